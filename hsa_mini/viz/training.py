"""Pictures of training: the stages of a recipe one after the other, and figures over the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hsa_mini.lab.capacity.law import Law, Point
from hsa_mini.lab.claims import NOT_RUN
from hsa_mini.lab.settled.curves import Ratio
from hsa_mini.viz.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    empty_picture,
    hide_frame,
)

LOOKS = ((BLUE, "-"), (RED, "--"), (ORANGE, "-."), (GREEN, ":"), (PURPLE, "-"))
FILLS = ((SKY, ""), (ORANGE, "//"), (PURPLE, ".."), (PALE, ""))
PARTS = ("text", "copy", "answer")  # of the loss; a log holds 0 where a batch had no such token


def timeline(
    ax: Axes, steps: Sequence[int], shares: dict[str, Sequence[float]], notes: Sequence[str]
) -> None:
    """One block per stage, as wide as its steps, filled by shares, with its note above.

    shares: name -> one number from 0 to 1 per stage. The shares of a stage add up to 1.
    """
    ends = np.cumsum(steps)
    middles = ends - np.asarray(steps) / 2
    below = np.zeros(len(steps))
    for (name, parts), (color, hatch) in zip(shares.items(), FILLS):
        look = dict(color=color, hatch=hatch, edgecolor="white", linewidth=1.5)
        ax.bar(middles, parts, steps, below, label=name, **look)
        below = below + parts
    for middle, note in zip(middles, notes):
        ax.text(
            middle, 1.03, note, ha="center", va="bottom", fontsize=9, color=INK, linespacing=1.15
        )
    ax.set(
        xlim=(0, ends[-1]),
        xticks=[0, *ends],
        xlabel="step",
        ylim=(0, 1),
        yticks=(0, 0.5, 1),
        ylabel="share of sequences",
    )
    hide_frame(ax)


def step_curves(
    ax: Axes,
    steps,
    curves: dict,
    *,
    ends: Sequence[int] = (),
    within: tuple[int, int] | None = None,
) -> None:
    """One line per name over the steps, with the ends of stages marked.

    curves: name -> one number for each of `steps`, nan where nothing was measured. ends: the last
    step of each stage; several stages are numbered. within: the first and the last step to show.
    """
    steps = np.asarray(steps)
    for (name, values), (color, line) in zip(curves.items(), LOOKS):
        seen = np.isfinite(values)
        if seen.any():
            look = dict(color=color, linestyle=line, linewidth=2)
            ax.plot(steps[seen], np.asarray(values)[seen], label=name, **look)
    first, last = within or (0, max(steps, default=1))
    for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends), start=1):
        _mark_end(ax, end)
        if len(ends) > 1 and start < last and end > first:
            middle = (max(start, first) + min(end, last)) / 2
            ax.text(
                middle,
                1.0,
                f"stage {number}",
                ha="center",
                va="bottom",
                fontsize=9,
                transform=ax.get_xaxis_transform(),
            )
    ax.set(xlabel="step", xlim=(first, last))
    ax.legend(frameon=False, fontsize=10)
    hide_frame(ax)


def loss_and_share(
    figure: Figure,
    steps,
    losses: dict,
    shares: dict,
    *,
    ends: Sequence[int],
    within: tuple[int, int],
    share: str = "share",
    top: float = 1.0,
) -> None:
    """Left, losses over the steps; right, shares named `share`, from 0 to `top` or to the largest.
    The rest is as in `step_curves`.
    """
    left, right = figure.subplots(1, 2)
    step_curves(left, steps, losses, ends=ends, within=within)
    step_curves(right, steps, shares, ends=ends, within=within)
    measured = [value for values in shares.values() for value in values if np.isfinite(value)]
    left.set(ylabel="loss of a batch", ylim=(0, None))
    right.set(ylabel=share, ylim=(0, 1.02 * max(top, *measured)))


def learning_curves(ax: Axes, runs: Mapping[str, Sequence[dict]], name: str) -> None:
    """One figure of the training steps in several runs: one line per seed, ends of stages marked.

    runs: arm -> its records in the laboratory's file. name: a figure such as "copy".
    """
    drawn = False
    for (arm, records), (color, line) in zip(runs.items(), LOOKS):
        for i, record in enumerate(records):
            steps, values = _measured(record["curve"], name)
            drawn = drawn or len(steps) > 0
            label = None if i else arm if steps else f"{arm}: not measured"
            ax.plot(steps, values, color=color, linestyle=line, linewidth=1.3, label=label)
    ax.set(xlabel="step", ylabel=f"loss of {name}" if name in PARTS else name.replace("_", " "))
    ax.xaxis.get_major_locator().set_params(integer=True)
    if drawn:
        some_record = next(record for records in runs.values() for record in records)
        stages = some_record["settings"]["recipe"]["stages"]
        for end in np.cumsum([stage["steps"] for stage in stages])[:-1]:
            _mark_end(ax, end)
        ax.legend(frameon=False, fontsize=10)
    else:
        empty_picture(ax, "nothing was measured" if any(runs.values()) else NOT_RUN)
    hide_frame(ax)


def ratio_curves(ax: Axes, curves: Mapping[str, Sequence[Ratio]]) -> None:
    """Perplexity over that of another arm against the tokens seen, with its 95% interval.

    curves: name -> the points of `lab.settled.curves.ratio_curve`. At 1 both arms are equal.
    """
    for (name, curve), (color, line) in zip(curves.items(), LOOKS):
        seen = [point.seen / 1e6 for point in curve]
        ratios = [point.ratio for point in curve]
        ax.plot(seen, ratios, color=color, linestyle=line, linewidth=2, marker="o", label=name)
        low = [point.low for point in curve]
        high = [point.high for point in curve]
        ax.fill_between(seen, low, high, color=color, alpha=0.15, linewidth=0)
    ax.axhline(1, color=GREY, linewidth=1, linestyle=":", zorder=0)
    ax.set(xlabel="million tokens seen", ylabel="ratio of perplexities")
    ax.legend(frameon=False, fontsize=10)
    hide_frame(ax)


def capacity(ax: Axes, points: Sequence[Point], law: Law) -> None:
    """The share of right answers against the needles in a chunk: marks are measured, lines are the
    law. One colour for each group of equal S, R, K and M, for the first five of them.
    """
    groups: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        groups.setdefault((point.S, point.R, point.K, point.M), []).append(point)
    for (sizes, group), (color, line) in zip(sorted(groups.items()), LOOKS):
        needles = np.array(sorted(point.n for point in group))
        share = [point.correct / point.samples for point in group]
        ax.plot([point.n for point in group], share, "o", color=color)
        between = np.geomspace(needles[0], needles[-1], 50)
        label = ", ".join(f"{name} {size}" for name, size in zip("SRKM", sizes))
        expected = [law.accuracy(n, *sizes) for n in between]
        ax.plot(between, expected, color=color, linestyle=line, linewidth=2, label=label)
    ax.set(xscale="log", xlabel="needles in a chunk", ylabel="share of right answers")
    ax.set_ylim(-0.03, 1.03)
    ax.legend(frameon=False, fontsize=10)
    hide_frame(ax)


def _mark_end(ax: Axes, step: float) -> None:
    """A dotted line at the end of a stage."""
    ax.axvline(step, color=GREY, linewidth=1, linestyle=":", zorder=0)


def _measured(curve: Mapping[str, Sequence], name: str) -> tuple[list, list]:
    """Steps and values of a curve, without the steps whose batch had no token of that part."""
    part = "answer" if name == "answer_accuracy" else name
    kept = [
        i
        for i, value in enumerate(curve[name])
        if value is not None and (part not in PARTS or curve[part][i])
    ]
    return [curve["step"][i] for i in kept], [curve[name][i] for i in kept]
