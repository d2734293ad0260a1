"""The pictures of notebooks 06 to 09: what is drawn is what was given."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("anywidget")

from matplotlib.colors import to_hex

from hsa_mini.viz import kernels, make_figure
from hsa_mini.viz.plots import BLUE, ORANGE, PALE, RED, SKY

CHOICE = torch.tensor([[-1, -1], [0, -1], [1, 0]])  # [T, K]


@pytest.fixture
def ax():
    return make_figure().subplots()


def faces(ax) -> list[str]:
    return [to_hex(patch.get_facecolor()).upper() for patch in ax.patches if patch.get_fill()]


def frames(ax) -> list:
    return [patch for patch in ax.patches if not patch.get_fill()]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_job_table_tells_current_from_finished(ax):
    kernels.job_table(ax, CHOICE, 2, current={(2, 1), (2, 0)}, finished={(1, 0)})
    assert faces(ax) == [BLUE, ORANGE, ORANGE] and len(frames(ax)) == 2


def test_job_table_frames_the_token_of_a_program_without_cells(ax):
    kernels.job_table(ax, CHOICE, 2, current=[], finished=set(), token=1)
    assert faces(ax) == [PALE] * 3
    (frame,) = frames(ax)
    assert frame.get_x() == pytest.approx(0.52) and frame.get_height() == 2


def test_meter_bars_show_totals_and_used(ax):
    kernels.meter_bars(ax, {"one": 4.0, "two": 2.0}, {"two": 1.0}, title="bytes")
    assert [patch.get_width() for patch in ax.patches] == [4.0, 0, 2.0, 1.0]
    assert texts(ax) == [" 4", " 2"] and ax.get_title() == "bytes"


def test_learning_curves_take_tensors_with_gradients(ax):
    curve = torch.tensor([0.1, 0.5], requires_grad=True)
    kernels.learning_curves(ax, {"weight": curve}, ylabel="share", ylim=(0, 1))
    assert ax.lines[0].get_ydata() == pytest.approx([0.1, 0.5])


def test_choice_table_and_index_rows_mark_the_same_chunk(ax):
    kernels.choice_table(ax, CHOICE, 2, 0, words=["a", "b", "c"])
    assert faces(ax) == [ORANGE, PALE, ORANGE]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0: a", "1: b", "2: c"]
    rows = make_figure().subplots()
    kernels.index_rows(rows, [[1, 2], [2]], 0, segment=1)
    assert faces(rows) == [ORANGE, SKY, PALE] and texts(rows) == ["1", "2", "2"]


def test_score_stream_draws_the_last_score_first():
    figure = make_figure()
    ax = figure.subplots()
    log = [(1, 1, float("-inf")), (2, 1, 5.0)]  # the third score does not come in
    kernels.score_stream(ax, torch.tensor([1.0, 5.0, 3.0]), log)
    rejected, entered = (points.get_offsets().data.tolist() for points in ax.collections)
    assert entered == [[1.0, 3.0], [2.0, 5.0]] and rejected == []
    assert list(ax.lines[0].get_ydata()) == [float("-inf"), 5.0, 5.0]
    kernels.candidate_sawtooth(ax, log, 3, 2)
    assert list(ax.lines[1].get_ydata()) == [1, 1, 1]


def test_search_bars_number_the_bits(ax):
    kernels.search_bars(ax, [(8, 32), (3, 2)], 8)
    assert [patch.get_height() for patch in ax.patches] == [8, 3] and texts(ax) == ["32", "2"]


def test_tile_columns_ring_the_kept_chunks():
    ax = make_figure().subplots()
    kernels.tile_columns(ax, torch.arange(8.0), torch.tensor([7]), torch.tensor([3]), 2, 7.0)
    dots, rings = (points.get_offsets().data for points in ax.collections)
    assert len(dots) == 8 and rings.tolist() == [[7.0, 7.0]]
    (column,) = ax.patches
    assert (column.get_x(), column.get_width()) == (5.5, 2)


def test_paired_bars_stand_beside_each_other(ax):
    kernels.paired_bars(ax, [1024, 2048], {"kernel": [1.0, 20.0], "other": [3.0, 4.0]})
    assert [patch.get_height() for patch in ax.patches] == [1, 20, 3, 4]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1K tokens", "2K tokens"]


def test_memory_strip_frames_what_the_windows_hold():
    figure = make_figure()
    kernels.memory_strip(figure, list("abcdef"), 2, read=5, chunks=2, near=3)
    (ax,) = figure.axes
    assert faces(ax) == [SKY] * 4 + [ORANGE, PALE] and len(frames(ax)) == 3
    assert texts(ax) == list("abcdef")


def test_tail_errors_tell_exact_from_wrong(ax):
    kernels.tail_errors(ax, {1: 1e-2, 2: 0.0}, {"here": (1, 1e-3)})
    assert faces(ax) == [RED, BLUE] and texts(ax) == ["here"]


def test_reach_by_kind_puts_rows_down_and_columns_across(ax):
    moved = torch.tensor([[True, False], [False, False]])
    kernels.reach_by_kind(ax, {"near": moved, "far": moved.T.roll(1, 0)}, 1)
    assert [points.get_offsets().data.tolist() for points in ax.collections[:2]] == [
        [[0, 0]],
        [[0, 1]],
    ]


def test_computed_layers_end_at_the_last_token():
    figure = make_figure()
    names = ["lower 0", "chunks", "upper 0", "upper 1"]
    options = dict(chunk_size=4, chunks=2, retrieved={1}, tail=4, needed=[4, 1])
    kernels.computed_layers(figure, names, 9, **options)
    (ax,) = figure.axes
    blue = [patch for patch in ax.patches if to_hex(patch.get_facecolor()).upper() == BLUE]
    assert [patch.get_x() + patch.get_width() for patch in blue] == pytest.approx([9, 3.8, 9, 9])
    assert faces(ax).count(ORANGE) == 1


def test_design_bars_label_and_mark(ax):
    kernels.design_bars(
        ax, {"a": 1e9, "b": 0}, ["1 GB", ""], color=BLUE, limits=(1e5, 1e12), title="kept", mark=8e9
    )
    assert texts(ax) == ["1 GB", ""] and list(ax.lines[0].get_xdata()) == [8e9, 8e9]


def test_fetched_map_hides_chunks_that_nobody_read():
    figure = make_figure()
    kernels.fetched_map(figure, torch.tensor([0, 2, 1, 0]), columns=2)
    shown = figure.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[True, False], [False, True]]
    assert shown.compressed().tolist() == [2, 1]
