"""The pictures of chunks and tokens that several notebooks share.

Each takes an Axes and arrays that are computed elsewhere. Arrays may be tensors. The names of
`style` and `costs` can be imported from here too.

Dimensions: T tokens, S chunk size, N chunks, K chunks kept.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hsa_mini.viz.costs import cost_curves, crossover, roofline
from hsa_mini.viz.style import (
    BLUE,
    GREEN,
    GREY,
    HEAT,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    as_array,
    hide_frame,
    length_name,
    save_figure,
)

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "HEAT",
    "INK",
    "ORANGE",
    "PALE",
    "PURPLE",
    "RED",
    "SKY",
    "as_array",
    "chunk_grid",
    "cost_curves",
    "crossover",
    "length_name",
    "needle_strip",
    "reach_map",
    "roofline",
    "save_figure",
    "save_needle_strip",
    "score_map",
    "weight_bars",
]


def chunk_grid(
    ax: Axes, tokens, chunk_size: int, *, token: int | None = None, weights=None
) -> None:
    """One row per chunk, one cell per token, as seen by token number `token` (None: the last one).

    weights: N numbers, the weight of each chunk for this token; 0 for a chunk that was not chosen.
    """
    token = len(tokens) - 1 if token is None else token
    for position, word in enumerate(tokens):
        row, column = divmod(position, chunk_size)
        visible = (row + 1) * chunk_size <= token
        weight = 0.0 if weights is None or row >= len(weights) else float(weights[row])
        _cell(ax, column, row, face=_mix(weight) if visible else PALE, edge=GREY)
        color = "white" if visible and weight > 0.85 else INK if position <= token else GREY
        size = 12 if max(map(len, tokens)) * chunk_size <= 40 else 10
        ax.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=color, fontsize=size)
    rows = -(-len(tokens) // chunk_size)
    for row in range(rows):
        ax.text(-0.1, row + 0.5, f"chunk {row}", ha="right", va="center", fontsize=11, color=INK)
        note = _row_note(row, chunk_size, token, len(tokens), weights)
        ax.text(chunk_size + 0.1, row + 0.5, note, ha="left", va="center", fontsize=11, color=INK)
    row, column = divmod(token, chunk_size)
    _cell(ax, column, row, face="none", edge=RED, width=3)
    ax.set(xlim=(-0.16 * chunk_size - 0.3, chunk_size * 1.45 + 0.3), ylim=(rows + 0.05, -0.05))
    ax.set_axis_off()


def _row_note(row: int, chunk_size: int, token: int, tokens: int, weights) -> str:
    """What chunk number `row` is to the token."""
    if row * chunk_size > token:
        return "the future"
    if (row + 1) * chunk_size > tokens:
        return "incomplete: it waits"
    if (row + 1) * chunk_size > token:
        return "not complete before this token"
    if weights is None or row >= len(weights):
        return "complete: can be retrieved"
    return f"weight {float(weights[row]):.2f}" if weights[row] > 0 else "not chosen"


def score_map(ax: Axes, scores, indices=None, *, tokens=None, token: int | None = None) -> None:
    """Scores [T, N] (-inf where a chunk is not visible), one column per token, one row per chunk.

    indices [T, K]: the kept chunks (-1: empty slot). They have a frame, or a dot where cells are
    small. tokens: T words. token: the column to point at.
    """
    scores = as_array(scores).astype(float)
    T, N = scores.shape
    shown = np.ma.masked_invalid(scores.T)
    small = T <= 40
    ax.set_facecolor(PALE)
    image = ax.imshow(
        shown,
        cmap=HEAT,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, T - 0.5, N - 0.5, -0.5),
    )
    ax.figure.colorbar(image, ax=ax, label="score", pad=0.01, fraction=0.04)
    if indices is not None:
        _mark_kept(ax, as_array(indices), framed=small)
    if token is not None:
        _point_at(ax, token, line=not small)
    if small:
        for t in range(T):
            for i in range(N):
                _number(ax, t, i, scores[t, i], shown)
    _token_axis(ax, tokens, T)
    ax.set(ylabel="chunk", xlim=(-0.6, T - 0.4), ylim=(N - 0.4, -0.6))
    ax.yaxis.get_major_locator().set_params(integer=True)


def _mark_kept(ax: Axes, indices: np.ndarray, *, framed: bool) -> None:
    """A frame or a dot on each cell (token, kept chunk)."""
    kept = [(t, int(i)) for t, row in enumerate(indices) for i in row if i >= 0]
    if framed:
        look = dict(fill=False, edgecolor=RED, linewidth=3, zorder=3)
        for t, i in kept:
            ax.add_patch(Rectangle((t - 0.45, i - 0.45), 0.9, 0.9, **look))
    elif kept:
        ax.scatter(*zip(*kept), s=4, color=RED, linewidths=0)


def _point_at(ax: Axes, token: int, *, line: bool) -> None:
    """A triangle above the column of a token, and a white line through it."""
    above = ax.get_xaxis_transform()
    ax.plot(token, 1.04, marker="v", markersize=10, color=INK, clip_on=False, transform=above)
    if line:
        ax.axvline(token, color="white", linewidth=1.2)


def _number(ax: Axes, t: int, i: int, score: float, shown) -> None:
    """The score in its cell, in a readable colour; a cross for a chunk that is not visible."""
    if not np.isfinite(score):
        ax.text(t, i, "×", ha="center", va="center", color=GREY, fontsize=11)
        return
    middle = (shown.min() + shown.max()) / 2
    ax.text(
        t,
        i,
        f"{score:.1f}",
        ha="center",
        va="center",
        fontsize=9,
        color=INK if score > middle else "white",
    )


def weight_bars(ax: Axes, weights, labels=None, *, limit: float = 1.0, digits: int = 2) -> None:
    """One horizontal bar per chunk (N numbers), the first on top.

    Up to 16 bars have their numbers beside them.
    """
    weights = as_array(weights)
    place = np.arange(len(weights))
    ax.barh(place, weights, color=BLUE, height=0.7)
    if len(weights) <= 16:
        for y, weight in zip(place, weights):
            ax.text(
                weight + 0.02 * limit,
                y,
                f"{weight:.{digits}f}",
                va="center",
                fontsize=11,
                color=INK,
            )
        ax.tick_params(axis="y", length=0)
        ax.set_yticks(
            place, labels if labels is not None else [f"chunk {i}" for i in place], fontsize=11
        )
    ax.set(xlim=(0, limit * 1.22), ylim=(len(weights) - 0.4, -0.6), xlabel="weight")
    hide_frame(ax)


def reach_map(ax: Axes, moved, *, tokens=None, token: int | None = None, title: str = "") -> None:
    """Which tokens influence which: a filled cell means yes, a dot means no.

    moved bool [T, T]: whether the output of token t (row) changes when token i (column) is changed.
    """
    moved = as_array(moved)
    T = len(moved)
    pairs = [(t, i) for t in range(T) for i in range(t + 1)]
    for t, i in (pair for pair in pairs if moved[pair]):
        _cell(ax, i - 0.5, t - 0.5, face=RED if t == token else BLUE, edge="white", width=1)
    still = [pair for pair in pairs if not moved[pair]]
    colors = [RED if t == token else GREY for t, _ in still]
    ax.scatter([i for _, i in still], [t for t, _ in still], s=5, c=colors)
    _token_axis(ax, tokens, T)
    words = [f"{t}: {word}" for t, word in enumerate(tokens)] if tokens is not None else range(T)
    ax.set_yticks(range(T), words, fontsize=10)
    ax.set(
        xlim=(-0.6, T - 0.4),
        ylim=(T - 0.4, -0.6),
        xlabel="token that is changed",
        ylabel="token that looks",
    )
    ax.set_title(title, fontsize=11)
    hide_frame(ax)


def _token_axis(ax: Axes, tokens, T: int) -> None:
    """Ticks with the tokens' words, or only a label if there are no words."""
    if tokens is None:
        ax.set_xlabel("token")
    else:
        ax.set_xticks(
            range(T),
            [f"{t}: {word}" for t, word in enumerate(tokens)],
            rotation=45,
            ha="right",
            fontsize=10,
        )


def _cell(ax: Axes, x: float, y: float, *, face, edge, width: float = 1) -> None:
    """A square with this corner."""
    look = dict(facecolor=face, edgecolor=edge, linewidth=width)
    ax.add_patch(Rectangle((x, y), 1, 1, zorder=3 if face == "none" else 1, **look))


def _mix(weight: float) -> tuple[float, float, float]:
    """White at 0, blue at 1."""
    red, green, blue = (1 - weight * (1 - part) for part in (0.0, 0x72 / 255, 0xB2 / 255))
    return red, green, blue


def needle_strip(figure, scores, needle_chunks, retrieved_chunks, chunk_size: int) -> None:
    """Retrieval scores over the haystack, one Axes per layer; needle and kept chunks are marked.

    scores [layers, N]: -inf for a chunk that is not visible.
    """
    scores = as_array(scores)
    axes = figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0]
    place = (np.arange(scores.shape[1]) + 0.5) * chunk_size
    for layer, (ax, row, kept) in enumerate(zip(axes, scores, retrieved_chunks)):
        ax.scatter(place, row, s=3, color=GREY, linewidths=0, rasterized=True, label="every chunk")
        ax.scatter(
            place[kept],
            row[kept],
            s=60,
            facecolor="none",
            edgecolor=BLUE,
            linewidths=1.8,
            label="retrieved",
        )
        ax.scatter(
            place[needle_chunks],
            row[needle_chunks],
            s=90,
            marker="*",
            color=RED,
            zorder=3,
            label="holds the needle",
        )
        ax.set(ylabel=f"score, HSA layer {layer}", xlim=(0, scores.shape[1] * chunk_size))
        hide_frame(ax)
    axes[0].legend(frameon=False, fontsize=11, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("position in the haystack (tokens)")
    axes[-1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")


def save_needle_strip(path: Path, finding, title: str) -> None:
    """Save the retrieval scores of a finding of `find_needle` as PNG.

    The file appears whole or not at all.
    """
    figure = Figure(figsize=(11, 2.4 * len(finding.scores) + 0.8), layout="constrained")
    needle_strip(
        figure, finding.scores, finding.needle_chunks, finding.retrieved_chunks, finding.chunk_size
    )
    figure.suptitle(title, fontsize=13, parse_math=False)
    save_figure(path, figure)
