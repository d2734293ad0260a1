"""Pictures side by side: each panel shows the numbers that it is given."""

import re
from pathlib import Path

import pytest

pytest.importorskip("anywidget")
pytest.importorskip("matplotlib")

from hsa_mini import PRESETS
from hsa_mini.evaluation.results import RetrievalRow
from hsa_mini.lab.claims import NEAR, Measure, Spread
from hsa_mini.paths import data_dir
from hsa_mini.training.scale.plan import plans
from hsa_mini.training.scale.seconds import Measured
from hsa_mini.viz import make_figure, training
from hsa_mini.viz.course import scale, side_by_side
from hsa_mini.viz.live import LivePicture
from hsa_mini.viz.widgets import HERE

WORDS = ["the", "code", "is", "7"]


def words(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def titles(figure) -> list[str]:
    return [ax.get_title().strip() for ax in figure.axes]


def test_a_panel_of_bars_for_each_entry():
    figure = side_by_side.bars({"a": [0.25, 0.5], "b": [0.125, 0]}, ["x", "y"], limit=1, xlabel="s")
    assert titles(figure) == ["a", "b"]
    assert [[bar.get_width() for bar in ax.patches] for ax in figure.axes] == [
        [0.25, 0.5],
        [0.125, 0],
    ]


def test_bars_of_angles_are_degrees():
    figure = make_figure()
    side_by_side.angle_bars(figure.subplots(), [12.4, 0.0], ["mean", "encoder"])
    assert words(figure) == ["12", "0"]


def test_reach_and_weights_stand_side_by_side():
    moved = [[True, False], [True, True]]
    assert titles(side_by_side.reach_maps({"a": moved, "b": moved}, tokens=WORDS[:2], token=1)) == [
        "a",
        "b",
    ]
    figure = make_figure()
    moved = [[i <= t for i in range(4)] for t in range(4)]
    side_by_side.reach_and_chunks(figure, moved, [0.75, 0.25], WORDS, 2, token=3, title="window")
    assert titles(figure) == ["window", "what retrieval gives to token 3"]
    assert any("0.75" in text for text in words(figure))


def test_designs_and_bills_have_the_numbers_at_their_bars():
    figure = make_figure()
    side_by_side.designs(figure, {"full": (2e9, 0, 3e9, 0, 4e12), "HSA": (1e6, 5e6, 2e6, 0, 1e9)})
    assert [text for text in words(figure) if text][:2] == ["2.00 GB", "1.00 MB"]
    figure = make_figure()
    kept = dict(zip("abcde", (1e9, 2e9, 3e9, 4e9, 5e9)))
    side_by_side.bills(figure, kept, dict(zip("abcd", (1e9, 2e9, 3e9, 4e9))))
    assert len(words(figure)) == 9


def test_maps_and_curves_are_those_of_their_task():
    rows = [RetrievalRow(1024, 0.5, 10, 7, 9, 1024, 1), RetrievalRow(4096, 0.5, 10, 4, 9, 4096, 1)]
    figure = side_by_side.heat_maps({"mini": rows})
    assert titles(figure)[0] == "mini"
    assert {"7", "4"} <= {re.split(r"[/\n]", text)[0] for text in words(figure)}
    figure = side_by_side.curves_by_task({"s_niah": {"mini": rows}, "vt": {}})
    assert titles(figure) == ["S-NIAH", "VT (ours not measured)"]


def test_the_rule_and_ratios_mark_every_seed():
    figure = make_figure()
    by = Measure("s_niah", NEAR)
    side_by_side.rule(figure, Spread((0.9, 0.8, 1.0)), Spread((0.5, 0.7, 0.6)), by)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "A (should be better)",
        "B (should be worse)",
    ]
    spread = Spread((1.0, 1.5, 2.0))
    assert titles(side_by_side.ratios({"a": {"hsa": spread}, "b": {"hsa": None}})) == ["a", "b"]


def test_losses_are_left_and_shares_right_of_the_same_steps():
    figure = make_figure()
    losses, shares = {"text": [3.0, 2.0]}, {"right": [0.25, float("nan")]}
    training.loss_and_share(figure, [1, 9], losses, shares, ends=[9], within=(0, 9), top=0.5)
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [3.0, 2.0]
    assert list(right.lines[0].get_ydata()) == [0.25]
    assert right.get_ylim() == (0, 0.51)


def test_a_live_picture_follows_a_computation():
    seen = []
    LivePicture(lambda figure, value: seen.append(value) or "", alt="").follow(iter([1, 2]))
    assert seen == [1, 2]


def test_stored_pictures_and_widgets_turn_dark_alike():
    folder = Path(__file__).parent.parent / "notebooks" / ".jupyter" / "custom"
    pattern = r"filter: [^;]+;"
    stored = re.findall(pattern, (folder / "custom.css").read_text(encoding="utf-8"))
    assert stored == re.findall(
        pattern, (HERE / "jupyter" / "labels.js").read_text(encoding="utf-8")
    )
    assert len(stored) == 1


def test_the_panels_of_scale_show_the_plans():
    measured = Measured.read(data_dir() / "results")
    found = [plans(PRESETS["ul_8b_a1b"], 1 << 17, gpus, measured)[0] for gpus in (1, 2, 8)]
    figure = make_figure(11, 3.4)
    scale.scale_panels(figure, found, gpus=2, capacity=80e9)
    memory, received, efficiency = figure.axes
    tops = [stack.get_paths()[0].vertices[:, 1].max() for stack in memory.collections]
    assert tops[-1] == pytest.approx(max(plan.peak_bytes for plan in found) / 1e9)
    curves = {line.get_label(): line.get_ydata() for line in received.lines}
    weights = [sum(plan.received_bytes[k] for k in ("weights", "gradients")) for plan in found[1:]]
    assert curves["weights, gradients"][1:] == pytest.approx([size / 1e9 for size in weights])
    best, worst = (list(line.get_ydata()) for line in efficiency.lines[:2])
    assert best == [plan.efficiency for plan in found] and best[0] == worst[0] == 1
    assert all(low <= high for low, high in zip(worst, best))
    assert all(2 in ax.lines[-1].get_xdata() or 2 in ax.lines[-2].get_xdata() for ax in figure.axes)


def test_the_widget_of_scale_holds_the_plans_of_its_controls():
    measured = Measured.read(data_dir() / "results")

    def find(tokens):
        return [plans(PRESETS["ul_8b_a1b"], tokens, gpus, measured)[0] for gpus in (1, 8)]

    explorer = scale.explore_scale(find, place=1, tokens=[1 << 14, 1 << 17])
    explorer.controls["tokens"].value = 1 << 17
    data = explorer.picture.data
    assert data == scale.picture_of(find(1 << 17)) and data["gpus"] == [1, 8]
    assert [sum(column) for column in zip(*data["memory"].values())] == [
        plan.peak_bytes for plan in explorer.plans
    ]
    picture, line = explorer.still()
    assert picture.startswith(b"\x89PNG") and line == data["words"][1]
    assert line.startswith("8 GPUs, dp=8,cp=1,ep=1: 59 GB; 131,072 tokens a GPU and step; ")
    assert "which does not fit" in data["words"][0]
