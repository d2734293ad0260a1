"""Pictures of training: the stages of a recipe one after the other, and what was measured from step to step."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from hsa_mini.viz.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, RED, SKY

LOOKS = ((BLUE, "-"), (RED, "--"), (ORANGE, "-."), (GREEN, ":"), (PURPLE, "-"))
FILLS = ((SKY, ""), (ORANGE, "//"), (PURPLE, ".."), (PALE, ""))


def timeline(
    ax: Axes, steps: Sequence[int], shares: dict[str, Sequence[float]], notes: Sequence[str]
) -> None:
    """One block a stage, as wide as its steps, filled by the shares of what it is made of; its note stands above it.

    shares: name -> one number from 0 to 1 for each stage, which together give 1.
    """
    ends = np.cumsum(steps)
    middles = ends - np.asarray(steps) / 2
    below = np.zeros(len(steps))
    for (name, parts), (color, hatch) in zip(shares.items(), FILLS):
        ax.bar(
            middles,
            parts,
            steps,
            below,
            color=color,
            hatch=hatch,
            edgecolor="white",
            linewidth=1.5,
            label=name,
        )
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
    ax.spines[["top", "right"]].set_visible(False)


def step_curves(
    ax: Axes,
    steps,
    curves: dict,
    *,
    ends: Sequence[int] = (),
    within: tuple[int, int] | None = None,
) -> None:
    """curves: name -> one number for each of `steps`; nan where nothing was measured.

    ends: of stages, marked and numbered if there are several. within: the first and the last step to show.
    """
    steps = np.asarray(steps)
    for (name, values), (color, line) in zip(curves.items(), LOOKS):
        seen = np.isfinite(values)
        if seen.any():
            ax.plot(
                steps[seen],
                np.asarray(values)[seen],
                color=color,
                linestyle=line,
                linewidth=2,
                label=name,
            )
    first, last = within or (0, max(steps, default=1))
    starts = [0, *ends[:-1]]
    for number, (start, end) in enumerate(zip(starts, ends), start=1):
        ax.axvline(end, color=GREY, linewidth=1, linestyle=":", zorder=0)
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
    ax.spines[["top", "right"]].set_visible(False)
