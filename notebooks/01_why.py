# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 01 · Why not simply attend to everything?
#
# A language model guesses the next token. To guess well it must look back: at the last word, at the last page, sometimes
# at one sentence that it read a million tokens ago. The plain way is to look at **everything**. This notebook presents
# the bill for that, tries the cheap way out, and shows what the cheap way cannot see.
#
# After this notebook you will be able to
#
# * say what full attention costs in bytes and in arithmetic, and check both by measuring,
# * show, without any belief, that a sliding window is blind behind its edge,
# * name the three properties that a model of very long texts needs, and say who has which.
#
# **Time:** 15 minutes to read, 15 seconds to run on two CPU cores. **Needs:** to know what a matrix is, and that softmax
# turns numbers into shares that add up to 1. No GPU, no trained model.

# %%
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from hsa_mini import PRESETS
from hsa_mini.reference import chunk_attention, decode, retrieve, sliding_window_attention
from hsa_mini.viz import Control, explore, make_figure, plots, show

# %% [markdown]
# ## Twelve tokens
#
# One tiny text goes with us through the whole course. It has twelve tokens; for us a word is a token.
#
# > `the code is 7` `birds sing at dawn` `what is the code`
#
# What comes next? You know: `7`. To know it, the last token (number 11, counted from 0) has to reach back to token 3.
# That is a distance of 8 tokens. Remember the 8.

# %%
# NBVAL_CHECK_OUTPUT
WORDS = "the code is 7 birds sing at dawn what is the code".split()
T = len(WORDS)
print(T, "tokens; the answer is token", WORDS.index("7"), "and the question ends at token", T - 1)

# %% [markdown]
# A model works with vectors, not with words. Ours are random: every word gets a vector of $D = 64$ numbers, and the same
# word always gets the same vector. So equal words find each other, and that is all the language we need today.


# %%
def word_vectors(words, dim, seed=0):
    """One random vector for each distinct word: T words -> [T, dim]."""
    distinct = sorted(set(words))
    table = torch.randn(len(distinct), dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return table[[distinct.index(word) for word in words]]


D = 64
x = word_vectors(WORDS, D)

# %%
# NBVAL_CHECK_OUTPUT
print("shape:", list(x.shape))
print("both `code` have one vector:", torch.equal(x[1], x[11]))

# %% [markdown]
# ## Full attention, in six lines
#
# Each token $t$ holds a query $q_t$, a key $k_t$ and a value $v_t$, vectors of $D$ numbers.
#
# $$O_t = \sum_{i \le t} \mathrm{softmax}_i\!\left(\frac{q_t \cdot k_i}{\sqrt{D}}\right) v_i$$
#
# In words: compare my query with every key up to my own, turn the results into shares, and take that share of every value.
# (The paper writes $n$ for the number of tokens and $d_h$ for the size of a head. Here and in the code they are $T$ and
# $D$.)


# %%
def full_attention(q, k, v):
    """Every token reads itself and all tokens before it: q, k, v [T, D] -> [T, D]."""
    scores = q @ k.T / q.shape[-1] ** 0.5  # [T, T]
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return weights @ v


out = full_attention(x, x, x)

# %% [markdown]
# **You should see** `True`: the formula, typed in for the last token alone, gives the same as the function.

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.stack([x[11] @ x[i] / D**0.5 for i in range(12)])
shares = scores.exp() / scores.exp().sum()
by_hand = sum(shares[i] * x[i] for i in range(12))
print("by hand == function:", torch.allclose(by_hand, out[11]))

# %% [markdown]
# ## The first bill: memory
#
# The next token will again compare itself with all keys and take its share of all values. So every key and every value must
# be **kept**, in every layer, for as long as the text lasts:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot T \cdot J \cdot D \cdot \text{bytes per number}$$
#
# The 2 is for keys and values. $J$ is the number of key/value heads: one layer runs several attentions side by side, and
# each head has its own keys and values.


# %%
def kv_bytes(tokens, layers, kv_heads, head_dim, bytes_each=2):
    """What full attention keeps of `tokens` tokens; 2 bytes for a bfloat16 number."""
    return 2 * layers * tokens * kv_heads * head_dim * bytes_each


# %% [markdown]
# Formulas are cheap, so let us weigh the real thing. **You should see** the same number twice.

# %%
# NBVAL_CHECK_OUTPUT
tokens, layers, kv_heads = 1000, 3, 4
cache = [torch.zeros(tokens, kv_heads, D, dtype=torch.bfloat16) for _ in range(2 * layers)]
measured = sum(part.nbytes for part in cache)
print("measured:", measured, "bytes")
print("formula :", kv_bytes(tokens, layers, kv_heads, D), "bytes")

# %% [markdown]
# Now the size that this course is about: the paper's large model, with about 8 billion parameters, on 16 million tokens.
# (The paper does not print its heads and layers. The preset `ul_8b_a1b` has numbers of ours that give the printed
# totals.)

# %%
# NBVAL_CHECK_OUTPUT
big = PRESETS["ul_8b_a1b"]
big_layers = big.lower_layers + big.upper_layers
million_16 = 16 * 2**20
full_bytes = kv_bytes(million_16, big_layers, big.kv_heads, big.head_dim)
print(big_layers, "layers,", big.kv_heads, "KV heads of", big.head_dim)
print("K and V of 16M tokens under full attention:", full_bytes // 2**30, "GiB")

# %% [markdown]
# A large GPU of today has about 80 to 140 GiB. The model's own 8 billion parameters take about 15 GiB. The memory of one
# text takes sixty times as much.
#
# ## The second bill: arithmetic
#
# We count **FLOP**: one multiplication or one addition is 1. A dot product of two vectors of $D$ numbers is $2D$ FLOP. For
# each of $T$ queries there are $T$ dot products with keys and $T$ shares of values:
#
# $$\text{FLOP} = 4 \cdot T^2 \cdot D \quad \text{per head}$$
#
# PyTorch can count the matrix products that a function really runs. **You should see** equal numbers, and a 4 in the last
# line: twice the text, four times the work.


# %%
def count_flop(function, *arguments, **options):
    """FLOP of the matrix products that a call runs (softmax and the like are not counted)."""
    with FlopCounterMode(display=False) as counter:
        function(*arguments, **options)
    return counter.get_total_flops()


# %%
# NBVAL_CHECK_OUTPUT
measured = {}
for tokens in (256, 512):
    y = torch.zeros(tokens, D)
    measured[tokens] = count_flop(full_attention, y, y, y)
    print(f"T={tokens}: measured {measured[tokens]}, formula {4 * tokens**2 * D}")
print("twice the text costs", measured[512] // measured[256], "times as much")

# %% [markdown]
# (Half of the products are with the future and are thrown away. Good programs skip them. That halves the bill and does not
# change its shape.)
#
# ## The cheap way out: look at the last W tokens
#
# A **sliding window** lets token $t$ read the $W$ tokens that end at its own. Now only $W$ keys and values are kept in a
# layer, and a token costs $4WD$ FLOP per head however long the text is. Many models for long texts use it in some of their
# layers, and so does ours.
#
# Here is the package's version. It takes tensors `[B, T, heads, D]`: a batch in front, and heads in between. **You should
# see** that a window as wide as the text is full attention.


# %%
def window_layer(x, window):
    """Sliding-window attention of one sequence with one head: x [T, D] -> [T, D]."""
    heads = x[None, :, None]  # [T, D] -> [1, T, 1, D]
    return sliding_window_attention(heads, heads, heads, window=window)[0, :, 0]


def full_layer(x):
    return full_attention(x, x, x)


# %%
# NBVAL_CHECK_OUTPUT
print("window of 12 == full attention:", torch.allclose(window_layer(x, 12), full_layer(x)))
print("window of  4 == full attention:", torch.allclose(window_layer(x, 4), full_layer(x)))

# %% [markdown]
# ## What a window cannot see
#
# Is token 3, the `7`, visible to token 11? We do not have to believe anything. **Change** token 3 and look whether the
# output of token 11 moves.


# %%
def output_change(layer, x, changed, seen_by):
    """How far the output of token `seen_by` moves when token `changed` gets another vector."""
    other = x.clone()
    other[changed] += 1.0
    return (layer(other)[seen_by] - layer(x)[seen_by]).abs().max().item()


# %% [markdown]
# **You should see** exactly zero, not a small number, as long as the window is 8 or less. Token 11 is one of the `W` tokens
# that it reads, so to reach a distance of 8 it needs `W = 9`.

# %%
# NBVAL_CHECK_OUTPUT
for window in (4, 8, 9, 12):
    change = output_change(partial(window_layer, window=window), x, changed=3, seen_by=11)
    print(f"W={window:2}: the output is untouched: {change == 0.0}")

# %% [markdown]
# No training can repair this. Whatever the weights of the layer are, the answer does not reach the question.
#
# "But layers are stacked!" Yes: the second layer reads outputs that have themselves looked back. With $L$ layers news
# travels $L \cdot (W - 1)$ tokens. Exercise 1 lets you check it. For the big model, if it had windows alone:

# %%
# NBVAL_CHECK_OUTPUT
reach = big_layers * (big.window - 1)
print(f"{big_layers} layers with a window of {big.window} reach {reach:,} tokens")
print(f"that is {100 * reach / million_16:.1f} % of 16M tokens")

# %% [markdown]
# And news that is handed on 27 times arrives as a rumour: each layer mixes it with thousands of other tokens.
#
# ## A third way: few tokens, from anywhere
#
# Hierarchical Sparse Attention (HSA) cuts the text into **chunks** of $S$ tokens. Each chunk gets one summary vector, its
# **landmark**. A token compares itself with the landmarks, keeps the best $K$ chunks, and reads those alone, token by
# token.
#
# The next notebooks build each part with care. Here we borrow the finished operations and take the crudest landmark, the
# mean of a chunk. With $S = 4$ and $K = 1$ it looks like this:


# %%
def choose_chunks(x, chunk_size, top_k):
    """Which chunks each token keeps, and how much it trusts each: x [T, D] -> indices and weights [T, K]."""
    landmarks = x.unflatten(0, (-1, chunk_size)).mean(dim=1)  # [T, D] -> [N, S, D] -> [N, D]
    queries = x[None, :, None]  # [1, T, 1, D]
    indices, weights = retrieve(queries, landmarks[None, :, None], chunk_size=chunk_size, top_k=top_k)
    return indices[0, :, 0], weights[0, :, 0]


def hsa_layer(x, chunk_size=4, top_k=1):
    """Read the kept chunks alone: x [T, D] -> [T, D]."""
    indices, weights = choose_chunks(x, chunk_size, top_k)
    chunks = x.unflatten(0, (-1, chunk_size))[None, :, :, None]  # [1, N, S, 1, D]
    return chunk_attention(x[None, :, None], chunks, chunks, indices[None, :, None], weights[None, :, None])[0, :, 0]


# %% [markdown]
# **You should see** that token 11 picks chunk 0, `the code is 7`, and that a change of the `7` now reaches it. It read 4
# tokens out of 12.

# %%
# NBVAL_CHECK_OUTPUT
indices, weights = choose_chunks(x, chunk_size=4, top_k=1)
chosen = indices[11].item()
print(f"token 11 keeps chunk {chosen}:", " ".join(WORDS[chosen * 4 : chosen * 4 + 4]))
print("a change of token 3 is felt:", output_change(hsa_layer, x, changed=3, seen_by=11) > 0)

# %% [markdown]
# ## The picture: who can be felt by whom
#
# Change each token in turn, and mark every token whose output moves. A filled square means that it moved. Rows are tokens
# that look, columns are tokens that are changed.


# %%
def felt(layer, x):
    """[T, T]: row t, column i is True where the output of token t moves when token i is changed."""
    before = layer(x)
    columns = []
    for i in range(len(x)):
        other = x.clone()
        other[i] += 1.0
        columns.append((layer(other) != before).any(dim=-1))
    return torch.stack(columns, dim=1)


# %%
figure = make_figure(11, 4.4)
layers_to_compare = {"full attention": full_layer, "window of 4": partial(window_layer, window=4), "HSA, K = 1": hsa_layer}
for ax, (name, layer) in zip(figure.subplots(1, 3), layers_to_compare.items()):
    plots.reach_map(ax, felt(layer, x), tokens=WORDS, token=11, title=name)
show(
    figure,
    "Three triangular maps of which token feels which. Full attention fills the whole triangle. The window of 4 fills a band "
    "along the diagonal. HSA fills whole chunks that are complete, far ones included, and leaves the newest tokens empty.",
)

# %% [markdown]
# The window is a thin band along the diagonal. The HSA map is different: squares appear in blocks of one chunk, far from
# the diagonal. (The single square at the end of a row is the token itself: its own query was changed.) HSA has a hole
# where the window is strong, at the newest tokens, because a chunk can be read only once it is complete. So the two go
# together: **the window for what is near, HSA for what is far.**
#
# ### Move it
#
# Choose who looks and how. On the right you see which chunks retrieval gives to that token, whatever the window is. Begin
# with both together: which squares come from which of the two? Then a window alone, of 8 and of 9; then HSA alone, at token
# 11, with `K` of 1 and of 2.


# %%
def layer_named(reading, window, K):
    """One of the ways to read, as a function of x."""
    near, far = partial(window_layer, window=window), partial(hsa_layer, top_k=K)
    both = lambda x: torch.cat((near(x), far(x)), dim=-1)  # noqa: E731
    return {"full": full_layer, "window": near, "HSA": far, "window + HSA": both}[reading]


def draw_reach(figure, reading, window, K, token):
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    moved = felt(layer_named(reading, window, K), x)
    plots.reach_map(left, moved, tokens=WORDS, token=token, title=reading)
    indices, weights = choose_chunks(x, 4, K)
    per_chunk = [weights[token][indices[token] == i].sum().item() for i in range(3)]
    plots.chunk_grid(right, WORDS, 4, token=token, weights=per_chunk)
    right.set_title(f"what retrieval gives token {token}", fontsize=11)
    count, seven = moved[token].sum().item(), "yes" if moved[token, 3] else "no"
    return f"{reading}: token {token} ({WORDS[token]}) feels {count} of {token + 1} tokens. Does it feel the 7? {seven}."


# %%
explore(
    draw_reach,
    alt="Left: a map of which token feels which. Right: the three chunks and the weight that retrieval gives to each.",
    size=(11, 4.4),
    reading=["window + HSA", "window", "HSA", "full"],
    window=Control((1, 12), start=4, label="window W"),
    K=Control((1, 2), label="chunks kept K"),
    token=Control((0, 11), start=11, label="token that looks"),
)

# %% [markdown]
# ## The bill again, for all three
#
# What does **one new token** cost in one layer, when $T$ tokens lie before it? With $H$ query heads of $D$ numbers,
# landmarks of $R$ numbers and one shared retrieval head:
#
# | | FLOP for one new token |
# |---|---|
# | full attention | $4 \cdot T \cdot D \cdot H$ |
# | window | $4 \cdot \min(W, T) \cdot D \cdot H$ |
# | HSA | $2R \cdot T/S$ to score landmarks, $4 \cdot K S \cdot D H$ to read chunks, $2 \cdot K \cdot D H$ to blend them |
#
# (Where fewer than $K$ chunks exist, $K$ stands for their number.)


# %%
def full_flop(T, H, D):
    return 4 * T * H * D


def window_flop(T, W, H, D):
    return 4 * min(W, T) * H * D


def hsa_flop(T, S, K, H, D, R):
    """Score T/S landmarks, read K chunks (or all, if there are fewer), blend the results."""
    K = min(K, T // S)
    return 2 * R * (T // S) + 4 * K * S * H * D + 2 * K * H * D


# %% [markdown]
# **You should see** that what PyTorch counts is what the formula says. `decode` is HSA for one new token.

# %%
# NBVAL_CHECK_OUTPUT
tokens, S, K, H, R = 4096, 16, 4, 2, 32
one = {"retrieval_q": torch.zeros(1, 1, 1, R), "q": torch.zeros(1, 1, H, D), "landmarks": torch.zeros(1, tokens // S, 1, R)}
one["k"] = one["v"] = torch.zeros(1, tokens // S, S, 1, D)
print("measured:", count_flop(decode, **one, chunk_size=S, top_k=K, offset=tokens))
print("formula :", hsa_flop(tokens, S, K, H, D, R))

# %% [markdown]
# ### Move it
#
# The sizes of the large model: $H = 16$, $D = 128$, $W = 4096$, $S = 64$, $R = 128$. Both axes are logarithmic: each step
# to the right doubles the text. Look where the curve of HSA starts to bend up, and at how many times cheaper it is at
# 16M.

# %%
LENGTHS = [2**n for n in range(12, 25)]


def draw_costs(figure, length, K):
    H, D = big.hsa_heads, big.hsa_head_dim
    costs = {
        "full attention": [full_flop(T, H, D) for T in LENGTHS],
        "HSA": [hsa_flop(T, big.chunk_size, K, H, D, big.retrieval_dim) for T in LENGTHS],
        f"window of {big.window}": [window_flop(T, big.window, H, D) for T in LENGTHS],
    }
    plots.cost_curves(figure.subplots(), LENGTHS, costs, at=length, ylabel="FLOP, one token, one layer")
    full, hsa, window = (costs[name][LENGTHS.index(length)] for name in costs)
    name = plots.length_name(length)
    return f"At {name} tokens, K={K}: full {full:.1e} FLOP, HSA {hsa:.1e}, window {window:.1e}; full / HSA = {full / hsa:.1f}."


explore(
    draw_costs,
    alt="FLOP of one new token against context length, logarithmic axes: full attention rises, window and HSA hardly do.",
    length=Control([(plots.length_name(n), n) for n in LENGTHS], start=million_16, label="context length"),
    K=Control([1, 4, 16, 64, 256], start=64, label="chunks kept K"),
)

# %% [markdown]
# Two honest remarks. First: HSA is not free of $T$. Every token scores every landmark, and at 16M tokens with $K = 64$
# that is two thirds of its work. It is *few* operations per chunk, not none. Second: at 4K tokens, HSA with $K = 64$
# reads all there is and saves nothing.
#
# And the memory? HSA keeps one set of keys, values and landmarks that **all** its layers share. **You should see** how
# little is left of the first bill.

# %%
# NBVAL_CHECK_OUTPUT
chunks = million_16 // big.chunk_size
shared = kv_bytes(million_16, 1, big.hsa_kv_heads, big.hsa_head_dim) + chunks * big.retrieval_dim * 2
windows = kv_bytes(big.window - 1, big_layers, big.kv_heads, big.head_dim)
print(f"{chunks:,} chunks; shared memory {shared / 2**30:.2f} GiB, windows of all layers {windows / 2**30:.2f} GiB")
print(f"full attention needs {full_bytes / (shared + windows):.0f} times as much")

# %% [markdown]
# ## Three properties
#
# The paper asks three things of a model for very long texts (abstract, §1). In our words:
#
# 1. **Sparsity.** A token looks at few others. Else the bill grows with the square of the text.
# 2. **Random-access flexibility.** Those few may lie *anywhere*, and the model itself learns where to look. Else the one
#    sentence that matters is out of reach, or reached by luck.
# 3. **Length generalization.** What was learned on short texts holds on long ones. Nobody trains on 16 million tokens at
#    a time; a model has to learn the skill at a few thousand and keep it.
#
# | | sparse | random access | generalizes to longer texts |
# |---|---|---|---|
# | full attention | no | yes | often badly: it meets distances and crowds of keys that it never saw in training |
# | sliding window | yes | no | yes, for what lies inside the window |
# | one state of fixed size, rewritten at every token | yes | no: what was overwritten is gone | as far as the state holds |
# | HSA | yes | yes, by chunks | this is its aim; notebook 05 puts a small model to the test |
#
# For three of the four rows, the first two columns are measured on this page. The third is a claim until we measure it, and
# we shall.

# %% [markdown]
# ## Exercises
#
# **1. News through a stack.** Feed the output of one window layer into the next. How many layers with `W = 4` does it
# take until token 11 feels a change of token 3? Predict it from $L \cdot (W - 1)$ first.
#
# <details>
# <summary>Solution</summary>
#
# The distance is 8 and a layer carries 3, so 2 layers reach 6 and are not enough; 3 layers reach 9.
#
# ```python
# def stack(x, layers, window=4):
#     for _ in range(layers):
#         x = window_layer(x, window)
#     return x
#
# for layers in (1, 2, 3):
#     print(layers, output_change(partial(stack, layers=layers), x, changed=3, seen_by=11) > 0)
# assert output_change(partial(stack, layers=2), x, 3, 11) == 0.0
# assert output_change(partial(stack, layers=3), x, 3, 11) > 0.0
# ```
#
# </details>
#
# **2. Where does HSA begin to pay?** From which text length on is HSA cheaper than full attention, with the large model's
# sizes and $K = 64$? Solve it on paper, then check with `full_flop` and `hsa_flop`.
#
# <details>
# <summary>Solution</summary>
#
# $4THD = 2RT/S + 4KSHD + 2KHD$. Here $2R/S = 4$ is nothing beside $4HD = 8192$. Divide by $4HD$ and get
# $T \approx KS + K/2 = 4128$. Until then HSA would read every token anyway; from then on full attention reads more. The
# first whole number of chunks beyond is $T = 4160$.
#
# ```python
# def first_gain(K, S=64, H=16, D=128, R=128):
#     return next(T for T in range(S, 10**6, S) if hsa_flop(T, S, K, H, D, R) < full_flop(T, H, D))
#
# print(first_gain(K=64))
# assert first_gain(K=64) == 4160
# ```
#
# </details>
#
# ## What comes next
#
# Our landmark was the mean of a chunk. Is that a good summary? [Notebook 02, *What does a chunk say about
# itself?*](02_chunks.ipynb) finds what a mean cannot say, and builds the small encoder that can. 20 minutes.
