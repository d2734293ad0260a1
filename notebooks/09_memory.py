# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 09 · What must be kept of 16 million tokens?
#
# A model has read sixteen million tokens. Now it shall say the next one, and then another. What must it still have of all it
# has read? And which of its layers had to read all of it in the first place?
#
# After this notebook you will be able to
#
# * say after every token what lies in the memory: complete chunks, an unfinished one, a few keys and values nearby,
# * fill that memory in three ways, and prove that they end in the same numbers,
# * say why half of the model may skip nearly the whole text, and exactly how many tokens it may not skip,
# * write the bill of four designs: what each keeps, reads and computes for 16 million tokens,
# * keep keys and values *outside* the GPU, fetch what was chosen, and count the bytes,
# * write a memory to a file, so that a long text is read once.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at least
# windows, chunks and retrieval. No GPU. The last part uses the trained model that comes with the repository.

# %%
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
from matplotlib.patches import Patch, Rectangle

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.data.corpus import load_corpus
from hsa_mini.inference.prefill import prefill
from hsa_mini.model.cost_estimate import estimate_cost, scaled
from hsa_mini.paths import data_dir
from hsa_mini.reference import chunk_attention
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREY, INK, ORANGE, PALE, RED, SKY, length_name

# %% [markdown]
# ## The question in plain words
#
# With **full attention** the answer is: everything. Each layer compares the new token with the keys of *all* tokens before, so
# each layer keeps the keys and values of all. [Notebook 01](01_why.ipynb) presented that bill.
#
# With a **window** alone the answer is: nearly nothing. The last $W - 1$ keys and values of each layer, and the rest is gone
# for good.
#
# An HSA model lies between. It keeps the windows, and beside them *one* library: what the chunk encoder made of each
# complete chunk. All HSA layers read the same library.
#
# ## In symbols
#
# | what is kept | in code | shape, one sequence | grows? | who reads it |
# |---|---|---|---|---|
# | keys and values of complete chunks | `k`, `v` | `[N, S, J, D]` | with the text | HSA layers, K chunks a token |
# | landmarks of complete chunks | `landmarks` | `[N, R]` | with the text, S times slower | HSA layers, all of them |
# | the unfinished chunk | `partial` | `[< S, C]` | no | the encoder, once it is complete |
# | window caches, one a block | `lower`, `upper` | `[<= W-1, J, D]` twice | no | that block |
# | how many tokens were read | `position` | a number | | |
#
# N is the number of complete chunks, S their tokens, J key/value heads of size D, R the size of a landmark, C the width of
# the model, W the window. The unfinished chunk waits as it left the lower decoder. It cannot be encoded yet, since the
# encoder looks at a chunk as a whole ([notebook 02](02_chunks.ipynb)).

# %% [markdown]
# ## Twelve tokens, one by one
#
# Our text again, in chunks of S = 4, and a tiny model with a window of W = 4: two blocks below, four above, random
# weights in double precision.

# %%
WORDS = "the code is 7 birds sing at dawn what is the code".split()
TINY = dataclasses.replace(PRESETS["debug"], vocab_size=16, window=4, hsa_heads=2, hsa_kv_heads=1, retrieval_heads=1)


def make(config):
    """A model with random weights, the same in every run."""
    torch.manual_seed(0)
    return HSAModel(config, dtype=torch.float64).eval().requires_grad_(False)


tiny = make(TINY)
ids = torch.tensor([[sorted(set(WORDS)).index(word) for word in WORDS]])
memory = ChunkMemory(TINY)
print("blocks below and above:", TINY.lower_layers, "and", TINY.upper_layers)

# %% [markdown]
# By hand, after $t$ tokens: $\lfloor t / S \rfloor$ chunks are complete, $t \bmod S$ tokens wait, and each window cache
# holds $\min(t, W - 1)$ tokens. Why not $W$? The next token is one of the $W$ that it reads itself.


# %%
def kept_after(t, S, W):
    """Complete chunks, tokens that wait, tokens in each window cache."""
    return t // S, t % S, min(t, W - 1)


# %%
# NBVAL_CHECK_OUTPUT
same = []
for t, token in enumerate(ids.split(1, dim=1), start=1):
    tiny(token, memory)
    chunks, waiting, near = measured = memory.chunks, memory.partial.shape[1], memory.lower[0].k.shape[1]
    same.append(measured == kept_after(t, S=4, W=4))
    if t in (3, 4, 11, 12):
        print(f"after {t:2} tokens, the last is `{WORDS[t - 1]}`: {chunks} chunks, {waiting} wait, {near} in a cache")
print("formula == memory, after every token:", all(same))

# %% [markdown]
# **You should see** the chunk appear at 4 and at 12, and `True`. After the last word three chunks are complete. The word itself
# could not read the third one: a chunk must be complete *before* a token comes. The next token can.
#
# ### Move it
#
# Let the words come, one by one. Blue cells are filed as chunks. Orange ones wait. A red frame marks what the window caches
# still hold. A cell can be filed *and* in a window. Is there a moment when a word is nowhere? Never: that is the point of a
# complete memory. With a window alone it would be the normal case.


# %%
def draw_memory(figure, read, window):
    """The twelve tokens as three chunks: filed, waiting or not read yet, and in the window."""
    chunks, waiting, near = kept_after(read, 4, window)
    axes = figure.subplots()
    for i, word in enumerate(WORDS):
        x, colour = i % 4 + 4.4 * (i // 4), SKY if i < 4 * chunks else ORANGE if i < read else PALE
        axes.add_patch(Rectangle((x, 0), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        axes.text(x + 0.5, 0.5, word, ha="center", va="center", fontsize=11, color=INK if i < read else GREY)
        if read - near <= i < read:
            axes.add_patch(Rectangle((x + 0.06, 0.06), 0.88, 0.88, fill=False, edgecolor=RED, linewidth=2.5))
    axes.set(xlim=(0, 12.8), ylim=(1, 0), frame_on=False, xticks=[], yticks=[])
    names = {SKY: "filed: K, V and a landmark", ORANGE: "waits in `partial`", PALE: "not read yet"}
    marks = [*(Patch(facecolor=c, label=name) for c, name in names.items()), Patch(fill=False, ec=RED, label="in window caches")]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return f"After {read} tokens: {chunks} chunks filed, {waiting} tokens wait, {near} are in every window cache."


explore(
    draw_memory,
    alt="Twelve words in three groups of four, coloured by where they are kept: filed as chunks, waiting, in window caches.",
    size=(9, 1.5),
    read=Control((0, 12), start=11, label="tokens read"),
    window=Control((1, 8), start=4, label="window W"),
)

# %% [markdown]
# ## Three ways to fill it
#
# * **Full**: every layer over all tokens at once, as in training.
# * **Token by token**: as in writing an answer.
# * **Early exit**: the lower decoder and the encoder over all tokens, the upper decoder over the **tail**, the last few tokens
#   alone.
#
# The third looks wrong: half of the layers never see most of the text! But what would they do there? Their outputs for old
# tokens are read by nobody. The library is made *below* them, from the lower decoder. All that the future asks of
# the upper decoder is its last output, and its window caches.


# %%
def full(model, ids):
    """Logits of the last token, and the memory."""
    logits, memory, _ = model(ids)
    return logits[:, -1:], memory


def token_by_token(model, ids):
    """The same, one after the other."""
    memory = ChunkMemory(model.config)
    for token in ids.split(1, dim=1):
        logits = model(token, memory).logits
    return logits, memory


def early_exit(model, ids, tail):
    """The same; the upper decoder reads the last `tail` tokens alone."""
    memory, start = ChunkMemory(model.config), max(ids.shape[1] - tail, 0)
    hidden = model.read(ids, memory)  # lower decoder and encoder
    hidden, _ = model.look_up(hidden[:, start:], start, memory)  # upper decoder
    return model.predict(hidden[:, -1:]), memory


# %% [markdown]
# ## The equality of this notebook
#
# With $U$ blocks above, of window $W$, the tail has to be $U (W - 1) + 1$ tokens. We compare the logits and **every** tensor of
# the memory. In the tiny model, in double precision, 100 tokens. Then in the trained model that comes with the
# repository, in single precision, 600 tokens of real text.


# %%
def contents(memory):
    """Every tensor of a memory, by name."""
    named = {name: getattr(memory, name) for name in ("k", "v", "landmarks", "partial")}
    for half in ("lower", "upper"):
        for i, cache in enumerate(getattr(memory, half)):
            named |= {f"{half} {i} k": cache.k, f"{half} {i} v": cache.v}
    return named


def largest_difference(a, b):
    """Between two results (logits, memory), over all numbers of both."""
    a, b = ({"logits": logits, **contents(memory)} for logits, memory in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].numel())


# %%
# NBVAL_CHECK_OUTPUT
threads = torch.get_num_threads()
torch.set_num_threads(1)  # single tokens are small work: one core is faster than several that wait for each other
mini = HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini").requires_grad_(False)
text = torch.from_numpy(load_corpus("validation").tokens[: 1 << 15].astype("int64"))[None]
random = torch.randint(16, (1, 100), generator=torch.Generator().manual_seed(0))
for name, model, read, bound in (("tiny", tiny, random, 1e-10), ("mini", mini, text[:, :600], 1e-3)):
    U, W = model.config.upper_layers, model.config.window
    one, two, three = full(model, read), token_by_token(model, read), early_exit(model, read, U * (W - 1) + 1)
    print(f"{name}: {U} blocks above, window {W}, tail of {U * (W - 1) + 1} tokens of {read.shape[1]}")
    print("  full == token by token:", largest_difference(one, two) < bound)
    print("  full == early exit    :", largest_difference(one, three) < bound)
torch.set_num_threads(threads)

# %% [markdown]
# **You should see** `True` four times.
#
# ## Why a tail of W is wrong
#
# "The window is 4 tokens, so the last 4 are enough." It sounds right, and it is wrong. The top block reads 4 outputs of the block
# below. The oldest of *those* has read 4 of the block below it. Every block adds $W - 1$. Here is the error of the
# last logits, for every length of the tail.

# %%
# NBVAL_CHECK_OUTPUT
logits, _ = full(tiny, random)
errors = {tail: (early_exit(tiny, random, tail)[0] - logits).abs().max().item() for tail in range(1, 21)}
exact = [tail for tail, error in errors.items() if error < 1e-12]
print("a tail of W = 4 is exact:", errors[4] < 1e-12)
print("the shortest exact tail :", exact[0], "  U * (W - 1) + 1 =", 4 * 3 + 1)

# %%
figure = make_figure(8.5, 2.8)
axes = figure.subplots()
colours = [BLUE if tail in exact else RED for tail in errors]
axes.bar(list(errors), [max(error, 1e-17) for error in errors.values()], color=colours)
axes.set(xlabel="tail of the upper decoder, in tokens", ylabel="error of the logits")
axes.set(yscale="log", xticks=range(1, 21), ylim=(1e-17, 1))
axes.text(4, errors[4] * 1.4, "W", ha="center", color=INK)
axes.text(12.7, 3e-16, "U (W - 1) + 1 = 13 and more", color=INK)
axes.spines[["top", "right"]].set_visible(False)
show(
    figure,
    "The error of the last logits for a tail of 1 to 20 tokens, on a logarithmic axis. It falls slowly, is still far from "
    "zero at a tail of 4, and drops to the rounding of double precision at 13, where it stays.",
)

# %% [markdown]
# Up to 12 the error is there, small and quiet: no test that looks at a few answers would find it. At 13 it is gone.
#
# ### The reach, by experiment
#
# Nobody has to believe the formula. **Change one token and see what moves.** We do it for each of 40 tokens, in two
# ways. Once we change what *enters the upper decoder* at one place, and leave the library as it is. Once we change the
# *token itself*, so that lower decoder, library and upper decoder all see it.


# %%
def felt(model, ids, *, library):
    """[T, T]: row t, column i: do the logits of token t move when token i is changed? library: does it change too?"""
    T, every = ids.shape[1], torch.arange(ids.shape[1])
    rows, memory = ids.expand(T, -1).clone(), ChunkMemory(model.config)  # row i is the text in which token i is changed
    hidden = model.read(rows, memory)
    rows[every, every] = (rows[every, every] + 1) % model.config.vocab_size
    if library:
        before, after = (model(x).logits for x in (ids.expand(T, -1), rows))
    else:
        before = model.predict(model.look_up(hidden, 0, memory.branch())[0])
        hidden[every, every] += 1
        after = model.predict(model.look_up(hidden, 0, memory.branch())[0])
    return ((after - before).abs().amax(dim=-1) > 1e-12).T


# %% [markdown]
# (`branch` makes a memory that goes on from here, with caches of its own.) **You should see** that the formula counts exactly
# the inputs of the upper decoder that the last token feels, for three windows, and that with the library it feels more.

# %%
# NBVAL_CHECK_OUTPUT
forty = random[:, :40]
for W in (2, 4, 6):
    last = felt(make(dataclasses.replace(TINY, window=W)), forty, library=False)[-1]
    print(f"W = {W}: the last token feels {int(last.sum()):2} inputs; U * (W - 1) + 1 = {4 * (W - 1) + 1}")
further = felt(tiny, forty, library=True)[-1]
print("with the library it feels tokens outside the windows of all blocks:", bool(further[: -6 * 3 - 1].any()))

# %% [markdown]
# ### Move it
#
# Rows are tokens that look, columns are tokens that were changed. Without the library you see a band, and nothing but a band:
# its width is $U (W - 1) + 1$. With the library the band gets wider ($L$ more blocks, the lower ones), and **islands** appear
# far away from it: chunks that were retrieved, by the token itself or by one that it reads, and what had flowed into them
# below. Make the window small, and watch the islands take over.


# %%
def draw_felt(figure, window, library, top_k):
    model = make(dataclasses.replace(TINY, window=window, top_k=top_k))
    moved, axes = felt(model, forty, library=library), figure.subplots()
    blocks = model.config.upper_layers + (model.config.lower_layers if library else 0)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    shade = torch.where(moved, torch.where(distance <= blocks * (window - 1), 1, 2), 0)
    for value, colour, name in ((1, BLUE, "felt through windows"), (2, ORANGE, "felt through retrieval alone")):
        t, i = (shade == value).nonzero(as_tuple=True)
        axes.scatter(i, t, s=22, marker="s", color=colour, linewidths=0, label=name)
    axes.set(xlim=(-1, 40), ylim=(40, -1), xlabel="token that is changed", ylabel="token that looks", aspect="equal")
    axes.vlines([i - 0.5 for i in range(4, 40, 4)], -1, 40, color=PALE, zorder=0)  # between chunks
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=10)
    alone = int((shade[-1] == 2).sum())
    return f"W = {window}: the last token feels {int(moved[-1].sum())} of 40 tokens, {alone} by retrieval alone."


explore(
    draw_felt,
    alt="A map of 40 tokens that look against 40 that are changed: a band along the diagonal, and islands through retrieval.",
    size=(5.6, 4.8),
    window=Control((1, 8), start=2, label="window W"),
    library=Control(bool, start=True, label="the library changes too"),
    top_k=Control((1, 4), start=1, label="chunks kept K"),
)

# %% [markdown]
# ## What each layer reads
#
# The same as a building. Each row is a layer, the bottom row is the text. **Blue** cells had to be computed. The lower decoder
# and the encoder run over everything. Of the upper decoder a staircase at the right end is needed, $W - 1$ tokens less with each
# block, up to a single token at the top. (A program computes the whole tail in each block: pale blue. That is simpler and
# costs little.) **Orange** chunks are those that the two HSA layers retrieved for the last token.


# %%
COMPUTED = "#CFE3F1"


def needed(U, W, block):
    """Outputs of an upper block (0 is the lowest) that the last logits depend on."""
    return (U - 1 - block) * (W - 1) + 1


def draw_upper(axes, y, U, tokens, window):
    """The upper decoder from row y on: what is computed, and what of it is needed."""
    tail = min(U * (window - 1) + 1, tokens)
    for i in range(U):
        axes.barh(y + i, tail, left=tokens - tail, color=COMPUTED)
        axes.barh(y + i, min(needed(U, window, i), tokens), left=max(tokens - needed(U, window, i), 0), color=BLUE)
    return tail


def draw_building(figure, tokens, window):
    model, axes = make(dataclasses.replace(TINY, window=window)), figure.subplots()
    (_, memory, aux), L, U = prefill(model, random.repeat(1, 2)[:, :tokens]), TINY.lower_layers, TINY.upper_layers
    read = {i for retrieval in aux.retrievals for i in retrieval.indices[0, -1].flatten().tolist()}
    axes.barh(range(L), [tokens] * L, color=BLUE)
    axes.barh([L] * memory.chunks, 3.6, left=[4 * i + 0.2 for i in range(memory.chunks)], color=BLUE)
    axes.barh([L] * len(read), 3.6, left=[4 * i + 0.2 for i in read], color=ORANGE)
    tail = draw_upper(axes, L + 1, U, tokens, window)
    names = [f"lower {i}" for i in range(L)] + ["chunks"] + [f"upper {i}" + " + HSA" * (i % 2 == 0) for i in range(U)]
    axes.set(xlim=(-1, tokens), xlabel="token", yticks=range(L + 1 + U), yticklabels=names, frame_on=False)
    axes.tick_params(axis="y", length=0)
    kinds = {BLUE: "needed", COMPUTED: "computed, not needed", ORANGE: "retrieved for the last token"}
    marks = [Patch(color=colour, label=kind) for colour, kind in kinds.items()]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, frameon=False)
    return f"{tokens} tokens, W = {window}: the tail is {tail}; the upper decoder skips {1 - tail / tokens:.0%} of the text."


explore(
    draw_building,
    alt="Layers as rows, tokens as columns. Lower layers and chunks fill the whole width, upper layers a staircase at the end.",
    size=(9, 3.2),
    tokens=Control((16, 200, 4), start=100, label="tokens T"),
    window=Control((2, 12), start=6, label="window W"),
)

# %% [markdown]
# Does it pay? The trained model on 8,192 tokens of text, in full and with early exit. For the 8B model the tail is 57,331
# tokens: long, but of 16 million tokens it is a third of a percent.

# %%
began = time.perf_counter()
all_logits, _ = full(mini, text[:, :8192])
middle = time.perf_counter()
tail_logits, _ = early_exit(mini, text[:, :8192], mini.config.upper_tail)
print(f"full {middle - began:.1f} s, early exit {time.perf_counter() - middle:.1f} s")
big = PRESETS["ul_8b_a1b"]
print(f"8B: {big.upper_layers} x {big.window - 1} + 1 = {big.upper_tail:,} tokens, {big.upper_tail / 2**24:.2%} of 16M")

# %%
# NBVAL_CHECK_OUTPUT
print("the same logits:", torch.allclose(all_logits, tail_logits, atol=1e-3))

# %% [markdown]
# ## The bill of 16 million tokens
#
# Four designs, with the sizes of the 8B model:
#
# 1. **full attention** in all 28 blocks, with a KV cache in each,
# 2. **a window alone** in all 28 blocks,
# 3. **HSA**: windows, and one library for seven HSA layers, all on the GPU,
# 4. **HSA, library outside**: keys and values lie in the memory of the host. On the GPU are landmarks and windows. For each
#    token the chosen chunks are fetched.
#
# What each **keeps** on the GPU and on the host, what a new token **reads**, and how many FLOP its attention **computes**. (The
# matrices, some 2.6 GFLOP a token, are the same in all designs, but for HSA's own few.)


# %%
def bill(c, T, size=2):
    """Four designs -> bytes on the GPU, on the host, read for a new token, fetched from the host; FLOP of attention."""
    blocks, N = c.lower_layers + c.upper_layers, T // c.chunk_size
    token, seen = 2 * blocks * c.kv_heads * c.head_dim * size, min(T, c.window - 1)
    chunk = 2 * c.chunk_size * c.hsa_kv_heads * c.hsa_head_dim * size  # K and V of a chunk
    marks, kept = N * c.retrieval_heads * c.retrieval_dim * size, min(c.top_k, N)
    near, fetched, flop = token * seen, c.groups * kept * chunk, 4 * blocks * c.heads * c.head_dim
    far = 2 * c.retrieval_heads * c.retrieval_dim * N + 4 * c.hsa_heads * c.hsa_head_dim * kept * c.chunk_size
    reads, far = near + c.groups * marks + fetched, c.groups * far
    return {
        "full attention": (token * T, 0, token * T, 0, flop * (T + 1)),
        "window alone": (near, 0, near, 0, flop * (seen + 1)),
        "HSA": (near + marks + N * chunk, 0, reads, 0, flop * (seen + 1) + far),
        "HSA, library outside": (near + marks, N * chunk, reads, fetched, flop * (seen + 1) + far),
    }


# %% [markdown]
# First check it. `estimate_cost` takes its bytes from the tensors of the model itself. Its FLOP contain the matrices as well, so we
# compare how much they *grow* from 1M to 16M tokens: growth is attention's alone.

# %%
# NBVAL_CHECK_OUTPUT
few, many = estimate_cost("ul_8b_a1b", 1 << 20), estimate_cost("ul_8b_a1b", 1 << 24)
now, then = bill(big, 1 << 20), bill(big, 1 << 24)
caches = many.window_cache_bytes, many.window_cache_bytes + many.landmark_bytes
print("bytes kept == plan:", [row[0] for row in then.values()] == [
    many.full_attention_kv_bytes, caches[0], caches[1] + many.kv_bytes, caches[1]
])  # fmt: skip
grown = {name: then[name][4] - now[name][4] for name in ("full attention", "HSA")}
print("growth of full attention == plan:", grown["full attention"] == (
    many.full_attention_decode_flops_per_token - few.full_attention_decode_flops_per_token
))  # fmt: skip
print("growth of HSA == plan           :", grown["HSA"] == many.decode_flops_per_token - few.decode_flops_per_token)

# %%
# NBVAL_CHECK_OUTPUT
print(f"{'16M tokens':21}{'on the GPU':>12}{'on the host':>12}{'reads':>12}{'fetches':>12}{'attention':>14}")
for name, (gpu, host, reads, fetched, flop) in then.items():
    sizes = [scaled(x, "B") if x else "-" for x in (gpu, host, reads, fetched)]
    print(f"{name:21}" + "".join(f"{x:>12}" for x in sizes) + f"{scaled(flop, 'FLOP'):>14}")

# %% [markdown]
# **You should see** `True` three times, and then four very different models. Full attention needs a dozen large GPUs for one
# text, and reads all of it for every token. The window keeps a quarter of a gigabyte, and has forgotten nearly everything.
# HSA keeps a *hundredth* of full attention. And with the library outside, what is left on the GPU is 300 MB, while 14.7 MB
# are fetched for each token. On a bus that moves 25 GB a second that takes 0.6 milliseconds.
#
# Does it hold? `python kernels/bench --model ul_8b_a1b` ran the 8B model, with random weights, on the GPU named below. These are
# its numbers as stored, not measured here.

# %%
stored = json.loads((data_dir() / "results" / "ul_8b_a1b.json").read_text())
near = 1 / stored["decode_64k_tokens_per_second"]
far = near * stored["decode_16m_over_64k"]
outside = far * stored["offload_slowdown"]
print(f"stored: {stored['hardware']}, commit {stored['commit'][:7]}")
print(f"weights              {scaled(many.weight_bytes, 'B')}")
print(f"read 16M tokens      {stored['prefill_16m_seconds']:.0f} s, {stored['prefill_16m_peak_bytes'] / 1e9:.1f} GB in use")
print(f"    a token of 16M over a token of 1M {stored['prefill_16m_over_1m_per_token']:.2f}")
print(f"a new token behind 64K tokens         {near * 1e3:.2f} ms")
print(f"    behind 16M                        {far * 1e3:.2f} ms")
print(f"    behind 16M, library outside       {outside * 1e3:.2f} ms, {stored['offload_16m_device_bytes'] / 1e9:.1f} GB in use")
fetched = then["HSA, library outside"][3]
print(f"fetched: {scaled(fetched, 'B')} in {(outside - far) * 1e3:.2f} ms, {fetched / (outside - far) / 1e9:.0f} GB a second")

# %% [markdown]
# **You should see** that reading costs the same per token at any length, and that a new token hardly notices sixteen million
# others, whether they lie on the GPU or outside. What is in use is mostly the weights.
#
# ### Move it
#
# All bars are logarithmic: a grid line is a factor of a thousand. At which length does full attention stop fitting into 80 GB
# (the dashed line)? What does a longer window cost, and whom? What does K change?


# %%
def bars(axes, values, colour, unit, limits, title):
    """Horizontal bars on a logarithmic axis with their numbers; nothing where the value is 0."""
    shown = axes.barh(list(values), [max(value, 1) for value in values.values()], color=colour, height=0.7)
    axes.bar_label(shown, [scaled(value, unit) if value else "" for value in values.values()], padding=3, fontsize=9)
    axes.set(xscale="log", xlim=limits, title=title, xticks=[10.0**n for n in range(6, 16, 3) if 10.0**n < limits[1]])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(axis="x", color=PALE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_designs(figure, tokens, window, K):
    rows = bill(dataclasses.replace(big, window=window, top_k=K), tokens)
    titles = ("kept on the GPU", "kept on the host", "read for a token", "attention, a token")
    columns = zip(figure.subplots(1, 4, sharey=True), (0, 1, 2, 4), (BLUE, ORANGE, BLUE, GREY), titles)
    for axes, number, colour, title in columns:
        unit, limits = ("FLOP", (1e7, 1e16)) if number == 4 else ("B", (1e5, 3e15))
        bars(axes, {name: row[number] for name, row in rows.items()}, colour, unit, limits, title)
        axes.title.set_fontsize(11)
        if number == 0:
            axes.axvline(80e9, color=RED, linestyle="--", linewidth=1, zorder=0)
    times, fetched = rows["full attention"][0] / rows["HSA"][0], scaled(rows["HSA, library outside"][3], "B")
    return f"{length_name(tokens)} tokens: full attention keeps {times:.1f} times as much as HSA; {fetched} fetched a token."


explore(
    draw_designs,
    alt="Four panels of bars for four designs: bytes kept on the GPU, on the host, read for a token, and FLOP of attention.",
    size=(11, 2.7),
    tokens=Control([(length_name(1 << n), 1 << n) for n in range(12, 25)], start=1 << 24, label="tokens"),
    window=Control([(length_name(1 << n), 1 << n) for n in range(9, 16)], start=4096, label="window W"),
    K=Control([16, 32, 64, 128, 256], start=64, label="chunks kept K"),
)

# %% [markdown]
# ## The library outside
#
# How does one attend to chunks that are elsewhere? Retrieval needs landmarks alone, and they are here. Then it is known *which*
# chunks are wanted. So: list the **distinct** ones, fetch them, **renumber** the choice, and attend as always. The
# operation does not notice: chunks have no positions, so it cannot tell number 3 of a few from number 417 of many.


# %%
def attend_fetching(q, k, v, indices, weights):
    """Chunk attention of one sequence whose k and v [1, N, S, J, D] lie elsewhere -> out, and how many chunks came."""
    wanted, places = indices.unique(return_inverse=True)  # sorted, so -1 is the first if a slot is empty
    empty = int((wanted < 0).any())
    k, v = (store[:, wanted[empty:].long()] for store in (k, v))  # the only traffic
    return chunk_attention(q, k, v, (places - empty).int(), weights), k.shape[1]


# %% [markdown]
# We try it where it matters, on the trained model behind 32,768 tokens of real text. Its HSA layers are asked what they asked
# for, and what they got, for the last 512 tokens.


# %%
def listen(model, ids):
    """Prefill; what every HSA layer asked in its tail: queries q [1, T, H, D], and its retrieval; and the memory."""
    heard, layers = [], [block.hsa for block in model.upper if block.hsa is not None]
    hooks = [hsa.register_forward_hook(lambda hsa, given, out: heard.append((hsa, given[0], out[1]))) for hsa in layers]
    memory = prefill(model, ids).memory
    for hook in hooks:
        hook.remove()
    asked = [(hsa.q_norm(hsa.q(x).unflatten(-1, (-1, hsa.config.hsa_head_dim))), found) for hsa, x, found in heard]
    return asked, memory


began = time.perf_counter()
asked, memory = listen(mini, text)
reading = time.perf_counter() - began
print(f"{text.shape[1]:,} tokens read in {reading:.1f} s; {memory.chunks} chunks in the library")

# %%
# NBVAL_CHECK_OUTPUT
for layer, (q, found) in enumerate(asked):
    usual = chunk_attention(q, memory.k, memory.v, found.indices, found.weights)
    fetched, count = attend_fetching(q, memory.k, memory.v, found.indices, found.weights)
    print(f"HSA layer {layer}: fetching == usual: {torch.allclose(usual, fetched, atol=1e-5)}")

# %% [markdown]
# **You should see** `True` twice. The package does the same for a memory that is made with `offload=True`: on a GPU its chunks
# wait in pinned host memory, and what the next tokens want is fetched while these attend.

# %%
# NBVAL_CHECK_OUTPUT
inside, outside = (prefill(mini, text, ChunkMemory(mini.config, offload=offload)) for offload in (False, True))
print("offloaded == usual:", torch.allclose(outside.logits, inside.logits, atol=1e-4))
kept = {name: output.memory.device_bytes for name, output in (("usual", inside), ("offloaded", outside))}
print("less than half stays on the device:", kept["offloaded"] < kept["usual"] / 2)

# %% [markdown]
# **You should see** `True` twice again. Now the bytes. One token wants at most K = 8 chunks. But do 100 tokens want 800? Neighbours
# mean similar things, so they choose alike, and a chunk that was fetched for one serves all.


# %%
def distinct(indices, n):
    """Chunks that the last n tokens want together; indices [1, T, J, K]."""
    return len(set(indices[0, -n:].flatten().tolist()) - {-1})


# %%
chunk_bytes = memory.k[:, :1].nbytes + memory.v[:, :1].nbytes
print(f"a chunk is {scaled(chunk_bytes, 'B')}, the library {scaled(memory.chunks * chunk_bytes, 'B')}")
for n in (1, 8, 64, 509):
    together, alone = [distinct(found.indices, n) for _, found in asked], n * mini.config.top_k
    fetched = scaled(sum(together) * chunk_bytes, "B")
    print(f"the last {n:3} tokens: {together} chunks in the two layers, one by one {alone} in each; {fetched}")

# %%
# NBVAL_CHECK_OUTPUT
shares = [distinct(found.indices, 64) / (64 * mini.config.top_k) for _, found in asked]
print("64 tokens together want less than half of what they want one by one:", max(shares) < 0.5)

# %% [markdown]
# ### Move it
#
# Every cell is a chunk of the library, row by row. Coloured ones were fetched for the last tokens, the darker the more of those
# tokens read it. Move **tokens**: how slowly it fills! Then look at the other layer.


# %%
def draw_fetched(figure, tokens, layer):
    indices, axes = asked[layer][1].indices[0, -tokens:].flatten(), figure.subplots()
    counts = torch.bincount(indices[indices >= 0].long(), minlength=memory.chunks)
    shown = torch.where(counts > 0, counts, float("nan")).view(-1, 64)
    axes.set_facecolor(PALE)
    image = axes.imshow(shown, cmap="YlGnBu", vmin=0, aspect="auto", interpolation="nearest")
    axes.hlines([y - 0.5 for y in range(1, 8)], -0.5, 63.5, color="white", linewidth=1)
    axes.vlines([x - 0.5 for x in range(1, 64)], -0.5, 7.5, color="white", linewidth=1)
    axes.set(xticks=[0, 63], yticks=range(8), yticklabels=[64 * y for y in range(8)], ylabel="chunk")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="tokens that read it", pad=0.01)
    count, alone = distinct(asked[layer][1].indices, tokens), tokens * mini.config.top_k
    fetched = scaled(count * chunk_bytes, "B")
    return f"{tokens} tokens fetch {count} of {memory.chunks} chunks, {fetched}; one by one it would be {alone}."


explore(
    draw_fetched,
    alt="512 chunks as cells in eight rows; those that were fetched are coloured by how many tokens read them.",
    size=(10, 2.6),
    tokens=Control([1, 2, 4, 8, 16, 32, 64, 128, 256, 509], start=8, label="the last tokens"),
    layer=Control([0, 1], start=0, label="HSA layer"),
)

# %% [markdown]
# ## Reading once
#
# A memory is all that a model needs of a text. So it can be written to a file, and a book need not be read again for
# every question. `save` writes a folder with tensors and checksums, `load` verifies it and maps the tensors from the file: their
# pages come in as they are used.

# %%
with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    memory.save(Path(folder) / "book")
    saved = time.perf_counter()
    loaded = ChunkMemory.load(Path(folder) / "book")
    done = time.perf_counter()
    size = (Path(folder) / "book" / "memory.safetensors").stat().st_size
    question = text[:, :5]
    answers = [mini(question, branch).logits for branch in (memory.branch(), loaded)]
print(f"read {reading:.2f} s, save {saved - began:.2f} s, load {done - saved:.2f} s")

# %%
# NBVAL_CHECK_OUTPUT
print("loaded == never saved:", torch.equal(*answers))
tensors = sum(tensor.nbytes for tensor in contents(memory).values())
print(f"bytes of the tensors {tensors:,}, of the file {100 * size / tensors:.1f}% of them")

# %% [markdown]
# **You should see** `True`. Our small model keeps half a megabyte of a thousand tokens, in single precision. The 8B, in 16 bits,
# keeps no more: it has 16 heads that *ask*, and one that is kept.
#
# ## Exercises
#
# **1.** A token changes somewhere in the middle of a long text. Which chunks of the library have to be made anew? Find the first
# and the last for token $i$, in terms of $S$, $W$ and the number of lower blocks $L$. Check it on the tiny model.
#
# <details><summary>Solution</summary>
#
# The lower decoder hands news on by $W - 1$ tokens a block, so the outputs from $i$ to $i + L (W - 1)$ change
# (`config.lower_reach`), and with them the chunks that these lie in.
#
# ```python
# S, reach = TINY.chunk_size, TINY.lower_reach
# assert reach == TINY.lower_layers * (TINY.window - 1)
# before = full(tiny, random)[1].landmarks
# for i in (0, 17, 50):
#     changed = random.clone()
#     changed[0, i] = (changed[0, i] + 1) % 16
#     moved = (full(tiny, changed)[1].landmarks != before).any(dim=-1).any(dim=-1)[0].nonzero()[:, 0].tolist()
#     print(i, moved)
#     assert moved == list(range(i // S, (i + reach) // S + 1))
# ```
#
# So a needle can be put into sixteen million tokens that were read already, by encoding a few chunks again. The package's
# evaluation does that.
#
# </details>
#
# **2.** The last *logits* need $U (W - 1) + 1$ inputs of the upper decoder. Do its *window caches* need as many? Think of the top
# block: how old is the oldest token in its cache, and what did that token's key see? Then try `early_exit` with one token
# less, and compare the caches and the logits.
#
# <details><summary>Solution</summary>
#
# One less. The top block's cache holds the last $W - 1$ keys, and a key is made of the block's *input*, which has passed $U - 1$
# blocks. That is $(W - 1) + (U - 1)(W - 1) = U (W - 1)$.
#
# ```python
# exact, shorter, too_short = full(tiny, random), early_exit(tiny, random, 12), early_exit(tiny, random, 11)
#
#
# def caches_differ(a, b):
#     return max((x - y).abs().max().item() for x, y in zip(contents(a[1]).values(), contents(b[1]).values()) if x.numel())
#
#
# print("12: logits", (shorter[0] - exact[0]).abs().max().item(), "caches", caches_differ(shorter, exact))
# assert caches_differ(shorter, exact) < 1e-12 < (shorter[0] - exact[0]).abs().max()
# assert caches_differ(too_short, exact) > 1e-12
# ```
#
# So with a tail of $U (W - 1)$ the logits of the very next word would be a little wrong, and all later ones right. That kind of
# error is found by identities, and hardly by anything else.
#
# </details>

# %% [markdown]
# ## What comes next
#
# The model reads, remembers, and forgets nothing that it may need. What stands in its blocks beside attention is still missing:
# the networks that think, where nearly all parameters are.
#
# [Notebook 10](10_model_and_experts.ipynb), *How do 8 billion parameters cost one?*, builds them, and the whole model, in about
# 30 minutes.
