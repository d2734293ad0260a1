"""Pictures of evaluation: by length and depth, by length beside the paper, controls, perplexity.

Each share has its 95% Wilson interval beside it. No number and no difference is shown by colour
only.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hsa_mini.evaluation.results import LENGTHS
from hsa_mini.evaluation.statistics import by_length, wilson_interval
from hsa_mini.lab.claims import NOT_RUN
from hsa_mini.viz.style import (
    BLUE,
    GREEN,
    GREY,
    HEAT,
    INK,
    ORANGE,
    PALE,
    RED,
    empty_picture,
    hide_frame,
    length_axis,
    length_name,
    perplexity_axis,
)

TITLES = {"s_niah": "S-NIAH", "mq_niah": "MQ-NIAH", "vt": "VT"}
TASK_LOOKS = {
    "s_niah": (BLUE, "o", "-"),
    "mq_niah": (ORANGE, "s", "--"),
    "vt": (RED, "^", "-."),
    "copy": (GREEN, "D", ":"),
}
CURVE_LOOKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (RED, "^", "-."))


def heat_map(
    ax: Axes,
    rows: Sequence,
    *,
    at: tuple[int, float] | None = None,
    low: float | None = None,
    brief: bool = False,
) -> None:
    """Lengths from left to right, depths downwards. A cell has its counts and its interval.

    The colour is the lower end of the interval, so a right answer to each of two questions looks
    different from one to each of fifty. rows: `RetrievalRow`s of an evaluation. at: (tokens, depth)
    of a cell to frame. low: where the colours begin (by default just below the lowest cell); they
    end at 1. brief: omit the intervals and the colour bar, for several maps side by side. A cell
    that was not evaluated is grey, with a dash.
    """
    lengths = sorted({row.tokens for row in rows})
    depths = sorted({row.depth for row in rows})
    correct = np.zeros((len(depths), len(lengths)))
    asked = np.zeros((len(depths), len(lengths)))
    for row in rows:
        cell = depths.index(row.depth), lengths.index(row.tokens)
        correct[cell] += row.correct
        asked[cell] += row.samples
    proven = np.ma.masked_array(np.zeros(asked.shape), mask=asked == 0)
    for y, x in np.argwhere(asked):
        proven[y, x] = wilson_interval(int(correct[y, x]), int(asked[y, x]))[0]
    if low is None:
        low = max(math.floor(10 * proven.min() - 0.5) / 10, 0.0)
    ax.set_facecolor(PALE)
    image = ax.imshow(proven, cmap=HEAT, vmin=low, vmax=1, aspect="auto", interpolation="nearest")
    for y, x in np.ndindex(proven.shape):
        ink = INK if not asked[y, x] or proven[y, x] > (low + 1) / 2 else "white"
        text = _cell_text(int(correct[y, x]), int(asked[y, x]), brief)
        ax.text(x, y, text, ha="center", va="center", fontsize=8, color=ink, linespacing=1.1)
    if at is not None:
        corner = lengths.index(at[0]) - 0.5, depths.index(at[1]) - 0.5
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=3, zorder=3))
    ax.set_xticks(range(len(lengths)), [length_name(tokens) for tokens in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    ax.set(xlabel="tokens", ylabel="depth")
    if not brief:
        ax.figure.colorbar(image, ax=ax, label="lower end of the interval", pad=0.01, fraction=0.03)


def _cell_text(correct: int, asked: int, brief: bool) -> str:
    if not asked:
        return "-"
    if brief:
        return f"{correct}/{asked}"
    return f"{correct} of {asked}\n{percent_interval(correct, asked)}"


def length_curves(
    ax: Axes, curves: dict[str, Sequence], *, published: Sequence[tuple[float, float]] = ()
) -> None:
    """One curve per name: the share correct at each length, with its interval.

    curves: name -> rows of `hsa_mini.evaluation.results`. published: the lowest and the highest
    percentage of the paper's 8B model at each of `LENGTHS`.
    """
    for i, ((name, rows), look) in enumerate(zip(curves.items(), CURVE_LOOKS)):
        shift = 1.06 ** (i - (len(curves) - 1) / 2)  # intervals must not hide each other
        _curve_with_intervals(ax, by_length(list(rows)), shift, look, name)
    if published:
        _published_range(ax, published)
    lengths = {row.tokens for rows in curves.values() for row in rows}
    length_axis(ax, sorted(lengths | set(LENGTHS if published else ())))
    ax.set(xlabel="tokens", ylabel="percent right", ylim=(-3, 106))
    ax.legend(frameon=False, fontsize=10, loc="best")
    hide_frame(ax)


def _curve_with_intervals(ax: Axes, table: list[dict], shift: float, look, name: str) -> None:
    """table: one summary per length; shift: a factor on the lengths."""
    color, mark, line = look
    lengths = [entry["tokens"] * shift for entry in table]
    shares = [100 * entry["accuracy"] for entry in table]
    below = [100 * abs(entry["low"] - entry["accuracy"]) for entry in table]
    above = [100 * abs(entry["high"] - entry["accuracy"]) for entry in table]
    options = dict(color=color, marker=mark, linestyle=line, markersize=6, linewidth=1.5)
    ax.errorbar(lengths, shares, (below, above), label=name, capsize=4, **options)


def _published_range(ax: Axes, published: Sequence[tuple[float, float]]) -> None:
    """A band between the lowest and the highest number, or a line where they are equal."""
    low, high = zip(*published)
    name = "paper's 8B (its Figure 4)"
    if low == high:
        look = dict(color=GREY, marker="D", fillstyle="none", linestyle=":")
        ax.plot(LENGTHS, low, label=name, **look)
    else:
        look = dict(facecolor=PALE, edgecolor=GREY, hatch="//", linewidth=0.8)
        ax.fill_between(LENGTHS, low, high, label=name, **look)


def count_marks(ax: Axes, counts: dict[str, tuple[int, int]]) -> None:
    """A mark at each share with its interval, and the counts beside it.

    counts: name -> (correct, asked).
    """
    for y, (correct, asked) in enumerate(counts.values()):
        low, high = wilson_interval(correct, asked)
        ax.plot([100 * low, 100 * high], [y, y], color=BLUE, linewidth=2, marker="|", markersize=10)
        if asked:
            ax.plot(100 * correct / asked, y, color=BLUE, marker="o", markersize=8)
        text = f"{correct} of {asked}   {percent_interval(correct, asked)}"
        ax.text(105, y, text, va="center", fontsize=10, color=INK)
    ax.set(
        xlim=(-2, 102),
        ylim=(len(counts) - 0.4, -0.6),
        xlabel="percent right, with its 95% interval",
    )
    ax.set_yticks(range(len(counts)), counts)
    hide_frame(ax)


def context_curve(ax: Axes, lengths: Sequence[int], losses) -> None:
    """How far the loss falls below that at the first length: each text, and their mean in bold.

    losses [stretches, lengths], in nats per token.
    """
    gains = np.asarray(losses)[:, :1] - np.asarray(losses)
    for i, gain in enumerate(gains):
        label = None if i else "one stretch of text"
        ax.plot(lengths, gain, color=GREY, linewidth=0.8, label=label)
    ax.plot(lengths, gains.mean(axis=0), color=BLUE, linewidth=2.5, marker="o", label="their mean")
    ax.axhline(0, color=INK, linewidth=0.8)
    length_axis(ax, lengths)
    ax.set(xlabel="tokens read", ylabel="nats gained per token")
    ax.legend(frameon=False, fontsize=10, loc="best")
    hide_frame(ax)


def abilities(ax: Axes, records: Sequence[dict], names: Sequence[str]) -> None:
    """What one arm of the laboratory can do by length: a mark per seed, a line through their means.

    records: one per seed. names: tasks (the share correct is shown), or only "perplexity".
    There is no mean where a perplexity is not finite.
    """
    for i, name in enumerate(names):
        shift = 1.07 ** (i - (len(names) - 1) / 2)  # marks must not hide each other
        _seeds_by_length(ax, [record["found"][name] for record in records], name, shift)
    if tuple(names) == ("perplexity",):
        drawn = [y for line in ax.lines for y in np.asarray(line.get_ydata()) if math.isfinite(y)]
        perplexity_axis(ax, drawn, "y")
        ax.set_ylabel("perplexity")
    else:
        ax.set(ylabel="share right", ylim=(-0.04, 1.08), yticks=(0, 0.5, 1))
    if records:
        ax.legend(frameon=False, fontsize=10, loc="best")
    else:
        empty_picture(ax, NOT_RUN)
    ax.set_xlabel("training lengths, tokens")
    hide_frame(ax)


def _seeds_by_length(ax: Axes, tables: Sequence[list[dict]], name: str, shift: float) -> None:
    """tables: one per seed, with one row per length; shift: a factor on the lengths."""
    if not tables:
        return
    color, mark, line = TASK_LOOKS.get(name, (BLUE, "o", "-"))
    key = "perplexity" if name == "perplexity" else "accuracy"
    lengths = [row["tokens"] for row in tables[0]]
    x = np.multiply(lengths, shift)
    seeds = [[math.nan if row[key] is None else row[key] for row in table] for table in tables]
    for values in seeds:
        ax.plot(x, values, mark, color=color, markersize=5, alpha=0.6, linestyle="none")
    look = dict(color=color, linestyle=line, linewidth=2, marker=mark)
    ax.plot(x, np.mean(seeds, axis=0), label=TITLES.get(name, name), **look)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [f"{tokens // lengths[0]}×\n{tokens:,}" for tokens in lengths])
    ax.minorticks_off()


def percent_interval(correct: int, asked: int) -> str:
    """The 95% interval in whole percent: 9 of 10 -> "60-98%"."""
    low, high = wilson_interval(correct, asked)
    return f"{100 * low:.0f}-{100 * high:.0f}%"
