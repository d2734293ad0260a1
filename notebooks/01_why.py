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
# A language model predicts the next token. To predict well it must look back: at the last word, at the last page, and
# sometimes at one sentence that it read a million tokens ago. The plain method is to look at **everything**. This
# notebook computes what that costs. Then it tries a cheap method, and it shows what the cheap method cannot see.
#
# After this notebook you will be able to
#
# * say what full attention costs in bytes and in arithmetic, and check both numbers by measuring,
# * show by experiment that a sliding window sees nothing beyond its edge,
# * name the three properties that a model of very long texts needs, and say which methods have them.
#
# **Time:** 15 minutes to read, 15 seconds to run on two CPU cores. **Needs:** You know what a matrix is. You know that
# softmax turns numbers into shares that add up to 1. You need no GPU and no trained model.
#
# [← 00 start](00_start.ipynb) · [02 chunks →](02_chunks.ipynb)

# %%
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from hsa_mini import PRESETS
from hsa_mini.reference import chunk_attention, decode, retrieve, sliding_window_attention
from hsa_mini.viz import Control, explore, plots, show
from hsa_mini.viz.course import side_by_side
from hsa_mini.viz.style import length_name

# %% [markdown]
# ## Twelve tokens
#
# The whole course uses one tiny text. It has twelve tokens. In this text every word is one token.
#
# > `the code is 7` `birds sing at dawn` `what is the code`
#
# Which word comes next? You know the answer: `7`. To know it, the last token (number 11, counted from 0) has to reach
# back to token 3. That is a distance of 8 tokens. Remember the 8. **You should see** both token numbers.

# %%
# NBVAL_CHECK_OUTPUT
TEXT = "the code is 7 birds sing at dawn what is the code"
WORDS = TEXT.split()
T = len(WORDS)
print(T, "tokens; the answer is token", WORDS.index("7"), "and the question ends at token", T - 1)

# %% [markdown]
# A model computes with vectors, not with words. Our vectors are random. Every word gets a vector of $D = 64$ numbers,
# and the same word always gets the same vector. So the dot product of two equal words is large, and the query of a word
# finds the key of the same word. This notebook needs no other knowledge of language.


# %%
def word_vectors(words, dim, seed=0):
    """One random vector for each distinct word: T words -> [T, dim]."""
    distinct = sorted(set(words))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(distinct), dim, dtype=torch.float64, generator=generator)
    return table[[distinct.index(word) for word in words]]


D = 64
x = word_vectors(WORDS, D)

# %% [markdown]
# **You should see** `True`: the word `code` occurs twice, and both occurrences have the same vector.

# %%
# NBVAL_CHECK_OUTPUT
print("shape:", list(x.shape))
print("both `code` have one vector:", torch.equal(x[1], x[11]))

# %% [markdown]
# ## Full attention, in six lines
#
# Each token $t$ has a query $q_t$, a key $k_t$ and a value $v_t$. Each of them is a vector of $D$ numbers.
#
# $$O_t = \sum_{i \le t} \mathrm{softmax}_i\!\left(\frac{q_t \cdot k_i}{\sqrt{D}}\right) v_i$$
#
# In words: the token compares its query with its own key and with all earlier keys. Softmax turns the results into
# shares. The output is the sum of all values, each multiplied by its share. (The paper writes $n$ for the number of
# tokens and $d_h$ for the size of a head. This course and the code write $T$ and $D$.)


# %%
def full_attention(q, k, v):
    """Every token reads itself and all tokens before it: q, k, v [T, D] -> [T, D]."""
    scores = q @ k.T / q.shape[-1] ** 0.5  # [T, T]
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return weights @ v


out = full_attention(x, x, x)

# %% [markdown]
# **You should see** `True`: we compute the formula by hand for the last token only, and it gives the same result as the
# function.

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.stack([x[11] @ x[i] / D**0.5 for i in range(12)])
shares = scores.exp() / scores.exp().sum()
by_hand = sum(shares[i] * x[i] for i in range(12))
print("by hand == function:", torch.allclose(by_hand, out[11]))

# %% [markdown]
# ## The first cost: memory
#
# The next token will again compare its query with all keys, and it will again read all values. So the model must
# **keep** every key and every value, in every layer, for as long as the text lasts:
#
# $$\text{bytes} = 2 \cdot \text{layers} \cdot T \cdot J \cdot D \cdot \text{bytes per number}$$
#
# The factor 2 stands for keys and values. $J$ is the number of key/value heads: one layer runs several attentions side
# by side, and each head has its own keys and values.


# %%
def kv_bytes(tokens, layers, kv_heads, head_dim, bytes_each=2):
    """Bytes of the keys and values that full attention keeps; a bfloat16 number has 2 bytes."""
    return 2 * layers * tokens * kv_heads * head_dim * bytes_each


# %% [markdown]
# A formula can be wrong, so we measure real tensors. **You should see** the same number twice.

# %%
# NBVAL_CHECK_OUTPUT
tokens = 1000
layers = 3
kv_heads = 4
cache = [torch.zeros(tokens, kv_heads, D, dtype=torch.bfloat16) for _ in range(2 * layers)]
measured = sum(part.nbytes for part in cache)
print("measured:", measured, "bytes")
print("formula :", kv_bytes(tokens, layers, kv_heads, D), "bytes")

# %% [markdown]
# Now we take the size that this course is about: the paper's large model, with about 8 billion parameters, and 16
# million tokens. (The paper does not print the numbers of its heads and layers. We chose the numbers in the preset
# `ul_8b_a1b`. They give the totals that the paper prints.) **You should see** 896 GiB.

# %%
# NBVAL_CHECK_OUTPUT
big = PRESETS["ul_8b_a1b"]
big_layers = big.lower_layers + big.upper_layers
million_16 = 16 * 2**20
full_bytes = kv_bytes(million_16, big_layers, big.kv_heads, big.head_dim)
print(big_layers, "layers,", big.kv_heads, "KV heads of", big.head_dim)
print("K and V of 16M tokens under full attention:", full_bytes // 2**30, "GiB")

# %% [markdown]
# A large GPU of today has about 80 to 140 GiB. The 8 billion parameters of the model take about 15 GiB. The keys and
# values of one text take sixty times as much.
#
# ## The second cost: arithmetic
#
# We count in **FLOP**: one multiplication or one addition is 1 FLOP. A dot product of two vectors of $D$ numbers takes
# $2D$ FLOP. Each of the $T$ queries needs $T$ dot products with keys. It also needs $T$ products of a share with a
# value, which cost $2D$ FLOP each:
#
# $$\text{FLOP} = 4 \cdot T^2 \cdot D \quad \text{per head}$$
#
# PyTorch can count the FLOP of the matrix products that a function really runs. **You should see** equal numbers, and a
# 4 in the last line: a text that is twice as long needs four times the work.


# %%
def count_flop(function, *arguments, **options):
    """FLOP of the matrix products in one call; softmax and other operations are not counted."""
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
# (Half of the products belong to future tokens, and the mask throws them away. Good programs skip them. That halves the
# cost, but the cost still grows with the square of $T$.)
#
# ## A cheap method: look at the last W tokens
#
# A **sliding window** lets token $t$ read the $W$ tokens that end at token $t$ itself. Now a layer keeps only $W$ keys
# and $W$ values. One token costs $4WD$ FLOP per head, no matter how long the text is. Many models for long texts use a
# sliding window in some of their layers. Our model does so too.
#
# The next cell uses the package's version. It takes tensors `[B, T, heads, D]`: it has two more axes, one for the batch
# and one for the heads. **You should see** that a window as wide as the text gives full attention.


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
# Can token 11 see token 3, the `7`? An experiment answers this. We **change** token 3 and look whether the output of
# token 11 changes.


# %%
def output_change(layer, x, changed, seen_by):
    """How far the output of token `seen_by` moves when token `changed` gets another vector."""
    other = x.clone()
    other[changed] += 1.0
    return (layer(other)[seen_by] - layer(x)[seen_by]).abs().max().item()


# %% [markdown]
# **You should see** that the output does not change at all as long as the window is 8 or less. Token 11 itself is one
# of the `W` tokens that it reads. So it needs `W = 9` to reach a distance of 8.

# %%
# NBVAL_CHECK_OUTPUT
for window in (4, 8, 9, 12):
    change = output_change(partial(window_layer, window=window), x, changed=3, seen_by=11)
    print(f"W={window:2}: the output does not change: {change == 0.0}")

# %% [markdown]
# No training can repair this. The answer cannot reach the question, no matter which weights the layer has.
#
# You may object that layers are stacked. That is right: the second layer reads outputs of the first layer, and those
# outputs already contain information from earlier tokens. Through $L$ layers, information travels $L \cdot (W - 1)$
# tokens. Exercise 1 lets you check it. The next cell computes this reach for the big model, as if it had window layers
# only. **You should see** that it covers less than 1% of 16 million tokens.

# %%
# NBVAL_CHECK_OUTPUT
reach = big_layers * (big.window - 1)
print(f"{big_layers} layers with a window of {big.window} reach {reach:,} tokens")
print(f"that is {100 * reach / million_16:.1f} % of 16M tokens")

# %% [markdown]
# And if 28 layers hand on a piece of information, one after the other, it arrives distorted: each layer mixes it with
# thousands of other tokens.
#
# ## A third method: few tokens, from anywhere
#
# Hierarchical Sparse Attention (HSA) cuts the text into **chunks** of $S$ tokens. Each chunk gets one summary vector,
# its **landmark**. A token compares its query with the landmarks and keeps the best $K$ chunks. This step is called
# **retrieval**, and it also gives each kept chunk a weight. Then the token reads the tokens of those $K$ chunks, and no
# others. It adds up the results of the chunks, each multiplied by the weight of its chunk.
#
# The next notebooks build each part with care. Here we borrow the finished operations of the package. Our landmark is
# the simplest one, the mean of a chunk. With $S = 4$ and $K = 1$ the layer looks like this:


# %%
def choose_chunks(x, chunk_size, top_k):
    """The chunks that each token keeps, and the weight of each: x [T, D] -> indices and weights [T, K]."""
    landmarks = x.unflatten(0, (-1, chunk_size)).mean(dim=1)  # [T, D] -> [N, S, D] -> [N, D]
    queries = x[None, :, None]  # [1, T, 1, D]
    indices, weights = retrieve(queries, landmarks[None, :, None], chunk_size=chunk_size, top_k=top_k)
    return indices[0, :, 0], weights[0, :, 0]


def hsa_layer(x, chunk_size=4, top_k=1):
    """Every token reads only the chunks that it keeps: x [T, D] -> [T, D]."""
    indices, weights = choose_chunks(x, chunk_size, top_k)
    chunks = x.unflatten(0, (-1, chunk_size))[None, :, :, None]  # [1, N, S, 1, D]
    return chunk_attention(x[None, :, None], chunks, chunks, indices[None, :, None], weights[None, :, None])[0, :, 0]


# %% [markdown]
# **You should see** that token 11 keeps chunk 0, `the code is 7`, and that a change of the `7` now changes the output
# of token 11. It read 4 tokens out of 12.

# %%
# NBVAL_CHECK_OUTPUT
indices, weights = choose_chunks(x, chunk_size=4, top_k=1)
chosen = indices[11].item()
print(f"token 11 keeps chunk {chosen}:", " ".join(WORDS[chosen * 4 : chosen * 4 + 4]))
print("a change of token 3 reaches token 11:", output_change(hsa_layer, x, changed=3, seen_by=11) > 0)

# %% [markdown]
# ## The picture: which token sees which
#
# We change each token in turn, and we mark every token whose output changes. A row stands for a token that looks. A
# column stands for a token that we change. A filled square means that the output in this row changed.


# %%
def sees(layer, x):
    """[T, T]: row t, column i is True where the output of token t changes when token i is changed."""
    before = layer(x)
    columns = []
    for i in range(len(x)):
        other = x.clone()
        other[i] += 1.0
        columns.append((layer(other) != before).any(dim=-1))
    return torch.stack(columns, dim=1)


# %%
window_of_4 = partial(window_layer, window=4)
layers_to_compare = {"full attention": full_layer, "window of 4": window_of_4, "HSA, K = 1": hsa_layer}
maps = {name: sees(layer, x) for name, layer in layers_to_compare.items()}
show(
    side_by_side.reach_maps(maps, tokens=WORDS, token=11),
    "Three triangular maps show which token sees which. Full attention fills the whole triangle. The window of 4 fills "
    "a band along the diagonal. HSA fills whole chunks that are complete, including far ones, and it leaves the newest "
    "tokens empty.",
)

# %% [markdown]
# The window gives a thin band along the diagonal. The HSA map is different: its squares form blocks of one chunk, far
# from the diagonal. (The single square at the end of a row belongs to the token itself, because its own query changed.)
# HSA has a hole at the newest tokens, because only a complete chunk can be read. The window is strong exactly there. So
# the two methods belong together: **the window reads near tokens, HSA reads far tokens.**
#
# ### Move it
#
# Choose the token that looks, and the method. The right half shows which chunks retrieval gives to that token. It does
# not depend on the window. Begin with both methods together: which squares come from which method? Then try only the
# window, with `W` of 8 and of 9. Then try only HSA, at token 11, with `K` of 1 and of 2.


# %%
def layer_named(method, window, K):
    """One of the four methods, as a function of x."""
    near = partial(window_layer, window=window)
    far = partial(hsa_layer, top_k=K)
    both = lambda x: torch.cat((near(x), far(x)), dim=-1)  # noqa: E731
    return {"full": full_layer, "window": near, "HSA": far, "window + HSA": both}[method]


def weights_by_chunk(token, K):
    """What retrieval gives to each of the three chunks."""
    indices, weights = choose_chunks(x, 4, K)
    return [weights[token][indices[token] == i].sum().item() for i in range(3)]


def count_seen(method, token, changed):
    """What a token sees, in words."""
    count = changed[token].sum().item()
    seven = "yes" if changed[token, 3] else "no"
    return f"{method}: token {token} ({WORDS[token]}) sees {count} of {token + 1} tokens. Does it see the 7? {seven}."


def draw_reach(figure, method, window, K, token):
    changed = sees(layer_named(method, window, K), x)
    side_by_side.reach_and_chunks(figure, changed, weights_by_chunk(token, K), WORDS, 4, token=token, title=method)
    return count_seen(method, token, changed)


# %%
explore(
    draw_reach,
    alt="Left: a map of which token sees which. Right: the three chunks and the weight that retrieval gives to each.",
    size=(11, 4.4),
    method=["window + HSA", "window", "HSA", "full"],
    window=Control((1, 12), start=4, label="window W"),
    K=Control((1, 2), label="chunks kept K"),
    token=Control((0, 11), start=11, label="token that looks"),
)

# %% [markdown]
# ## The costs again, for all three methods
#
# What does **one new token** cost in one layer, when $T$ tokens lie before it? We have $H$ query heads of $D$ numbers,
# landmarks of $R$ numbers, and one retrieval head that all query heads share:
#
# | | FLOP for one new token |
# |---|---|
# | full attention | $4 \cdot T \cdot D \cdot H$ |
# | window | $4 \cdot \min(W, T) \cdot D \cdot H$ |
# | HSA | $2R \cdot T/S$ to score landmarks, $4 \cdot K S \cdot D H$ to read chunks, $2 \cdot K \cdot D H$ to blend them |
#
# (Where fewer than $K$ chunks exist, $K$ stands for the number of chunks that exist.)


# %%
def full_flop(T, H, D):
    return 4 * T * H * D


def window_flop(T, W, H, D):
    return 4 * min(W, T) * H * D


def hsa_flop(T, S, K, H, D, R):
    """Score T/S landmarks, read K chunks (or all chunks, if there are fewer), blend the results."""
    K = min(K, T // S)
    return 2 * R * (T // S) + 4 * K * S * H * D + 2 * K * H * D


# %% [markdown]
# `decode` is HSA for one new token. **You should see** that PyTorch's count equals the formula.

# %%
# NBVAL_CHECK_OUTPUT
tokens = 4096
S = 16
K = 4
H = 2
R = 32
one = {
    "retrieval_q": torch.zeros(1, 1, 1, R),
    "q": torch.zeros(1, 1, H, D),
    "landmarks": torch.zeros(1, tokens // S, 1, R),
    "k": torch.zeros(1, tokens // S, S, 1, D),
    "v": torch.zeros(1, tokens // S, S, 1, D),
}
print("measured:", count_flop(decode, **one, chunk_size=S, top_k=K, offset=tokens))
print("formula :", hsa_flop(tokens, S, K, H, D, R))

# %% [markdown]
# ### Move it
#
# These are the sizes of the large model: $H = 16$, $D = 128$, $W = 4096$, $S = 64$, $R = 128$. Both axes are
# logarithmic: each step to the right doubles the text. Find the length at which the curve of HSA starts to bend up.
# Then read how many times cheaper HSA is at 16M tokens.

# %%
LENGTHS = [2**n for n in range(12, 25)]


def costs_of(K):
    """FLOP of one token in one layer, by method, at all LENGTHS."""
    H, D = big.hsa_heads, big.hsa_head_dim
    return {
        "full attention": [full_flop(T, H, D) for T in LENGTHS],
        "HSA": [hsa_flop(T, big.chunk_size, K, H, D, big.retrieval_dim) for T in LENGTHS],
        f"window of {big.window}": [window_flop(T, big.window, H, D) for T in LENGTHS],
    }


def compare_costs(length, K):
    """The costs at one length, in words."""
    full, hsa, window = (flop[LENGTHS.index(length)] for flop in costs_of(K).values())
    flop = f"full {full:.1e} FLOP, HSA {hsa:.1e}, window {window:.1e}"
    return f"At {length_name(length)} tokens, K={K}: {flop}; full / HSA = {full / hsa:.1f}."


def draw_costs(figure, length, K):
    plots.cost_curves(figure.subplots(), LENGTHS, costs_of(K), at=length, ylabel="FLOP, one token, one layer")
    return compare_costs(length, K)


explore(
    draw_costs,
    alt="FLOP of one new token against context length, on logarithmic axes: the curve of full attention rises, the "
    "curves of window and HSA hardly rise.",
    length=Control([(length_name(n), n) for n in LENGTHS], start=million_16, label="context length"),
    K=Control([1, 4, 16, 64, 256], start=64, label="chunks kept K"),
)

# %% [markdown]
# Two caveats. First: the cost of HSA still depends on $T$. Every token scores every landmark, and at 16M
# tokens with $K = 64$ that is two thirds of the work of HSA. HSA needs *few* operations per chunk, but it does need
# some. Second: at 4K tokens, HSA with $K = 64$ reads all chunks and saves nothing.
#
# What about the memory? HSA keeps one set of keys, values and landmarks, and **all** its layers share this set. **You
# should see** that HSA keeps a small fraction of what full attention keeps.

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
# The paper demands three properties of a model for very long texts (abstract, §1). In our words:
#
# 1. **Sparsity.** A token looks at few other tokens. Otherwise the cost grows with the square of the text length.
# 2. **Random-access flexibility.** Those few tokens may lie *anywhere*, and the model itself learns where to look.
#    Otherwise the one sentence that matters is out of reach, or the model reaches it by luck.
# 3. **Length generalization.** A skill that the model learned on short texts still works on long texts. Nobody trains
#    on 16 million tokens at a time. A model has to learn the skill at a few thousand tokens and keep it.
#
# | | sparse | random access | generalizes to longer texts |
# |---|---|---|---|
# | full attention | no | yes | often badly: it gets distances, and numbers of keys, that it never saw in training |
# | sliding window | yes | no | yes, for everything inside the window |
# | a state of fixed size, which every token rewrites (a recurrent network) | yes | no: overwritten information is gone | as far as the state can store it |
# | HSA | yes | yes, by chunks | this is its aim; notebook 05 tests a small model |
#
# For three of the four rows, this page measured the first two columns. The third column is only a claim so far. Later
# notebooks measure it.

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.mechanism.why import check_first_gain, check_layers_needed, check_window_attention

# %% [markdown]
# **1. A stack of window layers.** *Difficulty 1, importance 4, 5 minutes.* Feed the output of one window layer into the
# next. How many layers with a window of $W$ does it take until information has travelled `distance` tokens?


# %%
def layers_needed(distance, window):
    """The smallest number of window layers through which token t can see token t - distance."""
    # your code


check_layers_needed(layers_needed)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# One layer reaches $W - 1$ tokens back. With `W = 4` and a distance of 8, two layers reach 6 tokens, which is not
# enough, and three layers reach 9. The experiment agrees: it changes token 3 and looks at token 11.
#
# ```python
# def layers_needed(distance, window):
#     return -(-distance // (window - 1))  # rounded up
#
#
# def stack(x, layers, window=4):
#     for _ in range(layers):
#         x = window_layer(x, window)
#     return x
#
#
# check_layers_needed(layers_needed)
# for layers in (1, 2, 3):
#     print(layers, output_change(partial(stack, layers=layers), x, changed=3, seen_by=11) > 0)
# assert output_change(partial(stack, layers=2), x, 3, 11) == 0.0
# assert output_change(partial(stack, layers=layers_needed(8, 4)), x, 3, 11) > 0.0
# ```
#
# </details>

# %% [markdown]
# **2. Where does HSA begin to pay off?** *Difficulty 3, importance 3, 10 minutes.* From which text length on is HSA
# cheaper than full attention? The length is a multiple of $S$. Solve it on paper for the sizes of the large model and
# $K = 64$. Then write the function with `full_flop` and `hsa_flop`.


# %%
def first_gain(S, K, H, D, R):
    """The smallest multiple of S tokens at which `hsa_flop` is below `full_flop`."""
    # your code


check_first_gain(first_gain)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# $4THD = 2RT/S + 4KSHD + 2KHD$. Here $2R/S = 4$ is negligible beside $4HD = 8192$. Divide by $4HD$ and get $T \approx
# KS + K/2 = 4128$. Up to this length HSA would read every token anyway. Beyond it, full attention reads more. The first
# whole number of chunks beyond it is $T = 4160$.
#
# ```python
# def first_gain(S, K, H, D, R):
#     return next(T for T in range(S, 10**6, S) if hsa_flop(T, S, K, H, D, R) < full_flop(T, H, D))
#
#
# check_first_gain(first_gain)
# print(first_gain(S=64, K=64, H=16, D=128, R=128))
# assert first_gain(S=64, K=64, H=16, D=128, R=128) == 4160
# ```
#
# </details>

# %% [markdown]
# **3. A window in one mask.** *Difficulty 2, importance 5, 10 minutes.* Change `full_attention` so that token $t$ reads
# only the $W$ keys that end at its own.


# %%
def window_attention(q, k, v, window):
    """Token t reads tokens t - window + 1 to t: q, k, v [T, D] -> [T, D]."""
    # your code


check_window_attention(window_attention)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# The future is above the diagonal: `triu(1)`. What lies too far back is below it: `tril(-window)`. Both get a score of
# $-\infty$ *before* the softmax, so that the other shares add up to 1.
#
# ```python
# def window_attention(q, k, v, window):
#     scores = q @ k.T / q.shape[-1] ** 0.5  # [T, T]
#     everything = torch.ones_like(scores, dtype=torch.bool)
#     hidden = everything.triu(1) | everything.tril(-window)
#     return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ v
#
#
# check_window_attention(window_attention)
# assert torch.allclose(window_attention(x, x, x, 4), window_layer(x, 4))
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# Our landmark was the mean of a chunk. Is that a good summary? [Notebook 02, *What does a chunk say about
# itself?*](02_chunks.ipynb) shows what a mean cannot express, and it builds the small encoder that can. It takes 20
# minutes.
