# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · How to choose 64 of 262,144 without writing the scores?
#
# Retrieval is one line in PyTorch: a matrix product, then `topk`. For sixteen million tokens that line needs a table of
# scores that no GPU can hold. This notebook takes the line apart until the table is gone, and the answer is still
# *exactly* the same. Then it treats the opposite case: a single new token searches the whole memory.
#
# After this notebook you will be able to
#
# * compute how many bytes the scores take for any context, and explain why writing them would cost more than computing
#   them,
# * keep the $K$ best of a stream in a small buffer, and predict how rarely that buffer becomes full,
# * find the $K$ largest numbers of a row by counting instead of sorting,
# * draw noise that does not depend on how the work is cut into tiles,
# * decode one new token in two phases, prove that nothing is missed, and compute how fast it could be at best.
#
# **Time:** 40 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 03](03_retrieval.ipynb), and
# Triton, which is installed with the rest on Linux. You need no GPU: without one, Triton's interpreter runs the same
# kernels on the processor, slowly. [Notebook 06](06_forward_kernel.ipynb) explains more about kernels, but nothing here
# depends on it.
#
# [← 07 backward kernel](07_backward_kernel.ipynb) · [map of the course](00_start.ipynb) · [09 memory →](09_memory.ipynb)

# %%
import json
import os
from itertools import pairwise

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads this variable when a kernel is imported

import triton
import triton.language as tl

import hsa_kernels
from hsa_kernels.decoding.operator import TILE, TILES
from hsa_mini import reference
from hsa_mini.paths import data_dir
from hsa_mini.reference.noise import gumbel_noise, philox
from hsa_mini.reference.retrieval import newest_top_k
from hsa_mini.viz import Control, explore, make_figure, plots, show
from hsa_mini.viz.kernels import (
    candidate_sawtooth,
    paired_bars,
    score_stream,
    search_bars,
    tile_columns,
)
from hsa_mini.viz.plots import GREY, length_name
from hsa_mini.viz.programs.picture import program_map
from hsa_mini.viz.programs.record import record

MEASURED = json.loads((data_dir() / "results" / "kernels.json").read_text())  # used at the end of this notebook

# %% [markdown]
# ## The table that must not exist
#
# The equation is the one of notebook 03, Eq. (1), §2.2. Token $t$ scores all complete chunks, keeps the best $K$, and
# gives each of them a weight:
#
# $$s_{t,i} = \frac{Q^{slc}_t \cdot K^{slc}_i}{\sqrt{R}}, \qquad I_t = \text{the } K \text{ best}, \qquad
# w_{t,i} = \mathrm{softmax}_{i \in I_t}(s_{t,i})$$
#
# | paper | code | shape |
# |---|---|---|
# | $Q^{slc}$ | `queries` | `[T, R]` |
# | $K^{slc}$ | `landmarks` | `[N, R]` with $N = T/S$ |
# | $s$ | `scores` | `[T, N]`, **the table** |
# | $I$, $w$ | `indices`, `weights` | `[T, K]` |
#
# The inputs and the outputs grow in proportion to $T$. The table between them grows in proportion to $T \cdot T / S$.
# Take a chunk of $S = 64$ tokens, $K = 64$, $R = 128$, one retrieval head, scores of 4 bytes, queries and landmarks of
# 2 bytes.
#
# **You should see** the table grow from 1 GiB to 16 **TiB**, and `True`.

# %%
# S, K and R of the large cases; the small cases have sizes of their own
CHUNK = 64
KEPT = 64
WIDTH = 128


def bytes_of(T):
    """Bytes that retrieval for T tokens reads, could write in between, and returns."""
    N = T // CHUNK
    return {
        "queries and landmarks": 2 * (T + N) * WIDTH,
        "scores": 4 * T * N,
        "indices and weights": (4 + 4) * T * KEPT,
    }


def size_name(count):
    """1073741824 -> 1 GiB."""
    power = (int(count).bit_length() - 1) // 10
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# %%
# NBVAL_CHECK_OUTPUT
for T in (1 << 17, 1 << 20, 1 << 24):
    sizes = (f"{name} {size_name(count)}" for name, count in bytes_of(T).items())
    print(f"{length_name(T):>4} tokens:", ", ".join(sizes))
sketch = torch.empty(1 << 24, (1 << 24) // CHUNK, device="meta")  # it has a shape, but no memory
print("formula == the tensor PyTorch would make:", bytes_of(1 << 24)["scores"] == sketch.nbytes)

# %% [markdown]
# (In half of the cells the chunk is not yet complete. Half of 16 TiB is still too much.)
#
# And if the memory were large enough? Computing a score takes $2R$ operations. Writing it, and reading it back for
# `topk`, moves 8 bytes. Both happen $T \cdot N$ times. So the length of the text does not matter. Which of the two is
# slower depends only on the machine. These speeds were measured on the named machine:

# %%
speed = MEASURED["ceilings"]
compute = 2 * WIDTH / speed["flops_per_second"]
traffic = 8 / speed["bytes_per_second"]
scores_of_16M = (1 << 24) * ((1 << 24) // CHUNK)
print("measured on:", MEASURED["hardware"])
seconds = [f"{scores_of_16M * each:.1f} s" for each in (compute, traffic)]
print(f"16M tokens: {seconds[0]} to compute the scores, {seconds[1]} to write and read them")
print(f"the table costs {traffic / compute:.1f} times the arithmetic, at any length")

# %%
figure = make_figure(8.5, 3.4)
lengths = [1 << n for n in range(12, 25)]
names = "scores", "queries and landmarks", "indices and weights"
costs = {name: [bytes_of(T)[name] for T in lengths] for name in names}
plots.cost_curves(figure.subplots(), lengths, costs, at=1 << 24, ylabel="bytes")
show(
    figure,
    "Bytes against context length from 4K to 16M tokens, both axes logarithmic. Queries and landmarks, and indices and "
    "weights, grow in proportion to the text. The scores grow with its square. At 16M they are two thousand times "
    "larger.",
)

# %% [markdown]
# So a tile of scores must be computed, used and discarded in the fast memory next to the arithmetic units. The question
# becomes:
#
# > The scores pass in a stream, and none can be read twice. **Which 64 were the best?**
#
# ## A buffer and a floor
#
# A program keeps a small **candidate buffer**. While the buffer has space, every chunk is added to it. When the buffer
# is full, the $K$ best candidates stay and the others are removed. We call this step a **choice**. The lowest score
# among those that stay is the **floor**. From now on a chunk must *exceed* the floor to be added. Any other chunk
# cannot be among the $K$ best, because $K$ chunks are already at least as good.
#
# Chunks arrive **newest first**. So a chunk that only *equals* the floor is older than the candidates that stayed. The
# course's rule is that ties go to the newest chunk, so this chunk has lost. Therefore the right test is "exceeds", and
# not "reaches".


# %%
def best(candidates, scores, K):
    """The K candidates with the best scores; ties go to the candidate that came first."""
    return sorted(candidates, key=lambda n: -scores[n])[:K]  # Python's sort keeps ties in their order


def stream_top_k(scores, K, capacity):
    """Read once, the last first -> the K best; (chunks read, candidates, floor) for each chunk that came in."""
    candidates = []
    floor = float("-inf")
    log = []
    for n in reversed(range(len(scores))):
        if scores[n] <= floor:
            continue
        candidates.append(n)
        if len(candidates) == capacity:
            candidates = best(candidates, scores, K)
            floor = scores[candidates[-1]]
        log.append((len(scores) - n, len(candidates), floor))
    return best(candidates, scores, K), log


# %% [markdown]
# By hand: this time we divide the twelve tokens into six chunks of **two**. The query is that of the token after them,
# whose window ends with `what is the code`. The score is the number of words in common. (Dividing all scores by
# $\sqrt{R}$ changes no choice.) Take $K = 2$ and a buffer for 4 candidates, and follow the stream from the right end:
#
# `the code` 2 | `is 7` 1 | `birds sing` 0 | `at dawn` 0 | `what is` 2 | `the code` 2
#
# Four chunks are added: 2, 2, 0, 0. The buffer is full, chunks 5 and 4 stay, and the floor is 2. Chunk 1 has a score of
# 1 and is rejected. Chunk 0 is rejected too: its score of 2 does not exceed the floor. **You should see** the number of
# candidates go from 1 to 3 and back to 2, and chunks 5 and 4.

# %%
# NBVAL_CHECK_OUTPUT
WORDS = ["the", "code", "is", "7", "birds", "sing", "at", "dawn", "what", "is", "the", "code"]
pairs = [WORDS[i : i + 2] for i in range(0, 12, 2)]
in_common = [sum(word in WORDS[-4:] for word in pair) for pair in pairs]
kept, log = stream_top_k(in_common, K=2, capacity=4)
print("words in common:", in_common)
for read, candidates, floor in log:
    print(f"{read} read, candidates: {candidates}, floor: {floor}")
print("kept:", kept)

# %% [markdown]
# Is the result always right? We compare 300 random lists with `torch.topk`. Then we compare 300 lists full of ties with
# the package's rule for ties, since `torch.topk` promises nothing about ties. **You should see** `True` twice.


# %%
def agrees(scores, K, capacity):
    """Does the stream keep the K best, and the newest among ties?"""
    return set(stream_top_k(scores.tolist(), K, capacity)[0]) == set(newest_top_k(scores, K).tolist())


# %%
# NBVAL_CHECK_OUTPUT
random = torch.Generator().manual_seed(0)
lists = [torch.randn(1 + i, generator=random) for i in range(8, 308)]
found = [set(stream_top_k(x.tolist(), 8, 20)[0]) == set(x.topk(8).indices.tolist()) for x in lists]
print("streaming == torch.topk:", all(found))
print("ties go to the newest  :", all(agrees((2 * x).round(), K=8, capacity=20) for x in lists))

# %% [markdown]
# ## A kernel that stores no score
#
# The smallest kernel with this idea has $K = 1$. One program has one query. Tiles of landmarks pass by, the newest first.
# Only the best score so far (the floor) and the number of its chunk stay. The scores of a tile exist inside the program,
# and are never written to memory.
#
# **You should see** `True`: the kernel finds the newest best chunk of 12 queries among 20 chunks. The numbers are whole,
# so that ties occur.


# %%
# NBVAL_CHECK_OUTPUT
@triton.jit
def best_chunk_kernel(queries, landmarks, out, N, TILE: tl.constexpr, R: tl.constexpr):
    """One program finds the chunk with the best score for one query; the newest one among ties."""
    t = tl.program_id(0)
    o_r = tl.arange(0, R)
    b_q = tl.load(queries + t * R + o_r)  # [R]
    floor = -float("inf")
    best = -1
    for first in range(0, N, TILE):
        o_n = N - 1 - first - tl.arange(0, TILE)  # [TILE]: the newest first
        b_l = tl.load(landmarks + o_n[:, None] * R + o_r[None, :], mask=o_n[:, None] >= 0, other=0.0)
        b_s = tl.where(o_n >= 0, tl.sum(b_l * b_q[None, :], 1), -float("inf"))  # [TILE]
        highest = tl.max(b_s, 0)
        best = tl.where(highest > floor, N - 1 - first - tl.argmax(b_s, 0), best)  # exceeds, not reaches
        floor = tl.maximum(floor, highest)
    tl.store(out + t, best)


few = torch.Generator().manual_seed(0)
whole = (torch.randint(-2, 3, (rows, 8), generator=few).float() for rows in (12, 20))
streamed = dict(zip(("queries", "landmarks"), (x.to(DEVICE) for x in whole)), out=torch.empty(12, dtype=torch.int32, device=DEVICE))
best_chunk_kernel[(12,)](**streamed, N=20, TILE=8, R=8)
scores = (streamed["queries"] @ streamed["landmarks"].T).cpu()
print("kernel == newest best chunk:", streamed["out"].tolist() == [newest_top_k(row, 1).item() for row in scores])

# %%
recorded = record(best_chunk_kernel, (12,), **streamed, N=20, TILE=8, R=8)
figure = make_figure(7, 3)
summary = program_map(figure, recorded, 5)
show(figure, f"Program 5 loads one query and all landmarks, and stores one number. No program stores a score. {summary}")

# %% [markdown]
# The third tile has only four landmarks, and masks keep out the addresses of the others. Each of the 12 programs loads
# all landmarks again. The package's [kernel](../kernels/hsa_kernels/retrieval/forward.py) shares a tile of landmarks among a block
# of queries, with `tl.dot`, and keeps K chunks instead of one. The rest of this notebook builds that.
#
# ## How often is the buffer full?
#
# Say $n$ chunks were read when the floor was last raised. In random order, the next chunk is among the $K$ best so far
# with probability $K/n$. The buffer has space for $3K$ more candidates (the kernel's buffer holds about $4K$). So it
# becomes full again after about $3K \cdot n/K = 3n$ chunks: **three times as many as were read before.** The number of
# chunks read becomes $n + 3n = 4n$, and so on. So the number of choices grows like the *logarithm* of the text.
#
# **You should see** about six choices among 262,144 chunks, and over ten streams an average wait close to three times.


# %%
def choices(log):
    """How many chunks had been read at each choice: a chunk came in, and the buffer holds no more than before."""
    return [now[0] for before, now in pairwise(log) if now[1] <= before[1]]


# %%
# NBVAL_CHECK_OUTPUT
N = (1 << 24) // CHUNK
streams = [choices(stream_top_k(torch.randn(N, generator=random).tolist(), KEPT, 4 * KEPT)[1]) for _ in range(10)]
waits = [(after - before) / before for reads in streams for before, after in pairwise(reads)]
print("one stream: choices after", streams[0], "chunks")
print("most choices in a stream:", max(map(len, streams)))
print(f"wait for the next choice: {sum(waits) / len(waits):.1f} times what was read before")


# %% [markdown]
# ### Move it
#
# The upper picture shows the chunks from the newest (left) to the oldest, on a logarithmic axis. Grey dots are rejected
# chunks, and blue dots are chunks that came in. The red stairs are the floor. The lower picture shows the number of
# candidates in the buffer. On the logarithmic axis its teeth have the **same width**: that is the growth you just
# measured.
#
# Move `T` and `K`. Then change the order of the scores. If scores *fall* with age, the first choice is the last. If
# they *rise* with age, every chunk comes in, and the teeth become narrower and narrower. This is the worst case. The
# result is still correct, but choices are no longer rare.


# %%
def arrange(order, N):
    """N random scores. The last one is read first."""
    scores = torch.randn(N, generator=torch.Generator().manual_seed(1))
    return scores if order == "random" else scores.sort(descending=order == "rise with age").values


def draw_stream(figure, T, K, order):
    """The stream with its floor above, the number of candidates below."""
    scores = arrange(order, T // CHUNK)
    _, log = stream_top_k(scores.tolist(), K, 4 * K)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    score_stream(top, scores, log)
    candidate_sawtooth(bottom, log, len(scores), K)
    came_in = f"{len(log):,} of {len(scores):,} chunks came in"
    return f"T = {length_name(T)}, K = {K}: {came_in}; the buffer was full {len(choices(log)):,} times."


explore(
    draw_stream,
    alt="Above: scores as dots in the order of reading, and a floor that rises in stairs. Below: the number of candidates, a sawtooth.",
    size=(8.5, 4.4),
    T=Control([(length_name(1 << n), 1 << n) for n in range(16, 25)], start=1 << 22, label="tokens T"),
    K=Control([4, 8, 16, 32, 64], start=64, label="chunks kept K"),
    order=Control(["random", "fall with age", "rise with age"], label="scores"),
)

# %% [markdown]
# ## Floats as ordered whole numbers
#
# To reduce a full buffer means to find the $K$-th largest score. Sorting is slow on a GPU: numbers would change places
# between threads, round after round. **Counting** is fast: "how many of you reach this threshold?" takes one comparison
# per number and one sum. So we search for the threshold, and shrink the range that contains it. Floats are awkward for
# this search, because most of the range from $-3 \cdot 10^{38}$ to $3 \cdot 10^{38}$ is useless for scores near 1.
#
# But look at the *bits* of a float32: sign, exponent, fraction. Read the bits as a whole number. Among positive floats,
# the larger whole number is the larger float. Among negative floats it is the smaller one. So: **if the float is
# positive, set the first bit. If it is negative, flip all bits.** The result is a whole number, the **key**, and keys
# have the same order as the floats.


# %%
def keyed(x):
    """float32 -> whole numbers in the same order, above 0 and below 2^32 (as int64); both zeros get the same key."""
    bits = (x + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # -0.0 + 0.0 is 0.0
    return torch.where(bits < 1 << 31, bits + (1 << 31), 0xFFFFFFFF - bits)


def unkeyed(key):
    """The inverse of `keyed`."""
    bits = torch.where(key >= 1 << 31, key - (1 << 31), 0xFFFFFFFF - key)
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)


# %% [markdown]
# **You should see** keys that rise as the floats rise, the same key for both zeros, and `True` three times. No float
# has the key 0, not even $-\infty$. So 0 is free to mean "nothing here".

# %%
# NBVAL_CHECK_OUTPUT
for value in (-float("inf"), -1.0, -0.0, 0.0, 1 / 3, 2 / 3, 1.0, float("inf")):
    print(f"{value:6.2f} -> {keyed(torch.tensor(value)).item():08X}")
x = torch.randn(100_000, generator=random) * 10.0 ** torch.randint(-30, 30, (100_000,), generator=random)
print("sorted by key == sorted:", torch.equal(x[keyed(x).sort().indices], x.sort().values))
print("there and back:", torch.equal(unkeyed(keyed(x)), x))
print("nothing is below every float:", bool(keyed(torch.tensor(-float("inf"))) > 0))

# %% [markdown]
# ## The K largest, by counting
#
# We keep two bounds for the floor. At least $K$ keys reach `low`. Fewer than $K$ keys reach any number above `high`. In
# each step we cut the range in three, count how many keys reach each of the two cuts, and move the bounds. At most a
# third of the range remains. Since $3^{21} > 2^{32}$, **21 steps are always enough**. If exactly $K$ keys reach a cut,
# we stop at once: it does not matter *where* between two keys the floor lies.
#
# Why not halve the range, with one count per step? Counting is fast. Waiting is slow: all threads have to wait for the
# sum. Two counts fit into the two halves of one number, so both together cost one sum.


# %%
def find_floor(keys, K, known=0):
    """keys [rows, n] -> a floor [rows] that K keys reach and fewer exceed, 0 if fewer than K exist; the steps."""
    low = torch.zeros_like(keys[:, 0]) + known  # at least K keys reach it
    high = torch.maximum(keys.amax(1), low)
    steps = torch.zeros_like(low)
    while (high > low).any():
        steps += high > low
        third = (high - low + 2) // 3
        one = low + third
        two = torch.minimum(low + 2 * third, high)
        reach_one, reach_two = ((keys >= cut[:, None]).sum(1) for cut in (one, two))
        high = torch.where(reach_one < K, (one - 1).clamp(min=0), torch.where(reach_two < K, two - 1, high))
        low = torch.where(reach_two >= K, two, torch.where(reach_one >= K, one, low))
        high = torch.where((reach_two == K) | ((reach_one == K) & (reach_two < K)), low, high)  # exactly K reach `low`
    return low, steps


def largest(keys, K, known=0):
    """Which keys [rows, n] are the K largest of their row, the first ones among ties; the floor [rows]."""
    floor, _ = find_floor(keys, K, known)
    above = keys > floor[:, None]
    equal = (keys == floor[:, None]) & (keys > 0)
    space = K - above.sum(1)
    return above | (equal & (equal.cumsum(1) <= space[:, None])), floor


# %% [markdown]
# `cumsum` counts along the row, so `equal.cumsum(1) <= space` admits ties from the left until the space is used up. The
# candidates stand in the order in which they came: newest first.
#
# Here are the six chunks again, newest first: 2, 2, 0, 0, 1, 2. **You should see** the first two kept, and the number
# of steps for $K = 2$ and for $K = 3$. For $K = 3$ there is a threshold that exactly three keys reach, so the search
# stops early. For $K = 2$ there is none, because three scores are equal. So the search continues to the last bit, and
# finds the 2 itself.

# %%
# NBVAL_CHECK_OUTPUT
by_hand = torch.tensor([in_common[::-1]], dtype=torch.float32)
print("kept of", by_hand[0].int().tolist(), "->", largest(keyed(by_hand), 2)[0][0].int().tolist())
print("steps for K = 2 and K = 3:", [find_floor(keyed(by_hand), K)[1].item() for K in (2, 3)])

# %% [markdown]
# Now we compare `largest` with `torch.topk` on 1,000 rows of 256 candidates. **You should see** `True`, and far fewer
# steps than 21. The floor of an earlier choice saves about half of the steps. (Here the known floor is the 64th best of
# the first 192 candidates, as if the others had come later.)

# %%
# NBVAL_CHECK_OUTPUT
rows = torch.randn(1000, 256, generator=random)
kept, floor = largest(keyed(rows), KEPT)
theirs = torch.zeros_like(kept).scatter_(1, rows.topk(KEPT).indices, True)
print("largest == torch.topk:", torch.equal(kept, theirs))
steps = find_floor(keyed(rows), KEPT)[1].float()
known = keyed(rows[:, :192].topk(KEPT).values[:, -1])
fewer = find_floor(keyed(rows), KEPT, known)[1].float()
print(f"steps: {steps.mean():.1f} on average, {steps.max():.0f} at most; with a known floor {fewer.mean():.1f}")
rounds = sum(range(1, (256).bit_length()))
print(f"rounds of a sorting network for 256 numbers: {rounds}")

# %% [markdown]
# Each step of our search is a comparison and a sum. Each round of a sorting network compares all numbers in pairs, and
# exchanges the pairs that are in the wrong order. So a sorting network needs more rounds, and more work in each round.
#
# ### Move it
#
# The picture shows the search in one row of candidates. Each bar shows how many candidates are still in question after
# a step. The number above it shows how many bits of the range are left. Why do the first steps change so little? They
# settle the sign and the exponent, which almost all scores share. Switch on `known floor`, and these steps disappear.


# %%
def watch(keys, K, known=0):
    """Candidates in question and bits left of the range, after 0, 1, 2, ... steps, for one row of keys [n]."""
    low = known
    high = max(int(keys.max()), known)
    seen = []
    while True:
        seen.append((int(((keys >= low) & (keys <= high)).sum()), (high - low).bit_length()))
        if high == low:
            return seen
        third = (high - low + 2) // 3
        for cut in (low + third, min(low + 2 * third, high)):
            if (reached := int((keys >= cut).sum())) <= K:
                low, high = (low, cut - 1) if reached < K else (cut, cut)
                break
            low = cut


def draw_steps(figure, K, candidates, known):
    """The search for the K largest of some random scores, step by step."""
    scores = torch.randn(candidates, generator=torch.Generator().manual_seed(3))
    start = int(keyed(scores[: candidates * 3 // 4].topk(K).values[-1])) if known else 0
    steps = watch(keyed(scores), K, start)
    search_bars(figure.subplots(), steps, candidates)
    return f"The {K} largest of {candidates} candidates are found after {len(steps) - 1} of at most 21 steps."


explore(
    draw_steps,
    alt="One bar per step of the search: how many candidates lie between the bounds, and how many bits are left.",
    size=(8.5, 3),
    K=Control((2, 64), start=64, label="chunks kept K"),
    candidates=Control([128, 192, 256, 512], start=256),
    known=Control(bool, label="known floor"),
)

# %% [markdown]
# ## All tokens, tile by tile
#
# Now we put everything together, in PyTorch, in the same way as the kernel. Every token has its own candidate buffer, a
# row of `[T, CAP]`. A tile of 32 chunks arrives. All tokens score it, and each token adds the chunks that exceed its
# floor to its buffer.
#
# One trick is worth a look. Which position does a new candidate get? No thread has to communicate with another one. A
# cumulative sum over the mask numbers the new candidates, and that number *is* the position.


# %%
def empty_buffers(T, capacity):
    """One buffer per token, [T, capacity]: keys, scores, and chunk numbers from 1 on: 0 always means nothing."""
    whole = {name: torch.zeros(T, capacity, dtype=torch.int64) for name in ("key", "chunk")}
    return whole | {"score": torch.zeros(T, capacity)}


def put(buffer, count, mask, values):
    """Writes values [T, n], where the mask is True, to the next free positions of their rows in the buffer."""
    position = count[:, None] + mask.cumsum(1) - 1  # [T, n]
    t, i = mask.nonzero(as_tuple=True)
    buffer[t, position[t, i]] = values[t, i].to(buffer.dtype)


def add_candidates(buffers, count, mask, **values):
    """Puts values [T, n] of each kind into its buffer -> the new number of candidates per token [T]."""
    for name, of_chunks in values.items():
        put(buffers[name], count, mask, of_chunks)
    return count + mask.sum(1)


def choose(buffers, floor, K):
    """Moves the K best candidates of every buffer to its front -> the new floor, and how many remain, both [T]."""
    kept, floor = largest(buffers["key"], K, floor)
    for buffer in buffers.values():
        before = buffer.clone()
        put(buffer.zero_(), torch.zeros_like(floor), kept, before)
    return floor, kept.sum(1)


# %% [markdown]
# The largest tensor in the loop below is `[T, tile]`. `position` tells where each token stands in the text. A chunk is
# visible once it is complete, as in notebook 03. `noise` is explained in the next section.


# %%
def no_noise(position, chunk):
    return 0.0


def stream_tiles(queries, landmarks, chunk_size, K, position, tile=32, noise=no_noise):
    """Buffers whose first K positions hold the K best chunks of every token."""
    buffers = empty_buffers(len(queries), 4 * K + tile)
    floor = torch.zeros(len(queries), dtype=torch.int64)
    count = torch.zeros_like(floor)
    for n in torch.arange(len(landmarks)).flip(0).split(tile):  # the newest first
        scores = queries @ landmarks[n].T / queries.shape[1] ** 0.5  # [T, tile], discarded after this round
        keys = keyed(scores + noise(position, n))
        better = ((n + 1) * chunk_size <= position[:, None]) & (keys > floor[:, None])
        count = add_candidates(buffers, count, better, key=keys, score=scores, chunk=(n + 1).expand_as(keys))
        if count.max() > 4 * K:  # the next tile might not fit
            floor, count = choose(buffers, floor, K)
    choose(buffers, floor, K)
    return buffers


def retrieve_by_tiles(queries, landmarks, chunk_size, K, position, **options):
    """Eq. (1) without the table: queries [T, R], landmarks [N, R] -> indices and weights [T, K]."""
    buffers = stream_tiles(queries, landmarks, chunk_size, K, position, **options)
    indices = buffers["chunk"][:, :K] - 1
    empty = indices < 0
    scores = buffers["score"][:, :K].masked_fill(empty, -1e30)
    return indices, scores.softmax(1).masked_fill(empty, 0.0)


# %% [markdown]
# ## The equality of this notebook
#
# We compare three methods: the table with `torch.topk`, our loop over tiles, and the package's Triton kernel. The order
# of the K slots is free. So we compare by *chunk*: which chunks are kept (as a set), and with which weight.


# %%
def run_kernel(queries, landmarks, chunk_size, K, position, **options):
    """`hsa_kernels.retrieve` for one sequence and one head; on the GPU, or in the interpreter."""
    inputs = (x[None, :, None].to(DEVICE) for x in (queries, landmarks))
    found = hsa_kernels.retrieve(*inputs, chunk_size=chunk_size, top_k=K, offset=int(position[0]), **options)
    return tuple(x[0, :, 0].cpu() for x in found)


def with_table(queries, landmarks, chunk_size, K, position):
    """The one line that this notebook replaces, for tokens that see at least K chunks."""
    scores = queries @ landmarks.T / queries.shape[1] ** 0.5
    hidden = (torch.arange(len(landmarks)) + 1) * chunk_size > position[:, None]
    scores, indices = scores.masked_fill(hidden, -float("inf")).topk(K)
    return indices, scores.softmax(1)


def by_chunk(indices, weights, N):
    """Choices [T, K] -> is the chunk kept, and its weight, both [T, N]."""
    columns = indices.long() % (N + 1)  # -1, an empty slot, becomes column N
    spread = torch.zeros(len(indices), N + 1).scatter(1, columns, weights.float())
    kept = torch.zeros(len(indices), N + 1, dtype=torch.bool).scatter(1, columns, True)
    return kept[:, :N], spread[:, :N]


def compare(ours, theirs, N):
    """Are the chunks the same? Are the weights the same?"""
    (kept, weights), (kept_2, weights_2) = (by_chunk(*result, N) for result in (ours, theirs))
    return torch.equal(kept, kept_2), torch.allclose(weights, weights_2, atol=1e-5)


# %% [markdown]
# We start with the twelve tokens in three chunks of four, with the word counts of notebook 03 and $K = 2$. In that
# notebook, token 11 kept chunks 0 and 1, with weights 0.73 and 0.27. **You should see** that again, from a GPU kernel.

# %%
# NBVAL_CHECK_OUTPUT
VOCABULARY = list(dict.fromkeys(WORDS))


def count_words(words):
    """How often each word of the vocabulary occurs: [R]."""
    return torch.tensor([words.count(word) for word in VOCABULARY], dtype=torch.float32)


twelve = (
    torch.stack([count_words(WORDS[max(t - 3, 0) : t + 1]) for t in range(12)]),
    torch.stack([count_words(WORDS[i : i + 4]) for i in range(0, 12, 4)]),
)
indices, weights = run_kernel(*twelve, 4, 2, torch.arange(12))
found = {chunk: round(weight, 2) for chunk, weight in zip(indices[11].tolist(), weights[11].tolist())}
print("token 11 keeps", dict(sorted(found.items())))
print("chunks kept by token 0 ... 11:", (indices >= 0).sum(1).tolist())
ours = retrieve_by_tiles(*twelve, 4, 2, torch.arange(12))
print("kernel == our tiles (chunks, weights):", compare((indices, weights), ours, 3))

# %% [markdown]
# Then we take a random text that is long enough to fill the buffers on the way: 20 tokens at the end of 2,400, with 600
# chunks to choose from. **You should see** `True` for chunks and for weights, twice.

# %%
# NBVAL_CHECK_OUTPUT
queries, landmarks = (torch.randn(n, 16, generator=random) for n in (20, 600))
last_20 = torch.arange(2380, 2400)
table = with_table(queries, landmarks, 4, 8, last_20)
tiles = retrieve_by_tiles(queries, landmarks, 4, 8, last_20)
kernel = run_kernel(queries, landmarks, 4, 8, last_20)
print("our tiles == torch.topk (chunks, weights):", compare(tiles, table, 600))
print("kernel    == torch.topk (chunks, weights):", compare(kernel, table, 600))

# %% [markdown]
# The kernel is `retrieve_fwd_kernel` in `kernels/hsa_kernels/retrieval/forward.py`, and now you can read it. One
# program owns 16 tokens and one head. Its candidate buffers, with `put` and `choose`, are in `candidates.py`. `keyed`
# and `largest` are in `selection.py`. Two points concern the machine. A buffer is a few hundred numbers in global
# memory. And with numbers of 16 bits a program is a single warp (32 threads that run in step), so no warp waits for
# another one.
#
# Training needs gradients too. They flow only through the weights. The gradient of a query is a weighted sum of the $K$
# landmarks that it kept. The gradient of a landmark is a weighted sum of the queries of all tokens that kept it. So the
# gradients need no table either.
#
# ## Noise that does not depend on tiles
#
# In training, Gumbel noise is added to the scores before the choice (notebook 03 explains why). An ordinary generator
# produces its numbers *in order*. A kernel has no order: tiles of many sizes run at the same time. The solution is a
# **counter-based** generator. It is a function that takes a seed and four counters, and returns 32 random bits. Our
# counters are the chunk, the token, the head and the sequence.


# %%
def noise_at(seed, position, chunk):
    """Gumbel noise for tokens [T] and chunks [n], in the first head of the first sequence: [T, n]."""
    counters = torch.broadcast_tensors(chunk, position[:, None], torch.tensor(0), torch.tensor(0))
    uniform = (philox(seed, counters).double() + 0.5) * 2.0**-32  # never 0, never 1
    return (-(-uniform.log()).log()).float()


def in_tiles(make, height, width):
    """The same [60, 90] table, made one tile at a time by make(tokens, chunks)."""
    tokens = torch.arange(60).split(height)
    chunks = torch.arange(90).split(width)
    return torch.cat([torch.cat([make(t, n) for n in chunks], dim=1) for t in tokens])


# %% [markdown]
# **You should see** that counters give the same noise whether the table is made in one piece or in tiles of any size,
# and that it is the reference's noise. An ordinary generator gives other noise in tiles than in one piece.

# %%
# NBVAL_CHECK_OUTPUT
whole = noise_at(7, torch.arange(60), torch.arange(90))
print("== reference       :", torch.equal(whole, gumbel_noise(7, torch.arange(60)[None], 1, 90)[0, :, 0]))
for shape in ((16, 32), (7, 5), (60, 1)):
    print(f"tiles of {shape!s:8} :", torch.equal(whole, in_tiles(lambda t, n: noise_at(7, t, n), *shape)))
in_order = torch.rand(60, 90, generator=torch.Generator().manual_seed(7))
ordinary = torch.Generator().manual_seed(7)
by_tiles = in_tiles(lambda t, n: torch.rand(len(t), len(n), generator=ordinary), 16, 32)
print("ordinary generator :", torch.equal(in_order, by_tiles))

# %% [markdown]
# So the kernel computes the noise of a tile when it needs it, and no table of noise exists. The same seed gives the
# same choice. We compare
#
# * the kernel with the reference, which does hold the table of noise,
# * our loop with tiles of 32 and of 7,
# * the kernel for all tokens with the kernel for only the last 13, which then lie in other rows of other tiles.
#
# **You should see** `True` everywhere, and in the last line `False`: another seed chooses differently.

# %%
# NBVAL_CHECK_OUTPUT
inputs = queries, landmarks, 4, 8, last_20
options = {"chunk_size": 4, "top_k": 8, "offset": 2380, "gumbel_seed": 7}
expected = tuple(x[0, :, 0] for x in reference.retrieve(queries[None, :, None], landmarks[None, :, None], **options))
kernel = run_kernel(*inputs, gumbel_seed=7)
print("kernel == reference  :", compare(kernel, expected, 600))
for tile in (32, 7):
    found = retrieve_by_tiles(*inputs, tile=tile, noise=lambda position, n: noise_at(7, position, n))
    print(f"tiles of {tile:2} == kernel :", compare(found, kernel, 600))
last_13 = run_kernel(queries[7:], landmarks, 4, 8, last_20[7:], gumbel_seed=7)
print("only 13 tokens       :", compare(last_13, tuple(x[7:] for x in kernel), 600))
print("another seed, same   :", compare(run_kernel(*inputs, gumbel_seed=8), kernel, 600)[0])

# %% [markdown]
# One detail matters: the kernel computes this noise in float64. If the uniform number is close to 1, float32 rounds it
# *to* 1, and the noise becomes infinite. Then one chunk in tens of millions would win against any score. **You should
# see** `inf` in float32, and a finite number in float64.

# %%
# NBVAL_CHECK_OUTPUT
for dtype in (torch.float32, torch.float64):
    nearly_1 = torch.tensor((2**32 - 1 + 0.5) * 2.0**-32, dtype=dtype)  # from the largest value of 32 bits
    print(dtype, "-> noise", round((-(-nearly_1.log()).log()).item(), 2))

# %% [markdown]
# ## One new token: decode
#
# When a model generates text, one token at a time searches the whole memory. Now there is one row of scores, `[N]`: a
# megabyte for 16M tokens. It is no problem to write *that*. The problem is the opposite one: a single token is little
# work, and thousands of threads of the GPU have to share it.
#
# The scores are easy to share: cut the chunks into **tiles**, and give one tile to each program. But the choice needs
# all scores at once, and 262,144 candidates are too many for a single program. So each program also writes down the
# **best score of its tile**:
#
# 1. **Scores** of all chunks, and the maximum of each tile. This reads the landmarks once.
# 2. **Choice**: find the $K$ tiles with the best maxima. Then find the $K$ best chunks in these tiles, and look at *no
#    other tile*.
#
# **Claim: nothing is missed.** Take a chunk outside the $K$ chosen tiles. Its score is at most the maximum of its own
# tile. That tile was not chosen, so the score is at most each of the $K$ chosen maxima. Those maxima are scores of $K$
# different chunks, all inside the chosen tiles. So $K$ chunks inside are at least as good, and we can pick the $K$ best
# without the chunk outside. (What if there are fewer than $K$ tiles? Then all are chosen. And ties? Tiles and chunks
# both stand newest first, and `largest` keeps the first ones among ties, so the newest win in both rounds.)


# %%
def best_by_tiles(scores, K, tile):
    """The indices of the K best scores [N], the newest among ties; reads the maxima of all tiles, then K tiles."""
    newest_first = torch.nn.functional.pad(keyed(scores).flip(0), (0, -len(scores) % tile))  # 0: nothing here
    keys = newest_first.view(-1, tile)
    chosen, floor = largest(keys.amax(1)[None], K)  # K tiles
    tiles = chosen[0].nonzero()[:, 0]
    kept, _ = largest(keys[tiles].flatten()[None], K, floor)
    position = (tiles[:, None] * tile + torch.arange(tile)).flatten()[kept[0]]
    return len(scores) - 1 - position


# %% [markdown]
# Note that the first round passes its `floor` to the second: $K$ maxima reach the floor, so $K$ chunks reach it.
#
# We check 300 rows against `torch.topk`, and 300 rows full of ties against the package's rule. **You should see**
# `True` twice. Then you see how few numbers the choice reads for 16M tokens. The kernel uses the same idea once more,
# with small tiles and **blocks** of tiles. For each block it writes down the best of the *tile* maxima. It finds the
# best blocks, in those blocks the best tiles, and in those tiles the best chunks.

# %%
# NBVAL_CHECK_OUTPUT
sizes = [tuple(int(torch.randint(1, high, (), generator=random)) for high in (400, 20, 40)) for _ in range(300)]
rows = [(torch.randn(N + K, generator=random), K, tile) for N, K, tile in sizes]
same = [set(best_by_tiles(x, K, tile).tolist()) == set(x.topk(K).indices.tolist()) for x, K, tile in rows]
print("two rounds == torch.topk:", all(same))
rounded = [(x.round(), K, tile) for x, K, tile in rows]
same = [set(best_by_tiles(x, K, tile).tolist()) == set(newest_top_k(x, K).tolist()) for x, K, tile in rounded]
print("ties go to the newest   :", all(same))
N = (1 << 24) // CHUNK
tile = 64
print(f"numbers read: {N // tile:,} maxima and {KEPT * tile:,} scores, of {N:,}")
three = f"{N // (TILE * TILES):,} maxima of blocks, {KEPT * TILES:,} of tiles and {KEPT * TILE:,} scores"
print("in three rounds:", three)


# %% [markdown]
# ### Move it
#
# Here is the proof as a picture. The dots are the scores of 1,024 chunks. The pale columns are the $K$ tiles with the
# best maxima, and the rings are the $K$ best chunks. The line is the lowest of the chosen maxima. **Outside the columns
# no dot lies above the line.** If one column holds two rings, another column holds none. That tile was chosen in vain,
# but the first round could not know it. Move `K` and the tile size. Which tile size leaves the fewest numbers to read?


# %%
def draw_tiles(figure, K, tile, seed):
    """Scores, the chosen tiles and the kept chunks."""
    scores = torch.randn(1024, generator=torch.Generator().manual_seed(seed))
    kept = best_by_tiles(scores, K, tile)
    chosen = scores.view(-1, tile).amax(1).topk(K)
    tile_columns(figure.subplots(), scores, kept, chosen.indices, tile, chosen.values[-1].item())
    count = 1024 // tile + K * tile
    return f"K = {K}, tiles of {tile}: reads {1024 // tile} maxima and {K * tile} scores, {count} numbers in all."


explore(
    draw_tiles,
    alt="Scores of 1,024 chunks as dots, chosen tiles as columns, kept chunks in rings. Outside the columns no dot is above the line.",
    size=(8.5, 3.6),
    K=Control((1, 16), start=8, label="chunks kept K"),
    tile=Control([1, 2, 4, 8, 16, 32, 64], start=16, label="chunks in a tile"),
    seed=Control((0, 20), start=12, label="other scores"),
)

# %% [markdown]
# ### Then attention
#
# The kept chunks are read as in notebook 04: one softmax inside each chunk, and the answers blended by the weights.
# Here is the whole decode for one key/value head and the $G$ query heads that share it:


# %%
def decode_in_phases(query, landmarks, q, k, v, K, tile=64):
    """One new token: retrieval query [R], landmarks [N, R], q [G, D], k and v [N, S, D] -> [G, D]."""
    scores = landmarks @ query / len(query) ** 0.5  # phase 1
    kept = best_by_tiles(scores, K, tile)  # phase 2
    weights = scores[kept].softmax(0)
    inside = (torch.einsum("gd,ksd->kgs", q, k[kept]) / q.shape[1] ** 0.5).softmax(-1)
    partial_results = weights[:, None, None] * (inside @ v[kept])  # [K, G, D]: one per kept chunk
    return partial_results.sum(0)


# %% [markdown]
# The kernel does it in three launches: first scores and maxima, then **one program for each of the $K$ slots**, then
# the sum of their partial results. In the second launch each of the $K$ programs makes the whole choice by itself, and
# all make the same choice. That looks wasteful. But the alternative is one more launch, which makes the choice and
# stores it for the others, and a launch takes longer.
#
# The example has 400 chunks of 16 tokens, $K = 8$, and four query heads. The text ends in the middle of a chunk. The
# memory has space for 50 more chunks, filled with NaN. **You should see** `True` three times: an incomplete chunk is
# never even read.

# %%
# NBVAL_CHECK_OUTPUT
complete, capacity, G, D = 400, 450, 4, 32
query, q = (torch.randn(shape, generator=random) for shape in ((16,), (G, D)))
landmarks = torch.randn(complete, 16, generator=random)
k, v = (torch.randn(complete, 16, D, generator=random) for _ in range(2))


def with_nan(x):
    """[complete, ...] -> [1, capacity, ...] with NaN where nothing was written yet."""
    return torch.cat((x, torch.full((capacity - complete, *x.shape[1:]), float("nan"))))[None]


options = {"chunk_size": 16, "top_k": 8, "offset": 16 * complete + 5}
exact = landmarks[None, :, None], k[None, :, :, None], v[None, :, :, None]  # [B, N, J, R] and [B, N, S, J, D]
spare = with_nan(landmarks).unsqueeze(2), with_nan(k).unsqueeze(3), with_nan(v).unsqueeze(3)


def run_decode(operation, marks, keys, values, device):
    """A decode operator with the dimensions that it needs: query [B, T, J, R], q [B, T, H, D]."""
    inputs = query[None, None, None], marks, q[None, None], keys, values
    return operation(*(x.to(device) for x in inputs), **options).cpu()


expected = run_decode(reference.decode, *exact, "cpu")
kernel = run_decode(hsa_kernels.decode, *spare, DEVICE)
ours = decode_in_phases(query, landmarks, q, k, v, K=8)
print("two phases == reference:", torch.allclose(ours, expected[0, 0], atol=1e-5))
print("kernel     == reference:", torch.allclose(kernel, expected, atol=1e-5))
print("no NaN was touched     :", bool(kernel.isfinite().all()))

# %% [markdown]
# ## How fast could it be?
#
# To find the best chunk, every landmark has to be read. If the landmarks come from memory and not from a cache, decode
# can never be faster than **reading the landmarks once**: $2NR$ bytes in 16 bits, divided by the speed of the memory.
# This time is the *floor* of decode. (The $K$ chunks themselves are almost nothing for a long text.)
#
# The next numbers were **measured elsewhere and stored** with the repository, in `data/results/kernels.json`. The first
# line names the hardware. **You should see** that our formula gives the stored floors, and two facts about decode. For
# short memories decode takes the same time at any length, because three launches and the choice take longer than the
# reading. For 16M tokens decode takes only a few times as long as the floor.

# %%
retrieve_rows, decode_rows = ([row for row in MEASURED["rows"] if row["op"] == op] for op in ("retrieve", "decode"))


def floor_ms(row):
    """Milliseconds to read the landmarks once, in 16 bits."""
    return 2 * row["R"] * row["T"] // row["S"] / MEASURED["ceilings"]["bytes_per_second"] * 1e3


sizes = ", ".join(f"{name} = {retrieve_rows[0][name]}" for name in ("S", "K", "R", "dtype"))
print("stored, measured on:", MEASURED["hardware"], "with", sizes)
print("\nretrieve, all tokens   kernel, ms  plain PyTorch, ms  times   kernel's memory    the table")
for row in retrieve_rows:
    kernel_ms = row["ms"]
    plain_ms = row["portable_ms"]
    memory = f"{size_name(row['peak_bytes']):>17} {size_name(bytes_of(row['T'])['scores']):>12}"
    print(f"{length_name(row['T']):>14} tokens {kernel_ms:11.2f} {plain_ms:18.2f} {plain_ms / kernel_ms:6.1f} {memory}")
print("\ndecode, one new token  kernel, us      floor, us   times")
for row in decode_rows:
    kernel_us = row["ms"] * 1e3
    floor_us = row["floor_ms"] * 1e3
    print(f"{length_name(row['T']):>14} tokens {kernel_us:11.1f} {floor_us:14.2f} {kernel_us / floor_us:7.1f}")
print("\ncandidate buffers in the kernel's memory, at most:", size_name(hsa_kernels.retrieval.operator.CANDIDATES_BYTES))
same = all(abs(floor_ms(row) / row["floor_ms"] - 1) < 1e-6 for row in decode_rows)
print("floor by formula == stored floor:", same)

# %% [markdown]
# (1 us, a microsecond, is a thousandth of 1 ms. The kernel's memory holds its results and its candidate buffers. For
# short texts the buffers are no smaller than the table would be, and the kernel is still faster.)
#
# "Plain PyTorch" is the package's torch backend, `hsa_mini.ops.torch_backend`. It never holds the whole table either.
# But it writes the scores of a block of tokens, and calls `topk` on them.

# %%
figure = make_figure(10, 3.8)
left, right = figure.subplots(1, 2)
times = {name: [row[key] for row in retrieve_rows] for name, key in (
    ("kernel", "ms"), ("plain PyTorch", "portable_ms")
)}  # fmt: skip
paired_bars(left, [row["T"] for row in retrieve_rows], times, xlabel="retrieve, every token", ylabel="milliseconds")
times = {name: [row[key] * 1e3 for row in decode_rows] for name, key in (
    ("kernel", "ms"), ("floor: landmarks read once", "floor_ms")
)}  # fmt: skip
paired_bars(right, [row["T"] for row in decode_rows], times, xlabel="decode, one new token", ylabel="microseconds")
figure.suptitle(f"stored measurements: {MEASURED['hardware']}", fontsize=11, color=GREY)
show(
    figure,
    "Stored measurements on the hardware in the title, time on a logarithmic axis. Left: the retrieval kernel stays "
    "far below plain PyTorch at every length. Right: decode takes nearly constant time until the floor comes close.",
)

# %% [markdown]
# Do you have a GPU? Then the next cell measures on it, with `triton.testing.do_bench`: retrieval for 128K tokens, and
# decode of one token after a million tokens. Without a GPU it prints one line. (The stored decode times were measured
# inside a CUDA graph, where launches cost less.)


# %%
def live(T):
    """Milliseconds of the kernels on this GPU, in bfloat16: retrieve for 128K tokens, decode after T tokens."""
    from triton.testing import do_bench

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    few = 1 << 17
    queries, landmarks, many = (normal(1, n, 1, WIDTH) for n in (few, few // CHUNK, T // CHUNK))
    q = normal(1, 1, 16, 128)
    k, v = (normal(1, T // CHUNK, CHUNK, 1, 128) for _ in "kv")
    sizes = {"chunk_size": CHUNK, "top_k": KEPT}
    retrieved = do_bench(lambda: hsa_kernels.retrieve(queries, landmarks, **sizes))
    return retrieved, do_bench(lambda: hsa_kernels.decode(queries[:, :1], many, q, k, v, offset=T, **sizes))


if torch.cuda.is_available():
    retrieved, decoded = live(1 << 20)
    print(f"{torch.cuda.get_device_name()}: retrieve {retrieved:.2f} ms, decode {decoded:.4f} ms")
else:
    print("No GPU here: see the stored measurements above.")

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.kernels.retrieval import check_merge, check_misses, check_worst

# %% [markdown]
# **1. The worst stream.** *Difficulty 3, importance 2, 10 minutes.* If scores rise with age, every chunk comes in. Find
# a formula for the number of choices among $N$ chunks with a buffer for `capacity` candidates. How many choices would
# 16M tokens need with $K = 64$ and a capacity of 256? And is the answer still right?


# %%
def worst(N, K, capacity):
    """How often the buffer becomes full if every chunk comes in."""
    # your code


check_worst(worst)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# The first choice comes when `capacity` chunks have been read. Each choice leaves $K$ candidates, so the next choice
# comes `capacity - K` chunks later.
#
# ```python
# def worst(N, K, capacity):
#     return 0 if N < capacity else 1 + (N - capacity) // (capacity - K)
#
#
# check_worst(worst)
# for N, K, capacity in ((1000, 8, 32), (999, 5, 6), (20, 4, 30), (262_144, 64, 256)):
#     rising = [float(N - n) for n in range(N)]  # the last one is read first and is the lowest
#     kept, log = stream_top_k(rising, K, capacity)
#     assert sorted(kept) == list(range(min(K, N)))  # the oldest, and exactly those
#     assert len(choices(log)) == worst(N, K, capacity)
# print("16M tokens, at worst:", worst(262_144, 64, 256), "choices")
# ```
#
# It takes more than a thousand choices instead of about six. The answer is right in any order. Only the time suffers.
# Real texts lie in between, and much closer to random.
#
# </details>

# %% [markdown]
# **2. One tile fewer.** *Difficulty 3, importance 3, 10 minutes.* The proof needs $K$ tiles. Would $K - 1$ tiles be
# enough, since a tile often holds two of the best chunks? Write a function that says when they miss a chunk. Then count:
# in how many of 1,000 random rows (1,024 chunks, tiles of 16, $K = 6$) would $K - 1$ tiles have been enough?


# %%
def misses(scores, K, tile):
    """Is one of the K best scores [N] outside the K - 1 tiles with the best maxima? N is a multiple of `tile`."""
    # your code


check_misses(misses)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Put the $K$ best chunks into $K$ different tiles. Then every one of those tiles is needed.
#
# ```python
# def misses(scores, K, tile):
#     tiles = scores.view(-1, tile).amax(1).topk(K - 1).indices.tolist()
#     return any(n // tile not in tiles for n in scores.topk(K).indices.tolist())
#
#
# check_misses(misses)
# spread = torch.zeros(1024)
# spread[::16][:6] = torch.arange(1.0, 7.0)  # the first chunk of each of the first six tiles
# assert misses(spread, 6, 16)
# assert sorted(best_by_tiles(spread, 6, 16).tolist()) == [0, 16, 32, 48, 64, 80]
# rows = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(0))
# enough = sum(not misses(row, 6, 16) for row in rows)
# print(f"K - 1 tiles would have been enough in {enough} of 1000 rows")
# assert 0 < enough < 500
# ```
#
# They are enough only when two of the best chunks share a tile. An exact result needs all $K$ tiles.
#
# </details>

# %% [markdown]
# **3. Merge a tile.** *Difficulty 2, importance 4, 10 minutes.* The simplest streaming choice keeps exactly $K$
# candidates and merges every tile of scores into them. Write one merge. (The examples contain no ties.)


# %%
def merge(scores, chunks, tile, first):
    """The K best so far and their chunks, both [K], and a tile of scores of chunks first, first + 1, ... -> new ones.

    Both results are sorted from the best score to the lowest.
    """
    # your code


check_merge(merge)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def merge(scores, chunks, tile, first):
#     joined = torch.cat((scores, tile))
#     numbers = torch.cat((chunks, first + torch.arange(len(tile))))
#     best = joined.topk(len(scores))
#     return best.values, numbers[best.indices]
#
#
# check_merge(merge)
# row = torch.randn(1024, generator=random)
# kept, numbers = row[-8:].sort(descending=True).values, 1016 + row[-8:].argsort(descending=True)
# for first in range(1008, -8, -8):  # newest first
#     kept, numbers = merge(kept, numbers, row[first : first + 8], first)
# assert numbers.tolist() == row.topk(8).indices.tolist()
# ```
#
# Every tile costs a choice here, 127 choices for 1,024 chunks. The buffer with a floor needs only a few.
#
# </details>

# %% [markdown]
# ## What comes next
#
# The kernels are complete: attention over chunks, its gradients, the choice of chunks, and the decode of a single
# token. They start from a memory of landmarks, keys and values. So far we have taken that memory for granted.
#
# [Notebook 09](09_memory.ipynb), *What must be kept of 16 million tokens?*, builds that memory and shows three methods
# to fill it that end with the same numbers. It takes about 30 minutes.
