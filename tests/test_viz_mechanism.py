"""Pictures of the mechanism: cells, bars and curves show the numbers that were given."""

import pytest
import torch

pytest.importorskip("anywidget")
pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex, to_rgba
from matplotlib.patches import Polygon, Rectangle

from hsa_mini.viz import make_figure, mechanism, plots

TEXT = "the code is 7 birds sing at dawn what is the code"
WORDS = TEXT.split()
WEIGHTS = torch.tensor([0.75, 0.25, 0.0])
ATTENTION = torch.tensor([[0.0, 0.0, 0.1, 0.9], [0.25] * 4, [0.25] * 4])


def axes():
    return make_figure().subplots()


def colors(ax) -> list[str]:
    """Face colours of the cells, in the order in which they were drawn."""
    cells = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_fill()]
    return [to_hex(cell.get_facecolor()) for cell in cells]


def frame(ax) -> tuple[int, int]:
    """Row and column of the framed cell."""
    (found,) = (patch for patch in ax.patches if not patch.get_fill())
    assert found.get_edgecolor() == to_rgba(plots.RED)
    return int(found.get_y()), int(found.get_x())


def test_attention_grid_shades_kept_chunks_and_greys_incomplete_ones():
    ax = axes()
    mechanism.attention_grid(ax, WORDS, WEIGHTS, ATTENTION, token=9)
    assert [text.get_text() for text in ax.texts] == WORDS
    shown = colors(ax)
    assert shown[0] == "#ffffff" and len({shown[0], shown[2], shown[3]}) == 3
    assert shown[4] == shown[7] != "#ffffff"
    assert shown[8:] == [plots.PALE.lower()] * 4
    assert frame(ax) == (2, 1)


def test_attention_grid_leaves_a_chunk_that_is_not_kept_white():
    ax = axes()
    mechanism.attention_grid(ax, WORDS, [0.0, 1.0, 0.0], ATTENTION, token=11)
    assert colors(ax)[:4] == ["#ffffff"] * 4


def test_fusion_puts_a_bar_beside_each_chunk_and_the_largest_share_on_top():
    figure = make_figure()
    mechanism.fusion(figure, WORDS, WEIGHTS, ATTENTION, {"7": 0.7, "is": 0.1}, token=11)
    left, middle, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == WEIGHTS.tolist()
    assert left.get_ylim() == (2.5, -0.5) and middle.get_ylim() == (3, 0)
    assert [label.get_text() for label in right.get_yticklabels()] == ["7", "is"]


def test_hit_curves_draw_each_arm_and_the_blind_choice():
    ax = axes()
    fused = torch.linspace(0.1, 0.9, 81)
    mechanism.hit_curves(
        ax,
        {"fused": fused, "end to end": fused / 9},
        first_step=20,
        blind=0.125,
        blind_name="1 in 8",
    )
    first, second, blind = ax.lines
    assert first.get_xdata()[0] == 20 and first.get_xdata()[-1] == 100
    assert torch.equal(torch.from_numpy(first.get_ydata()), fused)
    assert second.get_ydata()[-1] == pytest.approx(0.1)
    assert list(blind.get_ydata()) == [0.125, 0.125]
    assert [text.get_text() for text in ax.texts] == ["fused", "end to end", "1 in 8"]


def test_distance_curves_draw_the_middle_the_band_and_no_positions():
    figure = make_figure()
    distances = torch.tensor([8.0, 1024.0, 2.0**24])
    rope = [torch.tensor([0.9, 0.5, 0.1]) + up for up in (0.0, 0.05, 0.1)]
    mechanism.distance_curves(figure, distances, rope, torch.ones(3), base=1e4, trained=1024)
    (ax,) = figure.axes
    middle, nope = ax.lines
    assert middle.get_ydata() == pytest.approx([0.95, 0.55, 0.15])
    assert list(nope.get_ydata()) == [1, 1, 1]
    entries = ax.get_legend_handles_labels()[1]
    assert "distances up to 1K, seen in training" in entries
    assert "RoPE, base 10,000: the middle" in entries


def test_token_strip_colours_the_window_and_retrieved_chunks_and_hides_other_words():
    ax = axes()
    words = [str(number) for number in range(32)]
    weights = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0]
    mechanism.token_strip(ax, words, weights, chunk_size=4, window=6)
    shown = colors(ax)
    assert shown[4:8] == [plots.ORANGE.lower()] * 4
    assert shown[26:] == [plots.SKY.lower()] * 6
    assert shown[:4] + shown[8:24] == [plots.PALE.lower()] * 20
    both = [patch for patch in ax.patches if isinstance(patch, Polygon)]
    assert len(both) == 2  # tokens 26 and 27: in the window, and in a chunk that is kept
    assert [text.get_text() for text in ax.texts] == [*words[4:8], *words[24:]]
    assert frame(ax) == (1, 15)


def test_window_and_retrieval_show_both_shares():
    figure = make_figure()
    mechanism.window_and_retrieval(
        figure, WORDS + WORDS[:4], [0, 0, 0, 1], [0.2, 0.9], chunk_size=4, window=2
    )
    bars = figure.axes[1].patches
    assert [bar.get_width() for bar in bars] == [0.2, 0.9]


def test_chunk_scores_mark_kept_chunks_the_needle_and_the_chunk_shown():
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0]).numpy()
    ax = axes()
    mechanism.chunk_scores(ax, scores, [1, 3], [3], title="HSA layer 0", shown=1)
    every, kept, needle, shown = (dots.get_offsets().tolist() for dots in ax.collections)
    assert every == [[0, 3], [1, 9], [2, 1], [3, 7]]
    assert kept == [[1, 9], [3, 7]] and needle == [[3, 7]] and shown == [[1, 9]]


def test_layers_of_scores_draw_one_axes_per_layer():
    scores = torch.tensor([[3.0, 9.0], [2.0, 1.0]]).numpy()
    figure = make_figure()
    mechanism.layers_of_scores(figure, [(scores[0], [1]), (scores[1], [0])], [1])
    assert [ax.get_title() for ax in figure.axes] == ["HSA layer 0", "HSA layer 1"]
    assert figure.axes[1].collections[1].get_offsets().tolist() == [[0, 2]]


def test_scores_and_text_print_the_chunk_as_it_is():
    scores = torch.tensor([3.0, 9.0]).numpy()
    figure = make_figure()
    mechanism.scores_and_text(
        figure, scores, [1], [1], title="HSA layer 1", shown=1, text="costs $5 and $6"
    )
    (text,) = figure.axes[1].texts
    assert text.get_text() == "costs $5 and $6" and not text.get_parse_math()


def test_page_shares_frame_the_right_chunk_and_say_its_share():
    figure = make_figure()
    shares = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.125, 0.375]])
    mechanism.page_shares(figure, {"one": shares, "two": shares.flip(0)}, torch.tensor([1, 0]))
    one, two = figure.axes
    assert one.images[0].get_array().tolist() == shares.tolist()
    assert [text.get_text() for text in one.texts] == ["0.75", "0.50"]
    assert [text.get_text() for text in two.texts] == ["0.12", "0.25"]
    corners = [frame.get_xy() for frame in one.patches]
    assert [(round(x + 0.47), round(y + 0.47)) for x, y in corners] == [(1, 0), (0, 1)]
