"""The pictures that several notebooks share. Each takes an Axes and arrays that are computed elsewhere.

Dimensions: T tokens, S chunk size, N chunks, K chunks kept. Arrays may be tensors. Colours are Okabe and Ito's, which
colour-blind readers can tell apart, and nothing is said by colour alone.
"""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hsa_mini.paths import write_whole

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
RED = "#D55E00"
INK = "#222222"
GREY = "#767676"
PALE = "#EDEDED"
HEAT = "cividis"


def chunk_grid(
    ax: Axes, tokens, chunk_size: int, *, token: int | None = None, weights=None
) -> None:
    """One row a chunk, one cell a token, as token number `token` sees them (as the last one does, if None).

    weights: N numbers, how much the token reads of each chunk; 0 for a chunk that it did not choose.
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
    """Scores [T, N] (-inf where a chunk is not visible) with tokens from left to right and chunks from top to bottom.

    indices [T, K]: the chunks kept (-1: empty slot), framed, or dotted where cells are small. `token`: the column to
    point at. tokens: T words.
    """
    scores = as_array(scores).astype(float)
    T, N = scores.shape
    shown = np.ma.masked_invalid(scores.T)
    ax.set_facecolor(PALE)
    small = T <= 40
    image = ax.imshow(
        shown,
        cmap=HEAT,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, T - 0.5, N - 0.5, -0.5),
    )
    ax.figure.colorbar(image, ax=ax, label="score", pad=0.01, fraction=0.04)
    if indices is not None:
        kept = [(t, int(i)) for t, row in enumerate(as_array(indices)) for i in row if i >= 0]
        if small:
            for t, i in kept:
                ax.add_patch(
                    Rectangle(
                        (t - 0.45, i - 0.45),
                        0.9,
                        0.9,
                        fill=False,
                        edgecolor=RED,
                        linewidth=3,
                        zorder=3,
                    )
                )
        elif kept:
            ax.scatter(*zip(*kept), s=4, color=RED, linewidths=0)
    if token is not None:
        ax.plot(
            token,
            1.04,
            marker="v",
            markersize=10,
            color=INK,
            clip_on=False,
            transform=ax.get_xaxis_transform(),
        )
        if not small:
            ax.axvline(token, color="white", linewidth=1.2)
    if small:
        for t in range(T):
            for i in range(N):
                _number(ax, t, i, scores[t, i], shown)
    _token_axis(ax, tokens, T)
    ax.set(ylabel="chunk", xlim=(-0.6, T - 0.4), ylim=(N - 0.4, -0.6))
    ax.yaxis.get_major_locator().set_params(integer=True)


def _number(ax: Axes, t: int, i: int, score: float, shown) -> None:
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
    """One horizontal bar a chunk (N numbers), the first on top, each with its number beside it, for at most 16."""
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
    _plain(ax)


def reach_map(ax: Axes, moved, *, tokens=None, token: int | None = None, title: str = "") -> None:
    """moved [T, T]: does the output of token t (row) move when token i (column) changes? Filled: yes; dot: no."""
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
    _plain(ax)


def cost_curves(
    ax: Axes, lengths, curves: dict, *, at: int | None = None, ylabel: str = ""
) -> None:
    """curves: name -> one cost per context length; both axes double at each step. `at`: a length to mark."""
    styles = ((RED, "-", "o"), (ORANGE, "--", "s"), (BLUE, "-.", "^"), (GREEN, ":", "D"))
    for (name, costs), (color, line, mark) in zip(curves.items(), styles):
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
    _plain(ax)


def roofline(ax: Axes, ceilings: dict, points: dict) -> None:
    """What a card can do at best, and where work stands: FLOP a second against FLOP for each byte moved.

    ceilings: flops_per_second and bytes_per_second. points: name -> (FLOP, bytes, milliseconds); without milliseconds
    (None) a hollow mark stands on the roof, where the ceilings would let it be.
    """
    flops = ceilings["flops_per_second"]
    moved = ceilings["bytes_per_second"]
    intensities = [flop / size for flop, size, _ in points.values()]
    ridge = flops / moved
    ends = np.array([min(*intensities, ridge) / 4, ridge, max(*intensities, ridge) * 4])
    ax.plot(ends, np.minimum(flops, ends * moved) / 1e12, color=INK, linewidth=2)
    ax.axvline(ridge, ymax=0.83, color=GREY, linewidth=1, linestyle=":", zorder=0)
    looks = ((RED, "o"), (ORANGE, "s"), (BLUE, "^"), (GREEN, "D"), (PURPLE, "v"), (SKY, "P"))
    rates = [
        min(flops, flop / size * moved) if ms is None else flop / ms * 1e3
        for flop, size, ms in points.values()
    ]
    for (name, (flop, size, ms)), rate, (color, mark) in zip(points.items(), rates, looks):
        look = dict(
            markersize=11,
            markerfacecolor="white" if ms is None else color,
            markeredgecolor=color,
            markeredgewidth=2,
        )
        ax.plot(flop / size, rate / 1e12, mark, label=name, **look)
    ax.text(
        ends[2],
        flops * 1.12 / 1e12,
        f"flat: multiplying, {flops / 1e12:.0f} TFLOP/s",
        ha="right",
        fontsize=10,
        color=INK,
    )
    low = ends[0] * moved / 1e12
    ax.text(
        ends[0] * 1.2,
        low,
        f"slope: memory, {moved / 1e12:.2f} TB/s",
        va="top",
        fontsize=10,
        color=INK,
    )
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
    _plain(ax)


def crossover(ax: Axes, rows: list[dict], *, title: str = "") -> None:
    """Milliseconds against tokens: HSA beside full attention, rows of one `op` with T, ms, cudnn_ms and fa2_ms (or None).

    A dotted line stands at the first measured length from which on HSA is faster.
    """
    rows = sorted(rows, key=lambda row: row["T"])
    for key, name, color, line, mark in (
        ("fa2_ms", "FlashAttention-2 (full)", ORANGE, "--", "s"),
        ("cudnn_ms", "cuDNN (full)", RED, "-.", "^"),
        ("ms", "HSA", BLUE, "-", "o"),
    ):
        measured = [row for row in rows if row[key] is not None]
        xs = [row["T"] for row in measured]
        ys = [row[key] for row in measured]
        ax.plot(
            xs, ys, color=color, linestyle=line, marker=mark, markersize=5, linewidth=2, label=name
        )
        slower = [row["T"] for row in measured if row["ms"] >= row[key]]
        faster = [T for T in xs if T > max(slower, default=0)]
        if key != "ms" and faster:
            ax.axvline(
                faster[0], ymax=0.72, color=color, linewidth=1.2, linestyle=":", zorder=0
            )  # the legend is above
            ax.text(
                faster[0],
                0.02,
                f" {length_name(faster[0])}",
                color=INK,
                fontsize=10,
                transform=ax.get_xaxis_transform(),
            )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    doubled = [row["T"] for row in rows if row["T"] & (row["T"] - 1) == 0][::2]
    ax.set_xticks(doubled, [length_name(T) for T in doubled])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda number, _: f"{number:g}")
    ax.set(xlabel="tokens", ylabel="milliseconds", title=title)
    ax.legend(frameon=False, fontsize=10, loc="upper left")
    _plain(ax)


def length_name(tokens: int) -> str:
    """4096 -> 4K, 16777216 -> 16M."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


def _token_axis(ax: Axes, tokens, T: int) -> None:
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
    ax.add_patch(
        Rectangle(
            (x, y),
            1,
            1,
            facecolor=face,
            edgecolor=edge,
            linewidth=width,
            zorder=3 if face == "none" else 1,
        )
    )


def _mix(weight: float) -> tuple[float, float, float]:
    """White at 0, blue at 1."""
    return tuple(1 - weight * (1 - part) for part in (0.0, 0x72 / 255, 0xB2 / 255))


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)


def as_array(values) -> np.ndarray:
    """A tensor or a list as a NumPy array, without its gradient."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def needle_strip(figure, scores, needle_chunks, retrieved_chunks, chunk_size: int) -> None:
    """Retrieval scores [layers, N] (-inf: not visible) over the whole haystack, one Axes a layer; needle and choice marked."""
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
        _plain(ax)
    axes[0].legend(frameon=False, fontsize=11, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("position in the haystack (tokens)")
    axes[-1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")


def save_needle_strip(path: Path, finding, title: str) -> None:
    """The retrieval scores of a `NeedleFinding` over the haystack as PNG; the file appears whole or not at all."""
    figure = Figure(figsize=(11, 2.4 * len(finding.scores) + 0.8), layout="constrained")
    needle_strip(
        figure, finding.scores, finding.needle_chunks, finding.retrieved_chunks, finding.chunk_size
    )
    figure.suptitle(title, fontsize=13, parse_math=False)
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG; the file appears whole or not at all."""
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_whole(path, image.getvalue())
