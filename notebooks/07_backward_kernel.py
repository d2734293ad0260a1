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
# A language model has one teacher: the loss on the next token. Nobody tells HSA which chunk it should have read. Still it
# learns to choose. The lesson arrives as a gradient, and the gradient comes through four doors: queries, keys, values,
# and **the weights of the chunks**. This notebook opens all four by hand, and then makes a kernel of them.
#
# After this notebook you will be able to
#
# * derive every gradient of chunk attention in a few lines, and check each against autograd,
# * say what the gradient of a weight means, and follow it to the landmark of a chunk that helps,
# * turn "which chunks did a token choose" around into "which tokens chose a chunk", without a loop over all pairs,
# * say why the order of a sum matters to a computer, and how to do without atomic additions.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** notebooks [04](04_fusion.ipynb) and
# [06](06_forward_kernel.ipynb), and to know what a derivative is. No GPU.

# %%
import json
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # has to be said before any kernel is imported

import hsa_kernels
from hsa_kernels.inverted_index import cut, invert
from hsa_kernels.slots import SEGMENT
from matplotlib.patches import Rectangle
from torch.nn.functional import pad, rms_norm

from hsa_mini.paths import data_dir
from hsa_mini.reference import chunk_attention, retrieve
from hsa_mini.reference.retrieval import visible_chunks
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, RED, SKY, length_name

DEVICE = "cuda" if GPU else "cpu"
print("kernels run", f"on {torch.cuda.get_device_name()}" if GPU else "in Triton's interpreter, on the processor")

# %% [markdown]
# ## The question in plain words
#
# The twelve tokens again. The last one, `code`, has read two chunks:
#
# > `the code is 7` | `birds sing at dawn` | `what is the code`
#
# It believed the first with 0.82 and the second with 0.18, and should have said `7`. A share of 0.71 of its answer was
# `7`. The loss wants more. What could it turn?
#
# * the **value** of `7`: more of what was read with great attention,
# * the **key** of `7` and the **query** of `code`: bring them closer, so that more attention falls there,
# * the **weights**: believe the first chunk more and the second less.
#
# The last one is what this architecture is about.
#
# ## In symbols
#
# One token, one head, one chunk $i$ that it kept. On the way forward, with the chunk's rows $k_s$ and $v_s$, $s = 1 \dots S$:
#
# $$a_s = c\; q \cdot k_s \qquad p_s = \frac{e^{a_s}}{\sum_r e^{a_r}} \qquad o = \sum_s p_s v_s \qquad O = \sum_i w_i\, o_i$$
#
# | symbol | what it is | in code |
# |---|---|---|
# | $c$ | the scale, $1/\sqrt D$ | `scale` |
# | $p_s$ | attention on token $s$ of the chunk | `p` |
# | $o_i, w_i$ | the chunk's answer, its weight | `o`, `weight` |
# | $g = \partial L / \partial O$ | how the loss rises with the output | `g` |
# | $\delta_i = g \cdot o_i$ | how much of that is in the chunk's answer | `delta` |

# %% [markdown]
# ## Four gradients by hand
#
# **The weight.** $O$ contains $w_i$ once, times $o_i$. So
#
# $$\frac{\partial L}{\partial w_i} = g \cdot o_i = \delta_i .$$
#
# **The values.** $O$ contains $v_s$ once for each chunk that it belongs to, times $w\,p_s$:
#
# $$\frac{\partial L}{\partial v_s} = w\, p_s\, g .$$
#
# **The attention.** $O$ contains $p_s$ times $w\,v_s$. Call $dp_s = g \cdot v_s$, and keep the $w$ for later. The softmax
# turns a gradient of shares into one of scores: what one share gains the others lose, so only the *difference from the
# mean* counts. And the mean of $dp$, weighted by $p$, is $\sum_s p_s\, g \cdot v_s = g \cdot o = \delta$: the number that
# we have already.
#
# $$ds_s = w\, p_s\, (dp_s - \delta)$$
#
# **Queries and keys.** $a_s = c\, q \cdot k_s$, so
#
# $$\frac{\partial L}{\partial q} = c \sum_s ds_s\, k_s \qquad \frac{\partial L}{\partial k_s} = c\; ds_s\, q .$$
#
# Everything is added up over whoever took part: a token's $q$ over its chunks, a chunk's $k$ and $v$ over the tokens that
# kept it. Note that $\delta$ does two jobs. It *is* the gradient of the weight, and it is what the softmax needs. In
# code, for one sequence and one head:


# %%
def gradients(q, k, v, indices, weights, grad_out, scale):
    """By hand: q and grad_out [T, D], k and v [N, S, D], indices and weights [T, K] -> dq, dk, dv, dweights."""
    dq, dk, dv, dweights = (torch.zeros_like(x) for x in (q, k, v, weights))
    for t, slot in (indices >= 0).nonzero().tolist():
        i, w, g = int(indices[t, slot]), weights[t, slot], grad_out[t]
        p = (k[i] @ q[t] * scale).softmax(dim=0)  # [S]: computed again, not remembered
        dp = v[i] @ g  # [S]
        delta = p @ dp  # g . o of this chunk
        ds = w * p * (dp - delta)  # [S]
        dweights[t, slot] = delta
        dv[i] += w * p[:, None] * g
        dk[i] += scale * ds[:, None] * q[t]
        dq[t] += scale * ds @ k[i]
    return dq, dk, dv, dweights


# %% [markdown]
# Three lines are worth a second look. The probabilities are **computed again** from q and k: remembering them would take
# S numbers for every pair, computing them costs one product. And `+=` stands at `dk` and `dv` *and* at `dq`. In a loop
# that is harmless. In a thousand programs at once it is the whole problem.
#
# ## The equality of this notebook
#
# The twelve tokens by the rule of notebook 04, the loss $-\log$ of the share of `7` at token 11. Autograd differentiates
# the reference in float64. We compare by name.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


S, TEXT = 4, "the code is 7 | birds sing at dawn | what is the code"
WORDS = TEXT.replace("|", " ").split()
VOCABULARY = list(dict.fromkeys(WORDS))
SEVEN = VOCABULARY.index("7")
own = torch.eye(len(VOCABULARY), dtype=torch.float64)[[VOCABULARY.index(word) for word in WORDS]]  # [T, D]
v = own.unflatten(0, (-1, S))  # [N, S, D]
q, k, landmarks = norm(own), norm(pad(v, (0, 0, 2, 0))[:, :S]), norm(v.sum(dim=1))


def read(q, k, v, indices, weights):
    """The reference, for one sequence and one head -> [T, D]."""
    heads = q[None, :, None], k[None, :, :, None], v[None, :, :, None]
    return chunk_attention(*heads, indices[None, :, None], weights[None, :, None])[0, :, 0]


def choose(landmarks):
    """Retrieval of notebook 03, K = 2 -> indices and weights [T, K]."""
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
    print(f"gradient of {name:7} == autograd: {torch.allclose(gradient, leaf.grad)}, largest {gradient.abs().max():.3f}")

# %% [markdown]
# **You should see** four times `True`.
#
# One token with a loss is a thin example. With random numbers, every token gets a gradient, and every sum has many terms:


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
    """What autograd makes of the reference."""
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
# A gradient is a slope: turn one weight a little and see how the loss moves. Let us do exactly that, for both weights of
# token 11, and compare with $\delta$.


# %%
def loss_with(slot, by):
    """The loss if token 11 believed the chunk in `slot` more by that much."""
    turned = weights.clone()
    turned[11, slot] += by
    return -read(q, k, v, indices, turned)[11, SEVEN].log()


# %%
# NBVAL_CHECK_OUTPUT
for slot in (0, 1):
    slope = (loss_with(slot, 1e-5) - loss_with(slot, -1e-5)) / 2e-5
    delta = ours[3][11, slot]
    print(f"weight of chunk {indices[11, slot]}: slope {slope:.4f}, delta {delta:.4f}, equal: {torch.allclose(slope, delta)}")

# %% [markdown]
# **You should see** a slope of −1.2231 for the chunk with the code: believing it more *lowers* the loss. For the birds
# the slope is 0: they say nothing about `7`, for or against.
#
# Should the birds' weight be left alone, then? No. Weights come out of a softmax over scores, so they share a total of 1.
# The softmax again subtracts a mean, this time over the chunks:
#
# $$\frac{\partial L}{\partial s_i} = w_i \Big(\delta_i - \sum_j w_j \delta_j\Big)$$
#
# It is the formula of notebook 04. A chunk that is **better than the blend** ($\delta_i$ below the mean) is pulled up, one
# that is worse is pushed down. And a score is a dot product of the token's query with the chunk's landmark $\ell_i$. So the
# landmark moves along the query, or against it:
#
# $$\frac{\partial L}{\partial \ell_i} = c \sum_t \frac{\partial L}{\partial s_{t,i}}\; q_t$$


# %%
def gradient_of_landmarks(dweights, indices, weights, queries, count):
    """From dweights [T, K] through the softmax over chunks and the score -> [N, D]."""
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
    print(f"chunk {i} `{chunk}`: the score of token 11 {'rises' if along < 0 else 'falls'} in a step against the gradient")

# %% [markdown]
# **You should see** `True`, then *rises* for the code and *falls* for the birds. This is how the loss teaches retrieval:
#
# > the chunk's content helped → δ is below the mean → its score should rise → its landmark turns towards the query
#
# Whatever made the landmark, down to the chunk encoder's matrices, learns from there. Let us take forty steps, with nothing
# but the three landmarks to learn.


# %%
def teach(steps=40, rate=2.0):
    """Gradient descent on the landmarks alone -> weight of chunk 0 at token 11, and share of `7`, before each step."""
    learned, history = landmarks.clone(), []
    for _ in range(steps):
        indices, weights = choose(learned)
        out = read(q, k, v, indices, weights)
        g = torch.zeros_like(out)
        g[11, SEVEN] = -1 / out[11, SEVEN]  # of -log
        history.append((weights[11][indices[11] == 0].sum().item(), out[11, SEVEN].item()))
        dweights = gradients(q, k, v, indices, weights, g, scale=len(VOCABULARY) ** -0.5)[3]
        learned -= rate * gradient_of_landmarks(dweights, indices, weights, q, len(learned))
    return torch.tensor(history)


def draw_learning(figure, history):
    axes = figure.subplots()
    names = "weight of the chunk with the code", "share of `7` in the answer"
    for name, curve, colour, line in zip(names, history.T, (BLUE, RED), ("-", "--")):
        axes.plot(curve, color=colour, linewidth=2.5, linestyle=line, label=name)
    axes.set(xlabel="steps taken", ylabel="at token 11", ylim=(0.6, 1.01))
    axes.legend(frameon=False, fontsize=10, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)


# %%
history = teach()
figure = make_figure(7.5, 2.8)
draw_learning(figure, history)
show(
    figure,
    "Two curves over forty steps: the weight of the chunk with the code rises from 0.82 towards 1, and with it the share of 7.",
)

# %%
# NBVAL_CHECK_OUTPUT
print("weight of chunk 0 before and after:", [round(x, 2) for x in (history[0, 0].item(), history[-1, 0].item())])
print("share of `7` before and after:     ", [round(x, 2) for x in (history[0, 1].item(), history[-1, 1].item())])

# %% [markdown]
# The share of `7` will never pass 0.87, which is all that chunk 0 gives it. From there on keys, queries and values have to learn,
# through the other three doors. (The weight itself could only learn if chunk 0 was chosen in the first place. Notebook
# 03's noise sees to it that everything is tried.)
#
# ## From a loop to programs
#
# Now fast. Notebook 06 had three orders, and every one was possible, because each pair's result is finished. On the way
# back there are four results, and they disagree about who owns what:
#
# | gradient | is a sum over | who would own it |
# |---|---|---|
# | dweights | nothing: one number a pair | anybody |
# | dq | the chunks of a token | a program of that token |
# | dk, dv | the tokens that chose a chunk | a program of that chunk |
#
# A chunk has 2·S rows of dk and dv, a token one row of dq. So the package goes **by chunk**. It keeps dk and dv where
# they are summed, inside the processor, and puts each pair's part of dq into a slot of its own.
#
# But a program for chunk 5 must know *which tokens chose chunk 5*. We have it the other way round: `indices[t]` lists a
# token's chunks. To look through all of `indices` for each chunk would cost T·K·N steps. N grows with T, so that is
# quadratic again, and the point of the whole method was not to be.
#
# ## Turned around
#
# It is the index of a book. The text says which words stand on a page; the index says on which pages a word stands. One
# makes it by **sorting**: write down an entry for each filled slot, sort the entries by chunk, and note where each
# chunk's list begins. By hand, for the twelve tokens: tokens 4 to 7 saw chunk 0 only, tokens 8 to 11 saw chunks 0 and 1. So
# chunk 0 has the list 4, 5, 6, 7, 8, 9, 10, 11, chunk 1 has 8, 9, 10, 11, and chunk 2 has none.


# %%
def invert_by_hand(indices, chunks):
    """indices [T, K] -> entries t*K + slot, by chunk, then by token, empty ones last; and where each chunk's list starts."""
    lists = [[] for _ in range(chunks + 1)]  # the last one for empty slots
    for entry, i in enumerate(indices.flatten().tolist()):
        lists[i if i >= 0 else chunks].append(entry)
    lengths = torch.tensor([0, *map(len, lists[:-1])])
    return torch.tensor(sum(lists, [])), lengths.cumsum(dim=0)


# %%
# NBVAL_CHECK_OUTPUT
entries, starts = invert_by_hand(indices, chunks=3)
for i in range(3):
    print(f"chunk {i} was chosen by tokens", (entries[starts[i] : starts[i + 1]] // 2).tolist())
for name, choice, count in (("twelve tokens", indices, 3), ("random example", example[3], 6)):
    entries, starts = invert_by_hand(choice, count)
    theirs = invert(choice[None, :, None].int(), count)
    print(f"{name}: by hand == package:", torch.equal(entries, theirs.entries) and torch.equal(starts, theirs.starts))
print("entries in a segment of the package:", SEGMENT)

# %% [markdown]
# **You should see** the three lists, and `True` twice. The package sorts keys instead of appending to lists, since a GPU
# sorts millions of numbers quickly and appends to lists badly. The sort is *stable*: entries of one chunk stay in the order
# of the tokens. So the index is always the same for the same choice. That will matter in a moment.
#
# A second array, `places`, is the way back: where does slot $k$ of token $t$ stand in the sorted list? With it dweights, which
# were written in the order of the list, return to the order of tokens. And a token finds its slots of dq.
#
# ## See it
#
# To the left the choice: tokens down, chunks across. To the right the same marks in a row for each chunk, as the index
# has them. Its cells are cut into **segments**, which is what one program gets. A chunk that everybody wants would
# otherwise keep one program busy long after all others are done.

# %%
LARGER = random_example(T=28, N=7, K=3, seed=2)[3]
CHOICES = {"twelve tokens": (indices, 3, WORDS), "28 tokens, K = 3": (LARGER, 7, None)}
SEGMENTS = (ORANGE, SKY, GREEN, PURPLE)


def draw_choice(axes, choice, chunks, chunk, words):
    """The choice as it is made: a row a token, a column a chunk."""
    for t, row in enumerate(choice.tolist()):
        for i in (i for i in row if i >= 0):
            axes.add_patch(Rectangle((i - 0.42, t - 0.42), 0.84, 0.84, facecolor=ORANGE if i == chunk else PALE, edgecolor=GREY))
    axes.add_patch(Rectangle((chunk - 0.5, -0.5), 1, len(choice), fill=False, edgecolor=RED, linewidth=2))
    names = [f"{t}: {word}" for t, word in enumerate(words)] if words else range(len(choice))
    axes.set_yticks(range(len(choice)), names, fontsize=10 if words else 7)
    axes.set(xlim=(-0.6, chunks - 0.4), ylim=(len(choice) - 0.3, -0.7), xticks=range(chunks), xlabel="chunk")
    axes.set_title("what a token chose", fontsize=11)
    axes.spines[:].set_visible(False)


def draw_index(axes, index, chunks, slots, chunk, size):
    """The choice turned around: a row a chunk, its tokens from left to right, a colour a segment."""
    starts = index.starts.tolist()
    for i in range(chunks):
        for place, entry in enumerate(index.entries[starts[i] : starts[i + 1]].tolist()):
            colour = SEGMENTS[place // size % 4] if i == chunk else PALE
            axes.add_patch(Rectangle((place, i - 0.4), 0.92, 0.8, facecolor=colour, edgecolor=GREY))
            axes.text(place + 0.46, i, entry // slots, ha="center", va="center", fontsize=9, color=INK)
    longest = max(end - start for start, end in zip(starts, starts[1:]))
    axes.set(xlim=(-0.2, longest + 0.2), ylim=(chunks - 0.4, -0.6), xticks=[], yticks=range(chunks), ylabel="chunk")
    axes.set_title("which tokens chose a chunk", fontsize=11)
    axes.spines[:].set_visible(False)


def draw_turned(figure, what, chunk, segment):
    """Choice and inverted index side by side, one chunk marked."""
    choice, chunks, words = CHOICES[what]
    chunk, index = min(chunk, chunks - 1), invert(choice[None, :, None].int(), chunks)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    draw_choice(left, choice, chunks, chunk, words)
    draw_index(right, index, chunks, choice.shape[1], chunk, segment)
    first, last = index.starts[chunk : chunk + 2].tolist()
    segments = cut(index, segment).starts.diff()[chunk].item()
    tokens = ", ".join(str(entry // choice.shape[1]) for entry in index.entries[first:last].tolist()) or "nobody"
    return f"Chunk {chunk} was chosen by {tokens}. Entries: {last - first}, segments of at most {segment}: {segments}."


# %% [markdown]
# ### Move it
#
# Select a chunk: its column to the left becomes its row to the right. Then cut the rows into shorter segments. With short
# segments many programs share a popular chunk. But each of them loads k and v again, and hands over a part of dk and dv
# that somebody must add up. The package's segments are much longer, as printed above.

# %%
explore(
    draw_turned,
    alt="Left: a table of tokens and chunks with a cell for every choice. Right: for each chunk a row of the tokens that chose "
    "it, the row of the selected chunk coloured by segment.",
    size=(9, 4.2),
    what=Control(list(CHOICES), start="28 tokens, K = 3", label="example"),
    chunk=Control((0, 6), start=1, label="chunk"),
    segment=Control([2, 4, 8, 16], start=4, label="choices in a segment"),
)

# %% [markdown]
# ## Why no atomics
#
# Several programs have a part of the same sum: of a token's dq, and of a popular chunk's dk and dv. The obvious tool is
# an *atomic* addition: whoever comes adds, and the hardware sees to it that nobody interrupts. It is right, and it has a
# flaw. Numbers in a computer are rounded after every addition. So **a sum depends on its order**, and the order in which
# programs of a GPU arrive is different in every run. Here are 256 numbers in float32, added up in 20 orders:


# %%
# NBVAL_CHECK_OUTPUT
def add_up(numbers):
    """One after the other, rounded to float32 each time."""
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
# **You should see** `False`, then `True`. The differences are tiny. But training repeats them a million times, and then two
# runs with the same seed are two different models. Whether a change made something better, or a bug is gone, becomes hard
# to say. So the package has a rule: **every sum belongs to one program, or is added in a fixed order.**
#
# ## Slots and segments
#
# Here are both ways in PyTorch. A program is a chunk and one segment of its list. It computes what `gradients` computed,
# for all its entries at once: rows of a tile instead of one token at a time.


# %%
def run_program(q, k, v, weights, g, chunk, entries):
    """One chunk, some of its entries [E] -> dq of each [E, D], dk and dv [S, D], dweights of each [E]."""
    t, w, scale = entries // weights.shape[1], weights.flatten()[entries][:, None], q.shape[1] ** -0.5
    p = (q[t] @ k[chunk].T * scale).softmax(dim=1)  # [E, S]
    dp = g[t] @ v[chunk].T  # [E, S]
    delta = (p * dp).sum(dim=1)  # [E]
    ds = w * p * (dp - delta[:, None])
    return scale * ds @ k[chunk], scale * ds.T @ q[t], (w * p).T @ g[t], delta


def programs(indices, chunks, size):
    """All programs: a chunk, and at most `size` entries of its list."""
    entries, starts = invert_by_hand(indices, chunks)
    return [(i, part) for i in range(chunks) for part in entries[starts[i] : starts[i + 1]].split(size) if len(part)]


def with_atomics(q, k, v, indices, weights, g, arrival, size=4):
    """Every program adds to dq, dk and dv at once, in the order of arrival."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    jobs = programs(indices, len(k), size)
    for chunk, entries in (jobs[number] for number in arrival(len(jobs))):
        dq_part, dk_part, dv_part, _ = run_program(q, k, v, weights, g, chunk, entries)
        dq[entries // indices.shape[1]] += dq_part
        dk[chunk] += dk_part
        dv[chunk] += dv_part
    return dq, dk, dv


def with_slots(q, k, v, indices, weights, g, arrival, size=4):
    """Every program writes to places of its own, in the order of arrival; then all is added in the order of the places."""
    slots, dweights, parts = q.new_zeros(indices.numel(), q.shape[1]), torch.zeros_like(weights), {}
    jobs = programs(indices, len(k), size)
    for number in arrival(len(jobs)):
        chunk, entries = jobs[number]
        slots[entries], *parts[number], dweights.view(-1)[entries] = run_program(q, k, v, weights, g, chunk, entries)
    dq, dk, dv = slots.view(*indices.shape, -1).sum(dim=1), torch.zeros_like(k), torch.zeros_like(v)
    for number, (chunk, _) in enumerate(jobs):  # segments, always in the same order
        dk[chunk] += parts[number][0]
        dv[chunk] += parts[number][1]
    return dq, dk, dv, dweights


# %%
# NBVAL_CHECK_OUTPUT
exact = by_autograd(*example)
single = [x.float() if x.is_floating_point() else x for x in example]
seeded = [torch.Generator().manual_seed(seed) for seed in range(5)]
arrivals = [lambda jobs, generator=generator: torch.randperm(jobs, generator=generator).tolist() for generator in seeded]
for way in (with_atomics, with_slots):
    runs = [way(*single, arrival) for arrival in arrivals]
    right = all(torch.allclose(got.double(), want, atol=1e-4) for run in runs for got, want in zip(run, exact))
    same = all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0]))
    print(f"{way.__name__}: 5 orders of arrival, every gradient == autograd: {right}; all bits equal: {same}")

# %% [markdown]
# **You should see** `True` and `False` for atomics, `True` and `True` for slots. That is the whole idea of
# [backward.py](../kernels/hsa_kernels/backward.py), in the same order: `find_segment` tells a program its chunk and its
# entries; a loop over blocks of entries computes `b_p`, `b_dp`, `b_delta`, `b_ds`; dk and dv stay in registers; `_sum_slots`
# and `_sum_segments` add up. Compare `run_program` with the loop there. The names are the same.
#
# ## The package's gradients
#
# In float32, with four heads that share, against autograd of the reference in float64. And twice, bit by bit.

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
# **You should see** eight times `True`. (In the interpreter programs run one after the other, so equal bits are no
# surprise there. On a GPU they are the point.)
#
# What does the way back cost on a real GPU? Stored measurements again, as in notebook 06:

# %%
stored = json.loads((data_dir() / "results" / "kernels.json").read_text())
rows = {(row["op"], row["T"]): row for row in stored["rows"] if row["choices"] == "random" and row["J"] == 1}
print(f"stored measurements, {stored['hardware']} · random choices, H/J = 16")
print(f"{'tokens':>7} {'forward':>11} {'both':>11} {'both / forward':>15} {'most memory':>13}")
for T in (T for op, T in rows if op == "forward"):
    forward, both = rows["forward", T], rows["forward_backward", T]
    ratio, memory = both["ms"] / forward["ms"], both["peak_bytes"] / 1e9
    print(f"{length_name(T):>7} {forward['ms']:8.2f} ms {both['ms']:8.2f} ms {ratio:15.1f} {memory:10.1f} GB")
room = both["chosen"] * both["H"] * both["D"] * 2 / 1e9  # of the longest text: H heads of D numbers a pair, 2 bytes each
print(f"slots for all pairs of {length_name(both['T'])} tokens at once: {room:.0f} GB")

# %% [markdown]
# The way back multiplies two and a half times as much as the way forward: five products a pair (scores again, dp, dv, dk,
# dq) instead of two. So both together should cost about 3.5 times the forward pass, if multiplying were all. The time goes
# by bytes instead. For short texts the way back is dearer. These numbers do not say why: sorting the choices and starting
# many small kernels are what one would look at first.
#
# And the memory: slots for *all* pairs would not fit into the card, as the last line says. So the package works through the
# tokens in **tiles**, as many at once as a fixed room for slots holds. The last column grows far slower than the text.

# %% [markdown]
# ## Exercises
#
# **1.** Add up the gradient of a chunk's keys over its S tokens, `dk.sum(dim=1)`. What do you find? Why must it be so?
#
# <details><summary>Solution</summary>
#
# Zero, for every chunk. Adding the same vector to all keys of a chunk adds the same number to all its scores, and the
# softmax inside the chunk does not notice. If the loss does not change, the slope is 0. In the formula: $\sum_s ds_s = w
# \sum_s p_s (dp_s - \delta) = w (\delta - \delta) = 0$. Note that this is special to HSA: in full attention the softmax
# runs over all keys, and only a shift of *all* of them is without effect.
#
# ```python
# dq, dk, dv, dweights = gradients(*example, scale=8**-0.5)
# print(dk.sum(dim=1).abs().max(), dk.abs().max())
# assert dk.sum(dim=1).abs().max() < 1e-12 < dk.abs().max()
# ```
#
# </details>
#
# **2.** How long should a segment be? For sizes 1, 2, 4, 8 and 32, count the programs of the random example, the entries
# of the longest program, and how often any k and v are loaded.
#
# <details><summary>Solution</summary>
#
# Every program loads its chunk's k and v once and hands over one part of dk and dv. So programs and loads are the same
# number: with segments of 1 as many as there are entries, with segments of 32 one for each chunk that somebody chose. But
# then all wait for the program of chunk 0. Short segments share the work evenly, long ones save bytes. With thousands of
# chunks there is enough to do for all processors, and a segment may be long.
#
# ```python
# for size in (1, 2, 4, 8, 32):
#     jobs = programs(example[3], 6, size)
#     print(size, len(jobs), max(len(entries) for _, entries in jobs))
# assert len(jobs) == len(example[3][example[3] >= 0].unique())
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# Chunks are read fast, forward and back. But before they can be read they have to be *chosen*: 64 out of up to 262,144,
# for every token, and a table of all scores would fill the memory many times over. [Notebook
# 08](08_retrieval_and_decode_kernels.ipynb) finds the best without ever writing the scores down. About 30 minutes.
