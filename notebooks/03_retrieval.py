# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 · Which chunks matter to this token?
#
# Every chunk of the text now has a heading, its landmark. A new token has to decide: *which few chunks should I read,
# and how much weight should each of them get?* This is **retrieval**, the heart of Hierarchical Sparse Attention (HSA).
# It is one equation. This notebook computes every part of it.
#
# After this notebook you will be able to
#
# * compute the scores, the choice of the best $K$ and the weights by hand, by loop and by matrix product,
# * say exactly which chunks a token may see, and why one more chunk would show it the future,
# * explain two ways to turn scores into weights, and why training adds noise to the choice but not to the weights.
#
# **Time:** 25 minutes to read, 10 seconds to run on two CPU cores. **Needs:** [notebook 02](02_chunks.ipynb), or just
# this: a chunk is $S$ tokens, and a landmark is one vector that stands for a chunk.
#
# [← 02 chunks](02_chunks.ipynb) · [map of the course](00_start.ipynb) · [04 fusion →](04_fusion.ipynb)

# %%
import torch

from hsa_mini import reference
from hsa_mini.reference import retrieve
from hsa_mini.reference.noise import gumbel_noise
from hsa_mini.viz import Control, explore, explore_map, make_figure, plots, show

# %% [markdown]
# ## In the paper's symbols
#
# Token $t$ has a query $Q^{slc}_t$ for **selecting** chunks. Chunk $i$ has a landmark $K^{slc}_i$. Both are vectors of
# $R$ numbers. Eq. (1), §2.2:
#
# $$s_{t,i} = \frac{Q^{slc}_t \cdot K^{slc}_i}{\sqrt{R}}, \qquad
# I_t = \text{the } K \text{ visible chunks with the largest } s_{t,i}, \qquad
# w_{t,i} = \mathrm{softmax}_{i \in I_t}(s_{t,i})$$
#
# | paper | code | shape in this notebook |
# |---|---|---|
# | $Q^{slc}$ | `queries` | `[T, R]` |
# | $K^{slc}$ | `landmarks` | `[N, R]` |
# | $s$ | `scores` | `[T, N]` |
# | $I$ | `indices` | `[T, K]`, with -1 for an empty slot |
# | $w$ | `weights` | `[T, K]`, with 0 for an empty slot |
#
# (The package has two more axes: one for the batch, and one for the retrieval heads. Each retrieval head chooses its
# own chunks.)
#
# ## Numbers you can check by hand
#
# Twelve tokens, three chunks of $S = 4$: `the code is 7` `birds sing at dawn` `what is the code`. The text has nine
# different words, so we take $R = 9$: one number for each word.
#
# * A **landmark** counts the words of its chunk.
# * A **query** counts the last four words, including the word of the token itself. In a model, a small window would
#   give the token this information.

# %%
TEXT = "the code is 7 birds sing at dawn what is the code"
WORDS = TEXT.split()
VOCABULARY = list(dict.fromkeys(WORDS))  # the nine words in order of appearance
T = len(WORDS)
S = 4
N = 3
R = len(VOCABULARY)


def count_words(words):
    """How often each word of the vocabulary occurs: [R]."""
    return torch.tensor([words.count(word) for word in VOCABULARY], dtype=torch.float64)


landmarks = torch.stack([count_words(WORDS[i * S : i * S + S]) for i in range(N)])
queries = torch.stack([count_words(WORDS[max(t - 3, 0) : t + 1]) for t in range(T)])

# %% [markdown]
# ## Scores
#
# The dot product of two word counts is the number of words that they have in common. Take token 11. Its last four words
# are `what is the code`. Chunk 0 shares three of them, chunk 1 shares none, and chunk 2 shares all four. We divide by
# $\sqrt{9} = 3$. **You should see** 1, 0 and 1.33.


# %%
def scores_by_loop(queries, landmarks):
    """Eq. (1), one number at a time: [T, N]."""
    scores = torch.zeros(len(queries), len(landmarks), dtype=queries.dtype)
    for t, query in enumerate(queries):
        for i, landmark in enumerate(landmarks):
            scores[t, i] = sum(a * b for a, b in zip(query, landmark)) / len(query) ** 0.5
    return scores


# %%
# NBVAL_CHECK_OUTPUT
scores = scores_by_loop(queries, landmarks)
print("scores of token 11:", [round(score, 2) for score in scores[11].tolist()])

# %% [markdown]
# One matrix product gives all scores at once. **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
by_matmul = queries @ landmarks.T / R**0.5  # [T, R] @ [R, N] -> [T, N]
print("loop == matmul:", torch.allclose(scores, by_matmul))

# %% [markdown]
# ## Which chunks a token may see
#
# Chunk 2 had the best score of all. But token 11 itself **belongs** to chunk 2. The landmark of this chunk was made
# from all four of its words. If token 9 could see this landmark, it would look into the future: the landmark contains
# tokens 10 and 11, and token 9 is supposed to predict them.
#
# The rule: a token can see a chunk once the chunk is **complete**. Chunk $i$ ends before token $(i+1) \cdot S$, so
#
# $$\text{chunk } i \text{ is visible to token } t \iff (i+1) \cdot S \le t \qquad (t, i = 0, 1, 2, \dots)$$


# %%
def visible_chunks(T, N, chunk_size):
    """[T, N]: True where chunk i is complete before token t."""
    t = torch.arange(T)[:, None]
    i = torch.arange(N)
    return (i + 1) * chunk_size <= t


# %% [markdown]
# **You should see** that the first four tokens see no chunk, the next four see one chunk, and the last four see two
# chunks. No token of this text sees chunk 2. Token 12 would see it.

# %%
# NBVAL_CHECK_OUTPUT
visible = visible_chunks(T, N, S)
of_package = reference.retrieval.visible_chunks(torch.arange(T), N, S)
print("chunks visible to token 0 ... 11:", visible.sum(dim=1).tolist())
print("same as the package:", torch.equal(visible, of_package))

# %% [markdown]
# > **Note.** The paper prints the condition as $i \le \lfloor t/S \rfloor$. If numbers start at 0, this condition shows
# > a token its own chunk, and so its own future. The code that the paper's authors published uses complete chunks only.
# > We do the same.
#
# How bad would the printed condition be? **You should see** that under it 9 of the 12 tokens see a chunk with words
# that come after them. (The other three tokens are the last tokens of their chunks.)

# %%
# NBVAL_CHECK_OUTPUT
t = torch.arange(T)[:, None]
as_printed = torch.arange(N) <= t // S
last_token = (torch.arange(N) + 1) * S - 1  # number of the last token of each chunk
leaks = (as_printed & (last_token > t)).any(dim=1)
leaks_here = (visible & (last_token >= t)).any(dim=1)
print("tokens that see their future, as printed:", leaks.sum().item())
print("tokens that see their future, our rule  :", leaks_here.sum().item())

# %% [markdown]
# ## The best K
#
# Sort the visible chunks by score and keep the first $K$. Two details decide whether two programs agree to the last
# digit:
#
# * **Ties** go to the newest chunk. (One of the chunks has to win, and a fixed rule makes the result reproducible.)
# * **Empty slots.** If fewer than $K$ chunks are visible, the remaining slots hold -1.


# %%
def keep_best(scores, visible, top_k):
    """For one token: numbers of the K best visible chunks. Ties go to the newest chunk; -1 marks an empty slot."""
    candidates = [(score, i) for i, score in enumerate(scores.tolist()) if visible[i]]
    candidates.sort(reverse=True)  # where scores are equal, the larger chunk number comes first: the newer chunk
    kept = [i for _, i in candidates[:top_k]]
    return kept + [-1] * (top_k - len(kept))


# %% [markdown]
# **You should see** two empty slots for token 3, one chunk and one empty slot for token 5, and two chunks for token 11.
# The tie goes to chunk 2, not to chunk 0.

# %%
# NBVAL_CHECK_OUTPUT
for t in (3, 5, 11):
    print(f"token {t:2} keeps", keep_best(scores[t], visible[t], top_k=2))
print("a tie:", keep_best(torch.tensor([2.0, 1.0, 2.0]), [True, True, True], top_k=1))

# %% [markdown]
# ## Weights
#
# A softmax over the kept chunks turns their scores into weights. Chunks that were not kept do not count. Token 11 keeps
# the scores 1 and 0. **You should see** 0.73 and 0.27, because $e^1/(e^1 + e^0) = 0.73$.


# %%
def retrieve_plainly(queries, landmarks, chunk_size, top_k):
    """Eq. (1) of the paper: queries [T, R], landmarks [N, R] -> indices and weights, both [T, K]."""
    scores = queries @ landmarks.T / queries.shape[-1] ** 0.5
    visible = visible_chunks(len(queries), len(landmarks), chunk_size)
    indices = torch.tensor([keep_best(scores[t], visible[t], top_k) for t in range(len(queries))])
    empty = indices < 0
    kept = scores.gather(1, indices.clamp(min=0)).masked_fill(empty, float("-inf"))
    weights = kept.softmax(dim=1).masked_fill(empty, 0.0)  # softmax makes NaN of a row of empty slots; here it gets 0
    return indices, weights


# %%
# NBVAL_CHECK_OUTPUT
indices, weights = retrieve_plainly(queries, landmarks, S, top_k=2)
rounded = [round(weight, 2) for weight in weights[11].tolist()]
print("token 11 keeps", indices[11].tolist(), "with weights", rounded)

# %% [markdown]
# This is the whole of retrieval. The package's `retrieve` does the same with tensors. **You should see** `True` twice:
# the same chunks get the same weights, in our text and in 50 random texts of random sizes. (The order of the slots is
# free, so we compare the weight of each *chunk*.)


# %%
def per_chunk(indices, weights, chunks):
    """Weights of slots to weights of chunks: indices and weights [T, K] -> [T, N]."""
    spread = torch.zeros(len(indices), chunks, dtype=weights.dtype)
    return spread.scatter_add(1, indices.long().clamp(min=0), weights)


def same_as_package(queries, landmarks, chunk_size, top_k):
    indices, weights = retrieve(queries[None, :, None], landmarks[None, :, None], chunk_size=chunk_size, top_k=top_k)
    theirs = per_chunk(indices[0, :, 0], weights[0, :, 0], len(landmarks))
    ours = per_chunk(*retrieve_plainly(queries, landmarks, chunk_size, top_k), len(landmarks))
    return torch.allclose(ours, theirs)


# %%
# NBVAL_CHECK_OUTPUT
print("twelve tokens:", same_as_package(queries, landmarks, S, top_k=2))
random = torch.Generator().manual_seed(0)
checks = []
for _ in range(50):
    size, chunk_size, top_k = (int(torch.randint(1, high, (), generator=random)) for high in (60, 8, 6))
    q, landmark = (torch.randn(n, 5, dtype=torch.float64, generator=random) for n in (size, size // chunk_size + 1))
    checks.append(same_as_package(q, landmark, chunk_size, top_k))
print("50 random texts:", all(checks))

# %% [markdown]
# ### The future is never chosen
#
# We make two checks on a longer random text. The first: every kept chunk ends before its token. The second is stronger:
# we **change** all queries and all chunks from token 40 on, and the retrieval of the first 40 tokens stays the same.
# **You should see** `True` twice.

# %%
# NBVAL_CHECK_OUTPUT
q, landmark = (torch.randn(1, n, 1, 8, dtype=torch.float64, generator=random) for n in (64, 16))
indices, weights = retrieve(q, landmark, chunk_size=4, top_k=3)
ends = (indices[0, :, 0] + 1) * 4
print("kept chunks end before their token:", bool((ends <= torch.arange(64)[:, None]).all()))
q[:, 40:] += 1.0
landmark[:, 10:] += 1.0  # chunks 10 to 15 hold tokens 40 to 63
indices_2, weights_2 = retrieve(q, landmark, chunk_size=4, top_k=3)
same = torch.equal(indices[:, :40], indices_2[:, :40]) and torch.equal(weights[:, :40], weights_2[:, :40])
print("the past does not change:", same)

# %% [markdown]
# ## The picture
#
# Tokens run from left to right, chunks from top to bottom. A cross marks a chunk that is not visible. A frame marks a
# kept chunk, with $K = 1$. Look at the steps: after every four tokens one more chunk becomes visible.


# %%
def choose(top_k, weighting="softmax", seed=None):
    """Retrieval for the twelve tokens: indices and weights [T, K]."""
    options = {"chunk_size": S, "top_k": top_k, "weighting": weighting, "gumbel_seed": seed}
    indices, weights = retrieve(queries[None, :, None], landmarks[None, :, None], **options)
    return indices[0, :, 0], weights[0, :, 0]


visible_scores = scores.masked_fill(~visible, float("-inf"))

# %%
figure = make_figure(9, 3)
plots.score_map(figure.subplots(), visible_scores, choose(top_k=1)[0], tokens=WORDS)
show(
    figure,
    "Score map of twelve tokens and three chunks. Chunk 0 is visible from token 4 on, chunk 1 from token 8 on. "
    "Tokens 8 and 9 keep chunk 1. Tokens 10 and 11 keep chunk 0, the code is 7. Chunk 2 is never visible.",
)

# %% [markdown]
# ## Another way to compute weights: breaking a stick
#
# The weights of a softmax always add up to 1, even if no chunk is useful. There is an alternative that does not force
# this. Take a stick of length 1. Go through the kept chunks **from the newest to the oldest**. Each chunk breaks off a
# share of the remaining stick. The share is the sigmoid of its score:
#
# $$w_i = \sigma(s_i) \prod_{j \text{ newer}} \bigl(1 - \sigma(s_j)\bigr)
# = \exp\Bigl(s_i - \sum_{j \le i} \mathrm{softplus}(s_j)\Bigr)$$
#
# In the sum, $j \le i$ means: $i$ itself and all newer chunks. A chunk with a very low score takes almost nothing. So
# part of the stick may stay unused. Newer chunks take their share before older ones. The package computes the closed
# form on the right: it needs one cumulative sum and no loop.


# %%
def break_stick(scores):
    """Weights of the kept scores [K], the newest first, one break after the other."""
    left = 1.0
    weights = []
    for score in scores:
        taken = left * torch.sigmoid(score)
        weights.append(taken)
        left = left - taken
    return torch.stack(weights)


# %% [markdown]
# **You should see** `True`, and a sum below 1.

# %%
# NBVAL_CHECK_OUTPUT
some = torch.tensor([0.0, -1.0, 3.0], dtype=torch.float64)  # newest first
closed = reference.retrieval.stick_breaking(some)
print("breaks == closed form:", torch.allclose(break_stick(some), closed))
print("weights:", [round(weight, 2) for weight in closed.tolist()], "sum:", round(closed.sum().item(), 2))

# %% [markdown]
# ## Exploration: noise changes only the choice
#
# Top-$K$ has a weakness in training. A chunk that is not chosen is not read, and a chunk that is not read gets no
# gradient. So a landmark that is wrong today may stay wrong for ever. The remedy: in **training**, add a little noise
# to the scores before the choice. Then another chunk is chosen now and then, and it gets a gradient.
#
# The noise is **Gumbel noise**: $-\log(-\log u)$ with $u$ uniform between 0 and 1. A counter-based generator computes
# it: seed, sequence, token, head and chunk determine one number. The generator has no state, and the order of the calls
# does not matter. So a GPU kernel and this page get the same noise.
#
# **You should see** that the same seed gives the same noise, and that another seed gives other noise. So token 11 keeps
# different chunks for different seeds.

# %%
# NBVAL_CHECK_OUTPUT
noise = {seed: gumbel_noise(seed, torch.arange(T)[None], 1, N) for seed in (1, 2)}  # [B, T, J, N]
again = gumbel_noise(1, torch.arange(T)[None], 1, N)
print("same seed, same noise :", torch.equal(noise[1], again))
print("other seed, same noise:", torch.equal(noise[1], noise[2]))
print("token 11 with seeds 1 to 12 keeps chunk:", [choose(1, seed=seed)[0][11].item() for seed in range(1, 13)])

# %% [markdown]
# Why this kind of noise? If we add Gumbel noise to the scores and take the largest sum, we **draw** chunk $i$ with
# exactly the probability $\mathrm{softmax}(s)_i$. In the next cell, 20,000 tokens with the same query each choose one
# of four chunks. **You should see** that the measured shares lie within 0.01 of the softmax.

# %%
# NBVAL_CHECK_OUTPUT
four = torch.tensor([1.0, 0.0, 0.5, -1.0])  # with R = 1 and a query of 1 the landmarks are the scores
same_query = torch.ones(1, 20_000, 1, 1)
drawn, _ = retrieve(same_query, four[None, :, None, None], chunk_size=1, top_k=1, offset=4, gumbel_seed=0)
measured = torch.bincount(drawn.flatten(), minlength=4) / 20_000
print("softmax :", [round(share, 2) for share in four.softmax(0).tolist()])
print("measured:", [round(share, 2) for share in measured.tolist()])
print("within 0.01:", bool((measured - four.softmax(0)).abs().max() < 0.01))

# %% [markdown]
# The noise changes **only the choice**. The weights of the chosen chunks come from the scores without noise. Noise in
# the weights would teach the model that its own scores mean nothing. **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
indices, weights = choose(2, seed=3)
kept = scores.gather(1, indices.long().clamp(min=0)).masked_fill(indices < 0, float("-inf"))
print("weights == softmax of scores without noise:", torch.allclose(weights[4:], kept[4:].softmax(dim=1)))

# %% [markdown]
# ### Move it
#
# This picture shows all of it. A `noise seed` of 0 means no noise. Try token 11 with $K = 1$ and step through the
# seeds: for most seeds the token keeps chunk 0, for some it keeps chunk 1. Then set $K = 2$ and compare the two ways to
# compute weights.


# %%
def draw_twelve(figure, token, K, weighting, seed):
    indices, weights = choose(K, weighting, seed or None)
    left, right = figure.subplots(1, 2, width_ratios=(1.8, 1))
    plots.score_map(left, visible_scores, indices, tokens=WORDS, token=token)
    shares = per_chunk(indices, weights, N)[token]
    plots.weight_bars(right, shares, [f"{i}: {' '.join(WORDS[i * S : i * S + S])}" for i in range(N)])
    right.set_title(f"token {token} reads", fontsize=11)
    kept = [i for i in indices[token].tolist() if i >= 0]
    return f"Token {token} ({WORDS[token]}) keeps chunks {kept}; weights sum to {shares.sum():.2f}."


explore(
    draw_twelve,
    alt="Left: score map of twelve tokens and three chunks, with a frame around each kept cell. Right: the weights of one token.",
    size=(11, 3.4),
    K=Control((1, 3), label="chunks kept K"),
    token=Control((0, 11), start=11),
    weighting=["softmax", "stick_breaking"],
    seed=Control((0, 20), label="noise seed (0: none)"),
)

# %% [markdown]
# ## A longer text with something to find
#
# Twelve tokens are a toy. The next text has 512 tokens, in 32 chunks of 16. Every token is drawn from 300 random words,
# and each word is a random vector with $R = 64$ numbers. Two passages are **quoted**: tokens 320 to 383 repeat tokens
# 64 to 127, and tokens 448 to 495 repeat tokens 200 to 247.
#
# A landmark is the mean of its chunk. A query is the mean of the token's last four words. Nothing is trained.

# %%
LONG_T = 512
LONG_S = 16
LONG_R = 64
words = torch.randint(300, (LONG_T,), generator=random)
words[320:384] = words[64:128]
words[448:496] = words[200:248]
vectors = torch.randn(300, LONG_R, dtype=torch.float64, generator=random)[words]  # [T, R]
long_landmarks = vectors.unflatten(0, (-1, LONG_S)).mean(dim=1)  # [N, R]
long_queries = torch.stack([vectors[max(t - 3, 0) : t + 1].mean(dim=0) for t in range(LONG_T)])

# %% [markdown]
# Good retrieval sends each token of a quotation to the chunk that it quotes. **You should see** that this happens for
# four tokens out of five. A random choice would be right for one token in twenty-five.

# %%
# NBVAL_CHECK_OUTPUT
indices, _ = retrieve(long_queries[None, :, None], long_landmarks[None, :, None], chunk_size=LONG_S, top_k=1)
quoting = torch.cat((torch.arange(324, 384), torch.arange(452, 496)))  # from the fifth quoted word on
quoted = torch.where(quoting < 400, quoting - 256, quoting - 248) // LONG_S
hits = (indices[0, quoting, 0, 0] == quoted).float().mean().item()
print(f"quoting tokens that keep the chunk they quote: {100 * hits:.0f} %")

# %% [markdown]
# ### Move it
#
# A bright cell is a high score. A dot marks a chunk that was kept. Each of the two quotations looks like a staircase:
# while the token moves through the quotation, the best chunk moves with it. Move the mouse over the map, or click it
# and press the arrow keys. The bars beside or below the map show the weight that the token gives to each of its chunks.
#
# Raise $K$. Then turn on the noise, and see how `sharpness` protects the choice. It multiplies the queries, so the
# differences between scores grow, while the noise stays the same. A trained model learns its own sharpness.


# %%
def compute_long(K, seed, sharpness):
    """Scores [T, N], and the result of `retrieve`: indices and weights [T, K]."""
    sharp = long_queries * sharpness
    options = {"chunk_size": LONG_S, "top_k": K, "gumbel_seed": seed or None}
    indices, weights = retrieve(sharp[None, :, None], long_landmarks[None, :, None], **options)
    scores = sharp @ long_landmarks.T / LONG_R**0.5
    seen = visible_chunks(LONG_T, len(long_landmarks), LONG_S)
    return scores.masked_fill(~seen, float("-inf")), indices[0, :, 0], weights[0, :, 0]


explore_map(
    compute_long,
    alt="Left: score map of 512 tokens and 32 chunks; the two quotations look like staircases. Right: the weights of one token.",
    token=350,
    K=Control((1, 8), start=2, label="chunks kept K"),
    seed=Control((0, 20), label="noise seed (0: none)"),
    sharpness=Control([1, 2, 4, 8, 16], start=8),
)

# %% [markdown]
# ## Two more options
#
# | option of `retrieve` | what it does | why |
# |---|---|---|
# | `exclude_window=W` | chunks that lie completely inside the last $W$ tokens are not visible | the window already reads them |
# | `query_block=n` | the first token of each block of $n$ tokens chooses for the whole block | fewer choices, shared chunks |
#
# Why does the *first* token of the block choose, and not the mean of the block? The mean would contain the future of
# every token except the last. The exercises try both options.

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.mechanism.retrieval import (
    check_deciding_token,
    check_retrieval_weights,
    check_visible_outside,
)

# %% [markdown]
# **1. Leave out what the window sees.** *Difficulty 2, importance 3, 10 minutes.* With `exclude_window=W`, chunk $i$ is
# visible only if it also begins at token $t - W$ or before. Extend `visible_chunks`. Which chunks can token 11 still
# see with $W = 8$?


# %%
def visible_outside(T, N, chunk_size, window):
    """[T, N]: True where chunk i is complete before token t and begins at token t - window or before."""
    # your code


check_visible_outside(visible_outside)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Token 11 still sees chunk 0 only. Chunk 1 begins at token 4, and the window of token 11 reads tokens 4 to 11.
#
# ```python
# def visible_outside(T, N, chunk_size, window):
#     begins_before_window = torch.arange(N) * chunk_size <= torch.arange(T)[:, None] - window
#     return visible_chunks(T, N, chunk_size) & begins_before_window
#
#
# check_visible_outside(visible_outside)
# for window in range(13):
#     theirs = reference.retrieval.visible_chunks(torch.arange(T), N, S, window)
#     assert torch.equal(visible_outside(T, N, S, window), theirs)
# print(visible_outside(T, N, S, 8)[11].tolist())  # [True, False, False]
# ```
#
# </details>

# %% [markdown]
# **2. Share a choice.** *Difficulty 1, importance 2, 5 minutes.* With `query_block=n` the first token of each block of
# $n$ tokens chooses for the whole block. Which token's query decides for token $t$? Prove it with `query_block=4` and
# $K = 1$ on the twelve tokens: change one query and see that token 11 keeps another chunk.


# %%
def deciding_token(t, block):
    """The number of the token whose query decides for token t."""
    # your code


check_deciding_token(deciding_token)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Token 8 is the first token of the block that contains token 11 (tokens 8 to 11). Its last four words are `sing at dawn
# what`, so it keeps chunk 1, and token 11 keeps chunk 1 too. Give token 8 the query of token 11, and the whole block
# keeps chunk 0. A change of token 11's own query has no effect.
#
# ```python
# def deciding_token(t, block):
#     return t // block * block
#
#
# def chunk_of_11(queries):
#     indices, _ = retrieve(queries[None, :, None], landmarks[None, :, None], chunk_size=S, top_k=1, query_block=4)
#     return indices[0, 11, 0, 0].item()
#
#
# check_deciding_token(deciding_token)
# first = queries.clone()
# first[deciding_token(11, 4)] = queries[11]
# own = queries.clone()
# own[11] = 0
# print(chunk_of_11(queries), chunk_of_11(first), chunk_of_11(own))  # 1 0 1
# assert (chunk_of_11(queries), chunk_of_11(first), chunk_of_11(own)) == (1, 0, 1)
# ```
#
# </details>

# %% [markdown]
# **3. Retrieval without loops.** *Difficulty 3, importance 5, 15 minutes.* Write Eq. (1) with tensors: score all chunks,
# hide those that are not complete, keep the best $K$, and turn the kept scores into weights. Return one weight for each
# chunk, and 0 for every chunk that is not kept. A token that sees no chunk gets only zeros. (The examples contain no
# ties.)


# %%
def retrieval_weights(queries, landmarks, chunk_size, top_k):
    """queries [T, R], landmarks [N, R] -> the weight of every chunk for every token [T, N]."""
    # your code


check_retrieval_weights(retrieval_weights)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Everything that is hidden or not kept gets a score of $-\infty$ before the softmax. A row that holds nothing else
# becomes NaN, so those cells get 0 at the end.
#
# ```python
# def retrieval_weights(queries, landmarks, chunk_size, top_k):
#     T = len(queries)
#     N = len(landmarks)
#     scores = queries @ landmarks.T / queries.shape[1] ** 0.5
#     visible = visible_chunks(T, N, chunk_size)
#     scores = scores.masked_fill(~visible, float("-inf"))
#     best = scores.topk(min(top_k, N)).indices
#     kept = torch.zeros_like(visible).scatter(1, best, True) & visible
#     return scores.masked_fill(~kept, float("-inf")).softmax(dim=1).masked_fill(~kept, 0.0)
#
#
# check_retrieval_weights(retrieval_weights)
# assert torch.allclose(retrieval_weights(queries, landmarks, S, 2), per_chunk(*retrieve_plainly(queries, landmarks, S, 2), N))
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# We know which chunks a token keeps and how much weight each of them gets. [Notebook 04, *How are chunks read and
# blended?*](04_fusion.ipynb) reads the chunks. It shows how the loss of the language model teaches the landmarks
# through the weights $w$, which is the main idea of HSA. It takes 25 minutes.
