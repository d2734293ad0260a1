# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 02 · What does a chunk say about itself?
#
# A reader who looks for one fact does not read every page again. She reads the headings. In Hierarchical Sparse
# Attention (HSA) the pages are **chunks**. The heading of a chunk is one vector, its **landmark**. This notebook cuts a
# text into chunks. It asks what makes a good landmark. Then it builds the small network that computes the landmark: the
# chunk encoder.
#
# After this notebook you will be able to
#
# * cut a sequence into chunks, and say what happens to the tokens that are left over,
# * show what the mean of a chunk can never express,
# * build the chunk encoder from its parts, and say why it looks both ways, why it needs positions, and what `[CLS]` is
#   for.
#
# **Time:** 20 minutes to read, 10 seconds to run on two CPU cores. **Needs:** [notebook 01](01_why.ipynb), or its last
# idea: a token chooses a few chunks by their landmarks and reads only the tokens of those chunks. You should have seen
# an attention layer before.
#
# [← 01 why](01_why.ipynb) · [map of the course](00_start.ipynb) · [03 retrieval →](03_retrieval.ipynb)

# %%
import dataclasses

import torch
from torch.nn.functional import cosine_similarity

from hsa_mini import PRESETS, HSAModel
from hsa_mini.reference import retrieve, sliding_window_attention
from hsa_mini.viz import Control, explore, plots, show
from hsa_mini.viz.course import side_by_side

# %% [markdown]
# ## Twelve tokens, three chunks
#
# Our text is `the code is 7 birds sing at dawn what is the code`. Every word is one token. In a model the chunk encoder
# reads the output of the **middle layer**, halfway up the model: $T$ vectors of $C$ numbers. The paper calls them $H$,
# the code calls them `hidden`. We have no trained model today, so every word gets the simplest possible vector. It has
# a 5 at the index of this word and zeros everywhere else. Equal words have equal vectors. The vectors of different
# words are at right angles. You can check everything by hand.


# %%
def word_vectors(words, width):
    """A 5 at the index of each word, zeros elsewhere: T words -> [T, C]."""
    index = {word: i for i, word in enumerate(dict.fromkeys(words))}
    return 5.0 * torch.eye(width, dtype=torch.float64)[[index[word] for word in words]]


TEXT = "the code is 7 birds sing at dawn what is the code"
WORDS = TEXT.split()
C = 32
hidden = word_vectors(WORDS, C)

# %% [markdown]
# Cutting is easy. Only **complete** chunks count. The tokens that are left over wait until their chunk is complete.


# %%
def split_into_chunks(hidden, chunk_size):
    """hidden [T, C] -> the complete chunks [N, S, C], and the tokens that wait [fewer than S, C]."""
    complete = hidden.shape[0] // chunk_size
    cut = complete * chunk_size
    return hidden[:cut].unflatten(0, (complete, chunk_size)), hidden[cut:]


# %% [markdown]
# **You should see** three chunks of four and no waiting tokens for $S = 4$, and two chunks of five and two waiting
# tokens for $S = 5$. In both cases no token is lost: the parts, put one after the other, give the whole text.

# %%
# NBVAL_CHECK_OUTPUT
for S in (4, 5):
    chunks, waiting = split_into_chunks(hidden, S)
    nothing_lost = torch.equal(torch.cat((chunks.flatten(0, 1), waiting)), hidden)
    print(f"S={S}: chunks {list(chunks.shape)}, waiting {list(waiting.shape)}, nothing lost: {nothing_lost}")

# %% [markdown]
# Now the text arrives word by word, as it does when a model generates text. **You should see** that a chunk appears
# exactly when its fourth word arrives.

# %%
# NBVAL_CHECK_OUTPUT
for seen in (3, 4, 7, 8, 12):
    chunks, waiting = split_into_chunks(hidden[:seen], 4)
    words = " ".join(WORDS[seen - len(waiting) : seen])
    print(f"after {seen:2} tokens: complete chunks: {len(chunks)}; waiting: {words or '-'}")

# %% [markdown]
# Why do tokens wait? *Later* tokens read a chunk. If half a chunk had a landmark, that landmark would change with every
# new token. Every result that was computed from it would be wrong a moment later. A complete chunk never changes. The
# model encodes it **once** and keeps the result. The model can still read the waiting tokens, because the sliding
# window sees them.
#
# ## The simplest landmark: the mean
#
# Average the vectors of a chunk. This takes one line, and nothing has to be learned.


# %%
def mean_landmarks(chunks):
    """chunks [N, S, C] -> [N, C]."""
    return chunks.mean(dim=1)


# %% [markdown]
# The mean can already find a word. Every token compares its own vector with the means. The package's `retrieve` does
# this (notebook 03 explains it). **You should see** that the last token, `code`, chooses the chunk that contains
# `code`.

# %%
# NBVAL_CHECK_OUTPUT
chunks, _ = split_into_chunks(hidden, 4)


def choose(queries, landmarks, chunk_size, top_k):
    """queries [T, C], landmarks [N, C] -> chosen chunks and their weights, both [T, K]."""
    indices, weights = retrieve(queries[None, :, None], landmarks[None, :, None], chunk_size=chunk_size, top_k=top_k)
    return indices[0, :, 0], weights[0, :, 0]


indices, _ = choose(hidden, mean_landmarks(chunks), 4, top_k=1)
print("token 11 chooses chunk", indices[11].item(), "=", " ".join(WORDS[indices[11] * 4 :][:4]))

# %% [markdown]
# ### Move it
#
# Move the token and the chunk size. Blue shows the weight that the token gives to a chunk. A grey chunk is not
# complete, or it lies in the future.
#
# Try $S = 3$ with token 11. The token still finds `the code is`, but the `7` now belongs to the next chunk. We come
# back to this case below.


# %%
def weights_by_chunk(S, token, K):
    """What a token gives to each chunk of S words."""
    chunks, _ = split_into_chunks(hidden, S)
    indices, weights = choose(hidden, mean_landmarks(chunks), S, K)
    return [weights[token][indices[token] == i].sum().item() for i in range(len(chunks))]


def name_best(S, token, weights):
    """The chunk with the largest weight, in words."""
    this_token = f"Token {token} ({WORDS[token]}) with S={S}"
    if not any(weights):
        return f"{this_token}: no chunk is complete before it, so it retrieves nothing."
    best = max(range(len(weights)), key=weights.__getitem__)
    words = " ".join(WORDS[best * S : best * S + S])
    return f"{this_token}: chunk {best} has the largest weight ({weights[best]:.2f}): {words}."


def draw_chunks(figure, S, token, K):
    weights = weights_by_chunk(S, token, K)
    plots.chunk_grid(figure.subplots(), WORDS, S, token=token, weights=weights)
    return name_best(S, token, weights)


explore(
    draw_chunks,
    alt="The twelve words in rows, one row per chunk, with the weight that the chosen token gives to each chunk.",
    size=(9, 3.8),
    S=Control((2, 6), start=4, label="chunk size S"),
    token=Control((0, 11), start=11, label="token that retrieves"),
    K=Control((1, 3), start=2, label="chunks kept K"),
)

# %% [markdown]
# ## What a mean can never express
#
# `the code is 7` and `7 is code the` have the same words. Their means are the same vector, so no query can tell them
# apart. The means of `dog bites man` and `man bites dog` are equal, too. (In a model the middle layer has already
# written information about the order into each vector, and a mean cannot remove all of it. But the mean adds no
# information about the order.)
#
# **You should see** `True`: all 24 orders of the words of a chunk have the same mean.

# %%
# NBVAL_CHECK_OUTPUT
code_is_7 = chunks[:1]  # [1, S, C]
orders = torch.cartesian_prod(*[torch.arange(4)] * 4)
orders = orders[[len(set(order.tolist())) == 4 for order in orders]]  # the 24 permutations
means = torch.cat([mean_landmarks(code_is_7[:, order]) for order in orders])
print(len(orders), "orders, one mean:", torch.allclose(means, means[:1].expand_as(means)))

# %% [markdown]
# ## A better summary, step by step
#
# ### Step 1: a reader, `[CLS]`
#
# A mean gives every word the same share. It would be better to give the important words larger shares. We put one extra
# vector, called `[CLS]`, beside the $S$ tokens and let it **attend** to them. `[CLS]` is not the vector of any word. It
# is learned in training. Its output is the summary. (The name comes from BERT.)
#
# Is that enough? **You should see** `True`: the summary still does not depend on the order. Attention compares vectors
# and adds them up. The result is the same, no matter where a word stands.


# %%
def read_by_cls(chunk, cls):
    """[CLS] attends to the tokens of one chunk: chunk [S, C], cls [C] -> summary [C]."""
    shares = (chunk @ cls / cls.shape[-1] ** 0.5).softmax(dim=0)  # [S]
    return shares @ chunk


# %%
# NBVAL_CHECK_OUTPUT
cls = torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
backwards = code_is_7[0].flip(0)
print("blind to order:", torch.allclose(read_by_cls(code_is_7[0], cls), read_by_cls(backwards, cls)))

# %% [markdown]
# ### Step 2: positions, by rotation
#
# So tokens must carry their positions. The usual method today is **RoPE**, rotary position embedding (Su et al., arXiv
# 2104.09864). Cut a vector into pairs of numbers. Think of each pair as an arrow in the plane. Then turn the arrow by
# an angle that grows with the position $t$:
#
# $$\text{angle of pair } p \text{ at position } t = t \cdot \theta_p, \qquad \theta_p = 10000^{-2p/D}, \qquad
# p = 0 \ldots D/2 - 1$$
#
# The first pair turns fast, the last pair hardly turns at all. RoPE turns queries and keys. It does not turn values.


# %%
def rope(x, base=10_000.0):
    """Turn pair p (numbers p and p + D/2) of the vector at position t by t * base**(-2p/D): x [..., S, D]."""
    S, D = x.shape[-2:]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(S, dtype=torch.float64)[:, None] * frequency  # [S, D/2]
    cos = angle.cos()
    sin = angle.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# %% [markdown]
# A rotation changes no length. And the dot product of two turned vectors depends only on the **distance** of the two
# positions: the dot product for positions 2 and 5 equals that for positions 0 and 3. **You should see** `True` twice,
# then `False`: another distance gives another dot product.

# %%
# NBVAL_CHECK_OUTPUT
q, k = torch.randn(2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
turned_q = rope(q.expand(8, C))  # the same vector at positions 0 to 7
turned_k = rope(k.expand(8, C))
print("lengths stay:", torch.allclose(turned_q.norm(dim=-1), q.norm()))
print("distance 3 == distance 3:", torch.allclose(turned_q[5] @ turned_k[2], turned_q[3] @ turned_k[0]))
print("distance 3 == distance 1:", torch.allclose(turned_q[5] @ turned_k[2], turned_q[3] @ turned_k[2]))

# %% [markdown]
# Inside a chunk all distances are small, and they are always the same ones: 0 to $S$, forwards and backwards. So the
# first training step already shows the encoder every distance that it will ever see. Positions are harmless **here**.
# [Notebook 05](05_layer.ipynb) explains why they are *not* harmless at large distances.
#
# ### Step 3: look both ways
#
# A language model may only look back: token $t$ must not see the token that it has to predict. Inside a complete chunk
# this rule does not apply. All tokens that read the chunk come after its end, so the whole chunk lies in their past.
# The encoder therefore looks **both ways**: in `the code is 7` the key of `code` may contain the information that a `7`
# follows.
#
# Here is one block of the encoder. It uses the weights of the package's own block. It is an ordinary transformer block,
# except that one line is *missing*: there is no mask.


# %%
def heads_of(x, qkv):
    """x [N, S+1, C] -> q, k, v [N, H, S+1, D]; queries and keys are normalised, then turned."""
    q, k, v = (project(x).unflatten(-1, (-1, qkv.head_dim)).transpose(1, 2) for project in (qkv.q, qkv.k, qkv.v))
    group = q.shape[1] // k.shape[1]  # query heads that share one key/value head
    q = rope(qkv.q_norm(q))
    k = rope(qkv.k_norm(k))
    return q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def encoder_block(x, block):
    """All positions of a chunk attend to all positions, then the MLP: x [N, S+1, C] -> [N, S+1, C]."""
    q, k, v = heads_of(block.attention_norm(x), block.qkv)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [N, H, S+1, S+1]
    read = scores.softmax(dim=-1) @ v  # no mask: both ways
    x = x + block.out(read.transpose(1, 2).flatten(-2))
    return x + block.mlp(block.mlp_norm(x))


# %% [markdown]
# ### Step 4: one reading, three results
#
# In the paper's symbols: chunk $i$ gives keys $K_{[i]}$ and values $V_{[i]}$, one for each of its $S$ tokens, and one
# landmark $L_i$ (this is $K^{slc}_i$ in Eq. (1), as notebook 03 shows). `[CLS]` stands last.
#
# * Two linear maps of the $S$ token outputs give $K_{[i]}$ and $V_{[i]}$. A token that retrieved the chunk attends to
#   them.
# * A third linear map, of the `[CLS]` output, gives the landmark. A token that is still *choosing* compares its query
#   with the landmark.
#
# Keys and landmarks are normalised, so that scores stay in a sensible range. In the shapes below $J$ is the number of
# key/value heads, $D$ is the size of a head and $R$ is the size of a landmark.


# %%
def encode_chunks(chunks, encoder):
    """chunks [N, S, C] -> k and v [N, S, J, D], landmarks [N, R]."""
    x = torch.cat((chunks, encoder.cls.expand(len(chunks), 1, -1)), dim=1)  # [CLS] last: [N, S+1, C]
    for block in encoder.blocks:
        x = encoder_block(x, block)
    x = encoder.norm(x)
    tokens = x[:, :-1]
    summary = x[:, -1]
    k, v = (project(tokens).unflatten(-1, (-1, encoder.config.hsa_head_dim)) for project in (encoder.k, encoder.v))
    return encoder.k_norm(k), v, encoder.landmark_norm(encoder.landmark(summary))


# %% [markdown]
# **You should see** that this function gives the same numbers as the encoder of the package,
# `hsa_mini.model.chunk_encoder.ChunkEncoder`. We take the encoder from a tiny model with random weights. From now on we
# import it.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
tiny = dataclasses.replace(PRESETS["debug"], hsa_heads=2, hsa_kv_heads=1, retrieval_heads=1)
encoder = HSAModel(tiny, dtype=torch.float64).encoder.requires_grad_(False)
# [B, N, S, C] -> twice [B, N, S, J, D], then [B, N, 1, R] with one retrieval head, and the outputs of [CLS]
k, v, landmarks, _ = encoder(chunks[None])
ours = encode_chunks(chunks, encoder)
same = [torch.allclose(a, b[0].reshape(a.shape), atol=1e-6) for a, b in zip(ours, (k, v, landmarks))]
print("k:", list(k.shape), " v:", list(v.shape), " landmarks:", list(landmarks.shape))
print("ours == package:", all(same))

# %% [markdown]
# ## Now the order counts
#
# We take the same 24 orders again. **You should see** one mean, but 24 different landmarks. (Training decides how
# different they are. A random encoder can only show that they *are* different.)


# %%
def count_distinct(vectors):
    """How many of the vectors [M, R] are farther than 0.001 from all earlier ones."""
    close = torch.cdist(vectors, vectors) < 1e-3
    return int((close.tril(-1).sum(dim=1) == 0).sum())


# %%
# NBVAL_CHECK_OUTPUT
shuffled = torch.cat([code_is_7[:, order] for order in orders])  # [24, S, C]
print("distinct means    :", count_distinct(mean_landmarks(shuffled)))
print("distinct landmarks:", count_distinct(encoder(shuffled[None]).landmarks[0, :, 0]))

# %% [markdown]
# The keys depend on both directions. We change the last word of the chunk. **You should see** that the key of the
# *first* word changes.

# %%
# NBVAL_CHECK_OUTPUT
other = code_is_7.clone()
other[0, 3] = other[0, 3].roll(20)  # `the code is 8`: a word with another index
change = (encoder(other[None]).k - encoder(code_is_7[None]).k).abs()[0, 0, 0].max()
print("the key of `the` depends on the word at the end:", change.item() > 1e-3)

# %% [markdown]
# ### Move it
#
# Put the words of the chunk into another order. The picture compares three summaries of the new order with the
# summaries of the original. A bar shows the angle between the two vectors. An angle of 0 degrees means that no query
# can tell the two apart.


# %%
def angle_between(one, other):
    """Degrees between two vectors [1, R]."""
    return cosine_similarity(one, other).clamp(max=1).arccos().rad2deg().item()


ORDERS = {
    "the code is 7": (0, 1, 2, 3),
    "the code 7 is": (0, 1, 3, 2),
    "code the is 7": (1, 0, 2, 3),
    "7 is code the": (3, 2, 1, 0),
}
SUMMARIES = {
    "mean": mean_landmarks,
    "[CLS] without positions": lambda x: read_by_cls(x[0], cls)[None],
    "chunk encoder": lambda x: encoder(x[None]).landmarks[0, :, 0],
}


def angles_of(order, chunk):
    """Degrees between the summaries of a chunk before and after reordering."""
    original = chunks[chunk : chunk + 1]
    reordered = original[:, list(ORDERS[order])]
    return [angle_between(summary(original), summary(reordered)) for summary in SUMMARIES.values()]


def name_angles(order, chunk, angles):
    """The order and the angles, in words."""
    words = " ".join(WORDS[chunk * 4 + i] for i in ORDERS[order])
    named = (f"{name} {angle:.0f}°" for name, angle in zip(SUMMARIES, angles))
    return f"Order: {words}. Angles: {', '.join(named)}."


def draw_orders(figure, order, chunk):
    angles = angles_of(order, chunk)
    side_by_side.angle_bars(figure.subplots(), angles, list(SUMMARIES))
    return name_angles(order, chunk, angles)


explore(
    draw_orders,
    alt="Three bars: the angle between a reordered chunk and its original, for the mean, for [CLS] without positions "
    "and for the chunk encoder.",
    size=(8.5, 2.6),
    order=Control(list(ORDERS), start="7 is code the", label="order, as in chunk 0"),
    chunk=Control((0, 2), label="chunk"),
)

# %% [markdown]
# ## A fact that lies across two chunks
#
# Back to $S = 3$, where `the code is` and `7 birds sing` are different chunks. Is the `7` lost? In a model it is not.
# The encoder does not read bare words. It reads the output of the **middle layer**, and the window attention of the
# lower layers has already written into the vector of `7` which words stood before it.
#
# We imitate this with one real window layer of $W = 4$: every token adds what it reads in its window. Then we measure
# how well chunk 1, `7 birds sing`, matches the query `code`: we take the cosine similarity of the two vectors. **You
# should see** it rise from zero.

# %%
# NBVAL_CHECK_OUTPUT
as_heads = hidden[None, :, None]  # [1, T, 1, C]
equal_shares = torch.zeros_like(as_heads)  # a query of zeros gives every key in its window the same share
mixed = hidden + sliding_window_attention(equal_shares, as_heads, as_heads, window=4)[0, :, 0]
sources = {"bare words": hidden, "after a window layer": mixed}
for name, source in sources.items():
    chunk_1 = mean_landmarks(split_into_chunks(source, 3)[0])[1]
    similarity = cosine_similarity(hidden[11], chunk_1, dim=0).item()
    print(f"{name}: similarity of chunk 1 to `code`: {similarity:.2f}")

# %%
labels = [" ".join(WORDS[i * 3 : i * 3 + 3]) for i in range(4)]
similarities = {}
for name, source in sources.items():
    means = mean_landmarks(split_into_chunks(source, 3)[0])
    similarities[name] = cosine_similarity(hidden[11][None], means)
show(
    side_by_side.bars(similarities, labels, limit=0.7, xlabel="similarity to `code`"),
    "Two bar charts show how similar each of four chunks of three words is to the query code. With bare words, the "
    "similarity of 7 birds sing is zero. After a window layer, it is not.",
)

# %% [markdown]
# (Chunk 3, `is the code`, is similar too, because it contains the query itself. It is not complete before token 11, so
# token 11 cannot choose it. Our query is still the bare word. In a model the window layer changes the query as well.)
#
# ## How large should a chunk be?
#
# * **Small chunks** are precise, but there are many of them. 16M tokens with $S = 64$ make 262,144 landmarks, and every
#   token scores all of them.
# * **Large chunks** need few landmarks. But one vector has to summarise more tokens, and a token that wants one word
#   reads all tokens of the chunk.
#
# The paper and this project take $S = 64$. The toy text takes $S = 4$.

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.mechanism.chunks import check_mean_of_keys, check_sizes_that_keep_whole, check_turn

# %% [markdown]
# **1. Is `[CLS]` needed?** *Difficulty 1, importance 3, 5 minutes.* The encoder gives keys. Take the mean of a chunk's
# keys as its landmark, without any `[CLS]` output. Is this landmark blind to order, like the mean of the words? Guess
# first. Then use `shuffled`, `encoder` and `count_distinct`.


# %%
def mean_of_keys(k):
    """k [N, S, D] -> one landmark for each chunk [N, D]."""
    # your code


check_mean_of_keys(mean_of_keys)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# It is not blind. The positions have already changed the output of each token before the mean is taken.
#
# ```python
# def mean_of_keys(k):
#     return k.mean(dim=1)
#
#
# check_mean_of_keys(mean_of_keys)
# keys = encoder(shuffled[None]).k[0, :, :, 0]  # [24, S, D]
# print(count_distinct(mean_of_keys(keys)))
# assert count_distinct(mean_of_keys(keys)) == 24
# ```
#
# So why do we use `[CLS]`? A heading and a page have different jobs. The outputs of the tokens are made to be *read*.
# The landmark is made to be *found*. `[CLS]` can give a larger share to a rare name than to four commas. A mean gives
# each token the same share.
#
# </details>

# %% [markdown]
# **2. Which chunk sizes keep the fact whole?** *Difficulty 1, importance 4, 5 minutes.* For which $S$ do `code` (token
# 1) and `7` (token 3) lie in one chunk? From which token on can that chunk be read?


# %%
def sizes_that_keep_whole(first, last, sizes):
    """The chunk sizes from 1 to `sizes` for which tokens `first` and `last` lie in one chunk, as a list."""
    # your code


check_sizes_that_keep_whole(sizes_that_keep_whole)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# Token $t$ lies in chunk $\lfloor t/S \rfloor$. Chunk 0 can be read from token $S$ on, when it is complete.
#
# ```python
# def sizes_that_keep_whole(first, last, sizes):
#     return [S for S in range(1, sizes + 1) if first // S == last // S]
#
#
# check_sizes_that_keep_whole(sizes_that_keep_whole)
# print(sizes_that_keep_whole(1, 3, 6))  # [4, 5, 6], readable from token 4, 5 and 6 on
# for S in sizes_that_keep_whole(1, 3, 6):
#     indices, _ = choose(hidden, mean_landmarks(split_into_chunks(hidden, S)[0]), S, top_k=1)
#     assert int((indices[:, 0] == 0).nonzero()[0]) == S
# ```
#
# </details>

# %% [markdown]
# **3. Turn one vector.** *Difficulty 3, importance 3, 10 minutes.* Write RoPE for a single vector. Pair $p$ is made of
# numbers $p$ and $p + D/2$. It turns by the angle $t \cdot \text{base}^{-2p/D}$, from the first axis towards the second.


# %%
def turn(x, position, base):
    """x [D] at this position -> the turned vector [D]."""
    # your code


check_turn(turn)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def turn(x, position, base):
#     D = len(x)
#     angle = position * base ** (-torch.arange(0, D, 2, dtype=x.dtype) / D)  # [D/2]
#     first, second = x.chunk(2)
#     return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()))
#
#
# check_turn(turn)
# assert torch.allclose(turn(q, 5, 10_000.0), turned_q[5])
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# Every chunk now has a heading. [Notebook 03, *Which chunks matter to this token?*](03_retrieval.ipynb) explains
# `retrieve`: the scores, the choice of the best $K$, and the weights that let a model *learn* where to look. It takes
# 25 minutes.
