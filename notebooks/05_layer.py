# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · Why positions near, and none far away?
#
# A token now has two ways to look back. A **sliding window** shows it the last few hundred tokens. **Retrieval**
# shows it a few chunks from anywhere. In an HSA model the window knows positions, and retrieval knows none. That
# looks odd: why would one give up knowing where something stands?
#
# After this notebook you will be able to
#
# * say what rotary positions (RoPE) do, and show that they see distances and nothing else,
# * show that far chunks without positions can be moved anywhere and nothing changes, while RoPE breaks them,
# * build a complete HSA layer from its parts, equal to the package's, number by number,
# * watch a trained model find one sentence among 65,536 tokens, and see what it retrieved.
#
# **Time:** 25 minutes to read, half a minute to run on two CPU cores. **Needs:** notebooks [03](03_retrieval.ipynb)
# and [04](04_fusion.ipynb), or at least that retrieval hands every token K chunks with weights. The last part uses
# the trained model that comes with the repository.

# %%
import json
import textwrap
from itertools import product

import torch
from matplotlib.patches import Patch, Polygon, Rectangle
from torch.nn.functional import rms_norm

from hsa_mini import PRESETS, ChunkMemory, HSAModel, reference
from hsa_mini.data.corpus import load_corpus
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.ops.rope import apply_rope, rope_table
from hsa_mini.paths import data_dir
from hsa_mini.reference import chunk_attention, retrieve
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREY, INK, ORANGE, PALE, RED, SKY, length_name, weight_bars

S = 4  # tokens in a chunk, until the trained model comes

# %% [markdown]
# ## The question in plain words
#
# Our twelve tokens again:
#
# > `the code is 7` | `birds sing at dawn` | `what is the code`
#
# *Near*, order is meaning. "Birds sing" is not "sing birds". To read the last words, a token has to know which came
# first.
#
# *Far*, the exact place hardly matters. The code is 7, whether that was said eight tokens ago or eight million. What matters is
# that it is **found**, and that it then reads **the same**. A model is trained on short texts. It has seen distances
# of 8, of 100, of a thousand. It has never seen eight million. Whatever depends on distance has never been tried
# there.
#
# ## In symbols
#
# RoPE (rotary position embedding, arXiv 2104.09864) turns queries and keys. Take a vector of $D$ numbers as $D/2$
# pairs. At position $t$, pair $p$ turns by the angle $t\,\theta_p$, fast for the first pairs and slowly for the last:
#
# $$\theta_p = b^{-2p/D}, \qquad b = 10\,000$$
#
# A query at position $t$ and a key at position $u$ meet in a dot product, and only the *difference* of the angles is
# left:
#
# $$\mathrm{rope}(q, t) \cdot \mathrm{rope}(k, u) = \sum_{p} |q_p|\,|k_p| \cos\big((t-u)\,\theta_p + \varphi_p\big)$$
#
# Here $|q_p|$ and $|k_p|$ are the lengths of pair $p$, and $\varphi_p$ is the angle from $k_p$ to $q_p$ before turning.
#
# You built this in [notebook 02](02_chunks.ipynb), for the places inside one chunk. Here is the package's version,
# which takes any positions, in one call.


# %%
def rope(x, positions, base=10_000.0):
    """Turn the pairs of x [..., T, heads, D] by their angles at positions [T]."""
    return apply_rope(x, rope_table(positions, x.shape[-1], base))


# %% [markdown]
# Does it see differences only? We take a query and a key, four places apart, and move both by a thousand. And we
# count full turns: the first pair of 64 numbers turns once in 6 tokens, the last one once in 47,000.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)
places = [(7, 3), (1007, 1003), (1007, 3)]
scores = [(rope(q, torch.tensor([t])) * rope(k, torch.tensor([u]))).sum() for t, u in places]
print("positions 7 and 3 == positions 1007 and 1003:", torch.allclose(scores[0], scores[1], atol=1e-5))
print("positions 7 and 3 == positions 1007 and    3:", torch.allclose(scores[0], scores[2], atol=1e-5))
print("tokens for a full turn, first and last pair:", [round(2 * torch.pi * 10_000 ** (2 * p / 64)) for p in (0, 31)])

# %% [markdown]
# **You should see** `True`, then `False`. RoPE knows no places. It knows distances.
#
# ## Near: the window, with RoPE
#
# A window of W means: token $t$ attends to W keys, the last of which is its own. Here it is as loops; keys of earlier
# tokens may stand in front.


# %%
def sliding_window_attention(q, k, v, *, window):
    """Token t attends the `window` keys that end at its own: q [B, T, H, D], k and v [B, cached+T, J, D] -> as q."""
    (B, T, H, D), J, cached = q.shape, k.shape[2], k.shape[1] - q.shape[1]
    out = torch.zeros_like(q)
    for b, t, h in product(range(B), range(T), range(H)):
        own, j = cached + t, h * J // H  # place of the token's own key; the key/value head that this query head shares
        near = slice(max(own - window + 1, 0), own + 1)
        shares = (k[b, near, j] @ q[b, t, h] * D**-0.5).softmax(dim=0)
        out[b, t, h] = shares @ v[b, near, j]
    return out


# %%
# NBVAL_CHECK_OUTPUT
q, k, v = (torch.randn(2, 30, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
out = sliding_window_attention(q, k, v, window=8)
last_20 = sliding_window_attention(q[:, 10:], k, v, window=8)
print("loops == package:", torch.allclose(out, reference.sliding_window_attention(q, k, v, window=8)))
print("20 tokens with 10 keys in front == the last 20 of 30:", torch.allclose(last_20, out[:, 10:]))

# %% [markdown]
# Two facts about the window, executed. First: without RoPE, attention sees a *bag*. Swap two words inside the window
# and the last token does not notice. With RoPE it does.
#
# Second: move the whole text to another place, and with RoPE nothing changes. Only distances count, and inside a
# window of W they are 0 to W − 1. **Training shows a model all of them.** However long the text gets, the window
# meets nothing new.


# %%
# NBVAL_CHECK_OUTPUT
def window_answer(order, *, turned, start=0):
    """Output of the last token over 8 tokens in the given order, the first of them at position `start`."""
    places = torch.arange(start, start + 8)
    q_8, k_8 = (rope(x[:1, order], places) if turned else x[:1, order] for x in (q, k))
    return sliding_window_attention(q_8, k_8, v[:1, order], window=8)[0, -1]


normal, swapped = [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 3, 2, 4, 5, 6, 7]
for turned in (False, True):
    same = torch.allclose(window_answer(normal, turned=turned), window_answer(swapped, turned=turned))
    print(f"{'with RoPE' if turned else 'no positions':12}: two words swapped, same output: {same}")
here, moved = (window_answer(normal, turned=True, start=start) for start in (0, 5_000))
print("with RoPE   : the whole text moved by 5,000, same output:", torch.allclose(here, moved, atol=1e-5))

# %% [markdown]
# **You should see** `True`, then `False`, then `True`.
#
# ## Far: chunks, with and without positions
#
# Now the twelve tokens, by the rule of [notebook 04](04_fusion.ipynb): a token asks for its own word, its key is the
# word two places before it in its chunk, its value is its own word. RoPE needs many numbers to turn, so each word
# gets a direction among 64, at right angles to all others. A match then scores 64 / √64 = **8**, everything else
# scores 0.

# %%
FILLERS = [
    "birds sing at dawn", "the door is red", "rain falls on roofs", "my name is Ada",
    "cats sleep all day", "waves roll to shore", "the sea is deep",
]  # fmt: skip
NEEDLE, QUESTION = "the code is 7", "what is the code"
VOCABULARY = list(dict.fromkeys(" ".join([NEEDLE, QUESTION, *FILLERS]).split()))
square = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
DIRECTIONS = torch.linalg.qr(square).Q[: len(VOCABULARY)]  # [words, 64], each of length 1


def norm(x):
    return rms_norm(x, x.shape[-1:])


def read_by_rule(chunks):
    """Chunks of four words -> query of the last token [1, 1, 1, D]; keys and values [1, N, S, 1, D]."""
    ids = torch.tensor([[VOCABULARY.index(word) for word in chunk.split()] for chunk in chunks])
    v = DIRECTIONS[ids][None, :, :, None]
    k = torch.cat((torch.zeros_like(v[:, :, :2]), v[:, :, :-2]), dim=2)
    return norm(v[:, -1:, -1]), norm(k), v


# %% [markdown]
# Retrieval keeps K = 2 chunks and HSA reads them, as in notebook 04. The switch `base` is the experiment: `None`
# leaves queries and keys as they are (this is called **NoPE**, no position embedding), a number turns them by RoPE,
# each at its own place in the text.


# %%
def ask(chunks, base=None):
    """The last token asks its text -> what HSA gives it [D]."""
    q, k, v = read_by_rule(chunks)
    tokens = len(chunks) * S
    indices, weights = retrieve(q, norm(v.sum(dim=2)), chunk_size=S, top_k=2, offset=tokens - 1)
    if base is not None:
        q = rope(q, torch.tensor([tokens - 1]), base)
        k = rope(k.flatten(1, 2), torch.arange(tokens), base).unflatten(1, (-1, S))
    return chunk_attention(q, k, v, indices, weights)[0, 0, 0]


def share_of(word, out):
    """How much of a word is in an output: values have length 1 and stand at right angles."""
    return (out @ DIRECTIONS[VOCABULARY.index(word)]).item()


# %%
# NBVAL_CHECK_OUTPUT
print("share of `7` in the answer of token 11:", round(share_of("7", ask([NEEDLE, FILLERS[0], QUESTION])), 3))

# %% [markdown]
# **You should see** 0.981: retrieval believes chunk 0 with $e^4 / (e^4 + 1)$ = 0.982, and inside it `7` has $e^8 /
# (e^8 + 3)$ = 0.999.
#
# ## The equality of this notebook
#
# We push the needle away from the question by inserting far text between them: no more chunks of birds, 10, 100, 1,000
# more. And we put it in every possible place among twenty chunks. Without positions the answer must not change at all. With
# RoPE it may.

# %%
# NBVAL_CHECK_OUTPUT
pushed_away = [[NEEDLE] + [FILLERS[0]] * (1 + far) + [QUESTION] for far in (0, 10, 100, 1_000)]
moved_about = [[FILLERS[0]] * i + [NEEDLE] + [FILLERS[0]] * (19 - i) + [QUESTION] for i in range(20)]
for name, base in (("no positions", None), ("RoPE", 10_000.0)):
    for what, texts in (("pushed away", pushed_away), ("moved about", moved_about)):
        answers = torch.stack([ask(text, base) for text in texts])
        print(f"{name:12} {what}: {len(texts):2} texts, {len(answers.round(decimals=6).unique(dim=0)):2} different answers")


# %% [markdown]
# **You should see** one single answer for all texts without positions, and with RoPE as many answers as texts.
#
# This is the argument in one line: **without positions, a chunk at distance 16 million is the same problem as a chunk
# at distance 16.** What is read there reads the same. What is left to get right is *which* chunks are retrieved. That,
# too, is a dot product without positions, but one against a crowd that grows with the text: there is the difficulty that
# remains.

# %% [markdown]
# ## See it
#
# How much of `7` does the token get out of the needle's chunk, as the distance grows? The score of a match under RoPE
# is a sum of cosines. Near, they all agree. Far, each is somewhere else, and a few tokens more or less change
# everything. The horizontal axis is logarithmic, up to 16 million tokens.


# %%
def share_inside_chunk(distances, base=None):
    """Share of `7` inside its own chunk, with the question that many tokens behind it -> one number a distance."""
    q, k, _ = read_by_rule([NEEDLE, QUESTION])
    q, k = q[0], k[0, 0]  # [1, 1, D], [S, 1, D]
    if base is not None:
        k = rope(k, torch.arange(S) - (S - 1), base)  # `7` at position 0
        q = rope(q.expand(len(distances), 1, -1), distances, base)
    scores = torch.einsum("thd,shd->ts", q.expand(len(distances), 1, -1), k) / 64**0.5
    return scores.softmax(dim=-1)[:, -1]


def share_by_distance(base=None):
    """Distances [63] from 8 to 16M, and the lowest, middle and highest share of `7` among 30 distances next to each."""
    edges = torch.logspace(3, 24, 64, base=2, dtype=torch.float64)
    nearby = (edges[:-1, None] * (edges[1] / edges[0]) ** torch.linspace(0, 1, 30)).round()  # [63, 30]
    shares = share_inside_chunk(nearby.flatten(), base).unflatten(0, nearby.shape).sort(dim=-1).values
    return nearby[:, 15], shares[:, 0], shares[:, 15], shares[:, -1]


def draw_distances(figure, base, trained=1024):
    """Share of `7` against distance, with RoPE of this base and without positions."""
    x, lowest, middle, highest = share_by_distance(base)
    axes = figure.subplots()
    axes.axvspan(8, trained, color=PALE, label=f"distances up to {length_name(trained)}, seen in training")
    axes.fill_between(x, lowest, highest, color=RED, alpha=0.25, linewidth=0, label="RoPE: lowest to highest")
    axes.plot(x, middle, color=RED, linewidth=2, label=f"RoPE, base {base:,.0f}: the middle")
    axes.plot(x, share_by_distance()[2], color=BLUE, linewidth=2.5, linestyle="--", label="no positions")
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**n for n in range(3, 25, 3)], [length_name(2**n) for n in range(3, 25, 3)])
    axes.set(xlabel="distance from `7` to the question, in tokens", ylim=(0, 1.04), xlim=(8, 2**24))
    axes.set_ylabel("attention on `7` in its chunk")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    worst = lowest[x > trained].min().item()
    return f"RoPE, base {base:,.0f}: the share of `7` falls to {worst:.2f} beyond distance {trained}; without positions: 1.00."


# %% [markdown]
# ### Move it
#
# A popular repair is a larger base: slower pairs, longer waves. Move **base** and see what it buys. The cliff moves
# to the right. It does not go away.

# %%
explore(
    draw_distances,
    alt="Attention on `7` against distance from 8 to 16M tokens. Without positions it is 1 everywhere. With RoPE it is 1 up "
    "to some distance that grows with the base, then falls, and far out it may be almost anything.",
    size=(7.4, 3.2),
    base=Control([1e4, 1e5, 1e6, 1e7, 1e8], start=1e4, label="base of RoPE"),
    trained=Control([256, 1024, 4096, 16384], start=1024, label="seen in training"),
)

# %% [markdown]
# The red line is the middle of thirty distances next to each other, the red area holds them all. A trained model
# would do better than ours *inside the grey band*. It can learn which pairs to rely on, because the loss shows it
# these distances. To the right of the band nobody shows it anything: the angles of the slow pairs there are
# combinations that it never met.
#
# The paper measured it on trained models (370M parameters with NSA, a kindred method): from 4K to 64K tokens the
# single-needle accuracy goes from 97 to 60 with RoPE, and from 99 to 73 without. So positions are a part of the trouble,
# not all of it. Notebook 04 has a candidate for another part: in NSA what is read does not teach what to read.
#
# ## What a token sees
#
# Now both together: a text of 128 tokens in 32 chunks. The last token asks for the code. You choose the window and
# the distance of the needle. Retrieval is real: scores of landmarks, two chunks kept.

# %%
CHUNKS, PER_ROW = 32, 16


def text_with_needle(distance):
    """32 chunks; the last token of the needle stands `distance` tokens before the last token of all."""
    chunks = [FILLERS[i % len(FILLERS)] for i in range(CHUNKS - 1)] + [QUESTION]
    chunks[CHUNKS - 1 - distance // S] = NEEDLE
    return chunks


def look(distance, window, keep=2):
    """-> weight of each chunk [N], share of `7` by the window, share of `7` by HSA."""
    q, k, v = read_by_rule(text_with_needle(distance))
    last = torch.tensor([CHUNKS * S - 1])
    indices, weights = retrieve(q, norm(v.sum(dim=2)), chunk_size=S, top_k=keep, offset=int(last))
    by_chunk = torch.zeros(CHUNKS, dtype=torch.float64)
    by_chunk[indices.flatten().long()] = weights.flatten()
    k_near = rope(k.flatten(1, 2), torch.arange(CHUNKS * S))
    near = reference.sliding_window_attention(rope(q, last), k_near, v.flatten(1, 2), window=window)
    far = chunk_attention(q, k, v, indices, weights)
    return by_chunk, *(share_of("7", out[0, 0, 0]) for out in (near, far))


# %%
def draw_strip(axes, chunks, window, by_chunk):
    """Every token a cell, in rows of 16: blue in the window, orange if retrieved, both if both; unseen words are left out."""
    words = " ".join(chunks).split()
    for i, word in enumerate(words):
        (row, column), kept, in_window = divmod(i, PER_ROW), by_chunk[i // S] > 0, i >= len(words) - window
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=SKY if in_window else ORANGE if kept else PALE))
        if kept and in_window:
            axes.add_patch(Polygon([(column, row + 1), (column + 1, row), (column + 1, row + 1)], facecolor=ORANGE))
        if kept or in_window:
            axes.text(column + 0.5, row + 0.52, word, ha="center", va="center", fontsize=9, color=INK)
    rows = len(words) // PER_ROW
    axes.hlines(range(rows + 1), 0, PER_ROW, color="white", linewidth=1)
    axes.vlines(range(0, PER_ROW + 1, S), 0, rows, color="white", linewidth=5)  # between chunks
    axes.add_patch(Rectangle((PER_ROW - 0.97, rows - 0.94), 0.88, 0.88, fill=False, edgecolor=RED, linewidth=2.5))
    axes.set(xlim=(0, PER_ROW), ylim=(rows, 0), frame_on=False, xticks=[], yticks=[])


def draw_reach(figure, window, distance):
    """The text and who sees what of it; below, how much of `7` each way of looking finds."""
    by_chunk, near, far = look(distance, window)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    draw_strip(top, text_with_needle(distance), window, by_chunk)
    names = {SKY: "in the window", ORANGE: "retrieved", PALE: "not seen"}  # a cell of both colours is both
    marks = [Patch(facecolor=colour, label=name) for colour, name in names.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    weight_bars(bottom, [near, far], ["window", "retrieval"])
    bottom.set_xlabel("share of `7` in what the last token gets")
    where = "inside" if distance < window else "outside"
    said = f"window says `7` with {near:.2f}, retrieval with {far:.2f}"
    return f"Needle {distance} tokens back, {where} the window of {window}: {said}."


# %% [markdown]
# ### Move it
#
# Bring the needle into the window, then let it leave. Watch the two bars. A needle that both can see is, in training,
# a needle that retrieval need not learn: the window is easier. This is the paper's *seesaw*: **with a long window,
# retrieval learns less.** [Notebook 11](11_training.ipynb) says why.

# %%
explore(
    draw_reach,
    alt="128 tokens in rows: blue where the window sees, orange where retrieval reads. Bars: the share of `7` found by each.",
    size=(8.5, 3.8),
    window=Control((1, 128), start=32, label="window W"),
    distance=Control((4, 124, 4), start=80, label="distance of the needle"),
)

# %% [markdown]
# ## The layer, from its parts
#
# Now everything is there. One HSA layer of the upper decoder does three things, one after the other. Each has a norm in
# front, and its result is added to its input $x$:
#
# 1. **look near**: window attention, with RoPE,
# 2. **look far**: retrieve, attend per chunk, fuse, without positions,
# 3. **think**: a small network for each token by itself.
#
# Queries and keys are normed per head before they meet (*QK norm*); it keeps scores in a sane range. We take the
# package's own weights, from its smallest preset, and its chunk memory: keys, values and landmarks of all chunks, as
# the chunk encoder of [notebook 02](02_chunks.ipynb) made them.


# %%
def look_near(swa, x, positions):
    """Window attention with RoPE: x [B, T, C] -> [B, T, C]."""
    parts = swa.qkv
    q, k, v = (project(x).unflatten(-1, (-1, parts.head_dim)) for project in (parts.q, parts.k, parts.v))
    q, k = rope(parts.q_norm(q), positions), rope(parts.k_norm(k), positions)
    return swa.out(reference.sliding_window_attention(q, k, v, window=swa.window).flatten(-2))


def look_far(hsa, x, memory):
    """Retrieval and chunk attention, no positions: x [B, T, C] -> [B, T, C]."""
    config = hsa.config
    asks = hsa.retrieval_norm(hsa.retrieval_q(x).unflatten(-1, (-1, config.retrieval_dim)))
    indices, weights = retrieve(asks, memory.landmarks, chunk_size=config.chunk_size, top_k=config.top_k)
    q = hsa.q_norm(hsa.q(x).unflatten(-1, (-1, config.hsa_head_dim)))
    return hsa.out(chunk_attention(q, memory.k, memory.v, indices, weights).flatten(-2))


def layer(block, x, memory):
    """Near, far, think; each normed before, each added: x [B, T, C] -> [B, T, C]."""
    x = x + look_near(block.swa, block.swa_norm(x), torch.arange(x.shape[1]))
    x = x + look_far(block.hsa, block.hsa_norm(x), memory)
    return x + block.mlp(block.mlp_norm(x))


# %% [markdown]
# Fifteen lines, and it must equal the package's `Block`, which is what a trained model runs.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
tiny = HSAModel(PRESETS["debug"], dtype=torch.float64)
memory = ChunkMemory(tiny.config)
with torch.no_grad():
    x = tiny.read(torch.randint(512, (2, 50)), memory)  # lower decoder and chunk encoder
    table = rope_table(torch.arange(50), tiny.config.head_dim, tiny.config.rope_base)
    expected, _ = tiny.upper[0](x, table, None, lambda hsa, x: hsa(x, memory.landmarks, memory.attend, position=0)[0])
    ours = layer(tiny.upper[0], x, memory)
print("tokens, width:", list(ours.shape[1:]), " chunks in memory:", memory.chunks)
print("our layer == the package's:", torch.allclose(ours, expected, atol=1e-5))

# %% [markdown]
# **You should see** `True`. That is the whole layer. The rest of the model is this layer, repeated, with ordinary
# window layers before and between, and the chunk encoder in the middle.
#
# ## A trained one, at 65,536 tokens
#
# The repository ships a small model of this kind. These are its sizes, and the length of the texts that it was trained
# on. What lies further back than its windows reach, it can only retrieve.

# %%
TOKENS, FOLDER = 65_536, data_dir() / "checkpoints" / "mini"
model = HSAModel.from_pretrained(FOLDER)
config, stages = model.config, json.loads((FOLDER / "training.json").read_text())["recipe"]["stages"]
trained_on = max(stage["tokens"] for stage in stages)
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")
print(f"trained on texts of {trained_on:,} tokens; this one has {TOKENS:,}, {TOKENS // trained_on} times as many")
print(f"window of {config.window}; each HSA layer reads {config.top_k} of {TOKENS // config.chunk_size:,} chunks")

# %% [markdown]
# We give it 65,536 tokens of text that it has not seen, with one sentence hidden 30% of the way in: a secret code. Five
# other codes with other names are hidden too. Then we ask for the one. On two cores this takes some seconds.

# %%
haystack = load_corpus("validation").tokens  # encoded once, the first time that anything asks for it
finding = find_needle(model, haystack, tokens=TOKENS, depth=0.3, seed=1)
print(finding.question)
print("expected:", finding.expected)
print("answered:", finding.answer)

# %%
# NBVAL_CHECK_OUTPUT
print("the answer is right:", finding.correct)
print("a needle chunk was retrieved:", finding.retrieved)

# %% [markdown]
# **You should see** `True` twice. One question is no measurement, of course: change `seed` and `depth` and ask again.
#
# ## What did it retrieve?
#
# The model's last question token scored every chunk of the text, once in each HSA layer. Each dot is a chunk. Rings
# are the chunks that were read.


# %%
def best_first(number):
    """The chunks that an HSA layer kept, the highest score first."""
    return sorted(finding.retrieved_chunks[number], key=lambda i: -finding.scores[number, i])


def draw_haystack(axes, number, marked=None):
    """The score of every chunk of the haystack, the chunks kept (rings) and the needle's (a red line)."""
    scores, kept = finding.scores[number], best_first(number)
    axes.scatter(range(len(scores)), scores, s=5, marker="s", color=GREY, linewidths=0, antialiased=False, label="a chunk")
    axes.scatter(kept, scores[kept], s=60, facecolors="none", edgecolors=BLUE, linewidths=1.5, label="retrieved")
    needle = finding.needle_chunks
    for chunk in needle:
        axes.axvline(chunk, color=RED, linewidth=1, zorder=0)
    axes.scatter(needle, scores[needle], s=22, color=RED, linewidths=0, label="the needle")
    if marked is not None:
        axes.scatter(marked, scores[marked], s=260, facecolors="none", edgecolors=ORANGE, linewidths=3, label="shown below")
    axes.margins(y=0.12)  # room for the ring
    axes.set(xlabel="chunk of the text", ylabel="retrieval score", xlim=(-12, len(scores) + 12))
    axes.set_title(f"HSA layer {number}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


# %%
figure = make_figure(8.5, 5)
for number, axes in enumerate(figure.subplots(config.groups, 1, sharex=True, squeeze=False)[:, 0]):
    draw_haystack(axes, number)
    axes.label_outer()
figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
show(
    figure,
    "For each HSA layer, the retrieval scores of all chunks of the text as dots. A red line marks the needle's chunk, and "
    "rings mark the chunks with the highest scores, which are read.",
)

# %% [markdown]
# In at least one of the layers the needle's chunk wears a ring: that was the second `True`. Here is what stands in it, the
# needle between marks (in two chunks, if it happens to lie across a border). All around is ordinary text. Below that: how
# many of the chunks that were read hold a code, the right one or another.

# %%
for chunk in finding.needle_chunks:
    print(f"chunk {chunk}:", finding.chunk_text(chunk), end="\n\n")
for number, kept in enumerate(finding.retrieved_chunks):
    codes = sum("secret code of" in finding.chunk_text(chunk) for chunk in kept)
    print(f"HSA layer {number} kept {len(kept)} chunks; {codes} of them hold a code")


# %% [markdown]
# ### Move it
#
# What else did the model read? Step through the chunks of each layer, best first, and read them yourself. How many hold
# one of the *other* codes, and how much lower are their scores? If hardly lower, the landmarks say "here is a code" and
# not much about whose. Then it is the attention inside the chunks that finds the right one, word by word: first search
# roughly, then read closely.


# %%
def draw_reading(figure, rank, number):
    """The haystack of one HSA layer, and the text of one of the chunks that it kept."""
    chunk = best_first(number)[rank - 1]
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1))
    draw_haystack(top, number, marked=chunk)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    words = textwrap.fill(" ".join(finding.chunk_text(chunk).split()), 92)
    bottom.text(0, 1, words, va="top", fontsize=9.5, family="monospace", color=INK, parse_math=False)
    bottom.set_axis_off()
    what = "it holds the needle" if chunk in finding.needle_chunks else "the needle is not in it"
    kept, score = len(finding.retrieved_chunks[number]), finding.scores[number, chunk]
    return f"HSA layer {number}: chunk {chunk} is number {rank} of {kept} by score ({score:.1f}); {what}."


explore(
    draw_reading,
    alt="The retrieval score of every chunk as a dot, a large ring around the chosen chunk, and the text of that chunk.",
    size=(8.5, 4.4),
    rank=Control((1, min(map(len, finding.retrieved_chunks))), label="number by score"),
    number=Control(list(range(config.groups)), label="HSA layer"),
)

# %% [markdown]
# ## Exercises
#
# **1.** Chunk attention has no positions. So inside a chunk it cannot tell "dog bites man" from "man bites dog", can
# it? Permute the four tokens of the needle, keys and values together, and compare the answers. Then say where a real
# model gets the order inside a chunk from.
#
# <details><summary>Solution</summary>
#
# The answer is the same: a sum does not care about its order.
#
# ```python
# q, k, v = read_by_rule([NEEDLE, FILLERS[0], QUESTION])
# chosen = retrieve(q, norm(v.sum(dim=2)), chunk_size=S, top_k=2, offset=11)
# order = [2, 0, 3, 1]
# permuted = chunk_attention(q, k[:, :, order], v[:, :, order], *chosen)
# print(torch.allclose(chunk_attention(q, k, v, *chosen), permuted))
# assert torch.allclose(chunk_attention(q, k, v, *chosen), permuted)
# ```
#
# But keys and values are not raw words. They are made by layers that *do* know positions: the lower decoder has a
# window with RoPE, and the chunk encoder has RoPE inside the chunk, from 0 to S. Order is written **into** the keys
# and values before they are filed away. Our toy did the same: "two places before it" is a position. Only the distance
# from the chunk to whoever reads it is left out.
#
# </details>
#
# **2.** Without retrieval, how far can the shipped model see at all? Each window layer hands news on by at most W − 1
# tokens. Compute the reach of all its layers from `config`, and how many such layers one would need for 65,536 tokens.
#
# <details><summary>Solution</summary>
#
# ```python
# step = config.window - 1
# reach = (config.lower_layers + config.upper_layers) * step
# layers_needed = -(-TOKENS // step)  # rounded up
# print(reach, "tokens;", layers_needed, "layers")
# assert reach < TOKENS <= layers_needed * step
# ```
#
# And news that is handed on hundreds of times is no longer news. Whatever lies further back than that reach came through
# retrieval: there is no other way.
#
# </details>

# %% [markdown]
# ## What comes next
#
# This was the last notebook on the mechanism. You have every part, and the twelve tokens work. What is missing is speed:
# our loops are slow, and so is plain PyTorch.
#
# [Notebook 06](06_forward_kernel.ipynb), *Where do the milliseconds go?*, turns chunk attention into a GPU kernel, line by
# line, in about 30 minutes. Or see the same model find a needle in a million tokens: `make demo`.
