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
# A model has read sixteen million tokens. Now it must predict the next token, and the one after. What must it still
# have of all that it has read? And which of its layers had to read all of it in the first place?
#
# After this notebook you will be able to
#
# * list what the memory holds after every token: complete chunks, an unfinished chunk, a few recent keys and values,
# * fill that memory by three methods, and prove that they end with the same numbers,
# * explain why half of the model may skip nearly the whole text, and exactly how many tokens it may not skip,
# * write the bill of four designs: what each design keeps, reads and computes for 16 million tokens,
# * keep keys and values *outside* the GPU, fetch the chosen chunks, and count the bytes,
# * write a memory to a file, so that a long text is read only once.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at
# least windows, chunks and retrieval. You need no GPU. The last part uses the trained model that comes with the
# repository.
#
# [← 08 retrieval and decode kernels](08_retrieval_and_decode_kernels.ipynb) · [map of the course](00_start.ipynb) · [10 model and experts →](10_model_and_experts.ipynb)

# %%
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.data.corpus import load_corpus
from hsa_mini.inference.prefill import prefill
from hsa_mini.model.cost_estimate import estimate_cost, scaled
from hsa_mini.paths import data_dir
from hsa_mini.reference import chunk_attention
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.course import side_by_side
from hsa_mini.viz.kernels import (
    computed_layers,
    fetched_map,
    memory_strip,
    reach_by_kind,
    tail_errors,
)
from hsa_mini.viz.style import length_name

# %% [markdown]
# ## The question in plain words
#
# With **full attention** the answer is: everything. Each layer compares the new token with the keys of *all* earlier
# tokens, so each layer keeps all keys and values. [Notebook 01](01_why.ipynb) presented that bill.
#
# With only a **window** the answer is: nearly nothing. Each layer keeps the last $W - 1$ keys and values. Everything
# older is lost.
#
# An HSA model lies in between. It keeps the windows and, beside them, *one* library: the keys, values and landmarks
# that the chunk encoder made of each complete chunk. All HSA layers read the same library.
#
# ## In symbols
#
# | what is kept | in code | shape, one sequence | does it grow? | which part reads it |
# |---|---|---|---|---|
# | keys and values of complete chunks | `chunks.k`, `chunks.v` | `[N, S, J, D]` | with the text | HSA layers, K chunks per token |
# | landmarks of complete chunks | `chunks.landmarks` | `[N, R]` | with the text, S times more slowly | HSA layers, all landmarks |
# | the unfinished chunk | `tail` | `[S, C]` | no | the encoder, once the chunk is complete |
# | window caches, one per block | `lower`, `upper` | `[W, J, D]` twice | no | the block itself |
# | how many tokens were read | `position` | a number | | |
#
# N is the number of complete chunks, S the number of tokens in a chunk, J the number of key/value heads, D their size,
# R the size of a landmark, C the width of the model, W the window. Each window cache is a `RollingKVCache` with W
# slots: position $p$ lies in slot $p \bmod W$, so a new token takes the slot of the oldest one. The tokens of the
# unfinished chunk wait in the tail, as the vectors that the lower decoder made of them: position $p$ lies in slot $p
# \bmod S$. This chunk cannot be encoded yet, because the encoder needs the whole chunk ([notebook
# 02](02_chunks.ipynb)).

# %% [markdown]
# ## Twelve tokens, one by one
#
# We use our text again, in chunks of S = 4, and a tiny model with a window of W = 4. It has two blocks in the lower
# decoder and four in the upper decoder, and random weights in double precision.

# %%
WORDS = ["the", "code", "is", "7", "birds", "sing", "at", "dawn", "what", "is", "the", "code"]
TINY = dataclasses.replace(PRESETS["debug"], vocab_size=16, window=4, hsa_heads=2, hsa_kv_heads=1, retrieval_heads=1)


def make(config):
    """A model with random weights, the same in every run."""
    torch.manual_seed(0)
    return HSAModel(config, dtype=torch.float64).eval().requires_grad_(False)


tiny = make(TINY)
ids = torch.tensor([[sorted(set(WORDS)).index(word) for word in WORDS]])
memory = ChunkMemory(TINY)
print("blocks in the lower and the upper decoder:", TINY.lower_layers, "and", TINY.upper_layers)

# %% [markdown]
# By hand, after $t$ tokens: $\lfloor t / S \rfloor$ chunks are complete, $t \bmod S$ tokens wait, and each window cache
# holds $\min(t, W - 1)$ tokens. Why not $W$? The next token reads $W$ tokens, and one of them is itself: one slot is
# free for it. Here a free slot holds zeros, so we can count the slots that hold a token.
#
# **You should see** a new chunk at 4 and at 12 tokens, and `True`.


# %%
def kept_after(t, S, W):
    """Complete chunks, waiting tokens, tokens in each window cache."""
    return t // S, t % S, min(t, W - 1)


def filled(part):
    """How many slots of a tensor [1, slots, ...] hold a token."""
    return int(part[0].flatten(start_dim=1).any(dim=1).sum())


# %%
# NBVAL_CHECK_OUTPUT
same = []
for t, token in enumerate(ids.split(1, dim=1), start=1):
    tiny(token, memory)
    measured = len(memory.chunks), filled(memory.tail), filled(memory.lower[0].k)
    chunks, waiting, near = measured
    same.append(measured == kept_after(t, S=4, W=4))
    if t in (3, 4, 11, 12):
        print(f"after {t:2} tokens, the last is `{WORDS[t - 1]}`: {chunks} chunks, {waiting} wait, {near} in a cache")
print("formula == memory, after every token:", all(same))

# %% [markdown]
# After the last word three chunks are complete. The last word itself could not read the third chunk: a chunk must be
# complete *before* a token comes. The next token can read it.
#
# ### Move it
#
# Let the words arrive one by one. Blue cells are stored in chunks. Orange cells wait. A red frame marks the words that
# the window caches still hold. A word can be in a chunk *and* in a window. Is there a moment when a word is nowhere?
# There is none, so the memory is complete. If the model had only a window, most words of a long text would be nowhere.


# %%
def draw_memory(figure, read, window):
    """Where each of the twelve words is kept after `read` tokens."""
    chunks, waiting, near = kept_after(read, 4, window)
    memory_strip(figure, WORDS, 4, read=read, chunks=chunks, near=near)
    return f"After {read} tokens: {chunks} chunks stored, {waiting} tokens wait, {near} are in every window cache."


explore(
    draw_memory,
    alt="Twelve words in three groups of four, coloured by where they are kept: in chunks, waiting, in window caches.",
    size=(9, 1.5),
    read=Control((0, 12), start=11, label="tokens read"),
    window=Control((1, 8), start=4, label="window W"),
)

# %% [markdown]
# ## Three methods to fill it
#
# * **Full**: every layer processes all tokens at once, as in training.
# * **Token by token**: as when the model generates an answer.
# * **Early exit**: the lower decoder and the encoder process all tokens. The upper decoder processes only the **upper
#   tail**, the last few tokens.
#
# The third method looks wrong: half of the layers never see most of the text! But what would they do there? No later
# step reads their outputs for old tokens. The library is made *below* them, from the output of the lower decoder. The
# future needs only two things from the upper decoder: its last output, and its window caches.
#
# In the package these steps are `lower_decoder`, `append_chunks` (it encodes the complete chunks and appends them to
# the library), `upper_decoder` and `logits`.


# %%
def full(model, ids):
    """Logits of the last token, and the memory."""
    logits, memory, _ = model(ids)
    return logits[:, -1:], memory


def token_by_token(model, ids):
    """The same results, one token after the other."""
    memory = ChunkMemory(model.config)
    for token in ids.split(1, dim=1):
        logits = model(token, memory).logits
    return logits, memory


def early_exit(model, ids, upper_tail):
    """The same results; the upper decoder processes only the last `upper_tail` tokens."""
    memory = ChunkMemory(model.config)
    hidden = model.lower_decoder(ids, memory)
    model.append_chunks(hidden, memory)
    hidden, _ = model.upper_decoder(hidden[:, -upper_tail:], memory)
    return model.logits(hidden[:, -1:]), memory


# %% [markdown]
# ## The equality of this notebook
#
# With $U$ upper blocks of window $W$, the upper tail must be $U (W - 1) + 1$ tokens long. We compare the logits and
# **every** tensor of the memory. First we use the tiny model in double precision, with 100 tokens. Then we use the
# trained model that comes with the repository, in single precision, with 600 tokens of real text.
#
# **You should see** `True` four times.


# %%
def contents(memory):
    """Every tensor of a memory, by name; the caches in the order of time, and no free slots."""
    named = {name: getattr(memory.chunks, name) for name in ("k", "v", "landmarks")}
    named["tail"] = memory.tail[:, : memory.position % memory.config.chunk_size]
    for half in ("lower", "upper"):
        for i, cache in enumerate(getattr(memory, half)):
            k, v = cache.in_order(memory.position)
            named |= {f"{half} {i} k": k, f"{half} {i} v": v}
    return named


def largest_difference(a, b):
    """The largest difference between two results (logits, memory), over all numbers of both."""
    a, b = ({"logits": logits, **contents(memory)} for logits, memory in (a, b))
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].numel())


# %%
# NBVAL_CHECK_OUTPUT
threads = torch.get_num_threads()
torch.set_num_threads(1)  # a single token is little work: one core is faster than several that wait for each other
mini = HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini").requires_grad_(False)
text = torch.from_numpy(load_corpus("validation").tokens[: 1 << 15].astype("int64"))[None]
random = torch.randint(16, (1, 100), generator=torch.Generator().manual_seed(0))
for name, model, tokens, bound in (("tiny", tiny, random, 1e-10), ("mini", mini, text[:, :600], 1e-3)):
    U = model.config.upper_layers
    W = model.config.window
    tail = U * (W - 1) + 1
    reference = full(model, tokens)
    print(f"{name}: {U} upper blocks, window {W}, upper tail of {tail} tokens of {tokens.shape[1]}")
    print("  full == token by token:", largest_difference(reference, token_by_token(model, tokens)) < bound)
    print("  full == early exit    :", largest_difference(reference, early_exit(model, tokens, tail)) < bound)
torch.set_num_threads(threads)

# %% [markdown]
# ## Why an upper tail of W tokens is wrong
#
# "The window is 4 tokens, so the last 4 are enough." It sounds right, and it is wrong. The top block reads 4 outputs of
# the block below. The oldest of *those* has read 4 outputs of the next block below. Every block adds $W - 1$. We
# compute the error of the last logits for every length of the upper tail.
#
# **You should see** `False`, and 13 twice.

# %%
# NBVAL_CHECK_OUTPUT
logits, _ = full(tiny, random)
errors = {tail: (early_exit(tiny, random, tail)[0] - logits).abs().max().item() for tail in range(1, 21)}
exact = [tail for tail, error in errors.items() if error < 1e-12]
print("an upper tail of W = 4 is exact:", errors[4] < 1e-12)
print("the shortest exact upper tail  :", exact[0], "  U * (W - 1) + 1 =", 4 * 3 + 1)

# %%
figure = make_figure(8.5, 2.8)
tail_errors(figure.subplots(), errors, {"W": (3.85, errors[4] * 1.4), "U (W - 1) + 1 = 13 and more": (12.7, 3e-16)})
show(
    figure,
    "The error of the last logits for an upper tail of 1 to 20 tokens, on a logarithmic axis. It falls slowly and is "
    "still far from zero at 4 tokens. At 13 tokens it drops to the rounding of double precision, and stays there.",
)

# %% [markdown]
# Up to 12 tokens the error is there, but it is small: a test that looks at a few answers would not find it. At 13 it is
# gone.
#
# ### The reach, by experiment
#
# You need not believe the formula. **Change one token and see what moves.** We do this for each of 40 tokens, with two
# kinds of change. In the first, we change only the *input of the upper decoder* at one token, and leave the library as
# it is. In the second, we change the *token itself*, so the change passes through the lower decoder, the library and
# the upper decoder.


# %%
def affected(model, ids, *, library):
    """[T, T]: do the logits of token t (row) change when token i (column) changes? library: does it change too?"""
    every = torch.arange(ids.shape[1])
    rows = ids.expand(len(every), -1).clone()  # row i is the text in which token i will be changed
    memory = ChunkMemory(model.config)
    hidden = model.lower_decoder(rows, memory)
    model.append_chunks(hidden, memory)
    rows[every, every] = (rows[every, every] + 1) % model.config.vocab_size
    if library:
        before, after = (model(x).logits for x in (ids.expand_as(rows), rows))
    else:
        before = model.logits(model.upper_decoder(hidden, memory.fork())[0])
        hidden[every, every] += 1
        after = model.logits(model.upper_decoder(hidden, memory.fork())[0])
    return ((after - before).abs().amax(dim=-1) > 1e-12).T


# %% [markdown]
# (`fork` makes a second memory that continues from here with caches of its own.) **You should see**, for three windows,
# that the formula gives exactly the number of inputs of the upper decoder that affect the last token, and that with the
# library more tokens affect it.

# %%
# NBVAL_CHECK_OUTPUT
forty = random[:, :40]
for W in (2, 4, 6):
    last = affected(make(dataclasses.replace(TINY, window=W)), forty, library=False)[-1]
    print(f"W = {W}: {int(last.sum()):2} inputs affect the last token; U * (W - 1) + 1 = {4 * (W - 1) + 1}")
further = affected(tiny, forty, library=True)[-1]
print("with the library, tokens outside the windows of all blocks affect it too:", bool(further[: -6 * 3 - 1].any()))

# %% [markdown]
# ### Move it
#
# Rows are the tokens that we observe, columns are the tokens that we change. Without the library you see only a band.
# Its width is $U (W - 1) + 1$. With the library the band is wider, because the $L$ lower blocks add to it. And
# **islands** appear far away from the band. An island is a chunk that the observed token retrieved, or that was
# retrieved by a token that it reads. The tokens just before this chunk belong to the island too, because their content
# reached the chunk through the lower decoder. Make the window small, and most of the reach comes from islands.


# %%
def reach(window, library, top_k):
    """What reaches each of 40 tokens, separately for windows and for retrieval."""
    model = make(dataclasses.replace(TINY, window=window, top_k=top_k))
    moved = affected(model, forty, library=library)
    blocks = model.config.upper_layers + (model.config.lower_layers if library else 0)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    near = distance <= blocks * (window - 1)
    return {"through windows": moved & near, "only through retrieval": moved & ~near}


def draw_reach(figure, window, library, top_k):
    kinds = reach(window, library, top_k)
    reach_by_kind(figure.subplots(), kinds, TINY.chunk_size)
    near, far = (int(kind[-1].sum()) for kind in kinds.values())
    return f"W = {window}: {near + far} of 40 tokens affect the last token, {far} only through retrieval."


explore(
    draw_reach,
    alt="A map of 40 observed tokens against 40 changed tokens: a band along the diagonal, and islands from retrieval.",
    size=(5.6, 4.8),
    window=Control((1, 8), start=2, label="window W"),
    library=Control(bool, start=True, label="change the library too"),
    top_k=Control((1, 4), start=1, label="chunks kept K"),
)

# %% [markdown]
# ## What each layer reads
#
# The next picture shows the same fact as a building. Each row is a layer, and the text enters at the bottom. **Blue**
# cells had to be computed. The lower decoder and the encoder process all tokens. The upper decoder needs only a
# staircase at the right end: $W - 1$ tokens fewer with each block, down to a single token in the top block. (A program
# computes the whole upper tail in each block: pale blue. That is simpler and costs little.) **Orange** chunks are those
# that the two HSA layers retrieved for the last token.


# %%
def needed(U, W, block):
    """How many outputs of an upper block (0 is the lowest) the last logits depend on."""
    return (U - 1 - block) * (W - 1) + 1


LAYERS = [f"lower {i}" for i in range(TINY.lower_layers)] + ["chunks"]
LAYERS += [f"upper {i}" + " + HSA" * (i % 2 == 0) for i in range(TINY.upper_layers)]


def computed(tokens, window):
    """What each layer of the tiny model computes for the last logits."""
    _, memory, aux = prefill(make(dataclasses.replace(TINY, window=window)), random.repeat(1, 2)[:, :tokens])
    U = TINY.upper_layers
    read = {i for retrieval in aux.retrievals for i in retrieval.indices[0, -1].flatten().tolist()}
    outputs = [needed(U, window, i) for i in range(U)]
    return dict(retrieved=read, needed=outputs, chunks=len(memory.chunks), tail=min(U * (window - 1) + 1, tokens))


def draw_building(figure, tokens, window):
    found = computed(tokens, window)
    computed_layers(figure, LAYERS, tokens, chunk_size=TINY.chunk_size, **found)
    skipped = f"the upper decoder skips {1 - found['tail'] / tokens:.0%} of the text"
    return f"{tokens} tokens, W = {window}: the upper tail is {found['tail']}; {skipped}."


explore(
    draw_building,
    alt="Layers as rows, tokens as columns. Lower layers and chunks fill the whole width, upper layers form a staircase at the right end.",
    size=(9, 3.2),
    tokens=Control((16, 200, 4), start=100, label="tokens T"),
    window=Control((2, 12), start=6, label="window W"),
)

# %% [markdown]
# Is it worth it? We run the trained model on 8,192 tokens of text, in full and with early exit. For the 8B model the
# upper tail is 57,331 tokens. That is long, but it is only a third of a percent of 16 million tokens.

# %%
began = time.perf_counter()
all_logits, _ = full(mini, text[:, :8192])
middle = time.perf_counter()
tail_logits, _ = early_exit(mini, text[:, :8192], mini.config.upper_tail)
print(f"full {middle - began:.1f} s, early exit {time.perf_counter() - middle:.1f} s")
big = PRESETS["ul_8b_a1b"]
print(f"8B: {big.upper_layers} x {big.window - 1} + 1 = {big.upper_tail:,} tokens, {big.upper_tail / 2**24:.2%} of 16M")

# %% [markdown]
# **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
print("the same logits:", torch.allclose(all_logits, tail_logits, atol=1e-3))

# %% [markdown]
# ## The bill of 16 million tokens
#
# We compare four designs with the sizes of the 8B model:
#
# 1. **full attention** in all 28 blocks, with a KV cache in each,
# 2. **a window alone** in all 28 blocks,
# 3. **HSA**: windows, and one library for seven HSA layers, all on the GPU,
# 4. **HSA, library outside**: the keys and values of chunks are in the memory of the host. Landmarks and windows are on
#    the GPU. For each token the chosen chunks are fetched.
#
# For each design we count what it **keeps** on the GPU and on the host, what a new token **reads**, and how many FLOP
# its attention **computes**. (The matrix products, about 2.6 GFLOP per token, are the same in all designs, except for
# HSA's own few matrices.)


# %%
def attention_cost(c, tokens, size=2):
    """Attention of every block to some earlier tokens -> bytes of their keys and values, FLOP for a new token."""
    blocks = c.lower_layers + c.upper_layers
    return 2 * blocks * c.kv_heads * c.head_dim * size * tokens, 4 * blocks * c.heads * c.head_dim * (tokens + 1)


def library_cost(c, T, size=2):
    """The library of T tokens -> bytes of landmarks, of chunks, of those fetched for a new token; its FLOP."""
    N = T // c.chunk_size
    kept = min(c.top_k, N)
    chunk = 2 * c.chunk_size * c.hsa_kv_heads * c.hsa_head_dim * size  # K and V of one chunk
    landmarks = N * c.retrieval_heads * c.retrieval_dim * size
    scoring = 2 * c.retrieval_heads * c.retrieval_dim * N
    reading = 4 * c.hsa_heads * c.hsa_head_dim * kept * c.chunk_size
    return landmarks, N * chunk, c.groups * kept * chunk, c.groups * (scoring + reading)


def bill(c, T):
    """Four designs -> bytes on the GPU, on the host, read for a new token, fetched from the host; FLOP of attention."""
    everything, full_flop = attention_cost(c, T)
    near, near_flop = attention_cost(c, min(T, c.window - 1))
    landmarks, chunks, fetched, far_flop = library_cost(c, T)
    reads = near + c.groups * landmarks + fetched
    return {
        "full attention": (everything, 0, everything, 0, full_flop),
        "window alone": (near, 0, near, 0, near_flop),
        "HSA": (near + landmarks + chunks, 0, reads, 0, near_flop + far_flop),
        "HSA, library outside": (near + landmarks, chunks, reads, fetched, near_flop + far_flop),
    }


# %% [markdown]
# First we check the bill against the package's `estimate_cost`. (The output calls its result the *plan*.)
# `estimate_cost` takes its bytes from the tensors of the model itself. Its FLOP include the matrix products. So we
# compare how much the FLOP *grow* from 1M to 16M tokens: only attention grows.
#
# **You should see** `True` three times.

# %%
# NBVAL_CHECK_OUTPUT
few, many = (estimate_cost("ul_8b_a1b", tokens) for tokens in (1 << 20, 1 << 24))
now, then = (bill(big, tokens) for tokens in (1 << 20, 1 << 24))
caches = many.window_cache_bytes
on_gpu = caches + many.landmark_bytes
planned = [many.full_attention_kv_bytes, caches, on_gpu + many.kv_bytes, on_gpu]
print("bytes kept == plan:", [row[0] for row in then.values()] == planned)
grown = {name: then[name][4] - now[name][4] for name in ("full attention", "HSA")}
planned = many.full_attention_decode_flops_per_token - few.full_attention_decode_flops_per_token
print("growth of full attention == plan:", grown["full attention"] == planned)
print("growth of HSA == plan           :", grown["HSA"] == many.decode_flops_per_token - few.decode_flops_per_token)

# %% [markdown]
# **You should see** four very different designs. Full attention needs a dozen large GPUs for one text, and reads all of
# it for every token. The window alone keeps a quarter of a gigabyte, and has lost nearly everything. HSA keeps a
# *hundredth* of what full attention keeps. With the library outside, only 300 MB remain on the GPU, and 14.7 MB are
# fetched for each token. On a bus that moves 25 GB per second, the fetch takes 0.6 milliseconds.

# %%
# NBVAL_CHECK_OUTPUT
print(f"{'16M tokens':21}{'on the GPU':>12}{'on the host':>12}{'reads':>12}{'fetches':>12}{'attention':>14}")
for name, (gpu, host, reads, fetched, flop) in then.items():
    sizes = [scaled(x, "B") if x else "-" for x in (gpu, host, reads, fetched)]
    print(f"{name:21}" + "".join(f"{x:>12}" for x in sizes) + f"{scaled(flop, 'FLOP'):>14}")

# %% [markdown]
# Does the bill hold on a real GPU? `python kernels/bench --model ul_8b_a1b` ran the 8B model, with random weights, on
# the GPU named below. The next cell prints its stored numbers. They were not measured here.
#
# **You should see** that reading costs the same per token at any length. You also see that a new token takes hardly
# longer after sixteen million tokens than after 64K, whether the library is on the GPU or outside. Most of the memory
# in use holds the weights.

# %%
stored = json.loads((data_dir() / "results" / "ul_8b_a1b.json").read_text())
near = 1 / stored["decode_64k_tokens_per_second"]
far = near * stored["decode_16m_over_64k"]
outside = far * stored["offload_slowdown"]
in_use = f"{stored['offload_16m_device_bytes'] / 1e9:.1f} GB in use"
print(f"stored: {stored['hardware']}, commit {stored['commit'][:7]}")
print(f"weights              {scaled(many.weight_bytes, 'B')}")
peak = stored["prefill_16m_peak_bytes"] / 1e9
print(f"read 16M tokens      {stored['prefill_16m_seconds']:.0f} s, {peak:.1f} GB in use")
print(f"    a token of 16M over a token of 1M {stored['prefill_16m_over_1m_per_token']:.2f}")
print(f"a new token behind 64K tokens         {near * 1e3:.2f} ms")
print(f"    behind 16M                        {far * 1e3:.2f} ms")
print(f"    behind 16M, library outside       {outside * 1e3:.2f} ms, {in_use}")
fetched = then["HSA, library outside"][3]
rate = fetched / (outside - far) / 1e9
print(f"fetched: {scaled(fetched, 'B')} in {(outside - far) * 1e3:.2f} ms, {rate:.0f} GB per second")

# %% [markdown]
# ### Move it
#
# All bars are logarithmic: one grid line is a factor of a thousand. At which length does full attention no longer fit
# into 80 GB (the dashed line)? What does a longer window cost, and in which designs? What does K change?


# %%
def compare(tokens, rows):
    """Two quantities of the bill, in words."""
    times = rows["full attention"][0] / rows["HSA"][0]
    fetched = scaled(rows["HSA, library outside"][3], "B")
    kept = f"full attention keeps {times:.1f} times as much as HSA"
    return f"{length_name(tokens)} tokens: {kept}; {fetched} fetched per token."


def draw_designs(figure, tokens, window, K):
    rows = bill(dataclasses.replace(big, window=window, top_k=K), tokens)
    side_by_side.designs(figure, rows)
    return compare(tokens, rows)


explore(
    draw_designs,
    alt="Four panels of bars for four designs: bytes kept on the GPU, on the host, read per token; FLOP of attention.",
    size=(11, 2.7),
    tokens=Control([(length_name(1 << n), 1 << n) for n in range(12, 25)], start=1 << 24, label="tokens"),
    window=Control([(length_name(1 << n), 1 << n) for n in range(9, 16)], start=4096, label="window W"),
    K=Control([16, 32, 64, 128, 256], start=64, label="chunks kept K"),
)

# %% [markdown]
# ## The library outside
#
# How can a token attend to chunks that are not on the GPU? Retrieval needs only landmarks, and those are on the GPU.
# After retrieval we know *which* chunks are needed. So we list the **distinct** chunks, fetch them, **renumber** the
# choice, and attend as always. The operation gives the same result: chunks have no positions, so number 3 of a few
# fetched chunks is the same to it as number 417 of many.


# %%
def attend_fetching(q, k, v, indices, weights):
    """Chunk attention of one sequence with k and v [1, N, S, J, D] elsewhere -> output, number of chunks fetched."""
    wanted, renumbered = indices.unique(return_inverse=True)  # sorted, so -1 comes first if a slot is empty
    empty = int((wanted < 0).any())
    k, v = (store[:, wanted[empty:].long()] for store in (k, v))  # the only traffic
    return chunk_attention(q, k, v, (renumbered - empty).int(), weights), k.shape[1]


# %% [markdown]
# We try it on the trained model, after it has read 32,768 tokens of real text. For the tokens of the upper tail, the
# last 509, we record the queries of its HSA layers, and the chunks that they retrieved.


# %%
def record(model, ids):
    """Prefill -> for every HSA layer its queries q [1, T, H, D] and its retrieval in the upper tail; the memory."""
    calls = []
    layers = [block.hsa for block in model.upper if block.hsa is not None]
    hooks = [hsa.register_forward_hook(lambda hsa, given, out: calls.append((hsa, given[0], out[1]))) for hsa in layers]
    memory = prefill(model, ids).memory
    for hook in hooks:
        hook.remove()
    queries = [hsa.q_norm(hsa.q(x).unflatten(-1, (-1, hsa.config.hsa_head_dim))) for hsa, x, _ in calls]
    return [(q, retrieval) for q, (_, _, retrieval) in zip(queries, calls)], memory


began = time.perf_counter()
recorded, memory = record(mini, text)
reading = time.perf_counter() - began
print(f"{text.shape[1]:,} tokens read in {reading:.1f} s; {len(memory.chunks)} chunks in the library")

# %% [markdown]
# **You should see** `True` twice.

# %%
# NBVAL_CHECK_OUTPUT
for layer, (q, found) in enumerate(recorded):
    usual = chunk_attention(q, memory.chunks.k, memory.chunks.v, found.indices, found.weights)
    fetched, count = attend_fetching(q, memory.chunks.k, memory.chunks.v, found.indices, found.weights)
    print(f"HSA layer {layer}: fetching == usual: {torch.allclose(usual, fetched, atol=1e-5)}")

# %% [markdown]
# The package does the same for a memory that is made with `offload=True`. On a GPU its chunks are stored in pinned host
# memory. While some tokens attend, the chunks that the next tokens need are already being fetched.
#
# **You should see** `True` twice.

# %%
# NBVAL_CHECK_OUTPUT
inside, outside = (prefill(mini, text, ChunkMemory(mini.config, offload=offload)) for offload in (False, True))
print("offloaded == usual:", torch.allclose(outside.logits, inside.logits, atol=1e-4))
kept = {name: output.memory.device_bytes for name, output in (("usual", inside), ("offloaded", outside))}
print("less than half stays on the device:", kept["offloaded"] < kept["usual"] / 2)

# %% [markdown]
# Now we count the bytes. One token keeps at most K = 8 chunks. But do 100 tokens need 800 chunks? Neighbours have
# similar meanings, so they choose similar chunks, and a chunk that was fetched for one token serves all of them.


# %%
def distinct(indices, n):
    """How many different chunks the last n tokens keep together; indices [1, T, J, K]."""
    return len(set(indices[0, -n:].flatten().tolist()) - {-1})


# %%
chunk_bytes = memory.chunks.k[:, :1].nbytes + memory.chunks.v[:, :1].nbytes
print(f"a chunk is {scaled(chunk_bytes, 'B')}, the library {scaled(len(memory.chunks) * chunk_bytes, 'B')}")
for n in (1, 8, 64, 509):
    together = [distinct(found.indices, n) for _, found in recorded]
    separately = n * mini.config.top_k
    fetched = scaled(sum(together) * chunk_bytes, "B")
    print(f"the last {n:3} tokens fetch {together} chunks in the two layers (one by one: {separately} in each), {fetched}")

# %% [markdown]
# **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
shares = [distinct(found.indices, 64) / (64 * mini.config.top_k) for _, found in recorded]
print("64 tokens together need less than half of what they need one by one:", max(shares) < 0.5)

# %% [markdown]
# ### Move it
#
# Every cell is a chunk of the library, row by row. Coloured chunks were fetched for the last tokens. The darker the
# cell, the more of those tokens read the chunk. Move **tokens**: the library fills slowly. Then look at the other
# layer.


# %%
def readers(tokens, layer):
    """How many of the last tokens read each chunk in one HSA layer, [N]."""
    indices = recorded[layer][1].indices[0, -tokens:].flatten()
    return torch.bincount(indices[indices >= 0].long(), minlength=len(memory.chunks))


def name_fetched(tokens, counts):
    """What is fetched, in words."""
    count = int((counts > 0).sum())
    fetched = f"{count} of {len(memory.chunks)} chunks, {scaled(count * chunk_bytes, 'B')}"
    return f"{tokens} tokens fetch {fetched}; one by one they would fetch {tokens * mini.config.top_k}."


def draw_fetched(figure, tokens, layer):
    counts = readers(tokens, layer)
    fetched_map(figure, counts)
    return name_fetched(tokens, counts)


explore(
    draw_fetched,
    alt="512 chunks as cells in eight rows. Fetched chunks are coloured by how many tokens read them.",
    size=(10, 2.6),
    tokens=Control([1, 2, 4, 8, 16, 32, 64, 128, 256, 509], start=8, label="the last tokens"),
    layer=Control([0, 1], start=0, label="HSA layer"),
)

# %% [markdown]
# ## Reading once
#
# A memory is all that a model needs from a text. So we can write the memory to a file, and the model need not read a
# book again for every question. `save` writes a folder with tensors and checksums, without free slots. `load` verifies
# it and copies it into memory. Only the weights that made a memory can use it, so the folder names them by a fingerprint.

# %%
with tempfile.TemporaryDirectory() as folder:
    began = time.perf_counter()
    memory.save(Path(folder) / "book")
    saved = time.perf_counter()
    loaded = ChunkMemory.load(Path(folder) / "book")
    done = time.perf_counter()
    size = (Path(folder) / "book" / "memory.safetensors").stat().st_size
    question = text[:, :5]
    answers = [mini(question, copy).logits for copy in (memory.fork(), loaded)]
print(f"read {reading:.2f} s, save {saved - began:.2f} s, load {done - saved:.2f} s")

# %% [markdown]
# **You should see** `True`, and that the file is as large as its tensors.

# %%
# NBVAL_CHECK_OUTPUT
print("loaded == never saved:", torch.equal(*answers))
tensors = sum(tensor.nbytes for tensor in contents(memory).values())
print(f"bytes of the tensors {tensors:,}, of the file {100 * size / tensors:.1f}% of them")

# %% [markdown]
# Our small model keeps half a megabyte per thousand tokens, in single precision. The 8B model, in 16 bits, keeps no
# more: it has 16 query heads, but only one key/value head is kept.
#
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.memory.kept import check_changed_chunks, check_oldest_first, check_tail_for_caches

# %% [markdown]
# **1. One token changes.** *Difficulty 2, importance 4, 10 minutes.* A token changes in the middle of a long text. Which
# chunks of the library must be encoded again? Find the first and the last for token $i$, in terms of $S$, $W$ and the
# number of lower blocks $L$. Then check it on the tiny model.


# %%
def changed_chunks(i, S, W, L):
    """The numbers of the first and the last chunk that change with token i, if the text is long enough."""
    # your code


check_changed_chunks(changed_chunks)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Each block of the lower decoder carries a change $W - 1$ tokens further. So the outputs from $i$ to $i + L (W - 1)$
# change (`config.lower_reach`), and with them the chunks that contain these outputs.
#
# ```python
# def changed_chunks(i, S, W, L):
#     return i // S, (i + L * (W - 1)) // S
#
#
# check_changed_chunks(changed_chunks)
# before = full(tiny, random)[1].chunks.landmarks
# for i in (0, 17, 50):
#     changed = random.clone()
#     changed[0, i] = (changed[0, i] + 1) % 16
#     moved = (full(tiny, changed)[1].chunks.landmarks != before).any(dim=-1).any(dim=-1)[0].nonzero()[:, 0].tolist()
#     first, last = changed_chunks(i, TINY.chunk_size, TINY.window, TINY.lower_layers)
#     print(i, moved)
#     assert moved == list(range(first, last + 1))
# ```
#
# So we can put a needle into sixteen million tokens that were already read, by encoding a few chunks again. The
# package's evaluation does that.
#
# </details>

# %% [markdown]
# **2. One token less.** *Difficulty 4, importance 3, 15 minutes.* The last *logits* need $U (W - 1) + 1$ inputs of the
# upper decoder. Do its *window caches* need as many? Think of the top block: how old is the oldest token in its cache,
# and which tokens does that token's key depend on? Then try `early_exit` with one token less, and compare the caches and
# the logits.


# %%
def tail_for_caches(U, W):
    """How many inputs of the upper decoder its window caches depend on: U blocks of window W."""
    # your code


check_tail_for_caches(tail_for_caches)

# %% [markdown]
# <details><summary>Solution</summary>
#
# They need one less. The cache of the top block holds the last $W - 1$ keys. A key is made from the *input* of the
# block, which has passed through $U - 1$ blocks. That is $(W - 1) + (U - 1)(W - 1) = U (W - 1)$.
#
# ```python
# def tail_for_caches(U, W):
#     return U * (W - 1)
#
#
# check_tail_for_caches(tail_for_caches)
# exact = full(tiny, random)
# enough = tail_for_caches(TINY.upper_layers, TINY.window)
# shorter = early_exit(tiny, random, enough)
# too_short = early_exit(tiny, random, enough - 1)
#
#
# def caches_differ(a, b):
#     pairs = zip(contents(a[1]).values(), contents(b[1]).values())
#     return max((x - y).abs().max().item() for x, y in pairs if x.numel())
#
#
# print(f"{enough}: logits", (shorter[0] - exact[0]).abs().max().item(), "caches", caches_differ(shorter, exact))
# assert caches_differ(shorter, exact) < 1e-12 < (shorter[0] - exact[0]).abs().max()
# assert caches_differ(too_short, exact) > 1e-12
# ```
#
# So with an upper tail of $U (W - 1)$ tokens the logits of the very next token would be a little wrong, and all later
# ones right. A check that two methods give identical results finds such an error. Hardly any other test does.
#
# </details>

# %% [markdown]
# **3. The order of time.** *Difficulty 2, importance 4, 10 minutes.* A window cache has $W$ slots, and position $p$ lies
# in slot $p \bmod W$. Return what the next token sees of it, oldest first. How many tokens are these? And what if the
# text has only just begun, so that some slots are still free?


# %%
def oldest_first(cache, position):
    """A cache [W, D] after `position` tokens -> those that the next token sees, beside itself, in the order of time."""
    # your code


check_oldest_first(oldest_first)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The next token sees $W$ tokens with itself. It takes the slot of the oldest one, so $W - 1$ remain.
#
# ```python
# def oldest_first(cache, position):
#     W = len(cache)
#     return cache[[p % W for p in range(max(position - (W - 1), 0), position)]]
#
#
# check_oldest_first(oldest_first)
# _, memory = full(tiny, random)
# for part in memory.lower + memory.upper:
#     k, v = part.in_order(memory.position)
#     assert torch.equal(oldest_first(part.k[0], memory.position), k[0])
#     assert torch.equal(oldest_first(part.v[0], memory.position), v[0])
# ```
#
# Nothing is ever moved in such a cache: a new token overwrites one slot. That is cheap, and a CUDA graph can record it,
# because the cache stays at its place in memory.
#
# </details>

# %% [markdown]
# ## What comes next
#
# The model can now read and remember, and it loses nothing that it may need. But a block has one more part beside
# attention: the feed-forward network. These networks hold nearly all parameters of the model.
#
# [Notebook 10](10_model_and_experts.ipynb), *How do 8 billion parameters cost one?*, builds them, and then the whole
# model. It takes about 30 minutes.
