"""The pictures of notebooks 04 and 05: how one token reads chunks, what window and retrieval see.

Each function takes an Axes or a Figure, and arrays that are computed elsewhere. Arrays may be
tensors.

Dimensions: T tokens, S chunk size, N chunks, K chunks kept.
"""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon, Rectangle

from hsa_mini.viz.plots import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    RED,
    SKY,
    as_array,
    length_name,
    weight_bars,
)


def attention_grid(ax: Axes, words: Sequence[str], weights, attention, *, token: int) -> None:
    """One row per chunk, one cell per word, as token number `token` reads them.

    weights [N]: weight of each chunk, 0 if it is not kept. attention [N, S]: attention inside each
    chunk, shown in blue where the chunk is kept. A chunk that is not complete before the token is
    grey. The token itself has a red frame.
    """
    weights = as_array(weights)
    attention = as_array(attention)
    chunk_size = attention.shape[1]
    for i, word in enumerate(words):
        row, column = divmod(i, chunk_size)
        kept = weights[row] > 0
        shade = float(attention[row, column]) if kept else 0.0
        blue = (1 - shade, 1 - 0.55 * shade, 1 - 0.3 * shade)
        face = PALE if (row + 1) * chunk_size > token else blue
        cell = Rectangle((column, row), 1, 1, facecolor=face, edgecolor=GREY, linewidth=0.6)
        ax.add_patch(cell)
        ink = "white" if shade > 0.6 else INK if kept or i == token else GREY
        ax.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink, fontsize=10)
    row, column = divmod(token, chunk_size)
    _frame(ax, column + 0.03, row + 0.03, 0.94)
    ax.set(xlim=(0, chunk_size), ylim=(len(words) // chunk_size, 0), xticks=[], yticks=[])


def fusion(figure: Figure, words: Sequence[str], weights, attention, blend, *, token: int) -> None:
    """Three panels: the weight of each chunk, the attention inside it, and the blend of outputs.

    words, weights, attention, token: as in `attention_grid`. blend: word -> its share, the largest
    share first.
    """
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 2.6, 1.3))
    weight_bars(left, weights)
    left.set_ylim(len(weights) - 0.5, -0.5)  # a bar beside each row of the grid
    attention_grid(middle, words, weights, attention, token=token)
    weight_bars(right, list(blend.values()), list(blend))
    titles = ("weight of each chunk", "attention inside each chunk", "the blend")
    for ax, title in zip((left, middle, right), titles):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("")


def hit_curves(ax: Axes, curves: dict, *, first_step: int, blind: float, blind_name: str) -> None:
    """curves: name -> share of hits (0 to 1) after each training step, from `first_step` on.

    blind: share of hits of a random choice, a dotted line with the text `blind_name`.
    """
    last = first_step
    for (name, values), color in zip(curves.items(), (BLUE, RED)):
        steps = range(first_step, first_step + len(values))
        last = max(last, steps[-1])
        ax.plot(steps, as_array(values), color=color, linewidth=2)
        ax.text(steps[-1] + 4, float(values[-1]), name, color=INK, va="center", fontsize=11)
    ax.plot((0, last), (blind, blind), color=GREY, linewidth=1, linestyle=":")
    ax.text(3, blind - 0.09, blind_name, color=GREY, fontsize=10)
    ax.set(xlabel="training steps", ylabel="right chunk among the two read")
    ax.set(ylim=(0, 1), xlim=(0, last * 1.22), xticks=range(0, last + 1, 50))
    ax.spines[["top", "right"]].set_visible(False)


def page_shares(figure: Figure, arms: dict, right) -> None:
    """How retrieval shares itself out over the chunks of several pages: one panel per arm.

    arms: name -> shares [pages, N], which add up to 1 in each page. right [pages]: the chunk that
    holds the answer, with a red frame.
    """
    axes = figure.subplots(1, len(arms), squeeze=False)[0]
    for ax, (name, shares) in zip(axes, arms.items()):
        shares = as_array(shares)
        ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for page, chunk in enumerate(as_array(right).tolist()):
            _frame(ax, chunk - 0.47, page - 0.47, 0.94)
            ink = "white" if shares[page, chunk] > 0.6 else INK
            words = dict(ha="center", va="center", fontsize=9, color=ink)
            ax.text(chunk, page, f"{shares[page, chunk]:.2f}", **words)
        ax.set(xlabel="chunk", xticks=range(shares.shape[1]), yticks=range(len(shares)))
        ax.set_title(name, fontsize=11)
    axes[0].set_ylabel("page")


def distance_curves(figure: Figure, distances, rope, nope, *, base: float, trained: int) -> None:
    """Attention on `7` in its chunk against its distance, with RoPE and without positions (NoPE).

    distances [M], in tokens. rope: the lowest, middle and highest attention near each distance,
    three arrays [M]. nope: attention without positions [M]. base: base of RoPE. trained: the
    largest distance that training shows, marked by a grey area.
    """
    lowest, middle, highest = (as_array(values) for values in rope)
    distances = as_array(distances)
    ax = figure.subplots()
    grey = f"distances up to {length_name(trained)}, seen in training"
    ax.axvspan(8, trained, color=PALE, label=grey)
    band = dict(color=RED, alpha=0.25, linewidth=0)
    ax.fill_between(distances, lowest, highest, label="RoPE: lowest to highest", **band)
    ax.plot(distances, middle, color=RED, linewidth=2, label=f"RoPE, base {base:,.0f}: the middle")
    dashed = dict(color=BLUE, linewidth=2.5, linestyle="--")
    ax.plot(distances, as_array(nope), label="no positions", **dashed)
    ax.set_xscale("log", base=2)
    ax.set_xticks([2**n for n in range(3, 25, 3)], [length_name(2**n) for n in range(3, 25, 3)])
    ax.set(xlabel="distance from `7` to the question, in tokens", ylim=(0, 1.04), xlim=(8, 2**24))
    ax.set_ylabel("attention on `7` in its chunk")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)


def token_strip(
    ax: Axes, words: Sequence[str], weights, *, chunk_size: int, window: int, per_row: int = 16
) -> None:
    """One cell per token, in rows of `per_row`; the last token has a red frame.

    A token inside the window is blue. A token in a kept chunk (weights [N] above 0) is orange. A
    token that is both has both colours. Words that the last token does not see are left out.
    """
    weights = as_array(weights)
    for i, word in enumerate(words):
        row, column = divmod(i, per_row)
        kept = weights[i // chunk_size] > 0
        in_window = i >= len(words) - window
        face = SKY if in_window else ORANGE if kept else PALE
        ax.add_patch(Rectangle((column, row), 1, 1, facecolor=face))
        if kept and in_window:
            corners = [(column, row + 1), (column + 1, row), (column + 1, row + 1)]
            ax.add_patch(Polygon(corners, facecolor=ORANGE))
        if kept or in_window:
            center = (column + 0.5, row + 0.52)
            ax.text(*center, word, ha="center", va="center", fontsize=9, color=INK)
    rows = len(words) // per_row
    ax.hlines(range(rows + 1), 0, per_row, color="white", linewidth=1)
    ax.vlines(range(0, per_row + 1, chunk_size), 0, rows, color="white", linewidth=5)  # chunk edges
    _frame(ax, per_row - 0.97, rows - 0.94, 0.88)
    ax.set(xlim=(0, per_row), ylim=(rows, 0), frame_on=False, xticks=[], yticks=[])


def window_and_retrieval(
    figure: Figure, words: Sequence[str], weights, shares, *, chunk_size: int, window: int
) -> None:
    """A `token_strip`, and below it how much of `7` the last token gets.

    shares: two numbers, from the window and from retrieval.
    """
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    token_strip(top, words, weights, chunk_size=chunk_size, window=window)
    names = {SKY: "in the window", ORANGE: "retrieved", PALE: "not seen"}
    marks = [Patch(facecolor=color, label=name) for color, name in names.items()]
    place = dict(loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    figure.legend(handles=marks, **place)
    weight_bars(bottom, shares, ["window", "retrieval"])
    bottom.set_xlabel("share of `7` in the output of the last token")


def chunk_scores(
    ax: Axes, scores, kept, needle: Sequence[int], *, title: str, shown: int | None = None
) -> None:
    """Retrieval scores [N] of all chunks as dots.

    kept: chunks with a ring. needle: chunks with a red line. shown: a chunk with a large ring.
    """
    ring = dict(facecolors="none", edgecolors=BLUE, linewidths=1.5)
    dot = dict(s=5, marker="s", color=GREY, linewidths=0, antialiased=False)
    ax.scatter(range(len(scores)), scores, label="a chunk", **dot)
    ax.scatter(kept, scores[kept], s=60, label="retrieved", **ring)
    for chunk in needle:
        ax.axvline(chunk, color=RED, linewidth=1, zorder=0)
    ax.scatter(needle, scores[needle], s=22, color=RED, linewidths=0, label="the needle")
    if shown is not None:
        large = dict(facecolors="none", edgecolors=ORANGE, linewidths=3)
        ax.scatter(shown, scores[shown], s=260, label="shown below", **large)
    ax.margins(y=0.12)  # space for the ring
    ax.set(xlabel="chunk of the text", ylabel="retrieval score", xlim=(-12, len(scores) + 12))
    ax.set_title(title, fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)


def layers_of_scores(figure: Figure, layers, needle: Sequence[int]) -> None:
    """One `chunk_scores` per HSA layer. layers: pairs of the scores [N] and the chunks kept."""
    axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
    for number, (ax, (scores, kept)) in enumerate(zip(axes, layers)):
        chunk_scores(ax, scores, kept, needle, title=f"HSA layer {number}")
        ax.label_outer()
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper center", ncols=3, frameon=False)


def scores_and_text(
    figure: Figure, scores, kept, needle: Sequence[int], *, title: str, shown: int, text: str
) -> None:
    """`chunk_scores` with the chunk `shown` marked, and below it the text of this chunk."""
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    chunk_scores(top, scores, kept, needle, title=title, shown=shown)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    look = dict(va="top", fontsize=9.5, family="monospace", color=INK, parse_math=False)
    bottom.text(0, 1, text, **look)
    bottom.set_axis_off()


def _frame(ax: Axes, x: float, y: float, size: float) -> None:
    """A red frame around one cell."""
    frame = Rectangle((x, y), size, size, fill=False, edgecolor=RED, linewidth=2.5)
    ax.add_patch(frame)
