# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 · How does the loss teach retrieval?
#
# A language model has one teacher: the loss on the next token. Nobody tells HSA which chunk it should have read. Still
# it learns to choose. The lesson arrives as a gradient, and the gradient enters through four doors: queries, keys,
# values, and **the weights of the chunks**. This notebook derives all four gradients by hand, and then turns them into
# a kernel.
#
# After this notebook you will be able to
#
# * derive every gradient of chunk attention in a few lines, and check each against autograd,
# * explain what the gradient of a weight means, and follow it to the landmark of a chunk that helps,
# * turn "which chunks did this token choose" into "which tokens chose this chunk", without a loop over all pairs,
# * explain why the order of a sum matters to a computer, and how to avoid atomic additions.
#
# **Time:** 35 minutes to read, half a minute to run on two CPU cores. **Needs:** notebooks [04](04_fusion.ipynb) and
# [06](06_forward_kernel.ipynb), and knowing what a derivative is. You need no GPU.
#
# [← 06 forward kernel](06_forward_kernel.ipynb) · [map of the course](00_start.ipynb) · [08 retrieval and decode kernels →](08_retrieval_and_decode_kernels.ipynb)

# %%
import json
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this variable when a kernel is imported

import triton
import triton.language as tl
from torch.nn.functional import pad, rms_norm

import hsa_kernels
from hsa_kernels.attention.partial_results import SEGMENT
from hsa_kernels.common.inverted_index import cut, invert
from hsa_mini.paths import data_dir
from hsa_mini.reference import chunk_attention, retrieve
from hsa_mini.reference.retrieval import visible_chunks
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.kernels import choice_table, index_rows, learning_curves
from hsa_mini.viz.plots import length_name
from hsa_mini.viz.programs.explorer import explore_programs
from hsa_mini.viz.programs.record import record

DEVICE = "cuda" if GPU else "cpu"
print("kernels run", f"on {torch.cuda.get_device_name()}" if GPU else "in Triton's interpreter, on the processor")

# %% [markdown]
# ## The question in plain words
#
# Take the twelve tokens again. The last one, `code`, has read two chunks:
#
# > `the code is 7` | `birds sing at dawn` | `what is the code`
#
# It gave the first chunk a weight of 0.82 and the second 0.18. The right answer is `7`, and the share of `7` in its
# answer was 0.71. The loss would be lower if this share were larger. Which numbers could change to make it larger?
#
# * The **value** of `7`: it was read with high attention, so a larger value gives `7` a larger share.
# * The **key** of `7` and the **query** of `code`: bring them closer together, so that `7` gets more attention.
# * The **weights**: raise the weight of the first chunk and lower that of the second.
#
# The last change is what makes HSA special: through it, the loss teaches retrieval.
#
# ## In symbols
#
# Consider one token, one head, and one chunk $i$ that the token kept. The forward pass uses the chunk's rows $k_s$ and
# $v_s$, $s = 1 \dots S$:
#
# $$a_s = c\; q \cdot k_s \qquad p_s = \frac{e^{a_s}}{\sum_r e^{a_r}} \qquad o = \sum_s p_s v_s \qquad O = \sum_i w_i\, o_i$$
#
# | symbol | what it is | in code |
# |---|---|---|
# | $c$ | the scale, $1/\sqrt D$ | `scale` |
# | $p_s$ | attention on token $s$ of the chunk | `p` |
# | $o_i, w_i$ | the chunk's answer, its weight | `o`, `w` |
# | $g = \partial L / \partial O$ | how the loss rises with the output | `g` |
# | $\delta_i = g \cdot o_i$ | how the loss rises with the chunk's answer | `delta` |

# %% [markdown]
# ## Four gradients by hand
#
# **The weight.** $O$ contains $w_i$ once, multiplied by $o_i$. So
#
# $$\frac{\partial L}{\partial w_i} = g \cdot o_i = \delta_i .$$
#
# **The values.** For each token that kept the chunk, $O$ contains $v_s$ once, multiplied by $w\,p_s$:
#
# $$\frac{\partial L}{\partial v_s} = w\, p_s\, g .$$
#
# **The attention.** $O$ contains $p_s$, multiplied by $w\,v_s$. Call $dp_s = g \cdot v_s$, and keep the factor $w$ for
# later. The softmax turns the gradient of the shares $p$ into the gradient of the scores $a$. If one share grows, the
# others shrink, so only the *difference from the mean* counts. The mean of $dp$, weighted by $p$, is $\sum_s p_s\, g
# \cdot v_s = g \cdot o = \delta$: a number that we already have.
#
# $$ds_s = w\, p_s\, (dp_s - \delta)$$
#
# **Queries and keys.** $a_s = c\, q \cdot k_s$, so
#
# $$\frac{\partial L}{\partial q} = c \sum_s ds_s\, k_s \qquad \frac{\partial L}{\partial k_s} = c\; ds_s\, q .$$
#
# These are the parts of one pair, and the parts are added up. A token's $q$ collects the parts of its chunks. A chunk's
# $k$ and $v$ collect the parts of the tokens that kept the chunk. Note that $\delta$ does two jobs. It *is* the
# gradient of the weight, and the softmax needs it too. Here is the code for one sequence and one head:


# %%
def gradients_of_pair(q, k, v, w, g, scale):
    """One token and one chunk: q and g [D], k and v [S, D], weight w -> their parts of dq, dk, dv and dw."""
    p = (k @ q * scale).softmax(dim=0)  # [S]: computed again, not stored
    dp = v @ g  # [S]
    delta = p @ dp  # g . o of this chunk
    ds = w * p * (dp - delta)  # [S]
    return scale * ds @ k, scale * ds[:, None] * q, w * p[:, None] * g, delta


def gradients(q, k, v, indices, weights, grad_out, scale):
    """By hand: q and grad_out [T, D], k and v [N, S, D], indices and weights [T, K] -> dq, dk, dv, dweights."""
    dq, dk, dv, dweights = (torch.zeros_like(x) for x in (q, k, v, weights))
    for t, slot in (indices >= 0).nonzero().tolist():
        i = int(indices[t, slot])
        parts = gradients_of_pair(q[t], k[i], v[i], weights[t, slot], grad_out[t], scale)
        dq[t] += parts[0]
        dk[i] += parts[1]
        dv[i] += parts[2]
        dweights[t, slot] = parts[3]
    return dq, dk, dv, dweights


# %% [markdown]
# Two things deserve a second look. First, the probabilities $p$ are **computed again** from q and k. Storing them would
# take S numbers for every pair, and computing them costs one product. Second, the function adds to `dq`, `dk` and `dv`
# with `+=`. In a loop this is harmless. But if a thousand programs run at once, several of them add to the same number
# at the same time. This is the main problem of the backward pass.
#
# ## The equality of this notebook
#
# We use the twelve tokens with the rule of notebook 04. The loss is $-\log$ of the share of `7` at token 11. Autograd
# differentiates the reference in float64. We compare each gradient by name.
#
# **You should see** four times `True`.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


S = 4
TEXT = "the code is 7 | birds sing at dawn | what is the code"
WORDS = TEXT.replace("|", " ").split()
VOCABULARY = list(dict.fromkeys(WORDS))
SEVEN = VOCABULARY.index("7")
own = torch.eye(len(VOCABULARY), dtype=torch.float64)[[VOCABULARY.index(word) for word in WORDS]]  # [T, D]
v = own.unflatten(0, (-1, S))  # [N, S, D]
q = norm(own)
k = norm(pad(v, (0, 0, 2, 0))[:, :S])
landmarks = norm(v.sum(dim=1))


def read(q, k, v, indices, weights):
    """The reference for one sequence and one head -> [T, D]."""
    heads = q[None, :, None], k[None, :, :, None], v[None, :, :, None]
    return chunk_attention(*heads, indices[None, :, None], weights[None, :, None])[0, :, 0]


def choose(landmarks):
    """The retrieval of notebook 03 with K = 2 -> indices and weights [T, K]."""
    indices, weights = retrieve(q[None, :, None], landmarks[None, :, None], chunk_size=S, top_k=2)
    return indices[0, :, 0], weights[0, :, 0]


# %%
# NBVAL_CHECK_OUTPUT
indices, weights = choose(landmarks)
leaves = {"q": q, "k": k, "v": v, "weights": weights}
leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
out = read(leaves["q"], leaves["k"], leaves["v"], indices, leaves["weights"])
loss = -out[11, SEVEN].log()
(g,) = torch.autograd.grad(loss, out, retain_graph=True)
loss.backward()
ours = gradients(q, k, v, indices, weights, g, scale=len(VOCABULARY) ** -0.5)
for (name, leaf), gradient in zip(leaves.items(), ours):
    same = torch.allclose(gradient, leaf.grad)
    print(f"gradient of {name:7} == autograd: {same}, largest {gradient.abs().max():.3f}")

# %% [markdown]
# In this example only one token has a loss, so it does not test much. In the next example, with random numbers, every
# token gets a gradient, and every sum has many terms. **You should see** four times `True` again.


# %%
def random_example(T=24, N=6, S=4, D=8, K=3, seed=0):
    """q [T, D], k and v [N, S, D], indices and weights [T, K], gradient of the output [T, D], in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (T, D), (T, D), (N, S, D), (N, S, D)
    q, g, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    scores = torch.rand(T, N, generator=generator).masked_fill(~visible_chunks(torch.arange(T), N, S), -1.0)
    best = scores.topk(K)
    empty = best.values < 0
    weights = torch.rand(T, K, generator=generator, dtype=torch.float64).masked_fill(empty, 0.0)
    return q, k, v, best.indices.masked_fill(empty, -1).int(), weights, g


def by_autograd(q, k, v, indices, weights, g):
    """The gradients of q, k, v and weights that autograd finds for the reference."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v, weights)]
    out = read(*leaves[:3], indices, leaves[3])
    return torch.autograd.grad(out, leaves, g)


# %%
# NBVAL_CHECK_OUTPUT
example = random_example()
for name, got, want in zip(("q", "k", "v", "weights"), gradients(*example, scale=8**-0.5), by_autograd(*example)):
    print(f"gradient of {name:7} == autograd: {torch.allclose(got, want)}")

# %% [markdown]
# ## What the gradient of a weight means
#
# A gradient is a slope: change one weight a little, and see how the loss moves. We do exactly that for both weights of
# token 11, and compare the slope with $\delta$.
#
# **You should see** a slope of −1.2231 for the chunk with the code: a higher weight *lowers* the loss. For the chunk
# with the birds the slope is 0, because that chunk contains nothing about `7`.


# %%
def loss_with(slot, change):
    """The loss if token 11 gave the chunk in `slot` a weight that is higher by `change`."""
    changed = weights.clone()
    changed[11, slot] += change
    return -read(q, k, v, indices, changed)[11, SEVEN].log()


# %%
# NBVAL_CHECK_OUTPUT
for slot in (0, 1):
    slope = (loss_with(slot, 1e-5) - loss_with(slot, -1e-5)) / 2e-5
    delta = ours[3][11, slot]
    same = torch.allclose(slope, delta)
    print(f"weight of chunk {indices[11, slot]}: slope {slope:.4f}, delta {delta:.4f}, equal: {same}")

# %% [markdown]
# Should the weight of the chunk of birds stay as it is, then? No. The weights come from a softmax over scores, so they
# add up to 1. The gradient of this softmax also contains the difference from a mean, now a mean over the chunks:
#
# $$\frac{\partial L}{\partial s_i} = w_i \Big(\delta_i - \sum_j w_j \delta_j\Big)$$
#
# It is the formula of notebook 04. The gradient pulls up a chunk that is **better than the blend** ($\delta_i$ below
# the mean), and pushes down a chunk that is worse. A score is a dot product of the token's query with the chunk's
# landmark $\ell_i$. So the landmark moves along the query, or against it:
#
# $$\frac{\partial L}{\partial \ell_i} = c \sum_t \frac{\partial L}{\partial s_{t,i}}\; q_t$$
#
# **You should see** `True`, then *rises* for the code and *falls* for the birds.


# %%
def gradient_of_landmarks(dweights, indices, weights, queries, count):
    """From dweights [T, K] through the softmax over chunks and the scores -> [N, D]."""
    dscores = weights * (dweights - (weights * dweights).sum(dim=1, keepdim=True))  # [T, K]
    grad = queries.new_zeros(count, queries.shape[1])
    for t, slot in (indices >= 0).nonzero().tolist():
        grad[indices[t, slot]] += dscores[t, slot] * queries[t] * queries.shape[1] ** -0.5
    return grad


# %%
# NBVAL_CHECK_OUTPUT
learning = landmarks.clone().requires_grad_()
(-read(q, k, v, *choose(learning))[11, SEVEN].log()).backward()
by_hand = gradient_of_landmarks(ours[3], indices, weights, q, len(landmarks))
print("gradient of landmarks == autograd:", torch.allclose(by_hand, learning.grad))
for i, chunk in enumerate(TEXT.split(" | ")[:2]):
    along = by_hand[i] @ q[11] * len(VOCABULARY) ** -0.5
    change = "rises" if along < 0 else "falls"
    print(f"chunk {i} `{chunk}`: the score of token 11 {change} in a step against the gradient")

# %% [markdown]
# This is how the loss teaches retrieval:
#
# > the chunk's content helped → δ is below the mean → its score should rise → its landmark turns towards the query
#
# Everything that produced the landmark learns from this gradient, down to the matrices of the chunk encoder. Let us
# take forty steps in which only the three landmarks learn.


# %%
def teach(steps=40, rate=2.0):
    """Gradient descent on the landmarks only -> weight of chunk 0 at token 11 and share of `7`, before each step."""
    learned = landmarks.clone()
    history = []
    for _ in range(steps):
        indices, weights = choose(learned)
        out = read(q, k, v, indices, weights)
        g = torch.zeros_like(out)
        g[11, SEVEN] = -1 / out[11, SEVEN]  # the gradient of -log
        history.append((weights[11][indices[11] == 0].sum().item(), out[11, SEVEN].item()))
        dweights = gradients(q, k, v, indices, weights, g, scale=len(VOCABULARY) ** -0.5)[3]
        learned -= rate * gradient_of_landmarks(dweights, indices, weights, q, len(learned))
    return torch.tensor(history)


# %%
history = teach()
curves = dict(zip(("weight of the chunk with the code", "share of `7` in the answer"), history.T))
figure = make_figure(7.5, 2.8)
learning_curves(figure.subplots(), curves, ylabel="at token 11", ylim=(0.6, 1.01))
show(
    figure,
    "Two curves over forty steps. The weight of the chunk with the code rises from 0.82 towards 1, and the share of 7 rises with it.",
)

# %% [markdown]
# **You should see** the weight rise from 0.82 to 0.99, and the share from 0.71 to 0.86.

# %%
# NBVAL_CHECK_OUTPUT
print("weight of chunk 0 before and after:", [round(x, 2) for x in (history[0, 0].item(), history[-1, 0].item())])
print("share of `7` before and after:     ", [round(x, 2) for x in (history[0, 1].item(), history[-1, 1].item())])

# %% [markdown]
# The share of `7` will never pass 0.87, which is its share inside chunk 0. To get further, keys, queries and values
# have to learn, through their own gradients. (The weight itself could learn only because chunk 0 was chosen in the
# first place. The noise of notebook 03 makes sure that every chunk is tried.)
#
# ## From a loop to programs
#
# Now we make it fast. Notebook 06 had three schedules. All of them were possible because the result of each pair is
# finished. The backward pass has four results, and each is a different sum:
#
# | gradient | is a sum over | which program could own it |
# |---|---|---|
# | dweights | nothing: one number per pair | any program |
# | dq | the chunks of a token | a program of that token |
# | dk, dv | the tokens that chose a chunk | a program of that chunk |
#
# A chunk has 2·S rows of dk and dv, and a token has one row of dq. So the package works **by chunk**. It sums dk and dv
# inside the processor, and writes each pair's part of dq as a partial result.
#
# But the program for chunk 5 must know *which tokens chose chunk 5*. We have the opposite: `indices[t]` lists the
# chunks of a token. Searching all of `indices` for each chunk would cost T·K·N steps. N grows with T, so this cost
# would be quadratic again. Avoiding a quadratic cost was the purpose of the whole method.
#
# ## The inverted index
#
# The solution is like the index of a book. The text tells which words stand on a page, and the index tells on which
# pages a word stands. We build it by **sorting**. Write down one entry for each filled slot, sort the entries by chunk,
# and note where each chunk's list begins. Here it is by hand for the twelve tokens. Tokens 4 to 7 saw only chunk 0, and
# tokens 8 to 11 saw chunks 0 and 1. So the list of chunk 0 is 4, 5, 6, 7, 8, 9, 10, 11, the list of chunk 1 is 8, 9,
# 10, 11, and the list of chunk 2 is empty.
#
# **You should see** these three lists, and `True` twice.


# %%
def invert_by_hand(indices, chunks):
    """indices [T, K] -> entries t*K + slot, sorted by chunk, then token, empty slots last; where each list starts."""
    lists = [[] for _ in range(chunks + 1)]  # the last list holds the empty slots
    for entry, i in enumerate(indices.flatten().tolist()):
        lists[i if i >= 0 else chunks].append(entry)
    lengths = torch.tensor([0, *map(len, lists[:-1])])
    return torch.tensor([entry for entries in lists for entry in entries]), lengths.cumsum(dim=0)


# %%
# NBVAL_CHECK_OUTPUT
entries, starts = invert_by_hand(indices, chunks=3)
for i in range(3):
    print(f"chunk {i} was chosen by tokens", (entries[starts[i] : starts[i + 1]] // 2).tolist())
for name, choice, count in (("twelve tokens", indices, 3), ("random example", example[3], 6)):
    entries, starts = invert_by_hand(choice, count)
    theirs = invert(choice[None, :, None].int(), count)
    same = torch.equal(entries, theirs.entries) and torch.equal(starts, theirs.starts)
    print(f"{name}: by hand == package: {same}")
print("entries in a segment of the package:", SEGMENT)

# %% [markdown]
# The package sorts keys instead of appending to lists, because a GPU sorts millions of numbers quickly and appends to
# lists slowly. The sort is *stable*: entries of the same chunk stay in the order of the tokens. So the same choice
# always gives the same index. That will matter soon.
#
# A second array, `inverse_order`, leads back: it gives the position of slot $k$ of token $t$ in the sorted list. The
# programs write dweights in the order of the list, and `inverse_order` brings them back to the order of the tokens. It
# also tells each token where its partial results of dq are.
#
# ## See it
#
# The left side shows the choice: tokens from top to bottom, chunks from left to right. The right side shows the same
# cells in the order of the index, in one row per chunk. The selected row is cut into **segments**, and one program gets
# one segment. Without segments, a chunk that every token wants would keep one program busy long after all others have
# finished.

# %%
LARGER = random_example(T=28, N=7, K=3, seed=2)[3]
CHOICES = {"twelve tokens": (indices, 3, WORDS), "28 tokens, K = 3": (LARGER, 7, None)}


def draw_inverted(figure, what, chunk, segment):
    """The choice and the inverted index side by side, one chunk marked."""
    choice, chunks, words = CHOICES[what]
    K = choice.shape[1]
    chunk = min(chunk, chunks - 1)
    index = invert(choice[None, :, None].int(), chunks)
    lists = [part.tolist() for part in (index.entries // K).tensor_split(index.starts[1:])][:chunks]
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    choice_table(left, choice, chunks, chunk, words)
    index_rows(right, lists, chunk, segment)
    segments = cut(index, segment).starts.diff()[chunk].item()
    tokens = f"tokens {', '.join(map(str, lists[chunk]))}" if lists[chunk] else "no token"
    return f"Chunk {chunk} was chosen by {tokens}. Segments of at most {segment} entries: {segments}."


# %% [markdown]
# ### Move it
#
# Select a chunk: its column on the left becomes its row on the right. Then cut the rows into shorter segments. With
# short segments many programs share a popular chunk. But each of them loads k and v again, and produces a part of dk
# and dv that must be added up. The package's segments are much longer, as printed above.

# %%
explore(
    draw_inverted,
    alt="Left: a table of tokens and chunks with a cell for every choice. Right: one row per chunk with the tokens "
    "that chose it. The row of the selected chunk is coloured by segment.",
    size=(9, 4.2),
    what=Control(list(CHOICES), start="28 tokens, K = 3", label="example"),
    chunk=Control((0, 6), start=1, label="chunk"),
    segment=Control([2, 4, 8, 16], start=4, label="choices in a segment"),
)

# %% [markdown]
# ## A kernel for one gradient
#
# With the index, a gradient is a small kernel, like those of notebook 06. One program has one chunk. It goes through the
# list of this chunk, one entry at a time, and sums dv where no other program adds to it. It computes the shares $p$
# again. The new idea: **the length of the loop is a number that was loaded.**
#
# **You should see** `True`.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def dv_kernel(q, k, g, weights, entries, starts, out, scale, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """One program sums dv [S, D] of one chunk over the tokens that kept it."""
    i = tl.program_id(0)
    o_d = tl.arange(0, D)
    o_kv = (i * S + tl.arange(0, S))[:, None] * D + o_d[None, :]  # [S, D]
    b_k = tl.load(k + o_kv)
    b_dv = tl.zeros([S, D], tl.float32)
    for place in range(tl.load(starts + i), tl.load(starts + i + 1)):
        entry = tl.load(entries + place)  # t * K + slot
        b_s = tl.sum(b_k * tl.load(q + entry // K * D + o_d)[None, :], 1) * scale  # [S]
        b_p = tl.exp(b_s - tl.max(b_s, 0))
        b_p = tl.load(weights + entry) * b_p / tl.sum(b_p, 0)  # [S]: w p
        b_dv += b_p[:, None] * tl.load(g + entry // K * D + o_d)[None, :]
    tl.store(out + o_kv, b_dv)


names = "q", "k", "v", "indices", "weights", "g"
tensors = {name: x.float().to(DEVICE) for name, x in zip(names, example) if name not in ("v", "indices")}
entries, starts = (x.to(DEVICE) for x in invert_by_hand(example[3], 6))
index = dict(entries=entries.view(example[3].shape), starts=starts, out=torch.empty_like(tensors["k"]))
dv_kernel[(6,)](**tensors, **index, scale=8**-0.5, K=3, S=4, D=8)
print("dv of the kernel == by hand:", torch.allclose(index["out"].cpu().double(), gradients(*example, scale=8**-0.5)[2], atol=1e-5))

# %% [markdown]
# ### Move it
#
# The picture was recorded from the run. Orange cells are loaded by the program of a chunk, dark blue ones are stored, and
# light blue cells belong to other programs. Move from chunk 0 to chunk 5. Every chunk loads *its* rows of `k` and stores
# its rows of `out`, and no two programs store to the same place. The rows of `q` and `g` lie where the tokens are that
# kept the chunk. Then play a program: after each row of `q` it computes, and the FLOP grow. Who has more work, an early
# chunk or a late one?

# %%
recorded = record(dv_kernel, (6,), **tensors, **index, scale=8**-0.5, K=3, S=4, D=8)
explore_programs(
    {"dv": recorded},
    alt="The tensors of the kernel for dv as grids. Orange: loaded by the program of the chunk. Dark blue: stored by it.",
)

# %% [markdown]
# An early chunk is visible to more tokens, so its list is longer, and its program takes longer. Segments, as in the
# picture of the index, divide such a list among several programs. Then several programs hold parts of one sum.
#
# ## Why no atomic additions
#
# Several programs hold parts of the same sum: of the dq of a token, and of the dk and dv of a popular chunk. The
# obvious tool is an *atomic* addition: each program adds its part when it arrives, and the hardware makes sure that no
# other program interrupts. The result is correct, but there is a flaw. A computer rounds after every addition. So **a
# sum depends on its order**, and the programs of a GPU arrive in a different order in every run. Here are 256 numbers
# in float32, added up in 20 orders.
#
# **You should see** `False`, then `True`.


# %%
# NBVAL_CHECK_OUTPUT
def add_up(numbers):
    """One number after the other, rounded to float32 each time."""
    total = torch.zeros(())
    for number in numbers:
        total = total + number
    return total.item()


generator = torch.Generator().manual_seed(0)
numbers = torch.randn(256, generator=generator)
sums = {add_up(numbers[torch.randperm(256, generator=generator)]) for _ in range(20)}
print("20 orders, one sum:", len(sums) == 1)
print("largest difference below 0.0001:", max(sums) - min(sums) < 1e-4)

# %% [markdown]
# The differences are tiny. But training repeats them a million times, and then two runs with the same seed give two
# different models. It becomes hard to tell whether a change improved something, or whether a bug is gone. So the
# package has a rule: **every sum belongs to one program, or is added in a fixed order.**
#
# ## Partial results and segments
#
# Here are both methods in PyTorch. A program gets one chunk and one segment of its list. It computes what `gradients`
# computed, but for all its entries at once: the entries are the rows of a tile.


# %%
def run_program(q, k, v, weights, g, chunk, entries):
    """One chunk and E of its entries -> dq of each entry [E, D], dk and dv [S, D], dweights of each entry [E]."""
    t = entries // weights.shape[1]
    w = weights.flatten()[entries][:, None]  # [E, 1]
    scale = q.shape[1] ** -0.5
    p = (q[t] @ k[chunk].T * scale).softmax(dim=1)  # [E, S]
    dp = g[t] @ v[chunk].T  # [E, S]
    delta = (p * dp).sum(dim=1)  # [E]
    ds = w * p * (dp - delta[:, None])  # [E, S]
    return scale * ds @ k[chunk], scale * ds.T @ q[t], (w * p).T @ g[t], delta


def programs(indices, chunks, size):
    """All programs: each is a chunk and at most `size` entries of its list."""
    entries, starts = invert_by_hand(indices, chunks)
    lists = (entries[starts[i] : starts[i + 1]] for i in range(chunks))
    return [(i, part) for i, whole in enumerate(lists) for part in whole.split(size) if len(part)]


def with_atomics(q, k, v, indices, weights, g, arrival, size=4):
    """Every program adds to dq, dk and dv when it arrives."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    jobs = programs(indices, len(k), size)
    for chunk, entries in (jobs[number] for number in arrival(len(jobs))):
        dq_part, dk_part, dv_part, _ = run_program(q, k, v, weights, g, chunk, entries)
        dq[entries // indices.shape[1]] += dq_part
        dk[chunk] += dk_part
        dv[chunk] += dv_part
    return dq, dk, dv


def sum_segments(like, jobs, parts):
    """One part [S, D] per program -> their sums per chunk [N, S, D], always added in the order of the programs."""
    total = torch.zeros_like(like)
    for number, (chunk, _) in enumerate(jobs):
        total[chunk] += parts[number]
    return total


def with_partial_results(q, k, v, indices, weights, g, arrival, size=4):
    """Every program writes to places of its own when it arrives. Then all is added in a fixed order."""
    jobs = programs(indices, len(k), size)
    dq_parts = q.new_zeros(indices.numel(), q.shape[1])  # one per entry
    dk_parts, dv_parts = (q.new_zeros(len(jobs), *k.shape[1:]) for _ in range(2))  # one per program
    dweights = torch.zeros_like(weights)
    for number in arrival(len(jobs)):
        chunk, entries = jobs[number]
        results = run_program(q, k, v, weights, g, chunk, entries)
        dq_parts[entries], dk_parts[number], dv_parts[number], dweights.view(-1)[entries] = results
    dq = dq_parts.view(*indices.shape, -1).sum(dim=1)  # [T, K, D] -> [T, D]
    return dq, sum_segments(k, jobs, dk_parts), sum_segments(v, jobs, dv_parts), dweights


# %% [markdown]
# **You should see** `True` and `False` for atomic additions, `True` and `True` for partial results.

# %%
# NBVAL_CHECK_OUTPUT
exact = by_autograd(*example)
single = [x.float() if x.is_floating_point() else x for x in example]
seeded = [torch.Generator().manual_seed(seed) for seed in range(5)]
arrivals = [lambda jobs, seed=seed: torch.randperm(jobs, generator=seed).tolist() for seed in seeded]
for method in (with_atomics, with_partial_results):
    runs = [method(*single, arrival) for arrival in arrivals]
    right = all(torch.allclose(got.double(), want, atol=1e-4) for run in runs for got, want in zip(run, exact))
    same = all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
    print(f"{method.__name__}: 5 orders of arrival, every gradient == autograd: {right}; all bits equal: {same}")

# %% [markdown]
# That is the whole idea of [backward.py](../kernels/hsa_kernels/attention/backward.py), and it has the same steps.
# `find_segment` gives a program its chunk and its entries. A loop over blocks of entries computes `b_p`, `b_dp`,
# `b_delta` and `b_ds`. dk and dv stay in registers. `chunk_attention_sum_partial_results_kernel` and
# `chunk_attention_bwd_sum_segments_kernel` add up the parts. Compare `run_program` with the loop there. The names are
# the same.
#
# ## The package's gradients
#
# Here are the package's gradients in float32, with four heads that share one key/value head, against autograd of the
# reference in float64. We compute them twice and compare the bits.
#
# **You should see** eight times `True`. (In the interpreter the programs run one after the other, so equal bits are no
# surprise there. On a GPU they show that every sum has a fixed order.)

# %%
# NBVAL_CHECK_OUTPUT
generator = torch.Generator().manual_seed(1)
T, N, G, D, K = 48, 3, 4, 32, 2
drawn = dict(q=(1, T, G, D), k=(1, N, 16, 1, D), v=(1, N, 16, 1, D), weights=(1, T, 1, K), g=(1, T, G, D))
drawn = {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in drawn.items()}
_, kept = torch.rand(T, N, generator=generator).masked_fill(~visible_chunks(torch.arange(T), N, 16), -1.0).topk(K)
kept = kept.masked_fill(kept >= (torch.arange(T) // 16)[:, None], -1).int()[None, :, None].to(DEVICE)


def gradients_of(operator, dtype):
    """Gradients of q, k, v and weights, by name."""
    leaves = {name: drawn[name].to(dtype).requires_grad_() for name in ("q", "k", "v", "weights")}
    out = operator(leaves["q"], leaves["k"], leaves["v"], kept, leaves["weights"])
    found = torch.autograd.grad(out, list(leaves.values()), drawn["g"].to(dtype))
    return dict(zip(leaves, found))


ours, again = (gradients_of(hsa_kernels.chunk_attention, torch.float32) for _ in range(2))
for name, want in gradients_of(chunk_attention, torch.float64).items():
    right = torch.allclose(ours[name].double(), want, atol=1e-5)
    print(f"gradient of {name:7} == autograd: {right}, twice the same bits: {torch.equal(ours[name], again[name])}")

# %% [markdown]
# What does the backward pass cost on a real GPU? Here are stored measurements, as in notebook 06:

# %%
stored = json.loads((data_dir() / "results" / "kernels.json").read_text())
rows = {(row["op"], row["T"]): row for row in stored["rows"] if row["choices"] == "random" and row["J"] == 1}
print(f"stored measurements, {stored['hardware']} · random choices, H/J = 16")
print(f"{'tokens':>7} {'forward':>11} {'both':>11} {'both / forward':>15} {'peak memory':>13}")
for T in (T for op, T in rows if op == "forward"):
    forward = rows["forward", T]
    both = rows["forward_backward", T]
    ratio = both["ms"] / forward["ms"]
    memory = both["peak_bytes"] / 1e9
    print(f"{length_name(T):>7} {forward['ms']:8.2f} ms {both['ms']:8.2f} ms {ratio:15.1f} {memory:10.1f} GB")
# for the longest text: H heads of D numbers of 2 bytes per pair
gigabytes = both["chosen"] * both["H"] * both["D"] * 2 / 1e9
print(f"partial results for all pairs of {length_name(both['T'])} tokens at once: {gigabytes:.0f} GB")

# %% [markdown]
# The backward pass does two and a half times as many multiplications as the forward pass: five products per pair (the
# scores again, dp, dv, dk, dq) instead of two. So if multiplying were the limit, both passes together would cost about
# 3.5 times the forward pass. But bytes are the limit, so the ratio in the table is often different. For short texts it
# is larger. These numbers do not tell why. Sorting the choices and starting many small kernels are the first things to
# examine.
#
# Then there is memory. The partial results of *all* pairs would not fit into the card, as the last line shows. So the
# package processes the tokens in **tiles**. A tile has as many tokens as a fixed buffer for partial results allows. The
# last column grows far more slowly than the text.

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.kernels.backward import check_count_programs, check_invert, check_softmax_backward

# %% [markdown]
# **1. Through the softmax.** *Difficulty 2, importance 5, 10 minutes.* Write $p\,(dp - \delta)$ for E entries at once.
# Then add up the gradient of a chunk's keys over its S tokens, `dk.sum(dim=1)`. What do you find? Why must it be so?


# %%
def softmax_backward(p, dp):
    """Shares p and their gradient dp, both [E, S] -> the gradient of the scores [E, S] (without w)."""
    # your code


check_softmax_backward(softmax_backward)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The sum is zero for every chunk. If you add the same vector to all keys of a chunk, all its scores change by the same
# number, and the softmax inside the chunk gives the same result. If the loss does not change, the slope is 0. In the
# formula: $\sum_s ds_s = w \sum_s p_s (dp_s - \delta) = w (\delta - \delta) = 0$. This is special to HSA. In full
# attention the softmax runs over all keys, and only a shift of *all* of them has no effect.
#
# ```python
# def softmax_backward(p, dp):
#     delta = (p * dp).sum(dim=1, keepdim=True)  # [E, 1]
#     return p * (dp - delta)
#
#
# check_softmax_backward(softmax_backward)
# dq, dk, dv, dweights = gradients(*example, scale=8**-0.5)
# print(dk.sum(dim=1).abs().max(), dk.abs().max())
# assert dk.sum(dim=1).abs().max() < 1e-12 < dk.abs().max()
# ```
#
# </details>

# %% [markdown]
# **2. The inverted index by sorting.** *Difficulty 3, importance 4, 15 minutes.* Write `invert_by_hand` without a loop.
# An entry is $t \cdot K + \text{slot}$. Sort the entries by chunk with a *stable* sort. The empty slots come last.


# %%
def invert_by_sorting(indices, chunks):
    """indices [T, K] -> entries [T*K] sorted by chunk, then token; where each list starts [chunks + 1]."""
    # your code


check_invert(invert_by_sorting)

# %% [markdown]
# <details><summary>Solution</summary>
#
# An empty slot gets the key `chunks`, which is above every chunk. `starts` needs no sort: it adds up the lengths of the
# lists.
#
# ```python
# def invert_by_sorting(indices, chunks):
#     flat = indices.flatten().long()
#     entries = flat.masked_fill(flat < 0, chunks).argsort(stable=True)
#     lengths = torch.bincount(flat[flat >= 0], minlength=chunks)
#     return entries, torch.cat((torch.zeros(1, dtype=torch.int64), lengths)).cumsum(dim=0)
#
#
# check_invert(invert_by_sorting)
# for ours, by_hand in zip(invert_by_sorting(example[3], 6), invert_by_hand(example[3], 6)):
#     assert torch.equal(ours, by_hand)
# ```
#
# </details>

# %% [markdown]
# **3. How long should a segment be?** *Difficulty 2, importance 2, 10 minutes.* Count the programs for lists of given
# lengths. Then, for segments of 1, 2, 4, 8 and 32, count the programs of the random example, the entries of the longest
# program, and how often the k and v of some chunk are loaded.


# %%
def count_programs(lengths, size):
    """How many programs work on lists of these lengths, if each gets at most `size` entries of one list."""
    # your code


check_count_programs(count_programs)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Every program loads the k and v of its chunk once, and produces one part of dk and dv. So the number of loads equals
# the number of programs. With segments of 1 there is one program per entry. With segments of 32 there is one program
# for each chunk that some token chose, but then all others wait for the program of chunk 0. Short segments share the
# work evenly, and long segments save bytes. With thousands of chunks there is enough work for all processors, so a
# segment may be long.
#
# ```python
# def count_programs(lengths, size):
#     return sum(-(-length // size) for length in lengths)  # each rounded up
#
#
# check_count_programs(count_programs)
# lengths = invert_by_hand(example[3], 6)[1].diff().tolist()
# for size in (1, 2, 4, 8, 32):
#     jobs = programs(example[3], 6, size)
#     print(size, len(jobs), max(len(entries) for _, entries in jobs))
#     assert len(jobs) == count_programs(lengths, size)
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# We can now read chunks quickly, forward and backward. But before a token can read chunks, it has to *choose* them: 64
# out of up to 262,144, and a table of all scores would fill the memory many times over. [Notebook
# 08](08_retrieval_and_decode_kernels.ipynb) finds the best chunks without ever storing the scores. It takes about 40
# minutes.
