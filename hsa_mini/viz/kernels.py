"""The pictures of notebooks 06 to 09: kernels at work, streams of scores, and what a memory holds.

Each function takes an Axes (or a Figure) and arrays that are computed elsewhere. Arrays may be
tensors. The colours are those of `plots`.

Dimensions: T tokens, N chunks, K chunks kept, U upper blocks.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hsa_mini.viz.plots import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    as_array,
    length_name,
)
from hsa_mini.viz.style import hide_frame

PALE_BLUE = "#CFE3F1"
SEGMENT_COLORS = (ORANGE, SKY, GREEN, PURPLE)


def job_table(
    ax: Axes, indices, chunks: int, *, current, finished, token: int | None = None
) -> None:
    """One cell for each chunk that a token kept: indices [T, K].

    Tokens stand from left to right, chunks from top to bottom. current: the (token, chunk) pairs of
    the program at work, framed. finished: those of earlier programs, in blue. token: the column to
    frame if the program works on no cell.
    """
    rows = as_array(indices).tolist()
    for t, i in ((t, i) for t, row in enumerate(rows) for i in row if i >= 0):
        color = ORANGE if (t, i) in current else BLUE if (t, i) in finished else PALE
        ax.add_patch(Rectangle((t - 0.45, i - 0.45), 0.9, 0.9, facecolor=color))
    for t, i in current:
        _frame(ax, t - 0.48, i - 0.48, 0.96, 0.96, width=1.3)
    if token is not None:
        _frame(ax, token - 0.48, -0.5, 0.96, chunks)
    ax.set(xlim=(-0.7, len(rows)), ylim=(chunks - 0.4, -0.6), yticks=range(chunks))
    ax.set(xlabel="token", ylabel="chunk", frame_on=False)


def meter_bars(ax: Axes, totals: dict, used: dict, *, title: str = "") -> None:
    """name -> amount as horizontal bars: the total in pale, and the part in `used` in orange."""
    for y, (name, total) in enumerate(totals.items()):
        ax.barh(y, total, color=PALE, edgecolor=GREY)
        ax.barh(y, used.get(name, 0), color=ORANGE)
        ax.text(total, y, f" {total:.0f}", va="center", fontsize=10, color=INK)
    ax.set(yticks=range(len(totals)), yticklabels=totals, xticks=[])
    ax.set(ylim=(len(totals) - 0.4, -0.6), xlim=(0, 1.3 * max(totals.values())))
    ax.set_title(title, fontsize=11)
    hide_frame(ax, "bottom")


def learning_curves(ax: Axes, curves: dict, *, ylabel: str = "", ylim=None) -> None:
    """name -> one value per step."""
    for (name, curve), color, line in zip(curves.items(), (BLUE, RED, ORANGE), ("-", "--", "-.")):
        ax.plot(as_array(curve), color=color, linewidth=2.5, linestyle=line, label=name)
    ax.set(xlabel="steps taken", ylabel=ylabel, ylim=ylim)
    ax.legend(frameon=False, fontsize=10, loc="lower right")
    hide_frame(ax)


def choice_table(ax: Axes, indices, chunks: int, chunk: int, words=None) -> None:
    """The choice [T, K]: one row per token, one column per chunk. Column `chunk` is marked."""
    rows = as_array(indices).tolist()
    for t, i in ((t, i) for t, row in enumerate(rows) for i in row if i >= 0):
        color = ORANGE if i == chunk else PALE
        ax.add_patch(Rectangle((i - 0.42, t - 0.42), 0.84, 0.84, facecolor=color, edgecolor=GREY))
    _frame(ax, chunk - 0.5, -0.5, 1, len(rows))
    names = [f"{t}: {word}" for t, word in enumerate(words)] if words else range(len(rows))
    ax.set_yticks(range(len(rows)), names, fontsize=10 if words else 7)
    ax.set(xlim=(-0.6, chunks - 0.4), ylim=(len(rows) - 0.3, -0.7), xticks=range(chunks))
    ax.set_xlabel("chunk")
    ax.set_title("the chunks that each token chose", fontsize=11)
    ax.spines[:].set_visible(False)


def index_rows(ax: Axes, lists, chunk: int, segment: int) -> None:
    """The inverted index: one row per chunk, its tokens from left to right.

    Row `chunk` has one colour per segment.
    """
    for i, tokens in enumerate(lists):
        for x, token in enumerate(tokens):
            color = SEGMENT_COLORS[x // segment % len(SEGMENT_COLORS)] if i == chunk else PALE
            ax.add_patch(Rectangle((x, i - 0.4), 0.92, 0.8, facecolor=color, edgecolor=GREY))
            ax.text(x + 0.46, i, token, ha="center", va="center", fontsize=9, color=INK)
    longest = max(map(len, lists))
    ax.set(xlim=(-0.2, longest + 0.2), ylim=(len(lists) - 0.4, -0.6))
    ax.set(xticks=[], yticks=range(len(lists)), ylabel="chunk")
    ax.set_title("the tokens that chose each chunk", fontsize=11)
    ax.spines[:].set_visible(False)


def score_stream(ax: Axes, scores, log, shown: int = 2500) -> None:
    """Scores [N] in the order of reading (the last one first), with the floor as stairs.

    log: (chunks read, candidates, floor) for every chunk that came in. At most `shown` dots of each
    kind are drawn.
    """
    scores = as_array(scores)
    N = len(scores)
    entered = np.array([read for read, _, _ in log])
    sample = np.exp(np.random.default_rng(2).random(shown) * np.log(N)).astype(int).clip(1, N)
    rejected = np.setdiff1d(sample, entered)
    drawn = entered[np.linspace(0, len(entered) - 1, min(shown, len(entered))).astype(int)]
    ax.scatter(rejected, scores[N - rejected], s=4, color=GREY, linewidths=0, label="rejected")
    ax.scatter(drawn, scores[N - drawn], s=7, color=BLUE, linewidths=0, label="came in")
    floors = [floor for _, _, floor in log]
    stairs = dict(where="post", color=RED, linewidth=2, label="floor")
    ax.step([*entered, N], [*floors, floors[-1]], **stairs)
    ax.set_ylabel("score")
    ax.figure.legend(frameon=False, fontsize=10, ncols=3, loc="outside upper center")
    hide_frame(ax)


def candidate_sawtooth(ax: Axes, log, N: int, K: int) -> None:
    """How many candidates the buffer holds after each chunk that came in. Dashed line: K."""
    counts = [count for _, count, _ in log]
    reads = [read for read, _, _ in log]
    ax.step([*reads, N], [*counts, counts[-1]], where="post", color=INK)
    ax.axhline(K, color=GREY, linestyle="--", linewidth=1)
    ax.set(xscale="log", xlim=(1, N), ylim=(0, 4.3 * K), xlabel="chunks read", ylabel="candidates")
    hide_frame(ax)


def search_bars(ax: Axes, steps, candidates: int, most: int = 21) -> None:
    """steps: (candidates in question, bits left of the range) after 0, 1, 2, ... steps.

    most: the largest number of steps that the axis shows.
    """
    ax.bar(range(len(steps)), [count for count, _ in steps], color=BLUE)
    for step, (count, bits) in enumerate(steps):
        ax.text(step, count + 0.012 * candidates, bits, ha="center", fontsize=10, color=INK)
    ax.set(xlabel="steps", ylabel="candidates in question", ylim=(0, 1.1 * candidates))
    ax.set(xlim=(-0.6, most + 0.6), xticks=range(0, most + 1, 3))
    hide_frame(ax)


def tile_columns(ax: Axes, scores, kept, tiles, tile: int, threshold: float) -> None:
    """Scores [N] as dots, chosen tiles as columns, kept chunks in rings. Line: the threshold."""
    scores = as_array(scores)
    kept = as_array(kept)
    for number, i in enumerate(as_array(tiles).tolist()):
        label = None if number else "chosen tile"
        left = i * tile - 0.5
        ax.axvspan(left, left + tile, color=ORANGE, alpha=0.3, linewidth=0, label=label)
    ax.axhline(threshold, color=RED, linewidth=1.5, label="lowest chosen maximum")
    ax.scatter(range(len(scores)), scores, s=6, color=GREY, linewidths=0, label="a chunk")
    rings = dict(s=55, facecolors="none", edgecolors=BLUE, linewidths=1.8)
    ax.scatter(kept, scores[kept], label="kept", **rings)
    ax.set(xlabel="chunk", ylabel="score", xlim=(0, len(scores) - 1))
    ax.figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    hide_frame(ax)


def paired_bars(ax: Axes, lengths, pairs: dict, *, xlabel: str = "", ylabel: str = "") -> None:
    """Two bars for each context length, logarithmic axis. pairs: name -> one value per length."""
    for shift, (name, heights), color in zip((-0.2, 0.2), pairs.items(), (BLUE, ORANGE)):
        places = [i + shift for i in range(len(lengths))]
        bars = ax.bar(places, heights, 0.38, color=color, label=name)
        labels = [f"{height:.2g}" if height < 10 else f"{height:.0f}" for height in heights]
        ax.bar_label(bars, labels, fontsize=10, padding=2)
    ax.set_xticks(range(len(lengths)), [f"{length_name(T)} tokens" for T in lengths])
    ax.set(yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize=10, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    hide_frame(ax)


def memory_strip(
    figure: Figure, words, chunk_size: int, *, read: int, chunks: int, near: int
) -> None:
    """The words, grouped by chunk: stored, waiting or not read yet. The last `near` are framed."""
    ax = figure.subplots()
    for i, word in enumerate(words):
        x = i + 0.4 * (i // chunk_size)
        color = SKY if i < chunk_size * chunks else ORANGE if i < read else PALE
        ax.add_patch(Rectangle((x, 0), 1, 1, facecolor=color, edgecolor="white", linewidth=2))
        ink = INK if i < read else GREY
        ax.text(x + 0.5, 0.5, word, ha="center", va="center", fontsize=11, color=ink)
        if read - near <= i < read:
            _frame(ax, x + 0.06, 0.06, 0.88, 0.88, width=2.5)
    width = len(words) + 0.4 * (len(words) // chunk_size - 1)
    ax.set(xlim=(0, width), ylim=(1, 0), frame_on=False, xticks=[], yticks=[])
    names = {SKY: "stored: K, V and a landmark", ORANGE: "waiting", PALE: "not read yet"}
    marks = [Patch(facecolor=color, label=name) for color, name in names.items()]
    marks.append(Patch(fill=False, edgecolor=RED, label="in the window caches"))
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=10)


def tail_errors(ax: Axes, errors: dict, notes: dict, *, smallest: float = 1e-17) -> None:
    """errors: tail length -> error of the logits, in blue where exact. notes: text -> (x, y)."""
    colors = [BLUE if error < 1e-12 else RED for error in errors.values()]
    ax.bar(list(errors), [max(error, smallest) for error in errors.values()], color=colors)
    for text, (x, y) in notes.items():
        ax.text(x, y, text, ha="left", color=INK)
    ax.set(xlabel="upper tail in tokens", ylabel="error of the logits")
    ax.set(yscale="log", xticks=range(min(errors), max(errors) + 1), ylim=(smallest, 1))
    hide_frame(ax)


def reach_by_kind(ax: Axes, kinds: dict, chunk_size: int) -> None:
    """kinds: two names -> moved [T, T]: does a change of token i (column) reach token t (row)?"""
    for (name, moved), color in zip(kinds.items(), (BLUE, ORANGE)):
        t, i = as_array(moved).nonzero()
        ax.scatter(i, t, s=22, marker="s", color=color, linewidths=0, label=name)
    T = len(moved)
    ax.set(xlim=(-1, T), ylim=(T, -1), aspect="equal")
    ax.set(xlabel="changed token", ylabel="observing token")
    borders = [i - 0.5 for i in range(chunk_size, T, chunk_size)]
    ax.vlines(borders, -1, T, color=PALE, zorder=0)
    ax.legend(loc="upper right", frameon=False, fontsize=10)
    hide_frame(ax)


def computed_layers(figure, names, tokens, *, chunk_size, chunks, retrieved, tail, needed) -> None:
    """What each layer computes for `tokens` tokens. Layers are rows, the lowest at the bottom.

    names: one per row (lower blocks, the chunks, U upper blocks). chunks: how many are complete.
    retrieved: indices of chunks. tail: how many tokens each upper block computes. needed [U]: how
    many of them the last logits depend on.
    """
    ax = figure.subplots()
    lower = len(names) - 1 - len(needed)
    ax.barh(range(lower), [tokens] * lower, color=BLUE)
    for i in range(chunks):
        color = ORANGE if i in retrieved else BLUE
        ax.barh(lower, 0.9 * chunk_size, left=(i + 0.05) * chunk_size, align="center", color=color)
    for y, count in enumerate(needed, start=lower + 1):
        ax.barh(y, tail, left=tokens - tail, color=PALE_BLUE)
        ax.barh(y, min(count, tokens), left=max(tokens - count, 0), color=BLUE)
    ax.set(xlim=(-1, tokens), xlabel="token", frame_on=False)
    ax.set(yticks=range(len(names)), yticklabels=names)
    ax.tick_params(axis="y", length=0)
    kinds = {
        BLUE: "needed",
        PALE_BLUE: "computed, not needed",
        ORANGE: "retrieved for the last token",
    }
    marks = [Patch(color=color, label=kind) for color, kind in kinds.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False)


def design_bars(ax: Axes, values: dict, labels, *, color, limits, title: str, mark=None) -> None:
    """name -> value as labelled bars on a logarithmic axis. mark: where a dashed line stands."""
    bars = ax.barh(
        list(values), [max(value, 1) for value in values.values()], color=color, height=0.7
    )
    ax.bar_label(bars, labels, padding=3, fontsize=9)
    ax.set(
        xscale="log", xlim=limits, xticks=[10.0**n for n in range(6, 16, 3) if 10.0**n < limits[1]]
    )
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.set_title(title, fontsize=11)
    ax.grid(axis="x", color=PALE)
    ax.set_axisbelow(True)
    if mark is not None:
        ax.axvline(mark, color=RED, linestyle="--", linewidth=1, zorder=0)
    hide_frame(ax)


def fetched_map(figure: Figure, counts, columns: int = 64) -> None:
    """One cell per chunk, row by row, coloured by its count [N]; pale where the count is 0.

    N is a multiple of `columns`.
    """
    ax = figure.subplots()
    counts = as_array(counts).reshape(-1, columns)
    rows = len(counts)
    shown = np.ma.masked_equal(counts, 0)
    ax.set_facecolor(PALE)
    image = ax.imshow(shown, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest")
    grid = dict(color="white", linewidth=1)
    ax.hlines([y - 0.5 for y in range(1, rows)], -0.5, columns - 0.5, **grid)
    ax.vlines([x - 0.5 for x in range(1, columns)], -0.5, rows - 0.5, **grid)
    ax.set(xticks=[0, columns - 1], ylabel="chunk")
    ax.set(yticks=range(rows), yticklabels=[columns * y for y in range(rows)])
    ax.spines[:].set_visible(False)
    figure.colorbar(image, ax=ax, label="tokens that read it", pad=0.01)


def _frame(ax: Axes, x: float, y: float, wide: float, high: float, *, width: float = 2) -> None:
    ax.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor=RED, linewidth=width))
