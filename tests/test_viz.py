"""Pictures and controls: each picture shows the given numbers, and an error is visible."""

import ast
import base64
import io
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import random

from hsa_mini.reference import retrieve

pytest.importorskip("anywidget")
pytest.importorskip("matplotlib")

import ipywidgets
from IPython.core.events import EventManager, available_events
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from hsa_mini.evaluation.results import RetrievalRow
from hsa_mini.evaluation.statistics import wilson_interval
from hsa_mini.lab.claims import (
    CLAIMS,
    DIFFERENT,
    FAR,
    NEAR,
    NOT_RUN,
    REPRODUCED,
    ClaimFinding,
    Measure,
    Spread,
)
from hsa_mini.viz import (
    Control,
    costs,
    explore,
    explore_map,
    kernels,
    laboratory,
    live,
    make_figure,
    mechanism,
    models,
    plots,
    results,
    show,
    stills,
    style,
    training,
    widgets,
)
from hsa_mini.viz.jupyter import turns

PNG = b"\x89PNG\r\n"
WORDS = ["the", "code", "is", "7", "birds", "sing", "at", "dawn", "what", "is", "the", "code"]


def draw_line(figure, token, how):
    if token == 3:
        raise RuntimeError("no three")
    figure.subplots().plot([0, token], [0, 1])
    return f"token {token}, {how}"


def line_explorer(**options):
    return explore(
        draw_line, alt="A line.", token=(0, 11), how=["softmax", "stick_breaking"], **options
    )


def axes():
    return make_figure().subplots()


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def line_of(explorer) -> str:
    return explorer.picture.frame["line"]


# ---- explore


def test_a_control_redraws_picture_and_summary():
    explorer = line_explorer()
    before = explorer.picture.frame
    explorer.controls["token"].value = 5
    frame = explorer.picture.frame
    assert frame["svg"].startswith("<svg") and frame["svg"] != before["svg"]
    assert frame["places"] == [5, 0] and frame["line"] == "token 5, softmax"
    explorer.controls["how"].value = "stick_breaking"
    assert line_of(explorer) == "token 5, stick_breaking"
    assert explorer.values == {"token": 5, "how": "stick_breaking"}


def test_one_figure_is_drawn_again_and_again():
    explorer = line_explorer()
    figure = explorer.figure
    for token in (1, 2, 4, 5):
        explorer.controls["token"].value = token
    assert explorer.figure is figure and len(figure.axes) == 1


def test_an_error_is_said_and_the_picture_stays():
    explorer = line_explorer()
    picture = explorer.picture.frame
    explorer.controls["token"].value = 3
    assert explorer.summary.value == "Could not draw token=3, how=softmax: RuntimeError: no three"
    assert explorer.picture.frame == picture
    explorer.controls["token"].value = 4
    assert line_of(explorer) == "token 4, softmax" and not explorer.summary.value


def asked_ahead(explorer, *places) -> dict:
    """What the browser receives when it asks for the drawing of these places of the controls."""
    said = []
    explorer.picture.send = said.append
    explorer.picture._handle_custom_msg({"places": list(places)}, [])
    return said[-1]


def test_the_browser_gets_drawings_ahead_and_the_picture_stays_as_it_is():
    explorer = line_explorer()
    still = explorer.still()
    said = asked_ahead(explorer, 5, 1)
    assert line_of(explorer) == "token 0, softmax" and explorer.still() == still
    explorer.controls["token"].value = 5
    explorer.controls["how"].value = "stick_breaking"
    assert said["frame"] == explorer.picture.frame and said["seconds"] > 0
    assert asked_ahead(explorer, 3, 0) == {"failed": [3, 0]}


def test_drawings_are_made_anew_after_a_cell_and_none_while_it_runs(monkeypatch):
    numbers = []

    def draw(figure, a):
        numbers.append(a)
        return str(len(numbers))

    explorer = explore(draw, alt="Nothing.", a=(0, 3))
    assert [asked_ahead(explorer, 0)["frame"]["line"] for _ in range(2)] == ["1", "1"]
    monkeypatch.setattr(turns.TURNS, "cells", turns.TURNS.cells + 1)
    assert asked_ahead(explorer, 0)["frame"]["line"] == "2"
    with turns.TURNS.lock:
        thread = threading.Thread(target=lambda: numbers.append(asked_ahead(explorer, 1)))
        thread.start()
        thread.join()
    assert numbers[-1] == {"busy": True}


def test_the_first_drawing_must_work():
    with pytest.raises(RuntimeError, match="no three"):
        explore(draw_line, alt="A line.", token=Control((0, 11), start=3), how=["softmax"])


def test_readers_without_a_kernel_get_picture_summary_and_alt():
    data, metadata = line_explorer()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]).startswith(PNG)
    assert data["text/plain"] == "A line. token 0, softmax"
    alt = "A line. token 0, softmax"
    assert metadata == {"image/png": {"alt": alt}, "needs_background": "light"}


def overlap_explorer(**options):
    """Its summary is the values, and how many drawings had begun and not ended: 1 in good order."""
    running = []

    def draw(figure, a, b):
        running.append(a)
        time.sleep(0.002)
        figure.subplots().plot([a, b])
        summary = f"{a} {b}, {len(running)} at once"
        running.pop()
        return summary

    return explore(draw, alt="Two numbers.", size=(1, 1), a=(0, 9), b=(0, 9), **options)


def move(explorer, name):
    for value in range(1, 10):
        explorer.controls[name].value = value


def test_two_threads_take_turns_and_the_latest_values_win(monkeypatch):
    monkeypatch.setattr(widgets, "PATIENCE_SECONDS", 60)
    explorer = overlap_explorer()
    summaries = []
    explorer.picture.observe(lambda change: summaries.append(change.new["line"]), "frame")
    threads = [threading.Thread(target=move, args=(explorer, name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert summaries[-1] == "9 9, 1 at once" == line_of(explorer)
    assert {summary[3:] for summary in summaries} == {", 1 at once"}
    assert len(explorer.figure.axes) == 1


def test_no_picture_is_drawn_while_a_cell_runs(monkeypatch):
    """What moves meanwhile says that the kernel is busy, and is drawn once when the cell ends."""

    class Shell:
        events = EventManager(None, available_events)

    monkeypatch.setattr(turns, "get_ipython", lambda: Shell)
    monkeypatch.setattr(widgets, "PATIENCE_SECONDS", 0.01)
    explorer = overlap_explorer()
    Shell.events.trigger("post_execute")  # the cell with the picture ends
    move(explorer, "a")
    assert line_of(explorer) == "9 0, 1 at once"
    Shell.events.trigger("pre_execute")
    thread = threading.Thread(target=move, args=(explorer, "b"))
    thread.start()
    thread.join(0.1)
    assert explorer.summary.value == widgets.BUSY and thread.is_alive()
    Shell.events.trigger("post_execute")
    thread.join()
    assert line_of(explorer) == "9 9, 1 at once" and not explorer.summary.value


@pytest.mark.parametrize(
    "offers, kind, values",
    [
        ((0, 11), ipywidgets.IntSlider, {"min": 0, "max": 11, "step": 1, "value": 0}),
        ((2, 12, 5), ipywidgets.IntSlider, {"min": 2, "max": 12, "step": 5, "value": 2}),
        ((0.5, 2.0), ipywidgets.FloatSlider, {"min": 0.5, "max": 2.0, "step": 0.1, "value": 0.5}),
        (["near", "far"], ipywidgets.Dropdown, {"options": ("near", "far"), "value": "near"}),
        ([1, 4, 16], ipywidgets.SelectionSlider, {"options": (1, 4, 16), "value": 1}),
        ([("4K", 4096), ("8K", 8192)], ipywidgets.SelectionSlider, {"value": 4096}),
        (bool, ipywidgets.Checkbox, {"value": False}),
    ],
)
def test_kinds_of_control(offers, kind, values):
    seen = []
    explorer = explore(
        lambda figure, some_size: seen.append(some_size) or "seen", alt="Nothing.", some_size=offers
    )
    control = explorer.controls["some_size"]
    assert type(control) is kind and control.description == "some size"
    assert {name: getattr(control, name) for name in values} == values
    assert seen == [values["value"]]


def test_start_and_label():
    explorer = explore(
        lambda figure, K: str(K), alt="Nothing.", K=Control((1, 9), start=4, label="chunks kept K")
    )
    assert (explorer.controls["K"].description, line_of(explorer)) == ("chunks kept K", "4")


def test_a_wrong_range_is_named():
    with pytest.raises(ValueError, match="token: got"):
        explore(lambda figure, token: "", alt="Nothing.", token=(1, 2, 3, 4))


# ---- explore_map


def compute(K):
    scores = random(6, 3).masked_fill(
        ~(torch.arange(1, 4) * 2 <= torch.arange(6)[:, None]), float("-inf")
    )
    best = scores.topk(K)
    indices = best.indices.masked_fill(best.values == float("-inf"), -1)
    return scores, indices, best.values.softmax(-1).nan_to_num(0.0)


def test_the_map_carries_the_numbers_bit_by_bit():
    explorer = explore_map(compute, alt="A map.", token=4, K=(1, 3))
    explorer.controls["K"].value = 2
    data = explorer.picture.data
    scores, indices, weights = compute(2)
    assert data["shape"] == [6, 3, 2]
    assert np.array_equal(
        np.frombuffer(data["scores"], "<f4").reshape(6, 3), scores.float().numpy()
    )
    assert np.array_equal(np.frombuffer(data["indices"], "<i4").reshape(6, 2), indices.numpy())
    assert np.array_equal(
        np.frombuffer(data["weights"], "<f4").reshape(6, 2), weights.float().numpy()
    )


def test_the_maps_still_picture_follows_the_token():
    explorer = explore_map(compute, alt="A map.", token=4, K=(1, 3))
    chunk = compute(1)[1][4, 0].item()
    data, metadata = explorer._repr_mimebundle_()
    assert data["text/plain"] == f"A map. Token 4 keeps chunk {chunk} with 1.00."
    assert metadata["image/png"]["alt"].startswith("A map. Token 4")
    explorer.picture.token = 0
    assert "keeps nothing" in explorer._repr_mimebundle_()[0]["text/plain"]


def test_an_error_of_the_map_is_seen():
    explorer = explore_map(compute, alt="A map.", K=(1, 5))
    explorer.controls["K"].value = 5  # there are only 3 chunks
    assert explorer.summary.value.startswith("Could not draw K=5: RuntimeError")


# ---- PNG


def test_png_has_few_colours_and_none_is_far_off():
    """A colour map beside pale tints: half the size or less, with no visible difference."""
    figure = make_figure(6, 3)
    left, right = figure.subplots(1, 2)
    plots.score_map(left, random(64, 20))
    plots.chunk_grid(right, WORDS, 4, weights=[0.04, 0.96, 0.0])
    small = widgets.to_png(figure)
    whole = io.BytesIO()
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    drawn.save(whole, format="png")
    assert len(small) < 0.5 * len(whole.getvalue())
    kept = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert np.abs(kept - np.asarray(drawn)).max() <= 8
    assert (kept[0, 0] == 255).all()


def test_64_colours_are_enough_for_marks_and_words():
    figure = make_figure(9, 5)
    laboratory.board(figure, [finding(claim) for claim in CLAIMS])
    usual = widgets.to_png(figure)
    small = widgets.to_png(figure, 64)
    assert len(small) < 0.85 * len(usual)
    drawn = np.asarray(
        Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    ).astype(int)
    assert np.abs(np.asarray(Image.open(io.BytesIO(small)).convert("RGB")) - drawn).max() <= 10


# ---- show, and what viz must not import


def test_show_displays_png_and_the_words_as_alt_and_caption(monkeypatch):
    displayed = []
    monkeypatch.setattr(
        widgets, "display", lambda data, **options: displayed.append((data, options))
    )
    words = " ".join(["An empty figure."] * 9)
    show(make_figure(2, 1), words)
    (data, options), (below, _) = displayed
    assert base64.b64decode(data["image/png"]).startswith(PNG) and list(data) == ["image/png"]
    assert options["metadata"]["image/png"]["alt"] == words and options["raw"]
    assert list(below) == ["text/plain"]
    assert below["text/plain"].count("\n") == 1 and " ".join(below["text/plain"].split()) == words


def test_an_ipynb_keeps_a_picture_and_its_caption_in_place_of_a_widget():
    data, metadata = line_explorer()._repr_mimebundle_()
    png = {"image/png": data["image/png"]}
    notebook = new_notebook(metadata={"widgets": {"state": 1}})
    notebook.cells = [
        new_markdown_cell("words"),
        new_code_cell(outputs=[new_output("display_data", dict(data), metadata=metadata)]),
        new_code_cell(outputs=[new_output("display_data", {stills.VIEW: {}, "text/plain": "x"})]),
    ]
    for _ in range(2):  # what was kept once is kept as it is
        stills.keep_stills(notebook)
        picture, below = notebook.cells[1].outputs
        assert picture.data == png and picture.metadata == metadata
        assert below.data == {"text/plain": "A line. token 0, softmax"}
        assert stills.VIEW in notebook.cells[2].outputs[0].data  # it has no picture
        assert "widgets" not in notebook.metadata


def test_pyplot_is_never_loaded():
    script = "import sys, hsa_mini.viz; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent).returncode
        == 0
    )


@pytest.mark.parametrize(
    "module",
    [
        costs,
        kernels,
        laboratory,
        live,
        mechanism,
        models,
        plots,
        results,
        stills,
        style,
        training,
        widgets,
    ],
    ids=lambda module: module.__name__,
)
def test_viz_computes_nothing_of_its_own(module):
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    low = tuple(
        f"hsa_mini.{package}"
        for package in ("model", "memory", "ops", "reference", "inference", "training")
    )
    assert not {name for name in imported if name.split(".")[0] == "torch" or name.startswith(low)}


# ---- plots


def test_chunk_grid_says_what_every_chunk_is_to_the_token():
    ax = axes()
    plots.chunk_grid(ax, [*WORDS, "is"], 4, token=9, weights=[0.75, 0.0, 0.0])
    shown = texts(ax)
    assert [word for word in shown if word in WORDS] == [*WORDS, "is"]
    assert shown[-7:-1:2] == ["weight 0.75", "not chosen", "not complete before this token"]
    assert shown[-1] == "the future"


def test_chunk_grid_of_the_last_token_shows_what_waits():
    ax = axes()
    plots.chunk_grid(ax, WORDS[:10], 4)
    assert texts(ax)[-1] == "incomplete: it waits"
    assert texts(ax)[-3] == texts(ax)[-5] == "complete: can be retrieved"


def test_score_map_frames_every_kept_chunk_and_crosses_the_unseen():
    queries = random(1, 12, 1, 5)
    landmarks = random(1, 3, 1, 5, seed=1)
    indices, _ = retrieve(queries, landmarks, chunk_size=4, top_k=1)
    scores = (queries[0, :, 0] @ landmarks[0, :, 0].T).masked_fill(
        ~(torch.arange(1, 4) * 4 <= torch.arange(12)[:, None]), float("-inf")
    )
    ax = axes()
    plots.score_map(ax, scores, indices[0, :, 0], tokens=WORDS, token=11)
    framed = {(round(patch.get_x() + 0.5), round(patch.get_y() + 0.5)) for patch in ax.patches}
    assert framed == {(t, i) for t, i in enumerate(indices[0, :, 0, 0].tolist()) if i >= 0}
    assert texts(ax).count("×") == int((scores == float("-inf")).sum())
    assert [label.get_text() for label in ax.get_xticklabels()][3] == "3: 7"


def test_score_map_of_a_long_text_dots_the_kept_chunks():
    ax = axes()
    indices = torch.full((100, 2), -1)
    indices[50] = torch.tensor([3, 1])
    plots.score_map(ax, random(100, 10), indices, token=50)
    assert ax.collections[0].get_offsets().tolist() == [[50, 3], [50, 1]]


def test_weight_bars_are_as_long_as_the_weights():
    ax = axes()
    plots.weight_bars(ax, torch.tensor([0.25, 0.75], requires_grad=True))
    assert [bar.get_width() for bar in ax.patches] == [0.25, 0.75]
    assert texts(ax) == ["0.25", "0.75"]


def test_reach_map_fills_what_moved():
    moved = torch.tensor([[True, False], [False, True]])
    ax = axes()
    plots.reach_map(ax, moved, tokens=["a", "b"], token=1)
    assert [patch.get_xy() for patch in ax.patches] == [(-0.5, -0.5), (0.5, 0.5)]
    assert ax.collections[0].get_offsets().tolist() == [[0, 1]]


def test_cost_curves_draw_the_given_costs():
    ax = axes()
    plots.cost_curves(ax, [1024, 2048, 4096], {"full": [1, 4, 16], "window": [1, 1, 1]}, at=2048)
    assert ax.lines[0].get_ydata().tolist() == [1, 4, 16]
    assert ax.lines[1].get_xydata().tolist() == [[2048, 4]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1K", "4K"]


CEILINGS = {"flops_per_second": 8e14, "bytes_per_second": 4e12}


def test_roofline_puts_work_where_it_was_measured_or_on_the_roof():
    ax = axes()
    plots.roofline(
        ax,
        CEILINGS,
        {"measured": (4e12, 1e11, 20.0), "slope": (1e12, 1e11, None), "flat": (1e15, 1e12, None)},
    )
    roof, _, measured, slope, flat = ax.lines
    assert measured.get_xydata().tolist() == [[40, 200]]  # FLOP per byte, TFLOP per second
    assert slope.get_xydata().tolist() == [[10, 40]] and flat.get_xydata().tolist() == [[1000, 800]]
    assert (measured.get_markerfacecolor(), slope.get_markerfacecolor()) == (plots.RED, "white")
    assert roof.get_xydata().tolist() == [[2.5, 10], [200, 800], [4000, 800]]
    assert texts(ax) == ["flat: multiplying, 800 TFLOP/s", "slope: memory, 4.00 TB/s"]


def test_crossover_draws_what_was_measured_and_says_from_where_on_hsa_is_faster():
    rows = [
        dict(T=T << 10, ms=ms, cudnn_ms=cudnn, fa2_ms=fa2)
        for T, ms, cudnn, fa2 in (
            (16, 4.0, 3.0, 5.0),
            (4, 1.0, 0.1, 0.2),
            (8, 2.0, 1.0, 2.5),
            (64, 16.0, None, None),
        )
    ]
    ax = axes()
    plots.crossover(ax, rows, title="forward", retrieval={8192: 0.5, 65536: 9.0, 1: 7.0})
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["HSA"] == [[4096, 1], [8192, 2], [16384, 4], [65536, 16]]
    assert lines["HSA and its retrieval"] == [[8192, 2.5], [65536, 25]]
    assert lines["cuDNN (full)"] == [[4096, 0.1], [8192, 1], [16384, 3]]
    assert texts(ax) == [" 8K"]  # of FlashAttention-2; cuDNN is faster at every length
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4K", "16K"]


@pytest.mark.parametrize(
    "tokens, name",
    [(512, "512"), (4096, "4K"), (1 << 20, "1M"), (3 << 19, "1.5M"), (16 << 20, "16M")],
)
def test_length_name(tokens, name):
    assert plots.length_name(tokens) == name


# ---- results


def row(tokens, depth, right, asked=10):
    return RetrievalRow(tokens, depth, asked, right, right, tokens, 1)


ROWS = [row(4096, 0.0, 10), row(4096, 1.0, 9), row(65536, 0.0, 3), row(65536, 0.0, 1)]


def test_every_cell_of_the_heat_map_has_its_count_and_its_interval():
    ax = axes()
    results.heat_map(ax, ROWS, at=(65536, 0.0))
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert cells == {
        (0, 0): "10 of 10\n72-100%",
        (0, 1): "9 of 10\n60-98%",
        (1, 0): "4 of 20\n8-42%",
        (1, 1): "-",
    }
    proven = ax.images[0].get_array()
    want = [wilson_interval(*counts)[0] for counts in ((10, 10), (9, 10), (4, 20))]
    assert [proven[0, 0], proven[1, 0], proven[0, 1]] == want and proven.mask[1, 1]
    assert ax.images[0].get_clim() == (0.0, 1)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["4K", "64K"]
    assert [patch.get_xy() for patch in ax.patches] == [(0.5, -0.5)]
    small = axes()
    results.heat_map(small, ROWS, brief=True)
    assert (
        texts(small) == ["10/10", "4/20", "9/10", "-"]
        and len(small.figure.axes) == len(ax.figure.axes) - 1
    )


def test_where_every_answer_is_right_the_colour_shows_how_many_were_asked():
    ax = axes()
    rows = [RetrievalRow(T, 0.5, n, n, n, T, 1) for T, n in ((4096, 50), (65536, 2))]
    results.heat_map(ax, rows)
    many, few = ax.images[0].get_array()[0]
    assert few < 0.4 < 0.9 < many and ax.images[0].get_clim() == (0.2, 1)
    results.heat_map(ax, rows[:1], low=0.5)
    assert ax.images[1].get_clim() == (0.5, 1)


def test_curves_stand_at_the_share_with_its_interval_and_beside_what_was_published():
    ax = axes()
    results.length_curves(ax, {"ours": ROWS}, published=[(100, 100)] * 6 + [(75, 75)])
    (bars,) = ax.containers
    assert bars.lines[0].get_xydata().tolist() == [[4096, 95], [65536, 20]]
    drawn = [segment[:, 1] / 100 for segment in bars.lines[2][0].get_segments()]
    assert np.allclose(drawn, [wilson_interval(19, 20), wilson_interval(4, 20)])
    (paper,) = [line for line in ax.lines if "paper" in line.get_label()]
    assert paper.get_xydata()[-1].tolist() == [1 << 24, 75]


def test_curves_of_several_names_do_not_hide_each_other_and_a_range_is_a_band():
    ax = axes()
    results.length_curves(ax, {"one": ROWS, "two": ROWS}, published=[(94, 100)] * 7)
    one, two = (bars.lines[0].get_xdata()[0] for bars in ax.containers)
    assert one < 4096 < two < 1.1 * one
    assert [band.get_label() for band in ax.collections if "paper" in str(band.get_label())]


def test_counts_are_marks_with_their_numbers():
    ax = axes()
    results.count_marks(ax, {"asked": (9, 10), "shuffled": (0, 70), "nobody": (0, 0)})
    assert texts(ax) == ["9 of 10   60-98%", "0 of 70   0-5%", "0 of 0   0-100%"]
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o"] == [
        [90.0],
        [0.0],
    ]


def test_the_context_curve_is_what_is_gained_over_the_first_length():
    ax = axes()
    results.context_curve(ax, [1024, 4096], [[3.0, 2.0], [5.0, 5.5]])
    assert [line.get_ydata().tolist() for line in ax.lines[:3]] == [[0, 1], [0, -0.5], [0, 0.25]]


# ---- laboratory

HIGH = Spread((0.9, 0.8, 1.0))
LOW = Spread((0.1, 0.3, 0.2))
MIDDLE = Spread((0.2, 0.2, 0.8))
NAMED = {claim.name: claim for claim in CLAIMS}
S_FAR = Measure("s_niah", FAR)
PERPLEXITY = Measure("perplexity", NEAR)


def finding(claim, verdict=REPRODUCED, numbers=None):
    """A finding with the same numbers for every measure; every arm is `HIGH` by default."""
    numbers = dict.fromkeys(claim.arms, HIGH) if numbers is None else numbers
    return ClaimFinding(claim, {measure: dict(numbers) for measure in claim.measures}, verdict)


def points(ax) -> list[tuple[float, float]]:
    """The positions of the marks of all seeds."""
    return [
        tuple(xy) for line in ax.lines if line.get_linestyle() == "None" for xy in line.get_xydata()
    ]


def test_every_seed_has_a_mark_in_the_row_of_its_arm_with_the_mean_beside():
    ax = axes()
    laboratory.seed_rows(ax, {"a": HIGH, "b": None, "c": Spread((0.5, 0.5, 0.5))}, "{:.2f}".format)
    rows = [[x for x, y in points(ax) if round(y) == row] for row in range(3)]
    assert rows == [[0.9, 0.8, 1.0], [], [0.5, 0.5, 0.5]]
    assert len({y for x, y in points(ax) if x == 0.5}) == 3  # equal values do not hide each other
    assert sorted(texts(ax)) == ["0.50", "0.90", NOT_RUN]
    bars = [
        line.get_xdata()[0]
        for line in ax.lines
        if line.get_linewidth() == 2 and line.get_linestyle() == "-"
    ]
    assert bars == [HIGH.mean, 0.5]


def test_what_is_not_finite_is_said():
    ax = axes()
    laboratory.seed_rows(
        ax,
        {"a": Spread((30.0, float("inf"), 31.0))},
        lambda x: laboratory.in_figures(PERPLEXITY, x),
    )
    laboratory.measure_axis(ax, PERPLEXITY)
    assert [x for x, _ in points(ax)] == [30, 31] and sorted(texts(ax)) == [
        "1 not finite",
        "not finite",
    ]


@pytest.mark.parametrize("measure, value, words", [
    (S_FAR, 0.906, "91%"), (PERPLEXITY, 9.5, "9.50"),
    (PERPLEXITY, 34.82, "34.8"), (PERPLEXITY, 41788.2, "41,788"),
])  # fmt: skip
def test_shares_are_in_percent_and_perplexities_in_three_digits(measure, value, words):
    assert laboratory.in_figures(measure, value) == words


def test_an_arm_is_marked_by_what_its_claim_expects_of_it():
    of = finding(NAMED["warm-up"])
    by = next(measure for measure in of.numbers if measure.what == "mq_niah")
    roles = {arm: laboratory.role(of, by, arm) for arm in of.claim.arms}
    assert roles == {
        "warmup_self_copy": laboratory.BETTER,
        "warmup_none": laboratory.WORSE,
        "warmup_short_window": laboratory.BOTH,
    }
    assert laboratory.role(of, PERPLEXITY, "warmup_none") == laboratory.BESIDE


def test_a_claim_has_a_panel_for_every_measure_and_says_what_is_missing():
    of = finding(NAMED["seesaw"], NOT_RUN, {"hsa": HIGH, "window_4x": LOW})
    figure = make_figure(10, 4)
    said = laboratory.claim(figure, of)
    assert [ax.get_title().split("\n")[1] for ax in figure.axes] == [
        "decides",
        laboratory.BESIDE,
        laboratory.BESIDE,
    ]
    assert figure.get_suptitle() == "seesaw: not yet run" and said.startswith(
        "seesaw, not yet run. S-NIAH at 64×: hsa 90%"
    )
    assert all(texts(ax).count(NOT_RUN) == 2 and len(points(ax)) == 6 for ax in figure.axes)
    brief = make_figure(5, 2)
    assert laboratory.claim(brief, of, brief=True) == said and [
        ax.get_title() for ax in brief.axes
    ] == ["S-NIAH at 64×"]


def test_the_board_has_every_comparison_with_its_seeds_and_every_verdict():
    seesaw = NAMED["seesaw"]
    norm = NAMED["QK norm"]
    both = [
        finding(seesaw, DIFFERENT, {"hsa": LOW, "window_8x": HIGH, "window_16x": MIDDLE}),
        finding(norm, NOT_RUN, {"hsa": HIGH}),
    ]
    figure = make_figure(9, 4)
    said = laboratory.board(figure, both)
    shares, perplexities = figure.axes
    labels = [label.get_text() for label in shares.get_yticklabels()]
    assert (
        labels[::3] == ["seesaw", "QK norm"] and labels[4] == "hsa > no_qk_norm, perplexity at 1×"
    )
    assert labels[1:3] == ["hsa > window_8x, S-NIAH at 64×", "hsa > window_16x, S-NIAH at 64×"]
    assert [sum(round(y) == row for _, y in points(shares)) for row in range(5)] == [0, 6, 6, 0, 0]
    assert [sum(round(y) == row for _, y in points(perplexities)) for row in range(5)] == [
        0,
        0,
        0,
        0,
        3,
    ]
    assert texts(perplexities) == [DIFFERENT, DIFFERENT, "not reproduced", NOT_RUN]
    assert said == f"seesaw: {DIFFERENT}. QK norm: {NOT_RUN}."


def test_ratios_stand_beside_a_line_at_one():
    ax = axes()
    laboratory.ratio_rows(ax, {"a": Spread((1.25, 1.5)), "b": None})
    assert [x for x, _ in points(ax)] == [1.25, 1.5] and texts(ax) == ["1.375", NOT_RUN, "equal"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1.00", "1.50"]


def lab_record(accuracies, copies):
    rows = [
        {"tokens": 512 * 4**i, "accuracy": x, "perplexity": None if x == 0 else 30 + i}
        for i, x in enumerate(accuracies)
    ]
    curve = {
        "step": [10, 20, 30],
        "copy": copies,
        "answer": [3.0, 0.0, 1.0],
        "answer_accuracy": [0.1, 0.0, 0.5],
    }
    stages = [{"steps": 10}, {"steps": 20}]
    return {
        "settings": {"recipe": {"stages": stages}},
        "curve": curve,
        "found": {"vt": rows, "perplexity": rows},
    }


def test_learning_curves_have_a_line_for_every_seed_without_what_was_not_measured():
    ax = axes()
    one, other, none = (
        lab_record([], copies) for copies in ([5.0, 0.0, 2.0], [4.0, 3.0, None], [0.0] * 3)
    )
    laboratory.learning_curves(ax, {"a": [one, other], "b": [none]}, "copy")
    first, second, _, end = ax.lines
    assert first.get_xydata().tolist() == [[10, 5], [30, 2]] and second.get_xydata().tolist() == [
        [10, 4],
        [20, 3],
    ]
    assert end.get_xdata()[0] == 10 and [text.get_text() for text in ax.get_legend().texts] == [
        "a",
        "b: not measured",
    ]
    share = axes()
    laboratory.learning_curves(share, {"a": [lab_record([], [0.0] * 3)]}, "answer_accuracy")
    assert share.lines[0].get_xydata().tolist() == [[10, 0.1], [30, 0.5]]


def test_a_curve_of_nothing_says_so():
    for runs, words in (
        ({"a": [lab_record([], [0.0] * 3)]}, "nothing was measured"),
        ({"a": []}, NOT_RUN),
    ):
        ax = axes()
        laboratory.learning_curves(ax, runs, "copy")
        assert texts(ax) == [words]


def test_abilities_are_the_mean_of_the_seeds_at_every_length():
    ax = axes()
    laboratory.abilities(ax, [lab_record([1.0, 0.5], []), lab_record([0.5, 0.0], [])], ["vt"])
    one, other, mean = ax.lines
    assert [line.get_ydata().tolist() for line in (one, other, mean)] == [
        [1, 0.5],
        [0.5, 0],
        [0.75, 0.25],
    ]
    assert (
        mean.get_xdata().tolist() == [512, 2048]
        and ax.get_xticklabels()[1].get_text() == "4×\n2,048"
    )
    text = axes()
    laboratory.abilities(text, [lab_record([1.0, 0.0], [])], ["perplexity"])
    assert text.lines[0].get_ydata()[0] == 30 and np.isnan(text.lines[1].get_ydata()[1])
    assert text.get_yscale() == "log" and [
        label.get_text() for label in text.get_yticklabels()
    ] == ["30.0"]
    empty = axes()
    laboratory.abilities(empty, [], ["vt"])
    assert texts(empty) == [NOT_RUN]


# ---- training


def test_a_timeline_has_a_column_for_every_stage_as_wide_as_its_steps_and_as_high_as_its_shares():
    ax = axes()
    training.timeline(ax, [10, 30], {"copy": [1.0, 0.25], "text": [0.0, 0.75]}, ["short", "long"])
    drawn = {
        (bar.get_x(), bar.get_width(), bar.get_y(), bar.get_height())
        for bars in ax.containers
        for bar in bars
    }
    assert drawn == {(0, 10, 0, 1), (10, 30, 0, 0.25), (0, 10, 1, 0), (10, 30, 0.25, 0.75)}
    assert [(text.get_position()[0], text.get_text()) for text in ax.texts] == [
        (5, "short"),
        (25, "long"),
    ]


def test_curves_leave_out_what_was_not_measured_and_number_the_stages_that_are_shown():
    ax = axes()
    curves = {"text": [3.0, 2.0, 1.0], "copy": [np.nan, 4.0, 1.0]}
    training.step_curves(ax, [5, 10, 20], curves, ends=(10, 20, 40), within=(0, 20))
    text, copy, *marks = ax.lines
    assert text.get_xydata().tolist() == [
        [5, 3],
        [10, 2],
        [20, 1],
    ] and copy.get_xydata().tolist() == [[10, 4], [20, 1]]
    assert [line.get_xdata()[0] for line in marks] == [10, 20, 40] and ax.get_xlim() == (0, 20)
    assert [(t.get_position()[0], t.get_text()) for t in ax.texts] == [
        (5, "stage 1"),
        (15, "stage 2"),
    ]


def test_a_live_picture_is_drawn_again_in_its_place(monkeypatch):
    shown = []
    figures = []

    class Place:
        def update(self, data, **options):
            shown.append(("update", data, options))

    def display(data, **options):
        shown.append(("display", data, options))
        return Place()

    monkeypatch.setattr(live, "display", display)

    def draw(figure, x):
        figures.append(figure)
        figure.subplots().plot(x)
        return f"{len(x)} seen."

    picture = live.LivePicture(draw, alt="A line.")
    for x in ([1], [1, 2], [1, 2, 3]):
        picture.paint(x)
    words = ["A line. 1 seen.", "A line. 2 seen.", "A line. 3 seen."]
    assert [how for how, *_ in shown] == ["display"] * 2 + ["update"] * 4
    assert all(options["display_id"] is True for *_, options in shown[:2])
    pictures, below = shown[::2], shown[1::2]
    assert [data for _, data, _ in below] == [{"text/plain": text} for text in words]
    assert [options["metadata"]["image/png"]["alt"] for *_, options in pictures] == words
    assert len({data["image/png"] for _, data, _ in pictures}) == 3 and len(
        set(map(id, figures))
    ) == 1 == len(picture.figure.axes)
