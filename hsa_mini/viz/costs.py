"""Pictures of costs: by context length, below a card's ceilings, beside full attention."""

import numpy as np
from matplotlib.axes import Axes

from hsa_mini.viz.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    hide_frame,
    length_axis,
    length_name,
)


def cost_curves(
    ax: Axes, lengths, curves: dict, *, at: int | None = None, ylabel: str = ""
) -> None:
    """One line per name, with one cost per context length; the horizontal axis is in powers of two.

    curves: name -> costs, one per length. at: a length to mark.
    """
    looks = ((RED, "-", "o"), (ORANGE, "--", "s"), (BLUE, "-.", "^"), (GREEN, ":", "D"))
    for (name, costs), (color, line, mark) in zip(curves.items(), looks):
        ax.plot(
            lengths,
            costs,
            color=color,
            linestyle=line,
            marker=mark,
            markersize=5,
            linewidth=2,
            label=name,
        )
        if at is not None:
            ax.plot(
                at,
                costs[list(lengths).index(at)],
                marker=mark,
                markersize=12,
                color=color,
                markeredgecolor=INK,
            )
    if at is not None:
        ax.axvline(at, color=GREY, linewidth=1, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(lengths[::2], [length_name(length) for length in lengths[::2]], fontsize=11)
    ax.set(xlabel="context length (tokens)", ylabel=ylabel)
    ax.legend(frameon=False, fontsize=11)
    hide_frame(ax)


def roofline(ax: Axes, ceilings: dict, points: dict) -> None:
    """A card's highest rate at each intensity (FLOP per byte), and measured work below it.

    ceilings: flops_per_second and bytes_per_second. points: name -> (FLOP, bytes, milliseconds). A
    point without milliseconds (None) is a hollow mark on the roof: the most that the card allows.
    """
    flops = ceilings["flops_per_second"]
    bandwidth = ceilings["bytes_per_second"]
    intensities = [flop / size for flop, size, _ in points.values()]
    ridge = flops / bandwidth
    left = min(*intensities, ridge) / 4
    right = max(*intensities, ridge) * 4
    low = left * bandwidth / 1e12
    _roof(ax, np.array([left, ridge, right]), flops, bandwidth)
    rates = _points_below_roof(ax, points, flops, bandwidth)
    _roof_labels(ax, left, right, low, flops, bandwidth)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
    ax.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    lowest = min(low, *(rate / 1e12 for rate in rates))
    ax.set(
        xlabel="FLOP for each byte moved",
        ylabel="TFLOP a second",
        ylim=(lowest / 3, flops * 2 / 1e12),
    )
    ax.legend(facecolor="white", edgecolor="none", framealpha=1, fontsize=10, loc="lower right")
    hide_frame(ax)


def _roof(ax: Axes, corners: np.ndarray, flops: float, bandwidth: float) -> None:
    """A slope limited by memory, a flat part limited by multiplications, a dotted line between."""
    ax.plot(corners, np.minimum(flops, corners * bandwidth) / 1e12, color=INK, linewidth=2)
    ax.axvline(corners[1], ymax=0.83, color=GREY, linewidth=1, linestyle=":", zorder=0)


def _points_below_roof(ax: Axes, points: dict, flops: float, bandwidth: float) -> list[float]:
    """A mark for each point; returns their rates in FLOP per second."""
    rates = [
        min(flops, flop / size * bandwidth) if ms is None else flop / ms * 1e3
        for flop, size, ms in points.values()
    ]
    looks = ((RED, "o"), (ORANGE, "s"), (BLUE, "^"), (GREEN, "D"), (PURPLE, "v"), (SKY, "P"))
    for (name, (flop, size, ms)), rate, (color, mark) in zip(points.items(), rates, looks):
        look = dict(
            markersize=11,
            markerfacecolor="white" if ms is None else color,
            markeredgecolor=color,
            markeredgewidth=2,
        )
        ax.plot(flop / size, rate / 1e12, mark, label=name, **look)
    return rates


def _roof_labels(
    ax: Axes, left: float, right: float, low: float, flops: float, bandwidth: float
) -> None:
    ax.text(
        right,
        flops * 1.12 / 1e12,
        f"flat: multiplying, {flops / 1e12:.0f} TFLOP/s",
        ha="right",
        fontsize=10,
        color=INK,
    )
    ax.text(
        left * 1.2,
        low,
        f"slope: memory, {bandwidth / 1e12:.2f} TB/s",
        va="top",
        fontsize=10,
        color=INK,
    )


def crossover(
    ax: Axes, rows: list[dict], *, title: str = "", retrieval: dict[int, float] | None = None
) -> None:
    """Milliseconds against tokens: attention to chosen chunks beside full attention.

    rows: measurements of one operation, with the keys T, ms, cudnn_ms and fa2_ms (or None). HSA is
    faster at the length with a dotted line and at all longer ones. retrieval: milliseconds that
    choosing the chunks takes, by T; a curve shows both together.
    """
    rows = sorted(rows, key=lambda row: row["T"])
    if retrieval:
        whole = [
            (row["T"], row["ms"] + retrieval[row["T"]]) for row in rows if row["T"] in retrieval
        ]
        look = dict(color=INK, linestyle=":", marker="D", markersize=4, linewidth=1.5, zorder=3)
        ax.plot(*zip(*whole), label="HSA and its retrieval", **look)
    for key, name, color, line, mark in (
        ("fa2_ms", "FlashAttention-2 (full)", ORANGE, "--", "s"),
        ("cudnn_ms", "cuDNN (full)", RED, "-.", "^"),
        ("ms", "HSA", BLUE, "-", "o"),
    ):
        measured = [row for row in rows if row[key] is not None]
        lengths = [row["T"] for row in measured]
        times = [row[key] for row in measured]
        look = dict(color=color, linestyle=line, marker=mark, markersize=5, linewidth=2)
        ax.plot(lengths, times, label=name, **look)
        slower = [row["T"] for row in measured if row["ms"] >= row[key]]
        faster = [T for T in lengths if max(slower, default=0) < T]
        if key != "ms" and faster:
            _mark_length(ax, faster[0], color)
    powers_of_two = [row["T"] for row in rows if row["T"] & (row["T"] - 1) == 0]
    ax.set_yscale("log")
    length_axis(ax, powers_of_two[::2])
    ax.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    ax.set(xlabel="tokens", ylabel="milliseconds", title=title)
    ax.legend(frameon=False, fontsize=10, loc="upper left")
    hide_frame(ax)


def _mark_length(ax: Axes, tokens: int, color: str) -> None:
    """A dotted line at a length, below the legend, with the length beside it."""
    ax.axvline(tokens, ymax=0.72, color=color, linewidth=1.2, linestyle=":", zorder=0)
    ax.text(
        tokens,
        0.02,
        f" {length_name(tokens)}",
        color=INK,
        fontsize=10,
        transform=ax.get_xaxis_transform(),
    )
