# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 · Where do the milliseconds go?
#
# In [notebook 04](04_fusion.ipynb) chunk attention was four nested loops. That is right, and far too slow. A GPU runs
# the same loops in thousands of small **programs** at once. Which loops become programs, and in what order do they
# meet the chunks? The numbers that come out are the same. The milliseconds are not.
#
# After this notebook you will be able to
#
# * read and write a small GPU kernel in Triton, and run it without a GPU,
# * say why chunk attention needs no rescaling, unlike every other attention kernel,
# * walk through the same work in three orders, and count the bytes and the multiplications of each,
# * read a roofline picture, and say from which length on HSA beats full attention on a real GPU.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 04](04_fusion.ipynb). No GPU:
# kernels run in Triton's interpreter here, slowly and rightly. With an NVIDIA GPU they run there, and are timed.

# %%
import json
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # has to be said before any kernel is imported

import hsa_kernels
import triton
import triton.language as tl
from hsa_kernels import by_chunk, by_token, slots
from hsa_kernels.tiles import Sizes
from matplotlib.patches import Rectangle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from hsa_mini import reference
from hsa_mini.paths import data_dir
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREY, INK, ORANGE, PALE, RED, crossover, length_name, roofline

DEVICE = "cuda" if GPU else "cpu"
print("kernels run", f"on {torch.cuda.get_device_name()}" if GPU else "in Triton's interpreter, on the processor")

# %% [markdown]
# ## The question in plain words
#
# A GPU has a large memory and many small processors. A processor can only multiply what it has fetched. So every
# program does three things: **load** tiles from memory, **compute** on them, **store** a result.
#
# * Loading costs time by the **byte**.
# * Multiplying costs time by the **FLOP**, one multiplication or addition.
#
# Both go on at once. So the slower of the two decides, and the other one is free. For a chunk that one token reads,
# there is little to multiply and much to load. The whole art of this kernel is **to load a chunk once and use it
# often**.
#
# ## In symbols
#
# Eq. (2) again, for one token $t$ and one head. It is a sum over *pairs* of a token and a chunk that it kept:
#
# $$O_t = \sum_{i \in I_t} w_{t,i}\; o_{t,i}, \qquad
# o_{t,i} = \mathrm{softmax}\!\left(q_t K_{[i]}^\top / \sqrt{D}\right) V_{[i]}$$
#
# | symbol | what it is | here | in the measurements below |
# |---|---|---|---|
# | T | tokens | 12 | thousands to a million |
# | S | tokens in a chunk | 4 | 64 |
# | N | chunks, T / S | 3 | |
# | K | chunks that a token keeps | 2 | 64 |
# | G | query heads that share one key/value head, H / J | 1 | 16 |
# | D | numbers in a head | 9, padded to 16 | 128 |

# %% [markdown]
# ## Twelve tokens
#
# `the code is 7 | birds sing at dawn | what is the code`, with the rule of notebook 04: a token asks for its own word,
# its key is the word two places before it, its value is its own word. A kernel likes powers of two, so the nine axes
# are padded with zeros to sixteen. A zero adds nothing to a dot product. Only the scale must still be $1/\sqrt 9$.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


def read_by_rule(text, S=4):
    """The rule of notebook 04 in float32 -> q [T, D], k and v [N, S, D], indices and weights [T, K]; D padded to 16."""
    words = text.replace("|", " ").split()
    vocabulary = list(dict.fromkeys(words))
    own = torch.eye(len(vocabulary))[[vocabulary.index(word) for word in words]]
    v = own.unflatten(0, (-1, S))
    k = pad(v, (0, 0, 2, 0))[:, :S]  # the word two places before; the first two of a chunk have none
    landmarks = norm(v.sum(dim=1))[None, :, None]
    indices, weights = reference.retrieve(norm(own)[None, :, None], landmarks, chunk_size=S, top_k=2)
    q, k, v = (pad(x, (0, 16 - len(vocabulary))) for x in (norm(own), norm(k), v))
    return [x.contiguous().to(DEVICE) for x in (q, k, v, indices[0, :, 0], weights[0, :, 0])]


q, k, v, indices, weights = twelve = read_by_rule("the code is 7 | birds sing at dawn | what is the code")

# %% [markdown]
# ## A kernel of fourteen lines
#
# Triton is Python that becomes GPU code. A kernel is the text of **one program**. It asks `tl.program_id` who it is,
# and works on **tiles**: blocks of numbers with fixed sizes, loaded at once. `q`, `k` and so on are no tensors but
# addresses of a first number; where the others lie is ours to work out. A comment like `# [S, D]` says the shape of a
# tile.
#
# One program for each token, with a loop over its slots:


# %%
@triton.jit
def token_kernel(q, k, v, indices, weights, out, scale, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    t, o_s, o_d = tl.program_id(0), tl.arange(0, S), tl.arange(0, D)
    b_q = tl.load(q + t * D + o_d)  # [D]
    b_out = tl.zeros([D], tl.float32)
    for slot in range(K):
        i = tl.load(indices + t * K + slot)
        if i >= 0:  # -1 is an empty slot
            o_tile = (i * S + o_s)[:, None] * D + o_d[None, :]  # [S, D]: where the chunk lies in memory
            b_k, b_v = tl.load(k + o_tile), tl.load(v + o_tile)
            b_s = tl.sum(b_k * b_q[None, :], 1) * scale  # [S]
            b_p = tl.exp(b_s - tl.max(b_s, 0))  # the softmax, before it is divided by its sum
            weight = tl.load(weights + t * K + slot) / tl.sum(b_p, 0)
            b_out += weight * tl.sum(b_p[:, None] * b_v, 0)
    tl.store(out + t * D + o_d, b_out)


def run_token_kernel(q, k, v, indices, weights, scale):
    """Launch a program for every token: q [T, D], k and v [N, S, D], indices and weights [T, K] -> [T, D]."""
    (T, K), (S, D), out = indices.shape, k.shape[1:], torch.empty_like(q)
    token_kernel[(T,)](q, k, v, indices, weights, out, scale, K=K, S=S, D=D)
    return out


def expected(q, k, v, indices, weights, scale):
    """The same by the reference in float64, which wants batch and heads as dimensions."""
    exact = (x.double() for x in (q[None, :, None], k[None, :, :, None], v[None, :, :, None]))
    out = reference.chunk_attention(*exact, indices[None, :, None], weights[None, :, None].double(), scale=scale)
    return out[0, :, 0].to(q.dtype)


# %%
# NBVAL_CHECK_OUTPUT
out = run_token_kernel(*twelve, scale=9**-0.5)
print("kernel == reference:", torch.allclose(out, expected(*twelve, scale=9**-0.5), atol=1e-6))
print("share of `7` at token 11:", round(out[11, 3].item(), 3))

# %% [markdown]
# **You should see** `True`, and the 0.711 of notebook 04.
#
# ## Nothing is rescaled
#
# Look at the loop again. It adds to `b_out`, and that is all it ever does to it. In ordinary attention this would be
# wrong. There *one* softmax runs over all keys, and its sum is known only at the end. A kernel that passes over the
# keys chunk by chunk has to carry a running maximum and a running sum, and each time the maximum grows, shrink
# everything it has summed before (*online softmax*). Here it is in PyTorch, with its shrinking step counted:


# %%
def online_softmax(q, k, v):
    """One softmax over all chunks, met one after the other: q [D], k and v [N, S, D] -> [D], and how often it rescaled."""
    highest, total, out, rescaled = torch.tensor(-torch.inf), 0.0, torch.zeros_like(q), 0
    for b_k, b_v in zip(k, v):
        b_s = b_k @ q
        new = torch.maximum(highest, b_s.max())
        rescaled += int(new > highest and bool(highest.isfinite()))
        total, out = total * (highest - new).exp(), out * (highest - new).exp()
        b_p = (b_s - new).exp()
        total, out, highest = total + b_p.sum(), out + b_p @ b_v, new
    return out / total, rescaled


# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
q_1, k_8, v_8 = torch.randn(16), torch.randn(8, 4, 16), torch.randn(8, 4, 16)
dense, rescaled = online_softmax(q_1, k_8, v_8)
one_pass = (k_8.flatten(0, 1) @ q_1).softmax(0) @ v_8.flatten(0, 1)
print("online softmax == one softmax:", torch.allclose(dense, one_pass, atol=1e-5), "- rescaled:", rescaled, "times")

# %% [markdown]
# HSA has **a softmax in every chunk**, and that one is complete as soon as the chunk is read. So $w_{t,i}\,o_{t,i}$ is
# a finished number: no later chunk can change it. That has two consequences. The loop is shorter. And, more
# important: **the pairs may be worked through in any order**, by anybody, in different programs even, and added up
# at the end. That freedom is what the rest of this notebook uses.
#
# ## Three orders
#
# Make a table with a row for each chunk and a column for each token, and a mark where the token kept the chunk. Every
# mark is a pair, a job to do. A program takes some jobs:
#
# 1. **By token.** A program takes a column: one token, its K chunks. Every chunk is loaded again for every token that
#    kept it.
# 2. **By block of M neighbouring tokens.** A program takes M columns, and meets every chunk that *any* of them kept
#    once. Neighbours often want the same. But it computes for all M tokens, and multiplies with weight 0 where one
#    did not keep the chunk.
# 3. **By chunk.** A program takes a row: one chunk, loaded once, and all tokens that kept it. But now a token's
#    answers come from K different programs. Each writes its part into a **slot** of its own, and a second round of
#    programs adds a token's slots up.
#
# Let us write all three in PyTorch, with a meter that counts what passes between memory and programs, and what is
# multiplied.


# %%
class Meter:
    """Counts, program by program, the bytes moved to or from memory and the FLOP of matrix products."""

    def __init__(self):
        self.bytes, self.flop = [], []

    def program(self):
        self.bytes.append(0)
        self.flop.append(0)

    def move(self, x):
        self.bytes[-1] += x.nbytes
        return x

    def product(self, a, b):
        self.flop[-1] += 2 * a.numel() * b.shape[-1]  # a multiplication and an addition
        return a @ b


def read_chunk(meter, q, k, v):
    """Softmax attention inside one chunk: rows q [R, D], k and v [S, D] -> [R, D]."""
    scores = meter.product(q, k.T) * q.shape[-1] ** -0.5
    return meter.product(scores.softmax(dim=-1), v)


# %% [markdown]
# From here on a token has G query heads, which all keep the same chunks: `q` is `[T, G, D]`. To keep the count simple
# we leave out indices and weights. They are one number where a chunk is 2·S·D.


# %%
def token_order(meter, q, k, v, indices, weights):
    """A program a token: loads q, then every chunk that it kept, stores its result."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        meter.program()
        b_q = meter.move(q[t])  # [G, D]
        for i, weight in zip(indices[t].tolist(), weights[t]):
            if i >= 0:
                out[t] += weight * read_chunk(meter, b_q, meter.move(k[i]), meter.move(v[i]))
        meter.move(out[t])
    return out


def block_order(meter, q, k, v, indices, weights, M=4):
    """A program for M neighbouring tokens: loads every chunk that any of them kept once; weight 0 for who did not."""
    out = torch.zeros_like(q)
    for start in range(0, len(q), M):
        meter.program()
        block = slice(start, start + M)
        b_q = meter.move(q[block]).flatten(0, 1)  # [M, G, D] -> [M*G, D]
        for i in indices[block][indices[block] >= 0].unique():
            weight = (weights[block] * (indices[block] == i)).sum(dim=1)  # [M]
            read = read_chunk(meter, b_q, meter.move(k[i]), meter.move(v[i]))
            out[block] += weight[:, None, None] * read.view_as(out[block])
        meter.move(out[block])
    return out


def chunk_order(meter, q, k, v, indices, weights):
    """A program a chunk: loads it, meets all who kept it, fills slots; then a program a token adds its slots."""
    filled = q.new_zeros(*indices.shape, *q.shape[1:])  # [T, K, G, D]
    for i in indices[indices >= 0].unique():
        meter.program()
        b_k, b_v, (t, slot) = meter.move(k[i]), meter.move(v[i]), (indices == i).nonzero(as_tuple=True)
        read = read_chunk(meter, meter.move(q[t]).flatten(0, 1), b_k, b_v).view(-1, *q.shape[1:])
        filled[t, slot] = meter.move(weights[t, slot][:, None, None] * read)
    out = torch.zeros_like(q)
    for t in range(len(q)):
        meter.program()
        out[t] = meter.move(meter.move(filled[t, indices[t] >= 0]).sum(dim=0))
    return out


ORDERS = {"by token": token_order, "by block": block_order, "by chunk": chunk_order}


# %% [markdown]
# Now the same count without running anything, as a formula. A token costs $GD$ numbers of `q` and $GD$ of result in
# every order, a chunk $2SD$ numbers whenever it is loaded, and reading it $4GSD$ FLOP for a token: two products, a
# multiplication and an addition each. So only three counts matter:
#
# * **pairs**: how many pairs of token and chunk there are,
# * **merged**: how many chunks the blocks meet, each counted once a block,
# * **touched**: how many different chunks are kept by anybody.


# %%
def traffic(*, T, G, S, D, pairs, merged, touched, M, size):
    """Bytes and FLOP of the three orders; `size`: bytes of a number."""
    ends, chunk, row, reading = 2 * T * G * D, 2 * S * D, G * D, 4 * G * S * D
    return {
        "by token": (size * (ends + pairs * chunk), pairs * reading),
        "by block": (size * (ends + merged * chunk), merged * M * reading),
        "by chunk": (size * (touched * chunk + pairs * 3 * row + T * row), pairs * reading),
    }


def count(indices, M=4):
    """What the formula asks for, of choices [T, K]."""
    blocks = (block[block >= 0].unique() for block in indices.split(M))
    kept = indices[indices >= 0]
    return dict(pairs=len(kept), merged=sum(map(len, blocks)), touched=len(kept.unique()))


# %% [markdown]
# The example: 32 tokens in 8 chunks of four, K = 3, G = 4. Every token keeps three of the chunks that it can see, at
# random. The equality of this notebook is now a double one: the three orders give the reference's **result**, and what
# the meter counts is what the **formula** says, to the byte.


# %%
def example(T=32, S=4, K=3, G=4, D=16, alike=1, seed=0):
    """Random tensors, and choices that are drawn once for `alike` neighbours: q [T, G, D], k, v, indices, weights."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((T, G, D), (T // S, S, D), (T // S, S, D)))
    scores = torch.rand(T // alike, T // S, generator=generator).repeat_interleave(alike, dim=0)
    visible = reference.retrieval.visible_chunks(torch.arange(T), T // S, S)
    best = scores.masked_fill(~visible, -1.0).topk(K)
    weights = torch.rand(T, K, generator=generator).masked_fill(best.values < 0, 0.0)
    return q, k, v, best.indices.masked_fill(best.values < 0, -1).int(), weights


def with_heads(q, k, v, indices, weights):
    """One sequence with one key/value head, as the operators want it: B = J = 1."""
    return q[None], k[None, :, :, None], v[None, :, :, None], indices[None, :, None], weights[None, :, None]


# %%
# NBVAL_CHECK_OUTPUT
inputs = example()
formula = traffic(T=32, G=4, S=4, D=16, M=4, size=4, **count(inputs[3]))
want = reference.chunk_attention(*(x.double() if x.is_floating_point() else x for x in with_heads(*inputs)))[0].float()
print(count(inputs[3]))
for name, order in ORDERS.items():
    meter = Meter()
    same = torch.allclose(order(meter, *inputs), want, atol=1e-5)
    counted = sum(meter.bytes), sum(meter.flop)
    print(f"{name}: result == reference: {same}; counted == formula: {counted == formula[name]}; bytes, FLOP: {counted}")

# %% [markdown]
# **You should see** six times `True`. Two lessons are in the numbers. By block, fewer bytes are moved and more is
# multiplied than by token: a trade. By chunk, the chunks almost vanish from the bill, and the slots come on to it.
#
# ## See who loads what
#
# The table of jobs, and one program at work. Its tokens and chunks are framed, and what is done is filled. To the
# right the meters of all three orders: the part so far of the chosen order, and in pale the whole.


# %%
def program_cells(order, indices, program, M=4):
    """Cells (token, chunk) that a program works on, computed in vain included; none if it only adds slots up."""
    T, touched = len(indices), indices[indices >= 0].unique().tolist()
    if order == "by chunk":
        return [(t, touched[program]) for t in range(T) if touched[program] in indices[t]] if program < len(touched) else []
    tokens = range(program, program + 1) if order == "by token" else range(program * M, min(program * M + M, T))
    return [(t, i) for i in indices[list(tokens)].unique().tolist() if i >= 0 for t in tokens]


def draw_jobs(axes, order, indices, program):
    """Choices as cells, tokens from left to right; filled: done; framed: what this program works on."""
    done = {cell for before in range(program) for cell in program_cells(order, indices, before)}
    now = program_cells(order, indices, program)
    for t, row in enumerate(indices.tolist()):
        for i in (i for i in row if i >= 0):
            colour = ORANGE if (t, i) in now else BLUE if (t, i) in done else PALE
            axes.add_patch(Rectangle((t - 0.45, i - 0.45), 0.9, 0.9, facecolor=colour))
    for t, i in now:
        axes.add_patch(Rectangle((t - 0.48, i - 0.48), 0.96, 0.96, fill=False, edgecolor=RED, linewidth=1.3))
    if not now:  # it adds up the slots of a token
        t = program - len(indices[indices >= 0].unique())
        axes.add_patch(Rectangle((t - 0.48, -0.5), 0.96, 8, fill=False, edgecolor=RED, linewidth=2))
    axes.set(xlim=(-0.7, len(indices)), ylim=(7.6, -0.6), yticks=range(8), xlabel="token", ylabel="chunk", frame_on=False)
    axes.set_title(f"{order}: the jobs", fontsize=11)


def draw_meter(axes, meters, what, order, program, unit):
    """Bars: the whole of every order in pale, and what the chosen one has used up to this program."""
    for y, (name, meter) in enumerate(meters.items()):
        numbers = [number / unit for number in getattr(meter, what)]
        axes.barh(y, sum(numbers), color=PALE, edgecolor=GREY)
        if name == order:
            axes.barh(y, sum(numbers[: program + 1]), color=ORANGE)
        axes.text(sum(numbers), y, f" {sum(numbers):.0f}", va="center", fontsize=10, color=INK)
    axes.set(yticks=range(3), yticklabels=meters, ylim=(2.6, -0.6), xticks=[])
    axes.set_xlim(0, 1.3 * max(sum(getattr(meter, what)) for meter in meters.values()) / unit)
    axes.set_title("kilobytes moved" if what == "bytes" else "thousand FLOP", fontsize=11)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def say(meter, order, indices, program):
    """What a program does, in words."""
    cells = program_cells(order, indices, program)
    adds = "adds up the slots of one token" if order == "by chunk" else "finds nothing to read"
    does = f"chunks loaded: {len({i for _, i in cells})}, tokens that read: {len({t for t, _ in cells})}" if cells else adds
    used = f"{meter.bytes[program]:,} bytes and {meter.flop[program]:,} FLOP"
    return f"{order}, program {program + 1} of {len(meter.bytes)}; {does}; {used}."


def draw_orders(figure, order, program, heads, alike):
    """One program of one order at work, and the meters of all."""
    inputs, meters = example(G=heads, alike=4 if alike else 1), {name: Meter() for name in ORDERS}
    for name, run in ORDERS.items():
        run(meters[name], *inputs)
    program = min(program, len(meters[order].bytes)) - 1
    grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1))
    draw_jobs(figure.add_subplot(grid[:, 0]), order, inputs[3], program)
    for place, what in enumerate(("bytes", "flop")):
        draw_meter(figure.add_subplot(grid[place, 1]), meters, what, order, program, 1e3)
    return say(meters[order], order, inputs[3], program)


# %% [markdown]
# ### Move it
#
# Step through the programs of each order. Then change two things. With **H/J = 1** (one query head a key/value head)
# a result is small beside a chunk: *by chunk* moves hardly more bytes than *by block*, and multiplies nothing in vain.
# With 16 results are large, and slots cost more than the chunks that they save. And when **neighbours choose alike**, as they
# often do in real text, a block's list shrinks: *by block* moves still less, and multiplies in vain no more.

# %%
explore(
    draw_orders,
    alt="A table of 8 chunks and 32 tokens with a cell for each chunk that a token kept; the cells of one program are framed. "
    "Beside it bars for the bytes and the FLOP of the three orders.",
    size=(9.5, 3.8),
    order=Control(list(ORDERS), start="by block"),
    program=Control((1, 40), start=6, label="program"),
    heads=Control([1, 2, 4, 8, 16], start=4, label="heads that share, H/J"),
    alike=Control(bool, start=False, label="neighbours choose alike"),
)

# %% [markdown]
# ## The package's kernels
#
# The package has two forward kernels, and a rule to choose between them.
# [by_token.py](../kernels/hsa_kernels/by_token.py) goes by block:
# [merge.py](../kernels/hsa_kernels/merge.py) first makes each block's list of chunks with M weights a chunk, and the
# kernel passes over it once. [by_chunk.py](../kernels/hsa_kernels/by_chunk.py) goes by chunk, over lists of who
# kept it ([notebook 07](07_backward_kernel.ipynb) builds them). Compare their inner loops with our fourteen lines. You
# will find the same five steps: load k and v, scores, softmax inside, weight, add. What is new:
#
# * **rows.** M tokens × G heads are the rows of one tile, so that `tl.dot` can multiply whole tiles. The matrix units of
#   a GPU (*tensor cores*) want at least 16 rows, and like 64.
# * **masks.** S, D and G need not be powers of two. Tiles are padded, and the padding is masked.
# * **one place ahead.** The number of the next chunk is loaded before the present one is used. So its tiles can be on
#   their way while this one is multiplied.
# * **the copy engine.** From Hopper on, one instruction asks for a whole tile (`k.load`), and the GPU fetches it while the
#   threads do other things. On older ones, and where tiles are padded, every thread fetches its part (`tl.load`).
# * **base 2.** A GPU computes $2^x$ faster than $e^x$. The scale contains $\log_2 e$ to make up for it.
#
# Both run on our twelve tokens, without the padding to 16: they pad by themselves. And both run on an example with
# chunks of 16, four heads and 48 tokens, as does the public operator, which decides for itself which way to go: every block of
# tokens goes the way that is cheaper for it. A block of neighbours that chose alike has a short list, and goes by block. One whose
# list is long goes by chunk. The rule is in [chunk_attention.py](../kernels/hsa_kernels/chunk_attention.py), and once more below.

# %%
# NBVAL_CHECK_OUTPUT
q, k, v, indices, weights = twelve
unpadded = with_heads(*(x[..., :9].contiguous() for x in (q[:, None], k, v)), indices.int(), weights)
larger = [x.to(DEVICE).contiguous() for x in with_heads(*example(T=48, S=16, K=2, D=32))]
larger_exact = reference.chunk_attention(*(x.double() if x.is_floating_point() else x for x in larger)).float()
for name, way in (("by_token", by_token), ("by_chunk", by_chunk)):
    on_twelve = way.forward(*unpadded, 9**-0.5)[0, :, 0]
    on_larger = way.forward(*larger, 32**-0.5)
    print(f"{name}: twelve tokens == reference: {torch.allclose(on_twelve, out[:, :9], atol=1e-5)};", end=" ")
    print(f"48 tokens == reference: {torch.allclose(on_larger, larger_exact, atol=1e-5)}")
operator = hsa_kernels.chunk_attention(*larger)
print(f"hsa_kernels.chunk_attention == reference: {torch.allclose(operator, larger_exact, atol=1e-5)}")

# %% [markdown]
# **You should see** five times `True`.
#
# ## The two ceilings of a card
#
# Back to milliseconds. A card can move only so many bytes a second, and multiply only so much. Both were measured, on
# the card named below, with nothing else to do: a copy, and a large matrix product. Their ratio tells how often each
# loaded byte must be used before the multiplying becomes the bottleneck.

# %%
stored = json.loads((data_dir() / "results" / "kernels.json").read_text())
ceilings = stored["ceilings"]
STORED = f"stored measurements, {stored['hardware']}"
ridge = ceilings["flops_per_second"] / ceilings["bytes_per_second"]
print(STORED)
print(f"at most {ceilings['flops_per_second'] / 1e12:.0f} TFLOP and {ceilings['bytes_per_second'] / 1e12:.2f} TB a second")
print(f"so a byte has to be used for {ridge:.0f} FLOP, or the processors wait for memory")


# %% [markdown]
# And how often does chunk attention use a byte? By token, a chunk of $2SD$ numbers of 2 bytes serves $4GSD$ FLOP. That
# is **G FLOP for a byte**, whatever S, D and K are. With G = 16 the processors wait most of the time.
#
# For the other orders the formula needs the count of merged chunks at full size. We do not have to run it: of $n$
# visible chunks, each is missed by a token that keeps K at random with chance $1 - K/n$, and by all M tokens with chance
# $(1 - K/n)^M$.


# %%
def blocks_of(T, S, K, M):
    """Of every block of M tokens: chunks that it meets, on average, if every token keeps K of those it sees at random; choices."""
    visible = torch.arange(0, T, M, dtype=torch.float64) // S
    missed = (1 - K / visible.clamp(min=K)) ** M
    return visible * (1 - missed), M * visible.clamp(max=K)


def block_tokens(row):
    """M of the package's kernel: how many tokens share a pass."""
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (
        (1, 1, row["H"], row["D"]), (1, 1, row["S"], row["J"], row["D"])
    ))  # fmt: skip
    return by_token.tokens_of_block(Sizes.of(q, k), row["K"])


def goes_by_block(row, met, choices, faster=1.5):
    """The package's rule for a block: chunks, mostly from the `faster` cache, cost less than slots of its choices, from memory."""
    return met * 2 * row["S"] <= faster * choices * 3 * (row["H"] // row["J"])


def predict(row):
    """Bytes and useful FLOP of the three orders, and of blocks that choose theirs, for a row of the measurements, bfloat16."""
    T, J, S, D, K, G = (*(row[name] for name in "TJSDK"), row["H"] // row["J"])
    pairs, M = row["chosen"] // J, block_tokens(row)
    met, choices = blocks_of(T, S, K, M)
    counts = dict(pairs=pairs, merged=met.sum().item(), touched=pairs / slots.CHOICES)
    orders = traffic(T=T, G=G, S=S, D=D, M=M, size=2, **counts)
    by_slots = choices * (3 * G * D + 2 * S * D / slots.CHOICES)
    cheaper = torch.where(goes_by_block(row, met, choices), met * 2 * S * D, by_slots).sum().item()
    orders["either"] = 2 * (2 * T * G * D + cheaper), None
    useful = 4 * G * S * D * row["chosen"]  # what is computed with weight 0 does not count
    return {name: (J * moved, useful) for name, (moved, _) in orders.items()}


# %%
# NBVAL_CHECK_OUTPUT
blocks = torch.rand(2000, 4, 40, generator=torch.Generator().manual_seed(0)).topk(8).indices.flatten(1)  # 8 of 40, M = 4
drawn = sum(len(block.unique()) for block in blocks) / len(blocks)
print("formula:", round(40 * (1 - (1 - 8 / 40) ** 4), 1), " drawn:", round(drawn, 1))

# %% [markdown]
# (At full size a chunk's list is cut into pieces, so that no program is much longer than others. A chunk is then loaded
# once for about every 128 choices, and `touched` counts that.)
#
# ## The roofline
#
# One picture for both ceilings. To the right: FLOP for each byte moved. Up: FLOP a second. The roof is the sloping line
# (bytes are the limit) until it meets the flat one (multiplying is the limit). Hollow marks stand on the roof, where
# each order could be if memory were the only place to load from; *either* means that each block of tokens goes by block or by
# chunk, as is cheaper for it. The filled mark is the package as measured, in the order that it takes.


# %%
def package_order(row):
    """By block for short texts, by chunk where even blocks that choose alike would cost more, else each block as it is cheaper.

    By chunk, all choices have to be sorted first. That pays if it looks cheaper by a third.
    """
    T, N, K, M = row["T"], row["T"] // row["S"], row["K"], block_tokens(row)
    halfway = max(N // 2, K)  # chunks that are visible in the middle of the text
    met = halfway * (1 - (1 - K / halfway) ** M)
    if T * K < slots.CHOICES * N or goes_by_block(row, met, M * K, faster=2):
        return "by block"
    return "either" if goes_by_block(row, 1, M) else "by chunk"


def find_row(T, J, op="forward"):
    wanted = dict(op=op, T=T, J=J, choices="random")
    return next(row for row in stored["rows"] if all(row[name] == value for name, value in wanted.items()))


def draw_roofline(figure, tokens, share):
    """Where the three orders could stand, and where the package stands."""
    row = find_row(tokens, 16 // share)
    orders, taken = predict(row), package_order(row)
    points = {name: (flop, moved, None) for name, (moved, flop) in orders.items()}
    points[f"{taken}, measured"] = (*points[taken][:2], row["ms"])
    axes = figure.subplots()
    roofline(axes, ceilings, points)
    axes.set_title(f"{length_name(tokens)} tokens, H/J = {share} · {STORED}", fontsize=11)
    rate = orders[taken][0] / row["ms"] / 1e9
    return f"{length_name(tokens)} tokens, H/J = {share}: {taken}, {row['ms']:.2f} ms, {rate:.1f} TB a second moved."


explore(
    draw_roofline,
    alt="The roofline of the card: a sloping line for memory, a flat one for multiplying. Hollow marks on it for the "
    "orders, and a filled mark for the package's kernel as measured.",
    size=(8.5, 3.8),
    tokens=Control([16384, 65536], start=16384, label="tokens T"),
    share=Control([1, 2, 4, 8, 16], start=16, label="heads that share, H/J"),
)

# %% [markdown]
# Move **H/J** down to 1, and the marks for *by token* and *by block* slide down the roof: fewer heads use each chunk.
# *By chunk* moves little: slots shrink together with the arithmetic. So from some point on the package changes its
# way. None of the three reaches the dotted line, where multiplying would become the limit. **This operation is limited
# by bytes.**
#
# With large H/J the filled mark may stand *above* the roof. That is no mistake. The roof counts bytes from
# memory, and a chunk that another block loaded a moment ago is still in the **L2 cache**, tens of megabytes between
# memory and processors that answer about twice as fast. In the formula a byte is a byte wherever it comes from.
#
# With H/J of 1 or 2 the mark stands a little *below* the roof. What our formula leaves out (indices, sorting the choices,
# many short programs) has grown with J, and the rows that are fetched one by one have become short. A roofline shows
# where to look next. It does not say what one will find.
#
# Here are all measured lengths, with the time that each ceiling alone would ask for:

# %%
print(STORED, "· random choices, H/J = 16, forward, milliseconds")
print(f"{'tokens':>7} {'multiplying':>12} {'bytes/memory':>13} {'measured':>9}   order")
for row in stored["rows"]:
    if (row["op"], row["J"], row["choices"]) == ("forward", 1, "random"):
        taken = package_order(row)
        moved, flop = predict(row)[taken]
        times = flop / ceilings["flops_per_second"] * 1e3, moved / ceilings["bytes_per_second"] * 1e3
        print(f"{length_name(row['T']):>7} {times[0]:12.2f} {times[1]:13.2f} {row['ms']:9.2f}   {taken}")

# %% [markdown]
# So that is where the milliseconds go: in every row the bytes ask for several times what the multiplications ask for,
# and the measured time follows the bytes. Where it is smaller than the column of bytes, the cache has helped.
#
# Are random choices fair? They are the worst case for blocks: neighbours share nothing but chance. The same lengths
# with choices that a *trained* model makes in real text, beside random ones:

# %%
print(STORED, "· forward, milliseconds")
print(f"{'tokens':>7} {'random':>8} {'trained':>8}")
for row in stored["rows"]:
    if (row["op"], row["choices"]) == ("forward", "trained"):
        print(f"{length_name(row['T']):>7} {find_row(row['T'], 1)['ms']:8.2f} {row['ms']:8.2f}")

# %% [markdown]
# At the lengths that go by block, alike neighbours save time. By chunk, it makes no difference who is whose neighbour.
#
# ## Against full attention
#
# Full attention reads all earlier tokens. Its bill grows with T², ours with T·K. But its kernels are the best-tuned ones
# there are, they use every byte so often that multiplying is their limit, and for a short text T² is small. So there must
# be a crossing. Here it is, against two kernels of PyTorch: cuDNN's and FlashAttention-2, causal, 16 heads.

# %%
figure = make_figure(9.5, 3.8)
for axes, (op, title) in zip(figure.subplots(1, 2), (("forward", "forward"), ("forward_backward", "forward and backward"))):
    shown = [row for row in stored["rows"] if (row["op"], row["J"], row["choices"]) == (op, 1, "random")]
    crossover(axes, shown, title=title)
figure.suptitle(STORED, fontsize=11)
show(
    figure,
    "Milliseconds against tokens for HSA, cuDNN and FlashAttention-2, forward alone and with backward. HSA grows in "
    "proportion to the tokens, full attention with their square. Dotted lines mark the length from which on HSA is faster.",
)

# %%
print(STORED)
for op in ("forward", "forward_backward"):
    for T in (16384, 131072):
        row = find_row(T, 1, op)
        print(f"{op} at {length_name(T)}: {row['cudnn_ms'] / row['ms']:.2f} times as fast as cuDNN, "
              f"{row['fa2_ms'] / row['ms']:.2f} times as fast as FlashAttention-2")  # fmt: skip
longest = find_row(131072, 1)
flop = 4 * longest["H"] * longest["D"] * longest["T"] * (longest["T"] + 1) / 2  # every token reads those up to itself
share = flop / longest["cudnn_ms"] * 1e3 / ceilings["flops_per_second"]
print(f"full attention by cuDNN at {length_name(longest['T'])} runs at {share:.0%} of the ceiling of multiplying")

# %% [markdown]
# A dotted line stands at the first measured length from which on HSA is faster. Below it, HSA is *slower* than full
# attention: at 8K tokens half of all tokens keep every chunk they see, so there is little to save. Above, the gap about
# doubles with every doubling of the text. Choosing the chunks costs time too, and is not in this picture.
# [Notebook 08](08_retrieval_and_decode_kernels.ipynb) adds it.
#
# ### On your own GPU
#
# With an NVIDIA GPU the next cell measures a small table live. Without one it says so.


# %%
def live_row(T, H=16, D=128, S=64, K=64):
    """Milliseconds on this GPU: by block, by chunk, and full attention by cuDNN or whatever PyTorch has."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in (
        (1, T, H, D), (1, T // S, S, 1, D), (1, T // S, S, 1, D)
    ))  # fmt: skip
    visible = reference.retrieval.visible_chunks(torch.arange(T, device="cuda"), T // S, S)
    best = torch.rand(T, T // S, device="cuda").masked_fill(~visible, -1.0).topk(K)
    indices = best.indices.masked_fill(best.values < 0, -1).int()[None, :, None]
    weights = torch.full(indices.shape, 1 / K, device="cuda").masked_fill(indices < 0, 0.0)
    times = [triton.testing.do_bench(lambda: way.forward(q, k, v, indices, weights, D**-0.5)) for way in (by_token, by_chunk)]
    full = [q.transpose(1, 2).contiguous() for _ in "qkv"]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return *times, triton.testing.do_bench(lambda: scaled_dot_product_attention(*full, is_causal=True))


if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "· milliseconds, forward: by block, by chunk, full attention")
    for T in (8192, 16384, 32768):
        print(f"{length_name(T):>5}", *(f"{ms:8.2f}" for ms in live_row(T)))
else:
    print("no NVIDIA GPU here: the numbers of this notebook are", STORED)

# %% [markdown]
# ## Exercises
#
# **1.** Give a block more tokens. In the example with random choices, how do bytes and FLOP of *by block* change for M =
# 1, 2, 4, 8, 16 and 32? What is M = 1? Where does it end?
#
# <details><summary>Solution</summary>
#
# M = 1 is the order by token, in bytes and in FLOP. With larger M the bytes fall and the FLOP rise. With M = 32 there is
# one block, which loads every chunk once and computes *everything with everything*, most of it times 0: chunk attention
# has become full attention. The best M lies where both ceilings ask for the same time.
#
# ```python
# inputs, by_itself = example(), Meter()
# token_order(by_itself, *inputs)
# for M in (1, 2, 4, 8, 16, 32):
#     meter = Meter()
#     block_order(meter, *inputs, M=M)
#     print(M, sum(meter.bytes), sum(meter.flop))
#     assert M > 1 or (sum(meter.bytes), sum(meter.flop)) == (sum(by_itself.bytes), sum(by_itself.flop))
# assert sum(meter.flop) == 32 * count(inputs[3])["touched"] * 4 * 4 * 4 * 16
# ```
#
# </details>
#
# **2.** A slot is written once and read once. Could a program by chunk not add its part straight into `out`? What would
# go wrong, and what would it save? Use `traffic`'s terms.
#
# <details><summary>Solution</summary>
#
# Many programs run at once, and several may want to add to the same token's row. Each would load the row, add, and
# store; one of two additions would be lost. *Atomic* additions make the hardware do the three steps as one. But they
# still read and write the row: per pair q, a read and a write of GD numbers, the same `3 * row`. And they come in the
# order of arrival, which differs from run to run, and with it the last bits of the sum ([notebook
# 07](07_backward_kernel.ipynb) shows it). What slots really cost is *room*: K rows for each token that is under way.
# Atomics save that, and only the term `T * row` of the bytes.
#
# ```python
# pairs, G, D, T = 1000, 16, 128, 50
# with_slots = pairs * 3 * G * D + T * G * D
# with_atomics = pairs * 3 * G * D
# print(f"{with_slots / with_atomics:.3f}")
# assert with_slots / with_atomics < 1.02
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# The forward pass says what the model answers. Training needs the way back: gradients of queries, keys, values, and of
# the **weights**, which is how the loss teaches retrieval. [Notebook 07](07_backward_kernel.ipynb) derives them by hand,
# checks each against autograd, and turns the table of jobs around without a single atomic addition. About 30 minutes.
# After it, [notebook 08](08_retrieval_and_decode_kernels.ipynb) makes retrieval fast.
