"""Pictures of the laboratory's claims, with a mark for every seed.

They are drawn from the findings that `hsa_mini.lab.claims.judge` returns. Nothing is shown by
colour only: each role of an arm has its own mark. The pictures of single runs can be imported from
here too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hsa_mini.lab.claims import NOT_RUN, Measure, Spread, verdict
from hsa_mini.viz.results import TITLES, abilities
from hsa_mini.viz.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    perplexity_axis,
    perplexity_name,
)
from hsa_mini.viz.training import learning_curves

__all__ = [
    "BESIDE",
    "BETTER",
    "BOTH",
    "WORSE",
    "abilities",
    "board",
    "claim",
    "in_figures",
    "learning_curves",
    "means",
    "measure_axis",
    "measures_of",
    "ratio_rows",
    "role",
    "seed_rows",
    "title_of",
]

BETTER = "should be better"
WORSE = "should be worse"
BOTH = "should be both"  # in different comparisons of a claim
BESIDE = "for information only"
MARKS = {BETTER: (BLUE, "o"), WORSE: (ORANGE, "s"), BOTH: (PURPLE, "^"), BESIDE: (GREY, "D")}


# ---- in words


def title_of(measure: Measure) -> str:
    """s_niah at 64x -> S-NIAH at 64×."""
    return f"{TITLES.get(measure.what, measure.what)} at {measure.multiple}×"


def in_figures(measure: Measure, value: float) -> str:
    """A share in percent, a perplexity with three digits or more."""
    return perplexity_name(value) if measure.what == "perplexity" else f"{100 * value:.0f}%"


def role(finding, measure: Measure, arm: str) -> str:
    """What the claim expects of the arm by this measure."""
    by_measure = [c for c in finding.claim.comparisons if c.by == measure]
    better = arm in {c.better for c in by_measure}
    worse = arm in {c.worse for c in by_measure}
    if better and worse:
        return BOTH
    return BETTER if better else WORSE if worse else BESIDE


def measures_of(finding, brief: bool = False) -> list[Measure]:
    """All measures of a claim; brief: only those that decide."""
    deciding = {c.by for c in finding.claim.comparisons}
    return [measure for measure in finding.claim.measures if not brief or measure in deciding]


def means(finding) -> str:
    """Every mean of a finding, in words."""
    parts = []
    for measure, spreads in finding.numbers.items():
        known = {arm: in_figures(measure, spread.mean) for arm, spread in spreads.items()}
        shown = (f"{arm} {known.get(arm, NOT_RUN)}" for arm in finding.claim.arms)
        parts.append(f"{title_of(measure)}: {', '.join(shown)}.")
    return " ".join(parts)


# ---- rows of seeds


def seed_rows(
    ax: Axes,
    rows: Mapping[str, Spread | None],
    say: Callable[[float], str],
    roles: Sequence[str] | None = None,
) -> None:
    """One row per name: a mark for each seed, a bar at their mean, and the mean in words beside it.

    rows: name -> the values of the seeds, or None if the arm has not been run. say: puts a
    value into words. roles: one per row; it decides the mark.
    """
    in_axes = dict(va="center", fontsize=10, transform=ax.get_yaxis_transform())
    for y, (spread, kind) in enumerate(zip(rows.values(), roles or [BETTER] * len(rows))):
        if spread is None:
            ax.text(0.5, y, NOT_RUN, ha="center", color=GREY, **in_axes)
            continue
        _seeds(ax, y, spread, kind)
        ax.text(1.02, y, say(spread.mean), color=INK, **in_axes)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(len(rows) - 0.4, -0.6))
    ax.spines[["top", "right", "left"]].set_visible(False)
    for y in range(len(rows) - 1):
        ax.axhline(y + 0.5, color=GREY, linewidth=0.4, zorder=0)


def _seeds(ax: Axes, y: float, spread: Spread, kind: str, size: float = 6) -> None:
    """The seeds of one row and a bar at their mean.

    The marks have different heights, so equal values can be counted. Values that are not finite are
    counted in words.
    """
    color, mark = MARKS[kind]
    heights = y + np.linspace(-0.22, 0.22, len(spread.values))
    finite = [xy for xy in zip(spread.values, heights) if math.isfinite(xy[0])]
    xs, ys = zip(*finite) if finite else ((), ())
    ax.plot(xs, ys, mark, color=color, markersize=size, linestyle="none")
    if len(finite) < len(spread.values):
        words = f"{len(spread.values) - len(finite)} not finite"
        place = dict(ha="right", va="center", transform=ax.get_yaxis_transform())
        ax.text(0.99, y, words, fontsize=8, color=INK, **place)
    if math.isfinite(spread.mean):
        ax.plot([spread.mean] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=2)


def measure_axis(ax: Axes, measure: Measure) -> None:
    """The horizontal axis: shares from 0 to 100%, or perplexity on a logarithmic axis."""
    if measure.what != "perplexity":
        ax.set(xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
        return
    marks = [line for line in ax.lines if line.get_linestyle() == "None"]
    perplexity_axis(ax, [x for line in marks for x in np.asarray(line.get_xdata())])


def ratio_rows(ax: Axes, rows: Mapping[str, Spread | None]) -> None:
    """Ratios of perplexities: one row per name, a mark for each seed; a dotted line where equal."""
    seed_rows(ax, rows, lambda ratio: f"{ratio:,.3f}" if ratio < 100 else perplexity_name(ratio))
    values = [1.0, *(x for spread in rows.values() if spread for x in spread.values)]
    perplexity_axis(ax, [x for x in values if math.isfinite(x)])
    ax.axvline(1, color=RED, linewidth=1.2, linestyle=":", zorder=0)
    place = dict(ha="center", va="bottom", transform=ax.get_xaxis_transform())
    ax.text(1, 1.01, "equal", fontsize=9, color=RED, **place)


# ---- claims


def claim(figure: Figure, finding, *, brief: bool = False) -> str:
    """A panel per measure of a claim, a row per arm, a mark per seed; returns one line in words.

    brief: only the measures that decide, without the verdict above and the legend below.
    """
    measures = measures_of(finding, brief)
    arms = finding.claim.arms
    used = []
    if (engine := figure.get_layout_engine()) is not None:
        engine.set(w_pad=0.12)
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for ax, measure in zip(panels, measures):
        roles = [role(finding, measure, arm) for arm in arms]
        used += roles
        spreads = finding.numbers[measure]
        seed_rows(ax, {arm: spreads.get(arm) for arm in arms}, partial(in_figures, measure), roles)
        measure_axis(ax, measure)
        decides = any(kind != BESIDE for kind in roles)
        title = title_of(measure)
        if not brief:
            title += "\ndecides" if decides else f"\n{BESIDE}"
        ax.set_title(title, fontsize=11, color=INK if decides else GREY)
    if not brief:
        figure.suptitle(f"{finding.claim.name}: {finding.verdict}", fontsize=13)
        _legend(figure, used)
    return f"{finding.claim.name}, {finding.verdict}. {means(finding)}"


def board(figure: Figure, findings: Sequence) -> str:
    """All comparisons "better > worse", claim by claim, with every seed; returns all verdicts.

    A claim has its verdict beside its name. If it has several comparisons, each has its own too.
    """
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    labels = []
    heads = []  # rows with the name of a claim
    y = 0
    beside = dict(va="center", fontsize=8.5, color=INK, transform=right.get_yaxis_transform())
    for finding in findings:
        heads.append(y)
        labels.append(finding.claim.name)
        right.text(1.03, y, finding.verdict, fontweight="bold", **beside)
        for c in finding.claim.comparisons:
            y += 1
            spreads = finding.numbers[c.by]
            _comparison(right if c.by.what == "perplexity" else left, y, c, spreads)
            if len(finding.claim.comparisons) > 1:
                words = verdict(c.by, spreads.get(c.better), spreads.get(c.worse))
                right.text(1.03, y, words, **beside)
            labels.append(f"{c.better} > {c.worse}, {title_of(c.by)}")
        y += 1
    _board_axis(left, Measure("s_niah", 1), "share right", heads, y)
    _board_axis(right, Measure("perplexity", 1), "perplexity", heads, y)
    left.set_yticks(range(y), labels, fontsize=8.5)
    for head in heads:
        left.get_yticklabels()[head].set_fontweight("bold")
    _legend(figure, (BETTER, WORSE))
    return " ".join(f"{finding.claim.name}: {finding.verdict}." for finding in findings)


def _comparison(ax: Axes, y: float, comparison, spreads: Mapping[str, Spread]) -> None:
    """The seeds of both arms of a comparison in one row, if they have been run."""
    for arm, kind in ((comparison.better, BETTER), (comparison.worse, WORSE)):
        if arm in spreads:
            _seeds(ax, y, spreads[arm], kind, size=5)


def _board_axis(ax: Axes, measure: Measure, label: str, heads: Sequence[int], rows: int) -> None:
    """The axes of one column of the board, with a thin line above each claim."""
    measure_axis(ax, measure)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set(xlabel=label, ylim=(rows - 0.4, -0.8))
    for head in heads:
        ax.axhline(head - 0.5, color=GREY, linewidth=0.6, zorder=0)


def _legend(figure: Figure, roles: Iterable[str]) -> None:
    """The meaning of the marks, below the figure."""
    used = set(roles)
    handles = [
        Line2D([], [], color=color, marker=mark, linestyle="none", label=kind)
        for kind, (color, mark) in MARKS.items()
        if kind in used
    ]
    mean = dict(color=INK, marker="|", markersize=12, markeredgewidth=2)
    handles.append(Line2D([], [], linestyle="none", label="mean of the seeds", **mean))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=10)
