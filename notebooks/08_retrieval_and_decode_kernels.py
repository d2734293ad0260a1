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
# *exactly* the same. Then it does the opposite case: one new token, alone, against the whole memory.
#
# After this notebook you will be able to
#
# * say how many bytes the scores of any context take, and why writing them would cost more than computing them,
# * keep the $K$ best of a stream in a small room, and predict how rarely that room has to be sorted out,
# * find the $K$ largest of a row by counting instead of sorting,
# * draw noise that does not depend on how the work is cut into tiles,
# * answer one new token in two phases, prove that nothing is missed, and say how fast it could be at best.
#
# **Time:** 35 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 03](03_retrieval.ipynb), and
# Triton, which on Linux comes with the rest. No GPU: Triton's interpreter runs the same kernels on the processor, slowly.
# [Notebook 06](06_forward_kernel.ipynb) says more about kernels, but nothing here depends on it.

# %%
import json
import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # has to be said before a kernel is imported

import hsa_kernels
from hsa_kernels.decode import TILE, TILES

from hsa_mini import reference
from hsa_mini.paths import data_dir
from hsa_mini.reference.noise import gumbel_noise, philox
from hsa_mini.reference.retrieval import newest_top_k
from hsa_mini.viz import Control, explore, make_figure, plots, show
from hsa_mini.viz.plots import BLUE, GREY, INK, ORANGE, RED, length_name

MEASURED = json.loads((data_dir() / "results" / "kernels.json").read_text())  # stored: see the end of this notebook

# %% [markdown]
# ## The table that must not exist
#
# The equation is that of notebook 03, Eq. (1), §2.2. Token $t$ scores all complete chunks, keeps the best $K$ and weighs
# them:
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
# What goes in and what comes out grows like $T$. The table between them grows like $T \cdot T / S$. With a chunk of
# $S = 64$ tokens, $K = 64$, $R = 128$, one retrieval head, scores in 4 bytes, queries and landmarks in 2:

# %%
CHUNK, KEPT, WIDTH = 64, 64, 128  # S, K and R of the big questions here; the small ones have sizes of their own


def bytes_of(T):
    """What retrieval for T tokens reads, could write in between, and hands on."""
    N = T // CHUNK
    return {"queries and landmarks": 2 * (T + N) * WIDTH, "scores": 4 * T * N, "indices and weights": (4 + 4) * T * KEPT}


def size_name(count):
    """1073741824 -> 1 GiB."""
    power = (int(count).bit_length() - 1) // 10
    return f"{count / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# %%
# NBVAL_CHECK_OUTPUT
for T in (1 << 17, 1 << 20, 1 << 24):
    print(f"{length_name(T):>4} tokens:", ", ".join(f"{name} {size_name(count)}" for name, count in bytes_of(T).items()))
sketch = torch.empty(1 << 24, (1 << 24) // CHUNK, device="meta")  # has a shape, and no memory
print("formula == the tensor PyTorch would make:", bytes_of(1 << 24)["scores"] == sketch.nbytes)

# %% [markdown]
# **You should see** the table grow from 1 GiB to 16 **TiB**, and `True`. (In half of its cells the chunk is not complete
# yet. Half of 16 TiB is no help.)
#
# And if the memory were there? Computing a score takes $2R$ operations. Writing it and reading it back for `topk` moves 8
# bytes. Both are done $T \cdot N$ times, so which of them is slower does not depend on the length of the text, only on
# the machine. These are the speeds that were measured on the machine named:

# %%
speed = MEASURED["ceilings"]
compute, traffic = 2 * WIDTH / speed["flops_per_second"], 8 / speed["bytes_per_second"]
scores_of_16M = (1 << 24) * ((1 << 24) // CHUNK)
print("measured on:", MEASURED["hardware"])
seconds = [f"{scores_of_16M * each:.1f} s" for each in (compute, traffic)]
print(f"16M tokens: {seconds[0]} to compute the scores, {seconds[1]} to write and read them")
print(f"the table costs {traffic / compute:.1f} times the arithmetic, at any length")

# %%
figure = make_figure(8.5, 3.4)
lengths = [1 << n for n in range(12, 25)]
costs = {name: [bytes_of(T)[name] for T in lengths] for name in ("scores", "queries and landmarks", "indices and weights")}
plots.cost_curves(figure.subplots(), lengths, costs, at=1 << 24, ylabel="bytes")
show(
    figure,
    "Bytes against context length from 4K to 16M tokens, both axes logarithmic. Queries and landmarks, and indices and "
    "weights, rise by the same factor as the text. The scores rise by its square and are two thousand times larger at 16M.",
)

# %% [markdown]
# So a tile of scores has to be made, used and forgotten, in the fast memory next to the arithmetic. The question becomes:
#
# > Scores stream by, and none can be looked at twice. **Which 64 were the best?**
#
# ## A room and a floor
#
# A program keeps a small **room** for candidates. While there is space, whatever comes walks in. When the room is full,
# the $K$ best stay and the others leave. The least of those that stay is the **floor**: from now on, only what *exceeds*
# the floor may come in. Nobody else can be among the $K$ best, because $K$ are at least as good already.
#
# Chunks come **newest first**. Then a chunk that merely *equals* the floor is older than those that stayed, and by the
# course's rule (of equal scores the newest) it has lost. So "exceeds", not "reaches", is exactly right.


# %%
def best(candidates, scores, K):
    """The K candidates of the best scores; of equals those that came first."""
    return sorted(candidates, key=lambda n: -scores[n])[:K]  # Python's sort leaves equals in their order


def stream_top_k(scores, K, room):
    """The K best, read once from the last to the first; and (chunks read, candidates, floor) whenever one came in."""
    candidates, floor, log = [], float("-inf"), []
    for n in reversed(range(len(scores))):
        if scores[n] <= floor:
            continue
        candidates.append(n)
        if len(candidates) == room:
            candidates = best(candidates, scores, K)
            floor = scores[candidates[-1]]
        log.append((len(scores) - n, len(candidates), floor))
    return best(candidates, scores, K), log


# %% [markdown]
# By hand: the twelve tokens, for once in six chunks of **two**, and the token after them, whose window ends in `what is
# the code`. The score is the number of words in common. (Dividing all by $\sqrt{R}$ changes no choice.) With $K = 2$ and a
# room for 4, follow the stream from the right end:
#
# `the code` 2 | `is 7` 1 | `birds sing` 0 | `at dawn` 0 | `what is` 2 | `the code` 2
#
# Four walk in: 2, 2, 0, 0. The room is full, chunks 5 and 4 stay, the floor is 2. Chunk 1 with its 1 stays out, and so does
# chunk 0: its 2 is no more than the floor. **You should see** the room go from 1 to 3 and back to 2, and chunks 5 and 4.

# %%
# NBVAL_CHECK_OUTPUT
WORDS = "the code is 7 birds sing at dawn what is the code".split()
pairs = [WORDS[i : i + 2] for i in range(0, 12, 2)]
in_common = [sum(word in WORDS[-4:] for word in pair) for pair in pairs]
kept, log = stream_top_k(in_common, K=2, room=4)
print("words in common:", in_common)
for read, candidates, floor in log:
    print(f"{read} read: {candidates} in the room, floor {floor}")
print("kept:", kept)

# %% [markdown]
# Is it right always? 300 random lists, against `torch.topk`. Then 300 lists full of equal scores, against the package's
# rule for them, since `torch.topk` promises nothing about equals. **You should see** `True` twice.


# %%
def agrees(scores, K, room):
    """Are the kept ones the K best, of equals the newest?"""
    return set(stream_top_k(scores.tolist(), K, room)[0]) == set(newest_top_k(scores, K).tolist())


# %%
# NBVAL_CHECK_OUTPUT
random = torch.Generator().manual_seed(0)
lists = [torch.randn(1 + i, generator=random) for i in range(8, 308)]
found = [set(stream_top_k(x.tolist(), 8, 20)[0]) == set(x.topk(8).indices.tolist()) for x in lists]
print("streaming == torch.topk:", all(found))
print("of equals the newest   :", all(agrees((2 * x).round(), K=8, room=20) for x in lists))

# %% [markdown]
# ## How often is the room full?
#
# Say $n$ chunks were read when the floor was last raised. In random order, the next chunk is among the $K$ best so far
# with a chance of $K/n$. The room has space for $3K$ more (the kernel's room holds about four times $K$). So it fills up
# again after about $3K \cdot n/K = 3n$ chunks: **three times as many as were read before.** What was read becomes
# $n + 3n = 4n$, and so on: the number of choices grows like the *logarithm* of the text.
#
# **You should see** half a dozen choices among 262,144 chunks, and waits close to threefold, over ten streams.


# %%
def choices(log):
    """How many chunks had been read at each choice: one came in, and the room is no fuller."""
    return [now[0] for before, now in zip(log, log[1:]) if now[1] <= before[1]]


# %%
# NBVAL_CHECK_OUTPUT
N = (1 << 24) // CHUNK
streams = [choices(stream_top_k(torch.randn(N, generator=random).tolist(), KEPT, 4 * KEPT)[1]) for _ in range(10)]
waits = [(after - before) / before for read in streams for before, after in zip(read, read[1:])]
print("one stream: choices after", streams[0], "chunks")
print("most choices in a stream:", max(map(len, streams)))
print(f"wait for the next choice: {sum(waits) / len(waits):.1f} times what was read before")


# %% [markdown]
# ### Move it
#
# Above: chunks from the newest (left) to the oldest, on a logarithmic axis. Grey: stayed out. Blue: came in. The red
# stairs are the floor. Below: how many candidates are in the room. On a logarithmic axis the teeth have the **same width**:
# that is the growth you just measured.
#
# Move `T` and `K`. Then change the order. If scores *fall* with age, the first choice is the last. If they *rise* with
# age, everybody comes in and the teeth get narrower and narrower: the worst case, still correct, and no longer rare.


# %%
def arrange(order, N):
    """N random scores, of which the last is read first."""
    scores = torch.randn(N, generator=torch.Generator().manual_seed(1))
    return scores if order == "random" else scores.sort(descending=order == "rise with age").values


def draw_stairs(axes, scores, log, shown=2500):
    """The stream against the number read: a sample of those that stayed out, of those that came in, and the floor."""
    N, came = len(scores), torch.tensor([read for read, _, _ in log])
    sample = (torch.rand(shown, generator=torch.Generator().manual_seed(2)) * torch.tensor(N).log()).exp().long().clamp(1, N)
    out = sample[~torch.isin(sample, came)].unique()
    blue = came[(torch.linspace(0, 1, min(shown, len(came))) * (len(came) - 1)).long()]
    axes.scatter(out, scores[N - out], s=4, color=GREY, linewidths=0, label="stayed out")
    axes.scatter(blue, scores[N - blue], s=7, color=BLUE, linewidths=0, label="came in")
    axes.step([x for x, _, _ in log] + [N], [y for *_, y in log] + [log[-1][2]], where="post", color=RED, lw=2, label="floor")
    axes.set(ylabel="score")
    axes.figure.legend(frameon=False, fontsize=10, ncols=3, loc="outside upper center")


def draw_stream(figure, T, K, order):
    scores = arrange(order, T // CHUNK)
    _, log = stream_top_k(scores.tolist(), K, 4 * K)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    draw_stairs(top, scores, log)
    bottom.step([read for read, _, _ in log] + [len(scores)], [n for _, n, _ in log] + [log[-1][1]], where="post", color=INK)
    bottom.axhline(K, color=GREY, linestyle="--", linewidth=1)
    bottom.set(xscale="log", xlim=(1, len(scores)), ylim=(0, 4.3 * K), xlabel="chunks read", ylabel="in the room")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    said = f"{len(log):,} of {len(scores):,} chunks came in"
    return f"T = {length_name(T)}, K = {K}: {said}; times that the room was sorted out: {len(choices(log)):,}."


explore(
    draw_stream,
    alt="Above: scores as dots in the order of reading, and a floor that rises in stairs. Below: candidates, a sawtooth.",
    size=(8.5, 4.4),
    T=Control([(length_name(1 << n), 1 << n) for n in range(16, 25)], start=1 << 22, label="tokens T"),
    K=Control([4, 8, 16, 32, 64], start=64, label="chunks kept K"),
    order=Control(["random", "fall with age", "rise with age"], label="scores"),
)

# %% [markdown]
# ## Floats as ordered whole numbers
#
# Sorting out a room means: find the $K$-th largest. A GPU does not like to sort: numbers would change places between
# threads, round after round. It does like to **count**: "how many of you reach this threshold?" is one comparison each and
# one sum. So we search for the threshold, and cut down the range in which it lies. For that, floats are awkward: most
# of the range from $-3 \cdot 10^{38}$ to $3 \cdot 10^{38}$ is of no use for scores near 1.
#
# But look at the *bits* of a float32: sign, exponent, fraction. Read the bits as a whole number: among positive floats, the
# larger number is the larger float. Among negative ones it is the other way round. So: **positive: set the first bit.
# Negative: flip all bits.** The outcome is a whole number, its **key**, in the same order as the float.


# %%
def keyed(x):
    """float32 -> whole numbers of the same order, above 0 and below 2^32 (as int64); either zero becomes the same."""
    bits = (x + 0.0).view(torch.int32).long() & 0xFFFFFFFF  # -0.0 + 0.0 is 0.0
    return torch.where(bits < 1 << 31, bits + (1 << 31), 0xFFFFFFFF - bits)


def unkeyed(key):
    """The inverse of `keyed`."""
    bits = torch.where(key >= 1 << 31, key - (1 << 31), 0xFFFFFFFF - key)
    return torch.where(bits < 1 << 31, bits, bits - (1 << 32)).int().view(torch.float32)


# %% [markdown]
# **You should see** keys that rise as the floats do, the same key for both zeros, and `True` three times. No number has
# the key 0, not even $-\infty$: so 0 is free to mean "nothing here".

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
# Two bounds for the floor: at least $K$ keys reach `low`, and fewer than $K$ reach any number above `high`. Cut the range in
# three, count how many keys reach each of the two cuts, and move the bounds. What is left is a third at most, so with
# $3^{21} > 2^{32}$ **21 steps are always enough**. And if exactly $K$ keys reach a cut, we are done at once: it does not
# matter *where* between two keys the floor lies.
#
# Why not halves, and one count a step? Counting is quick. What takes time is that all threads have to wait for the sum. Two
# counts fit into the two halves of one number, so both cost one sum.


# %%
def find_floor(keys, K, known=0):
    """A number [rows] that K keys of [rows, n] reach and no other exceeds, 0 if there are fewer than K; and the steps."""
    low = torch.zeros_like(keys[:, 0]) + known  # what K keys are known to reach
    high, steps = torch.maximum(keys.amax(1), low), torch.zeros_like(low)
    while (high > low).any():
        steps += high > low
        third = (high - low + 2) // 3
        one, two = low + third, torch.minimum(low + 2 * third, high)
        reach_one, reach_two = ((keys >= cut[:, None]).sum(1) for cut in (one, two))
        high = torch.where(reach_one < K, (one - 1).clamp(min=0), torch.where(reach_two < K, two - 1, high))
        low = torch.where(reach_two >= K, two, torch.where(reach_one >= K, one, low))
        exactly = (reach_two == K) | ((reach_one == K) & (reach_two < K))
        high = torch.where(exactly, low, high)
    return low, steps


def largest(keys, K, known=0):
    """Which keys [rows, n] are the K largest of their row, of equals the first; and their floor [rows]."""
    floor, _ = find_floor(keys, K, known)
    above, equal = keys > floor[:, None], (keys == floor[:, None]) & (keys > 0)
    space = K - above.sum(1)
    return above | (equal & (equal.cumsum(1) <= space[:, None])), floor


# %% [markdown]
# `cumsum` counts along the row, so `equal.cumsum(1) <= space` admits equals from the left until the space is used up.
# They stand in the order in which they came: newest first.
#
# The six chunks by hand, newest first: 2, 2, 0, 0, 1, 2. **You should see** the first two kept, and the steps for $K = 2$
# and for $K = 3$. For three of them some threshold is reached by exactly three, and the search stops early. For two there is
# none, because three are equal: the search goes on to the last bit and finds the 2 itself.

# %%
# NBVAL_CHECK_OUTPUT
by_hand = torch.tensor([in_common[::-1]], dtype=torch.float32)
print("kept of", by_hand[0].int().tolist(), "->", largest(keyed(by_hand), 2)[0][0].int().tolist())
print("steps for K = 2 and K = 3:", [find_floor(keyed(by_hand), K)[1].item() for K in (2, 3)])

# %% [markdown]
# Now 1,000 rows of 256 candidates, `largest` against `torch.topk`. **You should see** `True`, and a number of steps well below
# 21. The floor of an earlier choice saves half of them (here: the 64th of the first 192 candidates, known before the others
# came).

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
rounds = sum(range(1, 256 .bit_length()))
print(f"rounds of a sorting network for 256 numbers: {rounds}")

# %% [markdown]
# Each step is a comparison and a sum. Each round of a sorting network compares all numbers in pairs and lets those that stand
# wrong change places: more rounds, and more to do in each.
#
# ### Move it
#
# One row of candidates. Each bar: how many of them are still in question after a step. The number on it: how many bits are
# left of the range. Why are the first steps so idle? They settle the sign and the exponent, which almost all scores have
# in common. Set `known floor` and they are gone.


# %%
def watch(keys, K, known=0):
    """Candidates still in question and bits left of the range, after 0, 1, 2, ... steps for one row of keys [n]."""
    low, high, seen = known, max(int(keys.max()), known), []
    while True:
        seen.append((int(((keys >= low) & (keys <= high)).sum()), (high - low).bit_length()))
        if high == low:
            return seen
        third = (high - low + 2) // 3
        for cut in (low + third, min(low + 2 * third, high)):
            reached = int((keys >= cut).sum())
            if reached <= K:
                low, high = (low, cut - 1) if reached < K else (cut, cut)
                break
            low = cut


def draw_steps(figure, K, candidates, known):
    scores = torch.randn(candidates, generator=torch.Generator().manual_seed(3))
    keys = keyed(scores)
    start = int(keyed(scores[: candidates * 3 // 4].topk(K).values[-1])) if known else 0
    seen = watch(keys, K, start)
    axes = figure.subplots()
    axes.bar(range(len(seen)), [n for n, _ in seen], color=BLUE)
    for step, (n, bits) in enumerate(seen):
        axes.text(step, n + 0.012 * candidates, bits, ha="center", fontsize=10, color=INK)
    axes.set(xlabel="steps", ylabel="candidates in question", ylim=(0, 1.1 * candidates), xlim=(-0.6, 21.6), xticks=range(0, 22, 3))
    axes.spines[["top", "right"]].set_visible(False)
    return f"The {K} largest of {candidates} candidates are found after {len(seen) - 1} of at most 21 steps."


explore(
    draw_steps,
    alt="Bars over the steps of the search: how many candidates lie between the bounds, with the bits that are left.",
    size=(8.5, 3),
    K=Control((2, 64), start=64, label="chunks kept K"),
    candidates=Control([128, 192, 256, 512], start=256),
    known=Control(bool, label="known floor"),
)

# %% [markdown]
# ## All tokens, tile by tile
#
# Now everything at once, in PyTorch, the way the kernel does it. Every token has its own room, a row of `[T, CAP]`. A tile of
# 32 chunks streams by; all tokens score it, and those candidates that exceed their token's floor walk in.
#
# One trick is worth a look. Which place does a candidate take? No thread asks another. A cumulative sum over the mask
# numbers the newcomers, and that *is* the place.


# %%
def empty_rooms(T, places):
    """A room a token, [T, places]: keys, scores, and chunks counted from 1, so that 0 means nothing everywhere."""
    whole = {name: torch.zeros(T, places, dtype=torch.int64) for name in ("key", "chunk")}
    return whole | {"score": torch.zeros(T, places)}


def put(room, count, mask, values):
    """Values [T, n], where the mask says so, into the next free places of their rows of the room [T, CAP]."""
    place = count[:, None] + mask.cumsum(1) - 1
    t, i = mask.nonzero(as_tuple=True)
    room[t, place[t, i]] = values[t, i].to(room.dtype)


def sort_out(rooms, floor, K):
    """The K best of every room move to its front -> the new floor and how many are left, both [T]."""
    kept, floor = largest(rooms["key"], K, floor)
    for room in rooms.values():
        before = room.clone()
        put(room.zero_(), torch.zeros_like(floor), kept, before)
    return floor, kept.sum(1)


# %% [markdown]
# The largest thing that the loop below makes is `[T, tile]`. `position` is where each token stands in the text; a chunk is
# visible once it is complete, as in notebook 03. `noise` waits for the next section.


# %%
def no_noise(position, chunk):
    return 0.0


def stream_tiles(queries, landmarks, chunk_size, K, position, tile=32, noise=no_noise):
    """Rooms whose first K places hold the K best of every token."""
    rooms = empty_rooms(len(queries), 4 * K + tile)
    count = floor = torch.zeros(len(queries), dtype=torch.int64)
    for n in torch.arange(len(landmarks)).flip(0).split(tile):  # the newest first
        scores = queries @ landmarks[n].T / queries.shape[1] ** 0.5  # [T, tile], forgotten at the end of the round
        keys = keyed(scores + noise(position, n))
        better = ((n + 1) * chunk_size <= position[:, None]) & (keys > floor[:, None])
        for name, values in {"key": keys, "score": scores, "chunk": (n + 1).expand_as(keys)}.items():
            put(rooms[name], count, better, values)
        count = count + better.sum(1)
        if count.max() > 4 * K:  # the next tile might not fit
            floor, count = sort_out(rooms, floor, K)
    sort_out(rooms, floor, K)
    return rooms


def retrieve_by_tiles(queries, landmarks, chunk_size, K, position, **options):
    """Eq. (1) without the table: queries [T, R], landmarks [N, R] -> indices and weights [T, K]."""
    rooms = stream_tiles(queries, landmarks, chunk_size, K, position, **options)
    indices, scores = rooms["chunk"][:, :K] - 1, rooms["score"][:, :K]
    empty = indices < 0
    return indices, scores.masked_fill(empty, -1e30).softmax(1).masked_fill(empty, 0.0)

# %% [markdown]
# ## The equality of this notebook
#
# Three ways to the same choice: the table with `torch.topk`, our loop over tiles, and the package's Triton kernel. The
# order of the slots is free, so we compare what each *chunk* gets: which chunks are kept (a set), and with what weight.


# %%
def ask_kernel(queries, landmarks, chunk_size, K, position, **options):
    """`hsa_kernels.retrieve`, for one sequence and one head; on the GPU, or in the interpreter."""
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
    """Slots [T, K] -> is the chunk kept, and its weight, both [T, N]."""
    spread = torch.zeros(len(indices), N + 1).scatter(1, indices.long() % (N + 1), weights.float())[:, :N]
    kept = torch.zeros(len(indices), N + 1, dtype=torch.bool).scatter(1, indices.long() % (N + 1), True)[:, :N]
    return kept, spread


def compare(ours, theirs, N):
    """Same chunks, same weights?"""
    (kept, weights), (kept_2, weights_2) = by_chunk(*ours, N), by_chunk(*theirs, N)
    return torch.equal(kept, kept_2), torch.allclose(weights, weights_2, atol=1e-5)


# %% [markdown]
# First the twelve tokens in three chunks of four, with the word counts of notebook 03 and $K = 2$. There, token 11
# kept chunks 0 and 1, with weights 0.73 and 0.27. **You should see** that again, from a GPU kernel.

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
indices, weights = ask_kernel(*twelve, 4, 2, torch.arange(12))
found = {chunk: round(weight, 2) for chunk, weight in zip(indices[11].tolist(), weights[11].tolist())}
print("token 11 keeps", dict(sorted(found.items())))
print("chunks kept by token 0 ... 11:", (indices >= 0).sum(1).tolist())
ours = retrieve_by_tiles(*twelve, 4, 2, torch.arange(12))
print("kernel == our tiles (chunks, weights):", compare((indices, weights), ours, 3))

# %% [markdown]
# Then a random text, long enough that rooms are sorted out on the way: 20 tokens at the end of 2,400, with 600 chunks to
# choose from. **You should see** `True` for chunks and for weights, twice.

# %%
# NBVAL_CHECK_OUTPUT
queries, landmarks = (torch.randn(n, 16, generator=random) for n in (20, 600))
last_20 = torch.arange(2380, 2400)
table = with_table(queries, landmarks, 4, 8, last_20)
tiles = retrieve_by_tiles(queries, landmarks, 4, 8, last_20)
kernel = ask_kernel(queries, landmarks, 4, 8, last_20)
print("our tiles == torch.topk (chunks, weights):", compare(tiles, table, 600))
print("kernel    == torch.topk (chunks, weights):", compare(kernel, table, 600))

# %% [markdown]
# The kernel is `_retrieve` in `kernels/hsa_kernels/retrieval.py`, and now you can read it. A program owns 16 tokens and
# one head. `_put` is our `put`, `_choose` our `sort_out`, and `selection.py` holds `keyed` and `largest`. What is left to
# say is for the machine: a room is a few hundred numbers in global memory, and a program is a single warp (32 threads that
# go in step), so that nobody waits for anybody.
#
# Training needs gradients too. They flow through the weights alone: a query receives its $K$ kept landmarks, a landmark the
# queries of all tokens that kept it. No table there either.
#
# ## Noise that does not care about tiles
#
# In training, Gumbel noise is added to the choice (notebook 03 says why). An ordinary generator gives its numbers *in
# order*. In a kernel there is no order: tiles of many sizes run at the same time. The cure is a **counter-based**
# generator. It is a function, from a seed and four counters to 32 random bits. Ours are the chunk, the token, the head
# and the sequence.


# %%
def noise_at(seed, position, chunk):
    """Gumbel noise of these tokens [T] and chunks [n], in the first head of the first sequence, and of no others: [T, n]."""
    counters = torch.broadcast_tensors(chunk, position[:, None], torch.tensor(0), torch.tensor(0))
    uniform = (philox(seed, counters).double() + 0.5) * 2.0**-32  # never 0, never 1
    return (-(-uniform.log()).log()).float()


def in_tiles(make, height, width):
    """The same [60, 90] table, made a tile at a time: make(tokens, chunks)."""
    token, chunk = torch.arange(60).split(height), torch.arange(90).split(width)
    return torch.cat([torch.cat([make(t, n) for n in chunk], dim=1) for t in token])


# %% [markdown]
# **You should see** that noise by counters is the same whole or in tiles of any size, and the same as the reference's.
# Noise from an ordinary generator is not.

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
# So the kernel makes the noise of a tile where the tile is, and no table of noise exists. Same seed, same choice:
#
# * the kernel against the reference, which does hold the table of noise,
# * our loop with tiles of 32 and of 7,
# * the kernel for all tokens against the kernel for the last 13 alone, which then sit in other rows of other tiles.
#
# **You should see** `True` everywhere, and last, that another seed chooses differently.

# %%
# NBVAL_CHECK_OUTPUT
inputs = queries, landmarks, 4, 8, last_20
options = {"chunk_size": 4, "top_k": 8, "offset": 2380, "gumbel_seed": 7}
expected = tuple(x[0, :, 0] for x in reference.retrieve(queries[None, :, None], landmarks[None, :, None], **options))
kernel = ask_kernel(*inputs, gumbel_seed=7)
print("kernel == reference  :", compare(kernel, expected, 600))
for tile in (32, 7):
    found = retrieve_by_tiles(*inputs, tile=tile, noise=lambda position, n: noise_at(7, position, n))
    print(f"tiles of {tile:2} == kernel :", compare(found, kernel, 600))
last_13 = ask_kernel(queries[7:], landmarks, 4, 8, last_20[7:], gumbel_seed=7)
print("13 tokens alone      :", compare(last_13, tuple(x[7:] for x in kernel), 600))
print("another seed, same   :", compare(ask_kernel(*inputs, gumbel_seed=8), kernel, 600)[0])

# %% [markdown]
# A detail with teeth: the kernel computes this noise in float64. If the uniform number is close to 1, float32 rounds it *to*
# 1, and the noise becomes infinite. One chunk in tens of millions would win against any score. **You should see** it.

# %%
# NBVAL_CHECK_OUTPUT
for dtype in (torch.float32, torch.float64):
    nearly_1 = torch.tensor((2**32 - 1 + 0.5) * 2.0**-32, dtype=dtype)  # of the largest 32 bits
    print(dtype, "-> noise", round((-(-nearly_1.log()).log()).item(), 2))

# %% [markdown]
# ## One new token: decode
#
# When a model writes, one token at a time asks the whole memory. There is one row of scores now, `[N]`: a megabyte for 16M
# tokens. Nobody minds writing *that*. The trouble is the opposite: a single token is little work, and a GPU has thousands
# of threads that all have to help.
#
# Everybody can help with the scores: cut the chunks into **tiles** and give each program one. But the choice needs all
# scores at once, and 262,144 candidates are too many for a single program. So each program also notes the **best score of
# its tile**:
#
# 1. **Scores** of all chunks, and the maximum of each tile. This reads the landmarks, once.
# 2. **Choice**: find the $K$ tiles of the best maxima; among the chunks of *those tiles alone*, find the $K$ best.
#
# **Claim: nothing is missed.** Take a chunk outside the $K$ chosen tiles. Its score is at most the maximum of its own tile,
# which was not chosen, so it is at most each of the $K$ chosen maxima. Those maxima are scores of $K$ different chunks, all
# inside the chosen tiles. There are $K$ at least as good, so the $K$ best can be had without it. (Fewer than $K$ tiles in
# all? Then all are chosen. And equals? Tiles and chunks both stand newest first, and `largest` takes the first of equals, so
# the newest win in both rounds.)


# %%
def best_by_tiles(scores, K, tile):
    """Numbers of the K best of scores [N], of equals the newest; looks at the maxima of tiles and at K tiles."""
    keys = torch.nn.functional.pad(keyed(scores).flip(0), (0, -len(scores) % tile)).view(-1, tile)  # newest first, 0: nothing
    chosen, floor = largest(keys.amax(1)[None], K)  # K tiles
    tiles = chosen[0].nonzero()[:, 0]
    kept, _ = largest(keys[tiles].flatten()[None], K, floor)
    place = (tiles[:, None] * tile + torch.arange(tile)).flatten()[kept[0]]
    return len(scores) - 1 - place


# %% [markdown]
# Note the `floor` that the first round hands to the second: $K$ maxima reach it, so $K$ chunks do.
#
# **You should see** `True` twice, for 300 rows against `torch.topk` and 300 rows full of equals against the package's
# rule. Then how few numbers the choice looks at for 16M tokens. The kernel plays the same trick once more: small tiles, and
# **blocks** of tiles that note the best of *their* maxima. It looks for the best blocks, in them for the best tiles, and in those
# for the best chunks.

# %%
# NBVAL_CHECK_OUTPUT
sizes = [tuple(int(torch.randint(1, high, (), generator=random)) for high in (400, 20, 40)) for _ in range(300)]
rows = [(torch.randn(N + K, generator=random), K, tile) for N, K, tile in sizes]
same = [set(best_by_tiles(x, K, tile).tolist()) == set(x.topk(K).indices.tolist()) for x, K, tile in rows]
print("two rounds == torch.topk:", all(same))
rounded = [(x.round(), K, tile) for x, K, tile in rows]
same = [set(best_by_tiles(x, K, tile).tolist()) == set(newest_top_k(x, K).tolist()) for x, K, tile in rounded]
print("of equals the newest    :", all(same))
N, tile = (1 << 24) // CHUNK, 64
print(f"looked at: {N // tile:,} maxima and {KEPT * tile:,} scores, of {N:,}")
print(f"in three rounds: {N // (TILE * TILES):,} maxima of blocks, {KEPT * TILES:,} of tiles and {KEPT * TILE:,} scores")


# %% [markdown]
# ### Move it
#
# The proof as a picture. Dots: the scores of 1,024 chunks. Pale columns: the $K$ tiles of the best maxima, and rings: the
# $K$ best chunks. The line is the least of the chosen maxima. **Outside the columns no dot lies above the line.** A column may
# hold two rings, and then another holds none: it was chosen in vain, but nobody could know. Move `K` and the tile. Which
# tile leaves the fewest numbers to look at?


# %%
def draw_tiles(figure, K, tile, seed):
    scores = torch.randn(1024, generator=torch.Generator().manual_seed(seed))
    kept, maxima = best_by_tiles(scores, K, tile), scores.view(-1, tile).amax(1)
    chosen, axes = maxima.topk(K), figure.subplots()
    for number, i in enumerate(chosen.indices.tolist()):
        label = None if number else "chosen tile"
        axes.axvspan(i * tile - 0.5, (i + 1) * tile - 0.5, color=ORANGE, alpha=0.3, linewidth=0, label=label)
    axes.axhline(chosen.values[-1], color=RED, linewidth=1.5, label="least chosen maximum")
    axes.scatter(range(1024), scores, s=6, color=GREY, linewidths=0, label="a chunk")
    axes.scatter(kept, scores[kept], s=55, facecolors="none", edgecolors=BLUE, linewidths=1.8, label="kept")
    axes.set(xlabel="chunk", ylabel="score", xlim=(0, 1023))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=10)
    looked = f"{1024 // tile} maxima and {K * tile} scores"
    return f"K = {K}, tiles of {tile}: looks at {looked}, {1024 // tile + K * tile} numbers in all."


explore(
    draw_tiles,
    alt="Scores of 1,024 chunks as dots, chosen tiles as columns, kept chunks in rings; outside no dot is above the line.",
    size=(8.5, 3.6),
    K=Control((1, 16), start=8, label="chunks kept K"),
    tile=Control([1, 2, 4, 8, 16, 32, 64], start=16, label="chunks a tile"),
    seed=Control((0, 20), start=12, label="other scores"),
)

# %% [markdown]
# ### Then attention
#
# The kept chunks are read as in notebook 04: softmax inside each chunk, and the results blended by the weights. The whole
# decode, for one head of keys and values and the $G$ query heads that share it:


# %%
def decode_in_phases(asked, landmarks, q, k, v, K, tile=64):
    """One new token: asked [R], landmarks [N, R], q [G, D], k and v [N, S, D] -> [G, D]."""
    scores = landmarks @ asked / len(asked) ** 0.5  # phase 1
    kept = best_by_tiles(scores, K, tile)  # phase 2
    weights = scores[kept].softmax(0)
    inside = (torch.einsum("gd,ksd->kgs", q, k[kept]) / q.shape[1] ** 0.5).softmax(-1)
    parts = weights[:, None, None] * (inside @ v[kept])  # [K, G, D]: one part a slot
    return parts.sum(0)


# %% [markdown]
# The kernel does it in three launches: scores and maxima; **one program for each of the $K$ slots**; and the sum over slots.
# In the second launch each program makes the whole choice by itself, all $K$ of them the same one. That looks wasteful. But
# the alternative is one more launch that makes the choice and tells the others, and a launch takes longer.
#
# 400 chunks of 16 tokens, $K = 8$, four query heads. The text ends in the middle of a chunk, and the memory has room for 50
# more chunks, filled with NaN. **You should see** `True` three times: what is not complete is never even read.

# %%
# NBVAL_CHECK_OUTPUT
complete, room, G, D = 400, 450, 4, 32
asked, q = torch.randn(16, generator=random), torch.randn(G, D, generator=random)
landmarks = torch.randn(complete, 16, generator=random)
k, v = (torch.randn(complete, 16, D, generator=random) for _ in range(2))


def behind_nan(x):
    """[complete, ...] -> [1, room, ...] with NaN where nothing was written yet."""
    return torch.cat((x, torch.full((room - complete, *x.shape[1:]), float("nan"))))[None]


options = {"chunk_size": 16, "top_k": 8, "offset": 16 * complete + 5}
ask = asked[None, None, None], q[None, None]  # [B, T, J, R] and [B, T, H, D]
plain = landmarks[None, :, None], k[None, :, :, None], v[None, :, :, None]  # [B, N, J, R] and [B, N, S, J, D]
roomy = behind_nan(landmarks).unsqueeze(2), behind_nan(k).unsqueeze(3), behind_nan(v).unsqueeze(3)


def ask_memory(operation, marks, keys, values, device):
    return operation(*(x.to(device) for x in (ask[0], marks, ask[1], keys, values)), **options).cpu()


expected = ask_memory(reference.decode, *plain, "cpu")
kernel = ask_memory(hsa_kernels.decode, *roomy, DEVICE)
ours = decode_in_phases(asked, landmarks, q, k, v, K=8)
print("two phases == reference:", torch.allclose(ours, expected[0, 0], atol=1e-5))
print("kernel     == reference:", torch.allclose(kernel, expected, atol=1e-5))
print("no NaN was touched     :", bool(kernel.isfinite().all()))

# %% [markdown]
# ## How fast could it be?
#
# To know the best chunk, every landmark has to be looked at. If they come from memory and not from a cache, decode can never
# be faster than **reading the landmarks once**: $2NR$ bytes in 16 bits, divided by the speed of memory. That is its *floor*.
# (The $K$ chunks themselves are next to nothing for a long text.)
#
# What follows was **measured elsewhere and stored** with the repository, in `data/results/kernels.json`. The first
# line says on what. **You should see** that our formula gives the stored floors, and two things about decode: for short
# memories it takes the same time whatever their length, because three launches and the choice take longer than the
# reading; for 16M tokens it comes within a small factor of the floor.

# %%
retrieve_rows, decode_rows = ([row for row in MEASURED["rows"] if row["op"] == op] for op in ("retrieve", "decode"))


def floor_ms(row):
    """Milliseconds to read the landmarks once, in 16 bits."""
    return 2 * row["R"] * row["T"] // row["S"] / MEASURED["ceilings"]["bytes_per_second"] * 1e3


sizes = {name: retrieve_rows[0][name] for name in ("S", "K", "R", "dtype")}
print("stored, measured on:", MEASURED["hardware"], "with", ", ".join(f"{name} = {value}" for name, value in sizes.items()))
print("\nretrieve, all tokens   kernel, ms   portable, ms   times   kernel's memory    the table")
for row in retrieve_rows:
    ms, portable, T = row["ms"], row["portable_ms"], row["T"]
    memory = f"{size_name(row['peak_bytes']):>17} {size_name(bytes_of(T)['scores']):>12}"
    print(f"{length_name(T):>14} tokens {ms:11.2f} {portable:14.2f} {portable / ms:7.1f} {memory}")
print("\ndecode, one new token  kernel, us      floor, us   times")
for row in decode_rows:
    us, floor = row["ms"] * 1e3, row["floor_ms"] * 1e3
    print(f"{length_name(row['T']):>14} tokens {us:11.1f} {floor:14.2f} {us / floor:7.1f}")
largest_rooms = size_name(hsa_kernels.retrieval.ROOMS_BYTES)
print("\nrooms in the kernel's memory, at most:", largest_rooms)
print("floor by formula == stored floor:", all(abs(floor_ms(row) / row["floor_ms"] - 1) < 1e-6 for row in decode_rows))

# %% [markdown]
# (1 us, a microsecond, is a thousandth of 1 ms. The kernel's memory is what it hands on, and the rooms. For short texts the
# rooms are no smaller than the table would be, and the kernel is faster all the same.)
#
# "Portable" is the package's version in plain PyTorch, `hsa_mini.ops.torch_backend`: it never holds the whole table either, but it
# writes the scores of a block of tokens and calls `topk` on them.


# %%
def draw_pairs(axes, rows, other, name, unit=1, ylabel="milliseconds"):
    """Two bars for each length, with a logarithmic axis: the kernel and what it is compared with."""
    for shift, key, color, label in ((-0.2, "ms", BLUE, "kernel"), (0.2, other, ORANGE, name)):
        heights = [row[key] * unit for row in rows]
        bars = axes.bar([i + shift for i in range(len(rows))], heights, 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{x:.2g}" if x < 10 else f"{x:.0f}" for x in heights], fontsize=10, padding=2)
    axes.set_xticks(range(len(rows)), [f"{length_name(row['T'])} tokens" for row in rows])
    axes.set(yscale="log", ylabel=ylabel)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=10, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


# %%
figure = make_figure(10, 3.8)
left, right = figure.subplots(1, 2)
draw_pairs(left, retrieve_rows, "portable_ms", "plain PyTorch")
draw_pairs(right, decode_rows, "floor_ms", "floor: landmarks read once", unit=1e3, ylabel="microseconds")
left.set_xlabel("retrieve, every token")
right.set_xlabel("decode, one new token")
figure.suptitle(f"stored measurements: {MEASURED['hardware']}", fontsize=11, color=GREY)
show(
    figure,
    "Stored measurements on the hardware in the title, time on a logarithmic axis. Left: the retrieval kernel stays "
    "far below plain PyTorch at every length. Right: decode takes nearly constant time until the floor comes close to it.",
)

# %% [markdown]
# Have you a GPU? Then the next cell measures here, with `triton.testing.do_bench`, for 128K tokens and for one token behind a
# million. Without one it says so. (Stored decode times were taken inside a CUDA graph, where launches cost less.)


# %%
def live(T):
    """Milliseconds of the kernels on this GPU, in bfloat16: retrieve for 128K tokens, decode behind T tokens."""
    from triton.testing import do_bench

    def normal(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    few, N = 1 << 17, T // CHUNK
    asks, marks, many = normal(1, few, 1, WIDTH), normal(1, few // CHUNK, 1, WIDTH), normal(1, N, 1, WIDTH)
    q, k, v = normal(1, 1, 16, 128), *(normal(1, N, CHUNK, 1, 128) for _ in "kv")
    sizes = {"chunk_size": CHUNK, "top_k": KEPT}
    retrieved = do_bench(lambda: hsa_kernels.retrieve(asks, marks, **sizes))
    return retrieved, do_bench(lambda: hsa_kernels.decode(asks[:, :1], many, q, k, v, offset=T, **sizes))


if torch.cuda.is_available():
    retrieved, decoded = live(1 << 20)
    print(f"{torch.cuda.get_device_name()}: retrieve {retrieved:.2f} ms, decode {decoded:.4f} ms")
else:
    print("No GPU here: the stored measurements above have to do.")

# %% [markdown]
# ## Exercises
#
# **1. The worst stream.** Scores that rise with age let every chunk in. Find a formula for the number of choices among $N$
# chunks with a room of `room`, and check it with `stream_top_k`. How many would 16M tokens need with $K = 64$ and a room of
# 256? And does the answer stay right?
#
# <details>
# <summary>Solution</summary>
#
# The first choice comes when `room` chunks have been read. Each choice leaves $K$, so the next comes `room - K` later.
#
# ```python
# def worst(N, K, room):
#     return 0 if N < room else 1 + (N - room) // (room - K)
#
#
# for N, K, room in ((1000, 8, 32), (999, 5, 6), (20, 4, 30), (262_144, 64, 256)):
#     rising = [float(N - n) for n in range(N)]  # the last is read first and has the least
#     kept, log = stream_top_k(rising, K, room)
#     assert sorted(kept) == list(range(min(K, N)))  # the oldest, and exactly those
#     assert len(choices(log)) == worst(N, K, room)
# print("16M tokens, at worst:", worst(262_144, 64, 256), "choices")
# ```
#
# Over a thousand instead of half a dozen. The answer is right in any order; only the time suffers. Real texts lie in
# between, and much nearer to random.
#
# </details>
#
# **2. One tile fewer.** The proof needs $K$ tiles. Would $K - 1$ do, since a tile often holds two of the best? Build scores
# for which $K - 1$ tiles miss one of the best $K$. Then count: in how many of 1,000 random rows (1,024 chunks, tiles of 16,
# $K = 6$) would $K - 1$ tiles have been enough?
#
# <details>
# <summary>Solution</summary>
#
# Put the $K$ best into $K$ different tiles: then every one of those tiles is needed.
#
# ```python
# def misses(scores, K, tile):
#     """Is a chunk of the K best outside the K - 1 tiles of the best maxima?"""
#     tiles = scores.view(-1, tile).amax(1).topk(K - 1).indices.tolist()
#     return any(n // tile not in tiles for n in scores.topk(K).indices.tolist())
#
#
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
# Enough only when two of the best share a tile. Exactness needs all $K$.
#
# </details>

# %% [markdown]
# ## What comes next
#
# The kernels are complete: attention over chunks, its gradients, the choice, and the single token. They start from a
# memory of landmarks, keys and values that has been taken for granted so far.
#
# [Notebook 09](09_memory.ipynb), *What must be kept of 16 million tokens?*, builds that memory and shows three ways to fill
# it that end in the same numbers, in about 30 minutes.
