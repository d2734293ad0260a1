"""Pictures of the laboratory: claims with a mark for every seed, learning curves, what the runs of an arm can do by length.

Of `ClaimFinding`s and records as `hsa_mini.lab` makes them. Nothing is said by colour alone: every kind of arm has its own mark.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hsa_mini.lab.claims import NOT_RUN, ClaimFinding, Measure, Spread, verdict
from hsa_mini.viz.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED
from hsa_mini.viz.results import TITLES

BETTER = "should be better"
WORSE = "should be worse"
BOTH = "both, by turns"
BESIDE = "beside, has no say"
MARKS = {BETTER: (BLUE, "o"), WORSE: (ORANGE, "s"), BOTH: (PURPLE, "^"), BESIDE: (GREY, "D")}
PARTS = ("text", "copy", "answer")  # of the loss; 0 where a batch had none
TASK_LOOKS = {
    "s_niah": (BLUE, "o", "-"),
    "mq_niah": (ORANGE, "s", "--"),
    "vt": (RED, "^", "-."),
    "copy": (GREEN, "D", ":"),
}
ARM_LOOKS = ((BLUE, "-"), (RED, "--"), (ORANGE, "-."), (GREEN, ":"))


def title_of(measure: Measure) -> str:
    """s_niah at 64x -> S-NIAH at 64×."""
    return f"{TITLES.get(measure.what, measure.what)} at {measure.multiple}×"


def in_figures(measure: Measure, value: float) -> str:
    """A share in percent, a perplexity with three digits or more."""
    return _perplexity(value) if measure.what == "perplexity" else f"{100 * value:.0f}%"


def _perplexity(value: float) -> str:
    return (
        "not finite" if math.isinf(value) else f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"
    )


def role(finding: ClaimFinding, measure: Measure, arm: str) -> str:
    """What the claim expects of the arm by this measure."""
    by = [c for c in finding.claim.comparisons if c.by == measure]
    better, worse = (arm in {getattr(c, side) for c in by} for side in ("better", "worse"))
    return BOTH if better and worse else BETTER if better else WORSE if worse else BESIDE


def seed_rows(
    ax: Axes,
    rows: Mapping[str, Spread | None],
    say: Callable[[float], str],
    roles: Sequence[str] | None = None,
) -> None:
    """One row a name: a mark for every seed, a bar at their mean, and the mean beside it; None: not yet run."""
    for y, (spread, kind) in enumerate(zip(rows.values(), roles or [BETTER] * len(rows))):
        if spread is None:
            ax.text(
                0.5,
                y,
                NOT_RUN,
                ha="center",
                va="center",
                fontsize=10,
                color=GREY,
                transform=ax.get_yaxis_transform(),
            )
            continue
        _seeds(ax, y, spread, kind)
        ax.text(
            1.02,
            y,
            say(spread.mean),
            va="center",
            fontsize=10,
            color=INK,
            transform=ax.get_yaxis_transform(),
        )
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(axis="y", length=0)
    ax.set(ylim=(len(rows) - 0.4, -0.6))
    ax.spines[["top", "right", "left"]].set_visible(False)
    for y in range(len(rows) - 1):
        ax.axhline(y + 0.5, color=GREY, linewidth=0.4, zorder=0)


def _seeds(ax: Axes, y: float, spread: Spread, kind: str, size: float = 6) -> None:
    """The seeds of one row, one above the other, so that equal ones can be counted; what is not finite is counted in words."""
    color, mark = MARKS[kind]
    heights = y + np.linspace(-0.22, 0.22, len(spread.values))
    seen = [
        (value, height) for value, height in zip(spread.values, heights) if math.isfinite(value)
    ]
    ax.plot(*zip(*seen) if seen else ((), ()), mark, color=color, markersize=size, linestyle="none")
    if len(seen) < len(spread.values):
        words = f"{len(spread.values) - len(seen)} not finite"
        ax.text(
            0.99,
            y,
            words,
            ha="right",
            va="center",
            fontsize=8,
            color=INK,
            transform=ax.get_yaxis_transform(),
        )
    if math.isfinite(spread.mean):
        ax.plot([spread.mean] * 2, [y - 0.36, y + 0.36], color=INK, linewidth=2)


def measure_axis(ax: Axes, measure: Measure) -> None:
    """Shares from 0 to 100%; perplexity to the right of the least that was seen, the axis a logarithm."""
    if measure.what != "perplexity":
        ax.set(xlim=(-0.04, 1.04), xticks=(0, 0.5, 1))
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}%")
        return
    _log_axis(
        ax, [x for line in ax.lines if line.get_linestyle() == "None" for x in line.get_xdata()]
    )


def _log_axis(ax: Axes, seen: Sequence[float], which: str = "x") -> None:
    """A logarithmic axis around what was seen, with the least and the largest of it as ticks."""
    low, high = (min(seen), max(seen)) if seen else (10, 100)
    room = (1.1 * high / low) ** 0.1
    ends = [low, high] if high > 1.005 * low else [low]
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low / room, high * room)})
    ax.minorticks_off()
    getattr(ax, f"set_{which}ticks")(ends, list(map(_perplexity, ends)))


def ratio_rows(ax: Axes, rows: Mapping[str, Spread | None]) -> None:
    """Ratios of perplexities, one row a name, a mark for every seed; a dotted line where both are equal."""
    seed_rows(ax, rows, lambda ratio: f"{ratio:,.3f}" if ratio < 100 else _perplexity(ratio))
    _log_axis(
        ax,
        [
            x
            for x in (1.0, *(x for spread in rows.values() if spread for x in spread.values))
            if math.isfinite(x)
        ],
    )
    ax.axvline(1, color=RED, linewidth=1.2, linestyle=":", zorder=0)
    ax.text(
        1,
        1.01,
        "equal",
        ha="center",
        va="bottom",
        fontsize=9,
        color=RED,
        transform=ax.get_xaxis_transform(),
    )


def measures_of(finding: ClaimFinding, brief: bool = False) -> list[Measure]:
    """Those of a claim, or those alone that decide."""
    return [
        measure
        for measure in finding.claim.measures
        if not brief or measure in {c.by for c in finding.claim.comparisons}
    ]


def claim(figure: Figure, finding: ClaimFinding, *, brief: bool = False) -> str:
    """A panel for every measure of a claim, a row for every arm, a mark for every seed; returns what is seen in one line.

    brief: the measures that decide alone, without the verdict above and the meaning of the marks below.
    """
    measures = measures_of(finding, brief)
    arms = finding.claim.arms
    used = []
    figure.get_layout_engine().set(w_pad=0.12)
    for ax, measure in zip(
        figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures
    ):
        roles = [role(finding, measure, arm) for arm in arms]
        used += roles
        spreads = finding.numbers[measure]
        seed_rows(ax, {arm: spreads.get(arm) for arm in arms}, partial(in_figures, measure), roles)
        measure_axis(ax, measure)
        decides = any(kind != BESIDE for kind in roles)
        title = (
            title_of(measure)
            if brief
            else f"{title_of(measure)}\n{'decides' if decides else 'beside'}"
        )
        ax.set_title(title, fontsize=11, color=INK if decides else GREY)
    if not brief:
        figure.suptitle(f"{finding.claim.name}: {finding.verdict}", fontsize=13)
        _legend(figure, used)
    return f"{finding.claim.name}, {finding.verdict}. {means(finding)}"


def _legend(figure: Figure, roles: Iterable[str]) -> None:
    used = [(kind, *MARKS[kind]) for kind in MARKS if kind in set(roles)]
    handles = [
        Line2D([], [], color=color, marker=mark, linestyle="none", label=kind)
        for kind, color, mark in used
    ]
    mean = dict(color=INK, marker="|", markersize=12, markeredgewidth=2)
    handles.append(Line2D([], [], linestyle="none", label="mean of the seeds", **mean))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=10)


def means(finding: ClaimFinding) -> str:
    """Every mean of a finding, in words."""
    parts = []
    for measure, spreads in finding.numbers.items():
        said = {arm: in_figures(measure, spread.mean) for arm, spread in spreads.items()}
        shown = (f"{arm} {said.get(arm, NOT_RUN)}" for arm in finding.claim.arms)
        parts.append(f"{title_of(measure)}: {', '.join(shown)}.")
    return " ".join(parts)


def board(figure: Figure, findings: Sequence[ClaimFinding]) -> str:
    """All comparisons, "better > worse", claim by claim: every seed, and the verdict in words; returns all verdicts.

    A comparison that is not the only one of its claim has its own verdict beside it.
    """
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    labels = []
    heads = []
    y = 0
    beside = dict(va="center", fontsize=8.5, color=INK, transform=right.get_yaxis_transform())
    for finding in findings:
        heads.append(y)
        labels.append(finding.claim.name)
        right.text(1.03, y, finding.verdict, fontweight="bold", **beside)
        for c in finding.claim.comparisons:
            y += 1
            ax = right if c.by.what == "perplexity" else left
            spreads = finding.numbers[c.by]
            for arm, kind in ((c.better, BETTER), (c.worse, WORSE)):
                if arm in spreads:
                    _seeds(ax, y, spreads[arm], kind, size=5)
            if len(finding.claim.comparisons) > 1:
                right.text(
                    1.03, y, verdict(c.by, spreads.get(c.better), spreads.get(c.worse)), **beside
                )
            labels.append(f"{c.better} > {c.worse}, {title_of(c.by)}")
        y += 1
    for ax, measure, name in (
        (left, Measure("s_niah", 1), "share right"),
        (right, Measure("perplexity", 1), "perplexity"),
    ):
        measure_axis(ax, measure)
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set(xlabel=name, ylim=(y - 0.4, -0.8))
        for head in heads:
            ax.axhline(head - 0.5, color=GREY, linewidth=0.6, zorder=0)
    left.set_yticks(range(y), labels, fontsize=8.5)
    for head in heads:
        left.get_yticklabels()[head].set_fontweight("bold")
    _legend(figure, (BETTER, WORSE))
    return " ".join(f"{finding.claim.name}: {finding.verdict}." for finding in findings)


def learning_curves(ax: Axes, runs: Mapping[str, Sequence[dict]], name: str) -> None:
    """runs: arm -> records; figure `name` of a training step over the steps, one line a seed; the ends of stages are marked."""
    drawn = False
    for (arm, records), (color, line) in zip(runs.items(), ARM_LOOKS):
        for i, record in enumerate(records):
            steps, values = _measured(record["curve"], name)
            drawn = drawn or len(steps) > 0
            label = None if i else arm if steps else f"{arm}: not measured"
            ax.plot(steps, values, color=color, linestyle=line, linewidth=1.3, label=label)
    ax.set(xlabel="step", ylabel=f"loss of {name}" if name in PARTS else name.replace("_", " "))
    ax.xaxis.get_major_locator().set_params(integer=True)
    if drawn:
        stages = next(
            record["settings"]["recipe"]["stages"]
            for records in runs.values()
            for record in records
        )
        for end in np.cumsum([stage["steps"] for stage in stages])[:-1]:
            ax.axvline(end, color=GREY, linewidth=1, linestyle=":", zorder=0)
        ax.legend(frameon=False, fontsize=10)
    else:
        _nothing(ax, "nothing was measured" if any(runs.values()) else NOT_RUN)
    ax.spines[["top", "right"]].set_visible(False)


def _measured(curve: Mapping[str, Sequence], name: str) -> tuple[list, list]:
    """Steps and values, without the steps whose batch had no token of that part."""
    part = "answer" if name == "answer_accuracy" else name
    kept = [
        i
        for i, value in enumerate(curve[name])
        if value is not None and (part not in PARTS or curve[part][i])
    ]
    return [curve["step"][i] for i in kept], [curve[name][i] for i in kept]


def abilities(ax: Axes, records: Sequence[dict], names: Sequence[str]) -> None:
    """Share right (or, of "perplexity" alone, that) of one arm against the length: a mark for every seed, a line of the means.

    There is no mean where a perplexity is not finite.
    """
    for i, name in enumerate(names):
        color, mark, line = TASK_LOOKS.get(name, (BLUE, "o", "-"))
        key = "perplexity" if name == "perplexity" else "accuracy"
        shift = 1.07 ** (i - (len(names) - 1) / 2)
        rows = [
            [math.nan if row[key] is None else row[key] for row in record["found"][name]]
            for record in records
        ]
        lengths = [row["tokens"] for record in records[:1] for row in record["found"][name]]
        for row in rows:
            ax.plot(
                np.multiply(lengths, shift),
                row,
                mark,
                color=color,
                markersize=5,
                alpha=0.6,
                linestyle="none",
            )
        if rows:
            look = dict(
                color=color, linestyle=line, linewidth=2, marker=mark, label=TITLES.get(name, name)
            )
            ax.plot(np.multiply(lengths, shift), np.mean(rows, axis=0), **look)
            ax.set_xscale("log", base=2)
            ax.set_xticks(lengths, [f"{tokens // lengths[0]}×\n{tokens:,}" for tokens in lengths])
            ax.minorticks_off()
    if tuple(names) == ("perplexity",):
        _log_axis(ax, [y for line in ax.lines for y in line.get_ydata() if math.isfinite(y)], "y")
        ax.set_ylabel("perplexity")
    else:
        ax.set(ylabel="share right", ylim=(-0.04, 1.08), yticks=(0, 0.5, 1))
    if records:
        ax.legend(frameon=False, fontsize=10, loc="best")
    else:
        _nothing(ax, NOT_RUN)
    ax.set_xlabel("training lengths, tokens")
    ax.spines[["top", "right"]].set_visible(False)


def _nothing(ax: Axes, why: str) -> None:
    ax.text(
        0.5, 0.5, why, ha="center", va="center", fontsize=12, color=GREY, transform=ax.transAxes
    )
    ax.set(xticks=[], yticks=[])
