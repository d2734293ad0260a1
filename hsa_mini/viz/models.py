"""Pictures of the notebooks on the model and on training: experts, parameters, costs, copies.

Each function takes an Axes or a Figure and numbers that the notebook computed. Arrays may be
tensors. Nothing is told by colour alone.

Dimensions: E experts, A experts per token.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hsa_mini.viz.plots import BLUE, GREY, HEAT, INK, ORANGE, PALE, PURPLE, RED, SKY, as_array
from hsa_mini.viz.training import step_curves, timeline

PART_COLOURS = {
    "embedding and head": ORANGE,
    "window attention": SKY,
    "norms": GREY,
    "chunk encoder": PURPLE,
    "HSA": RED,
    "MLPs and experts": BLUE,
}
COPY_MARKS = [
    Patch(facecolor=ORANGE, label="the current token, and the word it must predict"),
    Patch(facecolor=SKY, label="a complete chunk that holds this word"),
    Patch(fill=False, edgecolor=RED, label="the window"),
]


# ---- Experts


def gate_grid(ax: Axes, chosen, gates, tokens: Sequence[str], experts: Sequence[str]) -> None:
    """The gates of all tokens as a grid: tokens from left to right, experts from top to bottom.

    chosen [M, A]: numbers of experts. gates [M, A]: from 0 to 1, printed in each cell.
    """
    for t, (numbers, values) in enumerate(zip(as_array(chosen), as_array(gates))):
        for e, gate in zip(numbers, values):
            corner = (t - 0.5, e - 0.5)
            ax.add_patch(Rectangle(corner, 1, 1, facecolor=BLUE, alpha=0.15 + 0.85 * float(gate)))
            ink = "white" if gate > 0.5 else INK
            ax.text(t, e, f"{gate:.2f}", ha="center", va="center", fontsize=10, color=ink)
    ax.set(xlim=(-0.5, len(tokens) - 0.5), ylim=(len(experts) - 0.5, -0.5))
    ax.set_xticks(range(len(tokens)), tokens, rotation=40, ha="right")
    ax.set_yticks(range(len(experts)), experts)


def load_bars(ax: Axes, counts, fair: float) -> None:
    """One horizontal bar per expert, as long as its count [E]; a dashed line at the fair share."""
    counts = as_array(counts)
    ax.bar_label(ax.barh(range(len(counts)), counts, color=ORANGE), padding=3)
    ax.axvline(fair, color=GREY, linestyle="--")
    ax.set(xlim=(0, 15), xticks=[])
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def load_history(figure: Figure, runs: Mapping[str, tuple]) -> None:
    """One column per run: the load of every expert at each step, and two curves below it.

    runs: name -> (load [steps, E], max over mean load [steps], similarity of tokens [steps]).
    """
    rows = figure.subplots(2, len(runs), sharex=True, sharey="row", height_ratios=(3, 2))
    for (top, bottom), (name, (load, max_over_mean, similarity)) in zip(rows.T, runs.items()):
        options = dict(aspect="auto", cmap=HEAT, vmin=0, vmax=0.5, interpolation="nearest")
        image = top.imshow(as_array(load).T, **options)
        top.set_title(name, fontsize=11)
        steps = range(len(load))
        bottom.plot(
            steps, as_array(max_over_mean), color=RED, linewidth=2, label="max / mean load (1 to 4)"
        )
        bottom.plot(
            steps,
            as_array(similarity),
            color=BLUE,
            linewidth=2,
            linestyle="--",
            label="similarity of the tokens (0 to 1)",
        )
        bottom.set(xlabel="step", ylim=(0, 4.3), yticks=range(5))
        _plain(bottom)
    rows[0, 0].set(ylabel="expert")
    figure.colorbar(image, ax=rows[0].tolist(), label="load", pad=0.01)
    handles = bottom.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10)


def load_at_step(figure: Figure, loads: Mapping[str, Sequence[float]]) -> None:
    """The load of every expert at one step of several runs: a panel per run, a bar per expert.

    loads: name -> load [E]. The dashed line is the mean load.
    """
    axes = figure.subplots(1, len(loads), sharey=True, squeeze=False)[0]
    for ax, (name, load) in zip(axes, loads.items()):
        load = as_array(load)
        ax.bar(range(len(load)), load, color=ORANGE)
        ax.axhline(1 / len(load), color=GREY, linestyle="--", linewidth=1)
        ax.set_title(f"{name}: max / mean load {load.max() * len(load):.2f}", fontsize=11)
        ax.set(xlabel="expert", ylim=(0, 0.55), xticks=range(len(load)))
        _plain(ax)
    axes[0].set_ylabel("load")


def load_before_and_after(figure: Figure, before, after, max_over_mean, top_k: int) -> None:
    """Left, the loads [E] before and after balancing as bars; right, max over mean load [steps]."""
    before = as_array(before)
    after = as_array(after)
    E = len(before)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    order = np.argsort(-before, kind="stable")
    bars = ((-0.2, before, ORANGE, "before"), (0.2, after, BLUE, "after"))
    for shift, load, colour, name in bars:
        left.bar(np.arange(E) + shift, load[order], 0.38, color=colour, label=name)
    left.axhline(1 / E, color=GREY, linestyle="--", linewidth=1)
    left.set(xlabel="experts, the busiest first", ylabel="load of all tokens", xticks=[])
    left.set_ylim(0, 1.05 / top_k + 0.03)
    left.legend(frameon=False)
    right.plot(as_array(max_over_mean), color=RED, linewidth=1.5)
    right.axhline(1, color=GREY, linestyle="--", linewidth=1)
    right.set(xlabel="step", ylabel="max / mean load in the step")
    right.set_ylim(0.8, max(E / top_k, 1.3) + 0.1)
    _plain(left, right)


def expert_squares(ax: Axes, used) -> None:
    """used [blocks, E]: one row of squares per block, coloured where an expert is used.

    The column on the left shows the shared expert, which every token uses.
    """
    used = as_array(used).astype(bool)
    blocks, E = used.shape
    squares = dict(s=34, marker="s", linewidths=0)
    ax.scatter(np.zeros(blocks), np.arange(blocks), color=ORANGE, **squares)
    for value, colour in ((True, BLUE), (False, PALE)):
        rows, columns = np.nonzero(used == value)
        ax.scatter(columns + 2, rows, color=colour, **squares)
    ax.set(xlim=(-1.5, E + 2), ylim=(blocks, -1))
    ax.set_xticks([0, E / 2 + 1], ["shared", f"{E} routed experts"])
    ax.set_yticks([0, blocks - 1], ["1", str(blocks)])
    ax.set_ylabel("block with experts")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


# ---- Parameters and costs


def parameter_bars(
    figure: Figure, whole: Mapping[str, int], of_one_token: Mapping[str, int]
) -> None:
    """All parameters, those that one token uses, and these a second time, enlarged.

    Both mappings: part -> number of parameters. A part has the colour whose name ends its own name.
    """
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
    total = _stacked(upper, whole, 0)
    used = _stacked(upper, of_one_token, 1)
    upper.set_yticks([0, 1], [f"all\n{total:.2f} B", f"of one token\n{used:.2f} B"])
    upper.set_ylim(1.5, -0.5)
    _stacked(lower, of_one_token, 0)
    lower.set_yticks([0], ["the same,\nenlarged"])
    lower.set_xlabel("billions of parameters")
    place = dict(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.legend(lower.containers, list(PART_COLOURS), **place)


def _stacked(ax: Axes, counts: Mapping[str, int], y: float) -> float:
    """One bar in billions of parameters, part by part; returns its length."""
    left = 0.0
    for part, colour in PART_COLOURS.items():
        size = sum(n for name, n in counts.items() if name.endswith(part)) / 1e9
        ax.barh(y, size, left=left, color=colour, edgecolor="white", linewidth=0.5, label=part)
        left += size
    ax.spines[["top", "right", "left"]].set_visible(False)
    return left


def log_bars(
    ax: Axes,
    values: Mapping[str, float],
    labels: Sequence[str],
    colours: Sequence[str],
    limits: tuple[float, float],
) -> None:
    """Horizontal bars over a logarithmic axis, the first on top, each with its label beside it."""
    bars = ax.barh(list(values), list(values.values()), color=colours, height=0.7)
    ax.bar_label(bars, labels, padding=3, fontsize=10)
    ax.set(xscale="log", xlim=limits)
    ax.invert_yaxis()
    ax.grid(axis="x", color=PALE)
    ax.set_axisbelow(True)
    _plain(ax)


# ---- Training


def copied_words(
    figure: Figure,
    words: Sequence[str],
    *,
    token: int,
    source: int,
    window: int,
    chunk: range | None,
) -> None:
    """A passage and its copy as two rows of twelve words, in chunks of four.

    token: the position of the current token. source: where the word that it must predict stood.
    chunk: the positions of the complete chunk that holds this word; None if no chunk does.
    """
    ax = figure.subplots()
    for i, word in enumerate(words):
        x = i % 12 + 0.4 * (i % 12 // 4)
        y = 1.3 * (i // 12)
        colour = ORANGE if i in (token, source) else SKY if chunk and i in chunk else PALE
        ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        ink = INK if i <= token else GREY
        ax.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=11, color=ink)
        if token - window < i <= token:
            frame = dict(fill=False, edgecolor=RED, linewidth=2.5)
            ax.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, **frame))
    ax.set(xlim=(0, 12.8), ylim=(2.3, 0), frame_on=False, xticks=[], yticks=[])
    place = dict(loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.legend(handles=COPY_MARKS, **place)


def recipe_timeline(
    figure: Figure,
    steps: Sequence[int],
    shares: Mapping[str, Sequence[float]],
    notes: Sequence[str],
    rates: Sequence[float],
    at: int,
) -> None:
    """The stages of a recipe above its learning rate, with a line at step `at`.

    steps, notes: one per stage. shares: name -> one share per stage. rates: one per step.
    """
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    timeline(top, steps, dict(shares), notes)
    step_curves(bottom, range(len(rates)), {"rate": rates}, within=(0, len(rates)))
    for ax in (top, bottom):
        ax.axvline(at, color=RED, linewidth=2)
    top.set_xlabel("")
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    bottom.legend([], frameon=False)
    bottom.set_ylabel("learning rate")


def reach_curve(
    ax: Axes, numbers: Sequence[int], chances: Sequence[float], marks: Mapping[str, int]
) -> None:
    """The chance that the right chunk is found, against the number of chunks to choose from.

    marks: note -> a number of chunks to mark by a line.
    """
    ax.plot(numbers, chances, color=BLUE, linewidth=2.5, marker="o")
    for note, number in marks.items():
        ax.axvline(number, color=RED, linestyle="--", linewidth=1.2)
        ax.text(number, 1.08, note, color=INK, fontsize=9, ha="center")
    ax.set_xscale("log", base=2)
    ax.set_xticks(numbers[::2], [f"{number:,}" for number in numbers[::2]], fontsize=9)
    ax.set(xlabel="chunks to choose from", ylabel="chance to be found", ylim=(-0.03, 1.05))
    _plain(ax)


def _plain(*several: Axes) -> None:
    """Remove the lines above and to the right."""
    for ax in several:
        ax.spines[["top", "right"]].set_visible(False)
