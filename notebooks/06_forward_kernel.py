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
# In [notebook 04](04_fusion.ipynb) chunk attention was four nested loops. The loops are correct, and far too slow. A
# GPU runs the same loops in thousands of small **programs** at once. Which loops become programs? And in which order
# does a program read the chunks? All answers lead to the same output, but they do not take the same time.
#
# After this notebook you will be able to
#
# * read and write a small GPU kernel in Triton, run it without a GPU, and see which program moves which bytes,
# * explain why chunk attention needs no rescaling, unlike every other attention kernel,
# * do the same work in three schedules, and count the bytes and the multiplications of each schedule,
# * read a roofline picture, and name the length from which HSA beats full attention on a real GPU.
#
# **Time:** 40 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 04](04_fusion.ipynb). You
# need no GPU: without one, Triton's interpreter runs the kernels, slowly and correctly. With an NVIDIA GPU the kernels
# run on the GPU, and the last part measures them.
#
# [← 05 layer](05_layer.ipynb) · [map of the course](00_start.ipynb) · [07 backward kernel →](07_backward_kernel.ipynb)

# %%
import json
import os
from functools import partial

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this variable when a kernel is imported

import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

import hsa_kernels
from hsa_kernels.attention import by_chunk, by_token_block
from hsa_kernels.attention.partial_results import MIN_CHOICES
from hsa_kernels.common.tiles import Sizes
from hsa_mini import reference
from hsa_mini.paths import data_dir
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.kernels import job_table, meter_bars
from hsa_mini.viz.plots import crossover, length_name, roofline
from hsa_mini.viz.programs.explorer import explore_programs
from hsa_mini.viz.programs.picture import program_map
from hsa_mini.viz.programs.record import record

DEVICE = "cuda" if GPU else "cpu"
print("kernels run", f"on {torch.cuda.get_device_name()}" if GPU else "in Triton's interpreter, on the processor")

# %% [markdown]
# ## The question in plain words
#
# A GPU has a large memory and many small processors. A processor can only multiply numbers that it has fetched. So
# every program does three things: it **loads** tiles from memory, it **computes** with them, and it **stores** a
# result.
#
# * Loading costs time per **byte**.
# * Computing costs time per **FLOP**. One FLOP is one multiplication or one addition.
#
# Both happen at the same time. So the slower of the two decides how long the program takes, and the faster one is free.
# When one token reads one chunk, there is little to multiply and much to load. So a good kernel **loads a chunk once
# and uses it often**.
#
# ## In symbols
#
# Here is Eq. (2) again, for one token $t$ and one head. It is a sum over *pairs*. A pair is a token and a chunk that
# the token kept:
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
# The text is `the code is 7 | birds sing at dawn | what is the code`, with the rule of notebook 04: the query of a
# token is its own word, the key is the word two places earlier, and the value is the word itself. A kernel needs tiles
# whose sizes are powers of two, so we pad the nine axes with zeros to sixteen. A zero adds nothing to a dot product.
# Only the scale must still be $1/\sqrt 9$.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


def read_by_rule(text, S=4):
    """The rule of notebook 04 in float32, D padded to 16 -> q [T, D], k and v [N, S, D], indices and weights [T, K]."""
    words = text.replace("|", " ").split()
    vocabulary = list(dict.fromkeys(words))
    own = torch.eye(len(vocabulary))[[vocabulary.index(word) for word in words]]  # [T, D]
    v = own.unflatten(0, (-1, S))  # [T, D] -> [N, S, D]
    k = pad(v, (0, 0, 2, 0))[:, :S]  # the word two places earlier; the first two tokens of a chunk have none
    landmarks = norm(v.sum(dim=1))[None, :, None]
    indices, weights = reference.retrieve(norm(own)[None, :, None], landmarks, chunk_size=S, top_k=2)
    q, k, v = (pad(x, (0, 16 - len(vocabulary))) for x in (norm(own), norm(k), v))
    return [x.contiguous().to(DEVICE) for x in (q, k, v, indices[0, :, 0], weights[0, :, 0])]


twelve = read_by_rule("the code is 7 | birds sing at dawn | what is the code")  # q, k, v, indices, weights

# %% [markdown]
# ## Triton, step by step
#
# Triton is Python that is compiled to GPU code. A kernel is the text of **one program**. The program gets its own
# number from `tl.program_id`. It works on **tiles**: blocks of numbers with fixed sizes, each loaded in one step.
# Inside a kernel `q`, `k` and the other arguments are not tensors. Each is the address of the first number of a tensor,
# and the kernel computes the addresses of the other numbers. A comment like `# [S, D]` gives the shape of a tile. The
# names follow a pattern: `o_` is a tile of offsets, `m_` is a mask, `b_` is a tile of numbers.
#
# Six small kernels lead to chunk attention. Each has one new idea, and beside it stands a **spec**: the same result in
# plain PyTorch. The picture below a kernel shows which program moves which bytes. Nobody drew it: `record` runs the
# kernel in the interpreter and notes every address that a program asks for.

# %%
LADDER = {}


def climb(step, kernel, grid, spec, **arguments):
    """Run a kernel that writes `out`, compare `out` with the spec, and record what each program moves."""
    kernel[grid](**arguments)
    print(f"{step}: kernel == spec: {torch.allclose(arguments['out'], spec, atol=1e-5)}")
    LADDER[step] = record(kernel, grid, **arguments)


def show_step(step, program, words, size=(9, 1.6)):
    """The picture of one program. Orange: it loads. Dark blue: it stores. Light blue: other programs do."""
    figure = make_figure(*size)
    summary = program_map(figure, LADDER[step], program)
    show(figure, f"{words} {summary}")


def on_device(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


# %% [markdown]
# ### Step 1: add two vectors
#
# Twelve numbers, and programs of four. Program 1 works on numbers 4 to 7. Nothing says in which order the three programs
# run, so none may need the result of another.
#
# **You should see** `True`, and a program that loads 32 bytes: four numbers of `x` and four of `y`, of 4 bytes each.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def add_kernel(x, y, out, BLOCK: tl.constexpr):
    """One program adds BLOCK numbers."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o_x, tl.load(x + o_x) + tl.load(y + o_x))


x = on_device(12)
y = x.flip(0)
climb("1 add", add_kernel, (3,), x + y, x=x, y=y, out=torch.empty_like(x), BLOCK=4)

# %%
show_step("1 add", 1, "Three rows of twelve numbers. Program 1 has the middle four of each.", size=(9, 1))

# %% [markdown]
# ### Step 2: load a tile with a mask
#
# A tile has two dimensions if the offsets have two: `[:, None]` makes a column of row numbers, `[None, :]` makes a row
# of column numbers, and the sum is the table of all addresses. The sizes of a tile must be powers of two. Our text has
# eleven tokens of nine numbers, and the tiles are `[4, 16]`. A **mask** says which addresses exist. The others are not
# loaded, and get the value `other`.
#
# What happens without the mask for the columns? Behind number 8 of a row lies number 0 of the *next row*. The kernel
# would load it without any error.
#
# **You should see** `True`. Program 2 has only three rows: its masks keep out a whole row and seven columns.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def pad_kernel(x, out, T, D, S: tl.constexpr, WIDTH: tl.constexpr):
    """One program copies S rows of x [T, D] into rows of WIDTH numbers. It writes zeros where x has ended."""
    o_t = (tl.program_id(0) * S + tl.arange(0, S))[:, None]  # [S, 1]
    o_d = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    m_x = (o_t < T) & (o_d < D)  # x has T rows of D numbers
    b_x = tl.load(x + o_t * D + o_d, mask=m_x, other=0.0)  # [S, WIDTH]
    tl.store(out + o_t * WIDTH + o_d, b_x)


x = on_device(11, 9)
padded = pad(x, (0, 7, 0, 1))
climb("2 mask", pad_kernel, (3,), padded, x=x, out=torch.empty_like(padded), T=11, D=9, S=4, WIDTH=16)

# %%
show_step("2 mask", 2, "x has eleven rows of nine numbers, out has twelve rows of sixteen.", size=(6, 2.6))

# %% [markdown]
# ### Step 3: the softmax of a row
#
# `tl.max` and `tl.sum` reduce a tile along one axis. The row has three scores and the tile has four places. Which value
# must the fourth place get? Not 0: a score of 0 would take a share. The softmax gives nothing to $-\infty$.
#
# **You should see** `True`.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def softmax_kernel(x, out, N, WIDTH: tl.constexpr):
    """One program computes the softmax of one row of x [T, N]."""
    row = tl.program_id(0)
    o_n = tl.arange(0, WIDTH)
    m_n = o_n < N  # the tile is wider than the row
    b_x = tl.load(x + row * N + o_n, mask=m_n, other=-float("inf"))  # [WIDTH]
    b_p = tl.exp(b_x - tl.max(b_x, 0))  # no number above 1, so nothing overflows
    tl.store(out + row * N + o_n, b_p / tl.sum(b_p, 0), mask=m_n)


x = on_device(12, 3)
climb("3 softmax", softmax_kernel, (12,), x.softmax(dim=1), x=x, out=torch.empty_like(x), N=3, WIDTH=4)

# %%
show_step("3 softmax", 5, "Twelve rows of three numbers. Program 5 loads and stores row 5.", size=(3.4, 2.6))

# %% [markdown]
# ### Step 4: a matrix product
#
# `tl.dot` multiplies two tiles. On a GPU a special unit does this, and it wants at least 16 numbers in each dimension.
# We score 32 queries against 32 keys. The grid has **two** dimensions: a program has the row and the column of its tile.
# Look at the addresses of the keys: rows and columns are exchanged, so the tile arrives transposed. (`"ieee"` asks for
# exact float32. A GPU would round the numbers before it multiplies.)
#
# **You should see** `True`. All programs together load 8,192 bytes, though `q` and `k` have 4,096: every number is
# loaded by two programs. Larger tiles would load less. This is what "use it often" means.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def scores_kernel(q, k, out, N, M: tl.constexpr, D: tl.constexpr):
    """One program scores M of the queries q [T, D] against M of the keys k [N, D]."""
    o_q = tl.program_id(0) * M + tl.arange(0, M)
    o_k = tl.program_id(1) * M + tl.arange(0, M)
    o_d = tl.arange(0, D)
    b_q = tl.load(q + o_q[:, None] * D + o_d[None, :])  # [M, D]
    b_k = tl.load(k + o_k[None, :] * D + o_d[:, None])  # [D, M]
    tl.store(out + o_q[:, None] * N + o_k[None, :], tl.dot(b_q, b_k, input_precision="ieee"))


q = on_device(32, 16)
k = q.flip(0)
climb("4 dot", scores_kernel, (2, 2), q @ k.T, q=q, k=k, out=q.new_empty(32, 32), N=32, M=16, D=16)

# %%
show_step(
    "4 dot", 1, "Program 1 loads the upper half of q and the lower half of k, and stores the upper right quarter of out.", size=(8, 3.2)
)

# %% [markdown]
# ### Step 5: one token's chunk
#
# Now the twelve tokens. Each program has one token, and reads the best chunk that its token kept. The new idea: **an
# address can depend on a number that was loaded before.** First the program loads the number of the chunk, then the
# chunk. A kernel may call another function that is marked `@triton.jit`.
#
# **You should see** `True`.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def attend_chunk(b_q, b_k, b_v, scale):
    """Softmax attention of one query [D] inside one chunk, with k and v [S, D] -> [D]."""
    b_s = tl.sum(b_k * b_q[None, :], 1) * scale  # [S]
    b_p = tl.exp(b_s - tl.max(b_s, 0))  # [S]: the softmax before the division by its sum
    return tl.sum(b_p[:, None] * b_v, 0) / tl.sum(b_p, 0)  # [D]


@triton.jit
def best_chunk_kernel(q, k, v, best, out, scale, S: tl.constexpr, D: tl.constexpr):
    """One program reads the best chunk of one token. A token without a chunk gets zeros."""
    t = tl.program_id(0)
    o_d = tl.arange(0, D)
    b_q = tl.load(q + t * D + o_d)  # [D]
    b_out = tl.zeros([D], tl.float32)
    i = tl.load(best + t)
    if i >= 0:  # -1: the token sees no chunk
        o_kv = (i * S + tl.arange(0, S))[:, None] * D + o_d[None, :]  # [S, D]: where the chunk lies in memory
        b_out = attend_chunk(b_q, tl.load(k + o_kv), tl.load(v + o_kv), scale)
    tl.store(out + t * D + o_d, b_out)


def read_best(q, k, v, best, scale):
    """The spec: one token after the other."""
    out = torch.zeros_like(q)
    for t, i in enumerate(best.tolist()):
        if i >= 0:
            out[t] = (k[i] @ q[t] * scale).softmax(dim=0) @ v[i]
    return out


q, k, v, indices, weights = twelve
best = indices[:, 0].contiguous()  # [T]: the first slot holds the best chunk
spec = read_best(q, k, v, best, 1 / 3)
climb("5 chunk", best_chunk_kernel, (12,), spec, q=q, k=k, v=v, best=best, out=torch.empty_like(q), scale=1 / 3, S=4, D=16)

# %%
show_step("5 chunk", 11, "Program 11 loads row 11 of q, one number of best, and chunk 0 of k and v: the first four rows.", size=(10, 2.4))

# %% [markdown]
# ### Step 6: all chunks of a token
#
# Two things are added: a loop over the token's K slots, and the weight of each chunk. A slot holds one chunk that the
# token kept, or -1 if the slot is empty. This is chunk attention.


# %%
@triton.jit
def chunk_attention_kernel(q, k, v, indices, weights, out, scale, K: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    """One program computes the output of one token: the weighted sum over the chunks that it kept."""
    t = tl.program_id(0)
    o_s = tl.arange(0, S)
    o_d = tl.arange(0, D)
    b_q = tl.load(q + t * D + o_d)  # [D]
    b_out = tl.zeros([D], tl.float32)
    for slot in range(K):
        i = tl.load(indices + t * K + slot)
        if i >= 0:  # -1 is an empty slot
            o_kv = (i * S + o_s)[:, None] * D + o_d[None, :]  # [S, D]: where the chunk lies in memory
            b_k = tl.load(k + o_kv)
            b_v = tl.load(v + o_kv)
            b_out += tl.load(weights + t * K + slot) * attend_chunk(b_q, b_k, b_v, scale)
    tl.store(out + t * D + o_d, b_out)


def run_token_kernel(q, k, v, indices, weights, scale):
    """Launch one program per token: q [T, D], k and v [N, S, D], indices and weights [T, K] -> [T, D]."""
    T, K = indices.shape
    _, S, D = k.shape
    out = torch.empty_like(q)
    chunk_attention_kernel[(T,)](q, k, v, indices, weights, out, scale, K=K, S=S, D=D)
    return out


def expected(q, k, v, indices, weights, scale):
    """The same result from the reference in float64. The reference needs a batch dimension and a head dimension."""
    exact = (x.double() for x in (q[None, :, None], k[None, :, :, None], v[None, :, :, None]))
    out = reference.chunk_attention(*exact, indices[None, :, None], weights[None, :, None].double(), scale=scale)
    return out[0, :, 0].to(q.dtype)


# %% [markdown]
# **You should see** `True`, and the 0.711 of notebook 04.

# %%
# NBVAL_CHECK_OUTPUT
out = run_token_kernel(*twelve, scale=9**-0.5)
inputs = dict(q=q, k=k, v=v, indices=indices, weights=weights, out=torch.empty_like(q))
climb("6 chunks", chunk_attention_kernel, (12,), expected(*twelve, scale=9**-0.5), **inputs, scale=9**-0.5, K=2, S=4, D=16)
print("share of `7` at token 11:", round(out[11, 3].item(), 3))

# %% [markdown]
# ### See every program
#
# Here are the six kernels together. Select a kernel, and one of its programs with the arrow keys. Orange cells are loaded,
# dark blue cells are stored, and light blue cells belong to other programs. Then play the program: its loads and stores
# come one by one, and the bars count its bytes and its FLOP. Point at a number to see who moves it.

# %%
explore_programs(
    LADDER,
    alt="The tensors of a kernel side by side as grids. Orange: loaded by the program. Dark blue: stored. Light blue: other programs.",
    launch="6 chunks",
    program=4,
)

# %% [markdown]
# In kernel 6, move the program from 0 to 11. Programs 0 to 3 load no chunk, 4 to 7 load one, 8 to 11 load both. So chunk
# 0 is loaded eight times, though it never changes. The rest of this notebook is about these repeated loads.
#
# ## Nothing is rescaled
#
# Look at the loop of `chunk_attention_kernel` again. It only ever adds to `b_out`. In ordinary attention this would be wrong, because *one* softmax
# runs over all keys, and its sum is known only at the end. A kernel that reads those keys chunk by chunk carries a
# running maximum and a running sum. Each time the maximum grows, it has to shrink everything that it summed before.
# This is called *online softmax*. Here it is in PyTorch, with a counter for the shrinking step:


# %%
def online_softmax(q, k, v):
    """One softmax over all chunks, read one by one: q [D], k and v [N, S, D] -> [D], and how often it rescaled."""
    highest = torch.tensor(-torch.inf)
    total = 0.0
    out = torch.zeros_like(q)
    rescaled = 0
    for b_s, b_v in zip(k @ q, v):  # the scores [S] and the values [S, D] of one chunk
        new = torch.maximum(highest, b_s.max())
        rescaled += int(new > highest and bool(highest.isfinite()))
        shrink = (highest - new).exp()
        b_p = (b_s - new).exp()
        total = total * shrink + b_p.sum()
        out = out * shrink + b_p @ b_v
        highest = new
    return out / total, rescaled


# %% [markdown]
# **You should see** `True`, and that eight chunks needed two rescalings.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
q_1, k_8, v_8 = (torch.randn(shape) for shape in ((16,), (8, 4, 16), (8, 4, 16)))
dense, rescaled = online_softmax(q_1, k_8, v_8)
one_pass = (k_8.flatten(0, 1) @ q_1).softmax(0) @ v_8.flatten(0, 1)
print("online softmax == one softmax:", torch.allclose(dense, one_pass, atol=1e-5), "- rescaled:", rescaled, "times")

# %% [markdown]
# HSA has **one softmax per chunk**, and that softmax is complete as soon as the chunk is read. So $w_{t,i}\,o_{t,i}$ is
# a finished number: no later chunk can change it. This has two consequences. First, the loop is shorter. Second, and
# more important: **the pairs may be computed in any order**, even by different programs, and added up at the end. The
# rest of this notebook uses that freedom.
#
# ## Three schedules
#
# Draw a table with one row per chunk and one column per token. Put a mark where the token kept the chunk. Every mark is
# a pair, and every pair is one job. A **schedule** divides the jobs among programs:
#
# 1. **By token.** One program takes one column: one token and its K chunks. Every chunk is loaded again for every token
#    that kept it.
# 2. **By token block.** One program takes M neighbouring columns. It loads every chunk that *any* of the M tokens kept,
#    and loads it once. Neighbours often keep the same chunks. But the program computes each chunk for all M tokens, and
#    multiplies the result by the weight 0 for a token that did not keep it.
# 3. **By chunk.** One program takes one row: one chunk, loaded once, and all tokens that kept it. But now the K answers
#    for one token come from K different programs. Each program writes a **partial result** to a place of its own. A
#    second round of programs adds up the partial results of each token.
#
# We write all three in PyTorch. A meter counts the bytes that pass between memory and programs, and the FLOP.


# %%
class Meter:
    """Counts the bytes moved to or from memory and the FLOP of matrix products, separately for each program."""

    def __init__(self):
        self.bytes = []
        self.flop = []

    def program(self):
        self.bytes.append(0)
        self.flop.append(0)

    def move(self, x):
        self.bytes[-1] += x.nbytes
        return x

    def product(self, a, b):
        self.flop[-1] += 2 * a.numel() * b.shape[-1]  # one multiplication and one addition
        return a @ b


def read_chunk(meter, q, k, v):
    """Softmax attention inside one chunk: rows q [R, D], k and v [S, D] -> [R, D]."""
    scores = meter.product(q, k.T) * q.shape[-1] ** -0.5  # [R, S]
    return meter.product(scores.softmax(dim=-1), v)


# %% [markdown]
# From here on a token has G query heads, and all of them keep the same chunks: `q` is `[T, G, D]`. To keep the count
# simple we leave out indices and weights. They are one number per pair, and a chunk has 2·S·D numbers.


# %%
def token_schedule(meter, q, k, v, indices, weights):
    """One program per token. It loads q, then every chunk that the token kept, and stores the result."""
    out = torch.zeros_like(q)
    for t in range(len(q)):
        meter.program()
        b_q = meter.move(q[t])  # [G, D]
        for i, weight in zip(indices[t].tolist(), weights[t]):
            if i >= 0:
                out[t] += weight * read_chunk(meter, b_q, meter.move(k[i]), meter.move(v[i]))
        meter.move(out[t])
    return out


def token_block_schedule(meter, q, k, v, indices, weights, M=4):
    """One program per M neighbouring tokens. It loads each chunk that any of them kept; the others get weight 0."""
    out = torch.zeros_like(q)
    for start in range(0, len(q), M):
        meter.program()
        block = slice(start, start + M)
        b_q = meter.move(q[block]).flatten(0, 1)  # [M, G, D] -> [M*G, D]
        for i in indices[block][indices[block] >= 0].unique():
            weight = (weights[block] * (indices[block] == i)).sum(dim=1)  # [M]
            answer = read_chunk(meter, b_q, meter.move(k[i]), meter.move(v[i]))
            out[block] += weight[:, None, None] * answer.view_as(out[block])
        meter.move(out[block])
    return out


def add_partial_results(meter, partial_results, indices):
    """One program per token. It loads the token's partial results and stores their sum: [T, K, G, D] -> [T, G, D]."""
    out = torch.zeros_like(partial_results[:, 0])
    for t in range(len(out)):
        meter.program()
        out[t] = meter.move(meter.move(partial_results[t, indices[t] >= 0]).sum(dim=0))
    return out


def chunk_schedule(meter, q, k, v, indices, weights):
    """One program per chunk. It loads the chunk and the tokens that kept it, and stores one partial result per pair."""
    partial_results = q.new_zeros(*indices.shape, *q.shape[1:])  # [T, K, G, D]
    for i in indices[indices >= 0].unique():
        meter.program()
        b_k = meter.move(k[i])
        b_v = meter.move(v[i])
        t, slot = (indices == i).nonzero(as_tuple=True)
        b_q = meter.move(q[t])  # [tokens, G, D]
        answer = read_chunk(meter, b_q.flatten(0, 1), b_k, b_v).view_as(b_q)
        partial_results[t, slot] = meter.move(weights[t, slot][:, None, None] * answer)
    return add_partial_results(meter, partial_results, indices)


SCHEDULES = {"by token": token_schedule, "by token block": token_block_schedule, "by chunk": chunk_schedule}


# %% [markdown]
# A formula gives the same counts without running anything. In every schedule a token costs $GD$ numbers of `q` and $GD$
# numbers of the result. A chunk costs $2SD$ numbers each time it is loaded. When one token reads one chunk, it computes
# $4GSD$ FLOP: two products, with one multiplication and one addition each. So only three counts matter:
#
# * **pairs**: the number of pairs of a token and a chunk,
# * **merged**: how many chunks each block loads, added up over all blocks,
# * **touched**: how many different chunks were kept by at least one token.


# %%
def traffic(*, T, G, S, D, pairs, merged, touched, M, size):
    """Bytes and FLOP of the three schedules; `size`: bytes of a number."""
    row = G * D
    chunk = 2 * S * D
    ends = 2 * T * row
    reading = 4 * G * S * D
    return {
        "by token": (size * (ends + pairs * chunk), pairs * reading),
        "by token block": (size * (ends + merged * chunk), merged * M * reading),
        "by chunk": (size * (touched * chunk + pairs * 3 * row + T * row), pairs * reading),
    }


def count(indices, M=4):
    """The three counts of the formula, for choices [T, K]."""
    blocks = (block[block >= 0].unique() for block in indices.split(M))
    kept = indices[indices >= 0]
    return dict(pairs=len(kept), merged=sum(map(len, blocks)), touched=len(kept.unique()))


# %% [markdown]
# The example has 32 tokens in 8 chunks of four, K = 3, G = 4. Every token keeps three random chunks among those that it
# can see. This notebook's equality is a double one: the three schedules give the **result** of the reference, and the
# meter's count equals the **formula** to the byte.
#
# **You should see** six times `True`.


# %%
def example(T=32, S=4, K=3, G=4, D=16, group=1, seed=0):
    """Random q [T, G, D], k and v [N, S, D], indices and weights [T, K]; `group` neighbours share their scores."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(T // group, T // S, generator=generator).repeat_interleave(group, dim=0)
    visible = reference.retrieval.visible_chunks(torch.arange(T), T // S, S)
    best = scores.masked_fill(~visible, -1.0).topk(K)
    weights = torch.rand(T, K, generator=generator).masked_fill(best.values < 0, 0.0)
    # q comes last: another G must not change the choices.
    k, v, q = (torch.randn(shape, generator=generator) for shape in ((T // S, S, D), (T // S, S, D), (T, G, D)))
    return q, k, v, best.indices.masked_fill(best.values < 0, -1).int(), weights


def with_heads(q, k, v, indices, weights):
    """Adds the dimensions that the operators need: one sequence (B = 1) with one key/value head (J = 1)."""
    return q[None], k[None, :, :, None], v[None, :, :, None], indices[None, :, None], weights[None, :, None]


# %%
# NBVAL_CHECK_OUTPUT
inputs = example()
formula = traffic(T=32, G=4, S=4, D=16, M=4, size=4, **count(inputs[3]))
want = reference.chunk_attention(*(x.double() if x.is_floating_point() else x for x in with_heads(*inputs)))[0].float()
print(count(inputs[3]))
for name, schedule in SCHEDULES.items():
    meter = Meter()
    same = torch.allclose(schedule(meter, *inputs), want, atol=1e-5)
    counted = sum(meter.bytes), sum(meter.flop)
    print(f"{name}: result == reference: {same}; counted == formula: {counted == formula[name]};", end=" ")
    print("bytes, FLOP:", counted)

# %% [markdown]
# The numbers show two things. *By token block* moves fewer bytes than *by token*, but it computes more FLOP. *By chunk*
# moves very few bytes for the chunks, but it also has to move the partial results.
#
# ## See which program loads what
#
# The picture shows the table of jobs and one program at work. Red frames mark the cells of this program. Blue cells
# were done by earlier programs. On the right are the meters of all three schedules. The pale bar is the total of a
# schedule. For the schedule that you select, the orange part is what its programs have used so far.


# %%
def program_cells(schedule, indices, program, M=4):
    """The (token, chunk) cells of a program, also those with weight 0; none if it only adds partial results."""
    T = len(indices)
    touched = indices[indices >= 0].unique().tolist()
    if schedule == "by chunk":
        return [(t, i) for i in touched[program : program + 1] for t in range(T) if i in indices[t]]
    first, count = (program, 1) if schedule == "by token" else (program * M, M)
    tokens = range(first, min(first + count, T))
    return [(t, i) for i in indices[list(tokens)].unique().tolist() if i >= 0 for t in tokens]


def draw_jobs(axes, schedule, indices, program):
    """The table of jobs with the cells of this program and of the programs before it."""
    finished = {cell for number in range(program) for cell in program_cells(schedule, indices, number)}
    current = program_cells(schedule, indices, program)
    earlier = len(indices[indices >= 0].unique()) if schedule == "by chunk" else 0  # programs that read chunks
    token = None if current else program - earlier
    job_table(axes, indices, 8, current=current, finished=finished, token=token)
    axes.set_title(f"{schedule}: the jobs", fontsize=11)


def draw_meters(axes, meters, what, schedule, program):
    """One meter of all schedules; for the selected schedule also the part used up to this program."""
    totals = {name: sum(getattr(meter, what)) / 1e3 for name, meter in meters.items()}
    used = {schedule: sum(getattr(meters[schedule], what)[: program + 1]) / 1e3}
    meter_bars(axes, totals, used, title="kilobytes moved" if what == "bytes" else "thousand FLOP")


def describe(meter, schedule, indices, program):
    """One sentence about a program."""
    cells = program_cells(schedule, indices, program)
    idle = "adds the partial results of one token" if schedule == "by chunk" else "finds nothing to read"
    work = f"chunks loaded: {len({i for _, i in cells})}, tokens that read: {len({t for t, _ in cells})}"
    used = f"{meter.bytes[program]:,} bytes and {meter.flop[program]:,} FLOP"
    return f"{schedule}, program {program + 1} of {len(meter.bytes)}; {work if cells else idle}; {used}."


def draw_schedules(figure, schedule, program, heads, same_chunks):
    """One program of one schedule at work, and the meters of all schedules."""
    inputs = example(G=heads, group=4 if same_chunks else 1)
    meters = {name: Meter() for name in SCHEDULES}
    for name, run in SCHEDULES.items():
        run(meters[name], *inputs)
    program = min(program, len(meters[schedule].bytes)) - 1
    grid = figure.add_gridspec(2, 2, width_ratios=(2.6, 1))
    draw_jobs(figure.add_subplot(grid[:, 0]), schedule, inputs[3], program)
    for row, what in enumerate(("bytes", "flop")):
        draw_meters(figure.add_subplot(grid[row, 1]), meters, what, schedule, program)
    return describe(meters[schedule], schedule, inputs[3], program)


# %% [markdown]
# ### Move it
#
# Step through the programs of each schedule. Then change two things. With **H/J = 1** there is one query head per
# key/value head, and a result is small compared with a chunk. Then *by chunk* moves hardly more bytes than *by token
# block*, and multiplies nothing by 0. With 16 heads each result is large, so writing partial results costs more than it
# saves in loading chunks. When **neighbours keep the same chunks**, as they often do in real text, a block's list is
# shorter. Then *by token block* moves still fewer bytes, and multiplies nothing by 0.

# %%
explore(
    draw_schedules,
    alt="A table of 8 chunks and 32 tokens with a cell for each chunk that a token kept. The cells of one program are "
    "framed. Beside it are bars for the bytes and the FLOP of the three schedules.",
    size=(9.5, 3.8),
    schedule=Control(list(SCHEDULES), start="by token block"),
    program=Control((1, 40), start=6, label="program"),
    heads=Control([1, 2, 4, 8, 16], start=4, label="heads that share, H/J"),
    same_chunks=Control(bool, start=False, label="neighbours keep the same"),
)

# %% [markdown]
# ## The package's kernels
#
# The package has two forward kernels, and a rule that chooses between them.
# [by_token_block.py](../kernels/hsa_kernels/attention/by_token_block.py) works by token block. First
# [merge.py](../kernels/hsa_kernels/attention/merge.py) makes the list of chunks of each block, with M weights per
# chunk. Then the kernel reads the list once. [by_chunk.py](../kernels/hsa_kernels/attention/by_chunk.py) works by
# chunk. For each chunk it needs the list of the tokens that kept it ([notebook 07](07_backward_kernel.ipynb) builds
# these lists). Compare the inner loops of both with our short kernel. You will find the same five steps: load k and v,
# compute scores, apply the softmax inside the chunk, weight, add. The package's kernels add five things:
#
# * **Rows.** The rows of one tile are M tokens × G heads, so that `tl.dot` can multiply whole tiles. The matrix units
#   of a GPU (*tensor cores*) need at least 16 rows, and work best with 64.
# * **Masks.** S, D and G need not be powers of two. Tiles are padded, and the padding is masked.
# * **Loading ahead.** The kernel loads the number of the next chunk before it uses the present chunk. So the tiles of
#   the next chunk can already be loading while the present tiles are multiplied.
# * **The copy engine.** From Hopper on, one instruction requests a whole tile (`k.load`), and the GPU fetches the tile
#   while the threads do other work. On older GPUs, and where tiles are padded, every thread fetches its part
#   (`tl.load`).
# * **Base 2.** A GPU computes $2^x$ faster than $e^x$. The scale contains the factor $\log_2 e$, so the result is the
#   same.
#
# Both kernels run on our twelve tokens without the padding to 16, because they pad the tiles themselves. Both also run
# on an example with chunks of 16, four heads and 48 tokens. The public operator runs on it too. It chooses the cheaper
# schedule for every block of tokens. A block of neighbours that keep the same chunks has a short list, and is processed
# by token block. A block with a long list is processed in chunk order. The rule is in
# [operator.py](../kernels/hsa_kernels/attention/operator.py), and we write it down once more below.
#
# **You should see** five times `True`.

# %%
# NBVAL_CHECK_OUTPUT
q, k, v, indices, weights = twelve
unpadded = with_heads(*(x[..., :9].contiguous() for x in (q[:, None], k, v)), indices.int(), weights)
larger = [x.to(DEVICE).contiguous() for x in with_heads(*example(T=48, S=16, K=2, D=32))]
larger_exact = reference.chunk_attention(*(x.double() if x.is_floating_point() else x for x in larger)).float()
for name, schedule in {"by token block": by_token_block, "by chunk": by_chunk}.items():
    on_twelve = schedule.forward(*unpadded, 9**-0.5)[0, :, 0]
    on_larger = schedule.forward(*larger, 32**-0.5)
    print(f"{name}: twelve tokens == reference: {torch.allclose(on_twelve, out[:, :9], atol=1e-5)};", end=" ")
    print(f"48 tokens == reference: {torch.allclose(on_larger, larger_exact, atol=1e-5)}")
operator = hsa_kernels.chunk_attention(*larger)
print(f"hsa_kernels.chunk_attention == reference: {torch.allclose(operator, larger_exact, atol=1e-5)}")

# %% [markdown]
# ## The two ceilings of a card
#
# Back to milliseconds. A card can move only so many bytes per second, and do only so many multiplications. Both limits
# were measured on the card named below while it did nothing else: one with a copy, the other with a large matrix
# product. Their ratio tells how many FLOP each loaded byte must serve before multiplying becomes the bottleneck.

# %%
stored = json.loads((data_dir() / "results" / "kernels.json").read_text())
ceilings = stored["ceilings"]
STORED = f"stored measurements, {stored['hardware']}"
teraflop = ceilings["flops_per_second"] / 1e12
terabytes = ceilings["bytes_per_second"] / 1e12
print(STORED)
print(f"at most {teraflop:.0f} TFLOP and {terabytes:.2f} TB per second")
print(f"so each byte must serve {teraflop / terabytes:.0f} FLOP, otherwise the processors wait for memory")


# %% [markdown]
# How many FLOP does a byte serve in chunk attention? By token, a chunk of $2SD$ numbers of 2 bytes serves $4GSD$ FLOP.
# That is **G FLOP per byte**, whatever S, D and K are. With G = 16 the processors wait most of the time.
#
# For the other schedules the formula needs the number of merged chunks at full size. We can compute it. Say $n$ chunks
# are visible, and every token keeps K of them at random. One token misses a given chunk with probability $1 - K/n$. All
# M tokens of a block miss it with probability $(1 - K/n)^M$.


# %%
def blocks_of(T, S, K, M):
    """For each block of M tokens: the expected number of chunks it loads if choices are random; its pairs."""
    visible = torch.arange(0, T, M, dtype=torch.float64) // S
    missed = (1 - K / visible.clamp(min=K)) ** M
    return visible * (1 - missed), M * visible.clamp(max=K)


def block_tokens(row):
    """The M of the package's kernel: how many tokens share one pass."""
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in (
        (1, 1, row["H"], row["D"]), (1, 1, row["S"], row["J"], row["D"])
    ))  # fmt: skip
    return by_token_block.tokens_per_block(Sizes.of(q, k), row["K"])


def prefers_token_block(row, chunks, choices, faster=1.5):
    """The package's rule for one block: is loading its chunks cheaper than moving its partial results?

    faster: chunks come mostly from the cache, which is this much faster than the memory that holds partial results.
    """
    return chunks * 2 * row["S"] <= faster * choices * 3 * (row["H"] // row["J"])


def predict(row):
    """Bytes and useful FLOP of each schedule and of the mixture `either`, for a measured row in bfloat16."""
    T, J, S, D, K = (row[name] for name in "TJSDK")
    G = row["H"] // J
    pairs = row["chosen"] // J
    chunks, choices = blocks_of(T, S, K, block_tokens(row))
    counts = dict(pairs=pairs, merged=chunks.sum().item(), touched=pairs / MIN_CHOICES)
    schedules = traffic(T=T, G=G, S=S, D=D, M=block_tokens(row), size=2, **counts)
    as_partial_results = choices * (3 * G * D + 2 * S * D / MIN_CHOICES)
    cheaper = torch.where(prefers_token_block(row, chunks, choices), chunks * 2 * S * D, as_partial_results)
    schedules["either"] = 2 * (2 * T * G * D + cheaper.sum().item()), None
    useful = 4 * G * S * D * row["chosen"]  # products with weight 0 do not count
    return {name: (J * moved, useful) for name, (moved, _) in schedules.items()}


# %% [markdown]
# **You should see** the same number from the formula and from 2,000 random blocks.

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.rand(2000, 4, 40, generator=torch.Generator().manual_seed(0))
blocks = scores.topk(8).indices.flatten(1)  # M = 4 tokens, each keeps 8 of 40 chunks
drawn = sum(len(block.unique()) for block in blocks) / len(blocks)
print("formula:", round(40 * (1 - (1 - 8 / 40) ** 4), 1), " drawn:", round(drawn, 1))

# %% [markdown]
# (At full size the list of a chunk is cut into pieces, so that no program runs much longer than the others. A chunk is
# then loaded once for about every 128 choices. `touched` counts these loads.)
#
# ## The roofline
#
# One picture shows both ceilings. The horizontal axis is FLOP per byte moved. The vertical axis is FLOP per second. The
# roof starts as a sloping line, where bytes are the limit. It ends as a flat line, where multiplying is the limit. A
# hollow mark stands on the roof: the speed that a schedule could reach if every byte came from memory. *Either* is the
# mixture: each block of tokens takes the cheaper of *by token block* and *by chunk*. The filled mark is the package as
# measured, with the schedule that it chooses.


# %%
def package_schedule(row):
    """The package's choice: by token block, by chunk, or `either`, where each block takes the cheaper of the two.

    Working by chunk requires sorting all choices first. That pays only if it looks cheaper by a third.
    """
    N = row["T"] // row["S"]
    K = row["K"]
    M = block_tokens(row)
    halfway = max(N // 2, K)  # chunks that are visible in the middle of the text
    chunks = halfway * (1 - (1 - K / halfway) ** M)
    if row["T"] * K < MIN_CHOICES * N or prefers_token_block(row, chunks, M * K, faster=2):
        return "by token block"
    return "either" if prefers_token_block(row, 1, M) else "by chunk"


def find_row(T, J, op="forward"):
    wanted = dict(op=op, T=T, J=J, choices="random")
    return next(row for row in stored["rows"] if all(row[name] == value for name, value in wanted.items()))


def draw_roofline(figure, tokens, share):
    """Where the schedules could stand, and where the package stands."""
    row = find_row(tokens, 16 // share)
    schedules = predict(row)
    taken = package_schedule(row)
    points = {name: (flop, moved, None) for name, (moved, flop) in schedules.items()}
    points[f"{taken}, measured"] = (*points[taken][:2], row["ms"])
    axes = figure.subplots()
    roofline(axes, ceilings, points)
    axes.set_title(f"{length_name(tokens)} tokens, H/J = {share} · {STORED}", fontsize=11)
    rate = schedules[taken][0] / row["ms"] / 1e9
    work = f"{taken}, {row['ms']:.2f} ms, {rate:.1f} TB per second moved"
    return f"{length_name(tokens)} tokens, H/J = {share}: {work}."


explore(
    draw_roofline,
    alt="The roofline of the card: a sloping line for memory and a flat line for multiplying. Hollow marks on it stand "
    "for the schedules, and a filled mark stands for the package's kernel as measured.",
    size=(8.5, 3.8),
    tokens=Control([16384, 65536], start=16384, label="tokens T"),
    share=Control([1, 2, 4, 8, 16], start=16, label="heads that share, H/J"),
)

# %% [markdown]
# Move **H/J** down to 1. The marks for *by token* and *by token block* slide down the roof, because fewer heads use
# each chunk. The mark for *by chunk* moves little, because the partial results shrink together with the arithmetic. So
# from some point on the package changes its schedule. None of the three schedules reaches the dotted line, where
# multiplying would become the limit. **Bytes are the limit of this operation.**
#
# With large H/J the filled mark may stand *above* the roof. That is no mistake. The roof counts bytes from memory. A
# chunk that another block loaded a moment ago is still in the **L2 cache**: tens of megabytes between memory and
# processors, about twice as fast as memory. The formula counts a byte as a byte, wherever it comes from.
#
# With H/J of 1 or 2 the mark stands a little *below* the roof. Our formula leaves out the indices, the sorting of the
# choices, and the start of many short programs. These costs grow with J, which is large here. Also, each row that is
# fetched is shorter here, because fewer heads share it. A roofline shows where to look next. It does not show what you
# will find there.
#
# Here are all measured lengths, with the time that the bytes or the multiplications would require if nothing else took
# time:

# %%
print(STORED, "· random choices, H/J = 16, forward, milliseconds")
print(f"{'tokens':>7} {'multiplying':>12} {'bytes/memory':>13} {'measured':>9}   schedule")
for row in stored["rows"]:
    if (row["op"], row["J"], row["choices"]) == ("forward", 1, "random"):
        taken = package_schedule(row)
        moved, flop = predict(row)[taken]
        compute_ms = flop / ceilings["flops_per_second"] * 1e3
        memory_ms = moved / ceilings["bytes_per_second"] * 1e3
        print(f"{length_name(row['T']):>7} {compute_ms:12.2f} {memory_ms:13.2f} {row['ms']:9.2f}   {taken}")

# %% [markdown]
# So the milliseconds go into moving bytes. In every row the bytes require several times as long as the multiplications,
# and the measured time follows the bytes. Where the measured time is shorter than the column for bytes, the cache has
# helped.
#
# Is it fair to measure random choices? They are the worst case for blocks, since neighbours then share chunks only by
# chance. Here are the same lengths with the choices that a *trained* model makes in real text, beside random choices:

# %%
print(STORED, "· forward, milliseconds")
print(f"{'tokens':>7} {'random':>8} {'trained':>8}")
for row in stored["rows"]:
    if (row["op"], row["choices"]) == ("forward", "trained"):
        print(f"{length_name(row['T']):>7} {find_row(row['T'], 1)['ms']:8.2f} {row['ms']:8.2f}")

# %% [markdown]
# At the lengths that are processed by token block, neighbours that keep the same chunks save time. At the lengths that
# are processed by chunk, it makes no difference which tokens are neighbours.
#
# ## Against full attention
#
# In full attention every token reads all earlier tokens. Its cost grows with T², and ours with T·K. But the kernels of
# full attention are the best-tuned ones that exist. They use every byte so often that multiplying is their limit. And
# for a short text T² is small. So there must be a length from which HSA is faster. The picture compares HSA with two
# full-attention kernels of PyTorch: cuDNN's and FlashAttention-2. Both are causal and have 16 heads.
#
# HSA also has to *choose* its chunks: every query is compared with every landmark before it (notebook 08 has that
# kernel). So a whole HSA layer is not linear. Its square is small, since there is one landmark for $S$ tokens and one
# retrieval head for all heads. The picture shows it where it was measured.

# %%
figure = make_figure(9.5, 3.8)
panels = {"forward": "forward", "forward_backward": "forward and backward"}
for axes, (op, title) in zip(figure.subplots(1, 2), panels.items()):
    shown = [row for row in stored["rows"] if (row["op"], row["J"], row["choices"]) == (op, 1, "random")]
    choosing = {row["T"]: row["ms"] for row in stored["rows"] if row["op"] == "retrieve"} if op == "forward" else None
    crossover(axes, shown, title=title, retrieval=choosing)
figure.suptitle(STORED, fontsize=11)
show(
    figure,
    "Milliseconds against tokens for HSA, cuDNN and FlashAttention-2. Left: only the forward pass. Right: with backward. "
    "Attention to chosen chunks grows in proportion to the tokens, full attention with their square. Left, a second curve "
    "of HSA has the choice of the chunks too. Dotted lines mark the length from which HSA is faster.",
)

# %%
print(STORED)
for op in ("forward", "forward_backward"):
    for T in (16384, 131072):
        row = find_row(T, 1, op)
        print(f"{op} at {length_name(T)}: {row['cudnn_ms'] / row['ms']:.2f} times as fast as cuDNN, "
              f"{row['fa2_ms'] / row['ms']:.2f} times as fast as FlashAttention-2")  # fmt: skip
longest = find_row(131072, 1)
flop = 4 * longest["H"] * longest["D"] * longest["T"] * (longest["T"] + 1) / 2  # each token reads up to itself
share = flop / longest["cudnn_ms"] * 1e3 / ceilings["flops_per_second"]
print(f"full attention by cuDNN at {length_name(longest['T'])} reaches {share:.0%} of the ceiling of multiplying")

# %% [markdown]
# A dotted line stands at the first measured length from which HSA is faster. Below that length HSA is *slower* than
# full attention. At 8K tokens, half of all tokens keep every chunk that they see, so there is little to save. Above
# that length the gap about doubles each time the text doubles. Choosing the chunks costs time too. This picture does
# not include it. [Notebook 08](08_retrieval_and_decode_kernels.ipynb) adds it.
#
# ### On your own GPU
#
# With an NVIDIA GPU the next cell measures a small table. Without one it prints where the stored numbers come from.


# %%
def live_row(T, H=16, D=128, S=64, K=64):
    """Milliseconds on this GPU: by token block, by chunk, and full attention by a kernel of PyTorch."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in (
        (1, T, H, D), (1, T // S, S, 1, D), (1, T // S, S, 1, D)
    ))  # fmt: skip
    visible = reference.retrieval.visible_chunks(torch.arange(T, device="cuda"), T // S, S)
    best = torch.rand(T, T // S, device="cuda").masked_fill(~visible, -1.0).topk(K)
    indices = best.indices.masked_fill(best.values < 0, -1).int()[None, :, None]
    weights = torch.full(indices.shape, 1 / K, device="cuda").masked_fill(indices < 0, 0.0)
    inputs = q, k, v, indices, weights, D**-0.5
    times = [triton.testing.do_bench(partial(schedule.forward, *inputs)) for schedule in (by_token_block, by_chunk)]
    full = [q.transpose(1, 2).contiguous() for _ in "qkv"]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        return *times, triton.testing.do_bench(lambda: scaled_dot_product_attention(*full, is_causal=True))


if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "· milliseconds, forward: by token block, by chunk, full attention")
    for T in (8192, 16384, 32768):
        print(f"{length_name(T):>5}", *(f"{ms:8.2f}" for ms in live_row(T)))
else:
    print("no NVIDIA GPU here: the numbers of this notebook are", STORED)

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.kernels.forward import check_merged_chunks, check_numbers_moved, check_run_norm

# %% [markdown]
# **1. Blocks of more tokens.** *Difficulty 2, importance 3, 10 minutes.* Give a block more tokens. How often does *by
# token block* load a chunk? This is the number *merged* of the formula. Then, in the example with random choices, how do
# the bytes and the FLOP change for M = 1, 2, 4, 8, 16 and 32? Which schedule is M = 1? What happens at M = 32?


# %%
def merged_chunks(indices, M):
    """indices [T, K], -1 for an empty slot -> how many chunks the blocks of M tokens load, added up."""
    # your code


check_merged_chunks(merged_chunks)

# %% [markdown]
# <details><summary>Solution</summary>
#
# M = 1 is the schedule by token, in bytes and in FLOP. As M grows, the bytes fall and the FLOP rise. With M = 32 there
# is one block. It loads every chunk once and computes *all tokens with all chunks*, and multiplies most results by 0:
# chunk attention has become full attention. The best M is where both ceilings require the same time.
#
# ```python
# def merged_chunks(indices, M):
#     return sum(len(block[block >= 0].unique()) for block in indices.split(M))
#
#
# check_merged_chunks(merged_chunks)
# inputs = example()
# single_token = Meter()
# token_schedule(single_token, *inputs)
# for M in (1, 2, 4, 8, 16, 32):
#     meter = Meter()
#     token_block_schedule(meter, *inputs, M=M)
#     print(M, sum(meter.bytes), sum(meter.flop))
#     assert sum(meter.flop) == merged_chunks(inputs[3], M) * M * 4 * 4 * 4 * 16
#     if M == 1:
#         assert (meter.bytes, meter.flop) == (single_token.bytes, single_token.flop)
# ```
#
# </details>

# %% [markdown]
# **2. Additions without partial results.** *Difficulty 3, importance 3, 10 minutes.* A partial result is written once
# and read once. Could a program by chunk add its part directly to `out`? What would go wrong, and what would it save?
# Count the numbers that both methods move, besides the chunks.


# %%
def numbers_moved(pairs, T, G, D):
    """Numbers that pass between memory and programs: with partial results, with additions to `out` (two integers)."""
    # your code


check_numbers_moved(numbers_moved)

# %% [markdown]
# <details><summary>Solution</summary>
#
# Many programs run at once, and several may need to add to the row of the same token. Each would load the row, add, and
# store it. Then one of two additions could be lost. With *atomic* additions the hardware does the three steps as one.
# But they still read and write the row: for each pair they move q once and the row of GD numbers twice, the same three
# rows. And they happen in the order in which programs arrive. That order differs from run to run, and so do the last
# bits of the sum ([notebook 07](07_backward_kernel.ipynb) shows it). The real cost of partial results is *memory*: K
# rows for each token in work. Atomic additions save that memory, but only T rows of the bytes.
#
# ```python
# def numbers_moved(pairs, T, G, D):
#     row = G * D
#     return pairs * 3 * row + T * row, pairs * 3 * row
#
#
# check_numbers_moved(numbers_moved)
# with_partial_results, with_atomics = numbers_moved(pairs=1000, T=50, G=16, D=128)
# print(f"{with_partial_results / with_atomics:.3f}")
# assert with_partial_results / with_atomics < 1.02
# ```
#
# </details>

# %% [markdown]
# **3. Write a kernel.** *Difficulty 3, importance 5, 15 minutes.* The function `norm` divides a row by the root of its
# mean square. Write it in Triton: one program per row, with a mask as in steps 2 and 3. `run_norm` launches your kernel.
# Before that it fills the result with NaN, so that you see what was not stored.


# %%
@triton.jit
def norm_kernel(x, out, D, WIDTH: tl.constexpr):
    """One program divides one row of x [T, D] by the root of its mean square. WIDTH: a power of two, at least D."""
    # your code


def run_norm(x):
    """x [T, D] -> [T, D], one program per row. Behind x and behind the result lie more numbers, all NaN."""
    T, D = x.shape
    WIDTH = triton.next_power_of_2(D)
    room = torch.full((2, T * D + WIDTH), torch.nan, device=DEVICE)
    room[0, : T * D] = x.flatten()
    norm_kernel[(T,)](room[0], room[1], D, WIDTH=WIDTH)
    if not room[1, T * D :].isnan().all():
        raise IndexError("a program stores behind the last row: the store needs a mask")
    return room[1, : T * D].view(T, D).cpu()


check_run_norm(run_norm)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The tile is wider than the row. Beyond the row it holds zeros, which add nothing to the sum of the squares. So the sum
# is divided by D, and not by WIDTH.
#
# ```python
# @triton.jit
# def norm_kernel(x, out, D, WIDTH: tl.constexpr):
#     row = tl.program_id(0)
#     o_d = tl.arange(0, WIDTH)
#     b_x = tl.load(x + row * D + o_d, mask=o_d < D, other=0.0)
#     tl.store(out + row * D + o_d, b_x / tl.sqrt(tl.sum(b_x * b_x, 0) / D), mask=o_d < D)
#
#
# check_run_norm(run_norm)
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# The forward pass computes the model's answer. Training also needs the backward pass: gradients of queries, keys,
# values, and of the **weights**, which is how the loss teaches retrieval. [Notebook 07](07_backward_kernel.ipynb)
# derives the gradients by hand, checks each against autograd, and inverts the table of jobs without a single atomic
# addition. It takes about 35 minutes. After it, [notebook 08](08_retrieval_and_decode_kernels.ipynb) makes retrieval
# fast.
