"""Pictures of the notebooks on the model and on training: what is drawn is what was given."""

import pytest
import torch

pytest.importorskip("anywidget")
pytest.importorskip("matplotlib")

from matplotlib.patches import Rectangle

from hsa_mini.viz import make_figure, models, plots

WORDS = "the code is 7 birds sing at dawn what is the code".split()


def axes():
    return make_figure().subplots()


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_gate_grid_has_a_cell_for_every_gate():
    ax = axes()
    chosen = torch.tensor([[1, 0], [2, 1]])
    gates = torch.tensor([[0.75, 0.25], [0.6, 0.4]], requires_grad=True)
    models.gate_grid(ax, chosen, gates, ["a", "b"], ["x", "y", "z"])
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {(0, 1): "0.75", (0, 0): "0.25", (1, 2): "0.60", (1, 1): "0.40"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["x", "y", "z"]


def test_load_bars_are_as_long_as_the_counts():
    ax = axes()
    models.load_bars(ax, torch.tensor([10, 12, 1, 1]), 6)
    assert [bar.get_width() for bar in ax.patches] == [10, 12, 1, 1]
    assert texts(ax) == ["10", "12", "1", "1"] and ax.lines[0].get_xdata()[0] == 6


def test_load_history_shows_every_run():
    figure = make_figure()
    load = torch.rand(5, 4).softmax(-1)
    curve = load.max(dim=-1).values
    models.load_history(figure, {"one": (load, curve, curve), "two": (load, curve, curve)})
    shown = [ax for ax in figure.axes if ax.get_images() and ax.get_title()]
    assert [ax.get_title() for ax in shown] == ["one", "two"]
    assert torch.equal(torch.as_tensor(shown[0].get_images()[0].get_array().data), load.T)
    assert figure.axes[2].lines[0].get_ydata().tolist() == curve.tolist()


def test_loads_before_and_after_stand_in_the_order_of_before():
    figure = make_figure()
    before = torch.tensor([0.1, 0.6, 0.3])
    after = torch.tensor([0.3, 0.4, 0.3])
    models.load_before_and_after(figure, before, after, torch.tensor([1.8, 1.2]), top_k=1)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([0.6, 0.3, 0.1, 0.4, 0.3, 0.3])
    assert figure.axes[1].lines[0].get_ydata().tolist() == pytest.approx([1.8, 1.2])


def test_expert_squares_colour_the_used_ones():
    ax = axes()
    used = torch.tensor([[True, False, False], [False, True, False]])
    models.expert_squares(ax, used)
    shared, coloured, pale = (points.get_offsets().tolist() for points in ax.collections)
    assert shared == [[0, 0], [0, 1]] and coloured == [[2, 0], [3, 1]] and len(pale) == 4


def test_parameter_bars_add_up():
    figure = make_figure()
    whole = {"embedding and head": 10**9, "lower MLPs and experts": 3 * 10**9, "HSA": 10**9}
    models.parameter_bars(figure, whole, {"HSA": 10**9})
    upper, lower = figure.axes
    labels = [label.get_text() for label in upper.get_yticklabels()]
    assert labels == ["all\n5.00 B", "of one token\n1.00 B"]
    assert sum(bar.get_width() for bar in lower.patches) == pytest.approx(1)


def test_log_bars_have_their_labels():
    ax = axes()
    models.log_bars(ax, {"a": 10.0, "b": 1e6}, ["ten", "many"], ["red", "blue"], (1, 1e7))
    assert [bar.get_width() for bar in ax.patches] == [10, 1e6] and texts(ax) == ["ten", "many"]
    assert ax.get_xscale() == "log" and ax.yaxis_inverted()


def test_copied_words_mark_token_source_chunk_and_window():
    figure = make_figure()
    passage = dict(token=14, source=3, window=4)
    models.copied_words(figure, WORDS + WORDS, chunk=range(4), **passage)
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    frames = [patch for patch in patches if not patch.get_fill()]
    colours = [patch.get_facecolor() for patch in patches if patch.get_fill()]
    assert len(frames) == 4 and len(colours) == 24
    assert colours[14] == colours[3] != colours[0] == colours[2] != colours[4]
    assert texts(figure.axes[0]) == WORDS + WORDS
    models.copied_words(unmarked := make_figure(), WORDS + WORDS, chunk=None, **passage)
    plain = [patch.get_facecolor() for patch in unmarked.axes[0].patches if patch.get_fill()]
    assert plain[0] == plain[4] != plain[3]


def test_recipe_timeline_marks_the_step_in_both_panels():
    figure = make_figure()
    models.recipe_timeline(figure, [2, 1], {"a": [1.0, 0.5], "b": [0, 0.5]}, ["", ""], [3, 2, 1], 1)
    top, bottom = figure.axes
    assert bottom.lines[0].get_ydata().tolist() == [3, 2, 1]
    marks = [ax.lines[-1] for ax in (top, bottom)]
    assert all(line.get_xdata()[0] == 1 and line.get_color() == plots.RED for line in marks)


def test_reach_curve_draws_the_given_chances():
    ax = axes()
    models.reach_curve(ax, [16, 32, 64], [1.0, 0.5, 0.1], {"stage 1": 32})
    assert ax.lines[0].get_ydata().tolist() == [1.0, 0.5, 0.1]
    assert ax.lines[1].get_xdata()[0] == 32 and texts(ax) == ["stage 1"]


def test_the_load_at_a_step_has_a_bar_for_each_expert():
    figure = make_figure()
    models.load_at_step(figure, {"uneven": [0.5, 0.5, 0, 0], "even": torch.full((4,), 0.25)})
    heights = [[bar.get_height() for bar in ax.patches] for ax in figure.axes]
    assert heights == [[0.5, 0.5, 0, 0], [0.25] * 4]
    assert [ax.get_title()[-4:] for ax in figure.axes] == ["2.00", "1.00"]
    assert figure.axes[0].lines[0].get_ydata() == [0.25, 0.25]
