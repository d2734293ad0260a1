"""Pictures of what evaluation counted: by length and depth, by length beside the paper, controls, perplexity by context.

Every share stands beside its 95% Wilson interval; no number and no difference is told by colour alone.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hsa_mini.evaluation.results import LENGTHS, RetrievalRow
from hsa_mini.evaluation.statistics import by_length, wilson_interval
from hsa_mini.viz.plots import BLUE, GREY, HEAT, INK, ORANGE, PALE, RED, length_name

TITLES = {"s_niah": "S-NIAH", "mq_niah": "MQ-NIAH", "vt": "VT"}


def heat_map(
    ax: Axes, rows: Sequence[RetrievalRow], *, at: tuple[int, float] | None = None, brief: bool = False
) -> None:
    """Lengths from left to right, depths from top to bottom; a cell says how many were right, and the interval in percent.

    at: (tokens, depth) of a cell to frame. brief: neither intervals nor a colour bar, for several maps side by side.
    Length and depth that nobody asked for together stay grey, with a dash.
    """
    lengths = sorted({row.tokens for row in rows})
    depths = sorted({row.depth for row in rows})
    counts = np.zeros((2, len(depths), len(lengths)))  # right, asked
    for row in rows:
        counts[:, depths.index(row.depth), lengths.index(row.tokens)] += row.correct, row.samples
    shares = np.ma.masked_invalid(
        np.divide(counts[0], counts[1], out=np.full(counts.shape[1:], np.nan), where=counts[1] > 0)
    )
    ax.set_facecolor(PALE)
    image = ax.imshow(shares, cmap=HEAT, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for y, x in np.ndindex(shares.shape):
        right, asked = (int(count) for count in counts[:, y, x])
        text = (
            f"{right}/{asked}" if brief else f"{right} of {asked}\n{percent_interval(right, asked)}"
        )
        ink = INK if not asked or shares[y, x] > 0.5 else "white"
        ax.text(
            x,
            y,
            text if asked else "-",
            ha="center",
            va="center",
            fontsize=8,
            color=ink,
            linespacing=1.1,
        )
    if at is not None:
        corner = lengths.index(at[0]) - 0.5, depths.index(at[1]) - 0.5
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=3, zorder=3))
    ax.set_xticks(range(len(lengths)), [length_name(tokens) for tokens in lengths])
    ax.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    ax.set(xlabel="tokens", ylabel="depth")
    if not brief:
        ax.figure.colorbar(image, ax=ax, label="share right", pad=0.01, fraction=0.03)


def length_curves(
    ax: Axes, curves: dict[str, Sequence[RetrievalRow]], *, published: Sequence[tuple[float, float]] = ()
) -> None:
    """curves: name -> rows; share right at each length with its interval, the curves side by side.

    published: (lowest, highest) percent of the paper's 8B at `LENGTHS`.
    """
    looks = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (RED, "^", "-."))
    for i, ((name, rows), (color, mark, line)) in enumerate(zip(curves.items(), looks)):
        table = by_length(list(rows))
        shift = 1.06 ** (i - (len(curves) - 1) / 2)  # intervals must not hide each other
        shares = [100 * entry["accuracy"] for entry in table]
        below, above = (
            [100 * abs(entry[end] - entry["accuracy"]) for entry in table]
            for end in ("low", "high")
        )
        options = dict(
            color=color, marker=mark, linestyle=line, markersize=6, linewidth=1.5, capsize=4
        )
        ax.errorbar(
            [entry["tokens"] * shift for entry in table],
            shares,
            (below, above),
            label=name,
            **options,
        )
    if published:
        low, high = zip(*published)
        name = "paper's 8B (its Figure 4)"
        if low == high:
            ax.plot(
                LENGTHS, low, color=GREY, marker="D", fillstyle="none", linestyle=":", label=name
            )
        else:
            ax.fill_between(
                LENGTHS,
                low,
                high,
                facecolor=PALE,
                edgecolor=GREY,
                hatch="//",
                linewidth=0.8,
                label=name,
            )
    ax.set_xscale("log", base=2)
    shown = sorted(
        {row.tokens for rows in curves.values() for row in rows} | set(LENGTHS if published else ())
    )
    ax.set_xticks(shown, [length_name(tokens) for tokens in shown])
    ax.minorticks_off()
    ax.set(xlabel="tokens", ylabel="percent right", ylim=(-3, 106))
    ax.legend(frameon=False, fontsize=10, loc="best")
    ax.spines[["top", "right"]].set_visible(False)


def count_marks(ax: Axes, counts: dict[str, tuple[int, int]]) -> None:
    """counts: name -> (right, asked): a mark at the share with its interval, and the numbers beside it."""
    for y, (name, (right, asked)) in enumerate(counts.items()):
        low, high = wilson_interval(right, asked)
        ax.plot([100 * low, 100 * high], [y, y], color=BLUE, linewidth=2, marker="|", markersize=10)
        if asked:
            ax.plot(100 * right / asked, y, color=BLUE, marker="o", markersize=8)
        ax.text(
            105,
            y,
            f"{right} of {asked}   {percent_interval(right, asked)}",
            va="center",
            fontsize=10,
            color=INK,
        )
    ax.set(
        xlim=(-2, 102),
        ylim=(len(counts) - 0.4, -0.6),
        xlabel="percent right, with its 95% interval",
    )
    ax.set_yticks(range(len(counts)), counts)
    ax.spines[["top", "right"]].set_visible(False)


def context_curve(ax: Axes, lengths: Sequence[int], losses) -> None:
    """losses [stretches, lengths]: how far each stretch's loss is below that at the first length, and their mean in bold."""
    gains = np.asarray(losses)[:, :1] - np.asarray(losses)
    for i, gain in enumerate(gains):
        ax.plot(
            lengths, gain, color=GREY, linewidth=0.8, label=None if i else "one stretch of text"
        )
    ax.plot(lengths, gains.mean(axis=0), color=BLUE, linewidth=2.5, marker="o", label="their mean")
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [length_name(tokens) for tokens in lengths])
    ax.minorticks_off()
    ax.set(xlabel="tokens read", ylabel="nats gained a token")
    ax.legend(frameon=False, fontsize=10, loc="best")
    ax.spines[["top", "right"]].set_visible(False)


def percent_interval(right: int, asked: int) -> str:
    """The 95% interval in whole percent: 9 of 10 -> "60-98%"."""
    low, high = wilson_interval(right, asked)
    return f"{100 * low:.0f}-{100 * high:.0f}%"
