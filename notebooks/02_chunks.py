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
# A reader who looks for one fact does not read every page again. She looks at the headings. In Hierarchical Sparse
# Attention (HSA) the pages are **chunks**, and the heading of a chunk is one vector, its **landmark**. This notebook cuts
# a text into chunks, asks what makes a good landmark, and builds the small network that writes it: the chunk encoder.
#
# After this notebook you will be able to
#
# * cut a sequence into chunks, and say what happens to the tokens that are left over,
# * show what the mean of a chunk can never say,
# * build the chunk encoder from its parts, and say why it looks both ways, why it needs positions, and what `[CLS]` is for.
#
# **Time:** 20 minutes to read, 10 seconds to run on two CPU cores. **Needs:** [notebook 01](01_why.ipynb), or its last
# idea: a token chooses a few chunks by their landmarks and reads those alone. You should have seen an attention layer
# before.

# %%
import dataclasses

import torch
from torch.nn.functional import cosine_similarity

from hsa_mini import PRESETS, HSAModel
from hsa_mini.reference import retrieve, sliding_window_attention
from hsa_mini.viz import Control, explore, make_figure, plots, show

# %% [markdown]
# ## Twelve tokens, three chunks
#
# Our text is `the code is 7 birds sing at dawn what is the code`. Every word is one token. In a model the chunk encoder
# reads what the **middle layer** makes of the tokens: $T$ vectors of $C$ numbers, the paper's $H$, called `hidden` in
# code. We have no trained model today. So every word gets the simplest vector there is: a 5 in a place of its own, zeros
# elsewhere. Equal words are alike, different words have nothing in common, and you can check everything by hand.


# %%
def word_vectors(words, width):
    """A 5 in the place of each word, zeros elsewhere: T words -> [T, C]."""
    places = {word: place for place, word in enumerate(dict.fromkeys(words))}
    return 5.0 * torch.eye(width, dtype=torch.float64)[[places[word] for word in words]]


WORDS = "the code is 7 birds sing at dawn what is the code".split()
C = 32
hidden = word_vectors(WORDS, C)

# %% [markdown]
# Cutting is easy. Only **complete** chunks count. What is left over waits until enough tokens have come.


# %%
def split_into_chunks(hidden, chunk_size):
    """hidden [T, C] -> the complete chunks [N, S, C], and the tokens that wait [fewer than S, C]."""
    complete = hidden.shape[0] // chunk_size
    cut = complete * chunk_size
    return hidden[:cut].unflatten(0, (complete, chunk_size)), hidden[cut:]


# %% [markdown]
# **You should see** three chunks of four and nothing left over for $S = 4$; two chunks of five and two tokens that wait for
# $S = 5$. And in both cases nothing is lost: laid end to end, the parts are the text.

# %%
# NBVAL_CHECK_OUTPUT
for S in (4, 5):
    chunks, waiting = split_into_chunks(hidden, S)
    whole = torch.cat((chunks.flatten(0, 1), waiting))
    print(f"S={S}: chunks {list(chunks.shape)}, waiting {list(waiting.shape)}, nothing lost: {torch.equal(whole, hidden)}")

# %% [markdown]
# Now let the text arrive word by word, as it does when a model writes. **You should see** a chunk appear exactly when its
# fourth word is there.

# %%
# NBVAL_CHECK_OUTPUT
for seen in (3, 4, 7, 8, 12):
    chunks, waiting = split_into_chunks(hidden[:seen], 4)
    words = " ".join(WORDS[seen - len(waiting) : seen])
    print(f"after {seen:2} tokens: complete chunks: {len(chunks)}; waiting: {words or '-'}")

# %% [markdown]
# Why wait? A chunk is read by *later* tokens. If half a chunk had a landmark, that landmark would change with every new
# token, and whatever was computed from it would be wrong a moment later. A complete chunk never changes. It is encoded
# **once** and kept. The tokens that wait are not lost to the model either: the sliding window sees them.
#
# ## The simplest landmark: the mean
#
# Average the vectors of a chunk. One line, nothing to learn.


# %%
def mean_landmarks(chunks):
    """chunks [N, S, C] -> [N, C]."""
    return chunks.mean(dim=1)


# %% [markdown]
# It can already find something. Let every token compare its own vector with the means, by the package's `retrieve`
# (notebook 03 opens it). **You should see** that the last token, `code`, prefers the chunk in which `code` occurs.

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
# Move the token and the chunk size. Blue: how much the token trusts a chunk. Grey: not complete, or in the future.
#
# Try $S = 3$ with token 11. It still finds `the code is`, but the `7` has fallen into the next chunk. We come back to this.


# %%
def draw_chunks(figure, S, token, K):
    chunks, _ = split_into_chunks(hidden, S)
    indices, weights = choose(hidden, mean_landmarks(chunks), S, K)
    per_chunk = [weights[token][indices[token] == i].sum().item() for i in range(len(chunks))]
    plots.chunk_grid(figure.subplots(), WORDS, S, token=token, weights=per_chunk)
    best = indices[token, 0].item()
    for_token = f"Token {token} ({WORDS[token]}) with S={S}: "
    if best < 0:
        return for_token + "no chunk is complete before it, so it retrieves nothing."
    best = max(range(len(chunks)), key=per_chunk.__getitem__)
    return for_token + f"it trusts chunk {best} most ({per_chunk[best]:.2f}): {' '.join(WORDS[best * S : best * S + S])}."


explore(
    draw_chunks,
    alt="The twelve words in rows, one row a chunk, with the weight that the chosen token gives to each chunk.",
    size=(9, 3.8),
    S=Control((2, 6), start=4, label="chunk size S"),
    token=Control((0, 11), start=11, label="token that asks"),
    K=Control((1, 3), start=2, label="chunks kept K"),
)

# %% [markdown]
# ## What a mean can never say
#
# `the code is 7` and `7 is code the` have the same words. Their mean is the same vector, so no query in the world can
# tell them apart. `dog bites man` and `man bites dog` are one and the same to it. (In a model the middle layer has already
# written something of the order into each vector, and a mean cannot wash all of that out. But it adds nothing of its own.)
#
# **You should see** `True` for every one of the 24 orders of a chunk.

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
# ### Step 1: somebody who reads, `[CLS]`
#
# A mean gives every word the same share. Better: let a reader decide which words matter. Put one extra vector, called
# `[CLS]`, beside the $S$ tokens and let it **attend** to them. It is learned in training, it stands for no word, and what
# it has gathered at the end is the summary. (The name comes from BERT.)
#
# Is that enough? **You should see** `True`: it is still blind to order. Attention compares and adds up. It does not care
# who stands where.


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
# ### Step 2: positions, by turning
#
# So tokens must carry their place. The usual way today is **RoPE**, rotary positions (Su et al., arXiv 2104.09864): cut a
# vector into pairs of numbers, see each pair as an arrow in the plane, and turn it by an angle that grows with the
# position $t$:
#
# $$\text{angle of pair } p \text{ at position } t = t \cdot \theta_p, \qquad \theta_p = 10000^{-2p/D}, \qquad
# p = 0 \ldots D/2 - 1$$
#
# The first pair turns fast, the last hardly at all. Queries and keys are turned, values are not.


# %%
def rope(x, base=10_000.0):
    """Turn pair p (numbers p and p + D/2) of the vector at position t by t * base**(-2p/D): x [..., S, D]."""
    S, D = x.shape[-2:]
    frequency = base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    angle = torch.arange(S, dtype=torch.float64)[:, None] * frequency  # [S, D/2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), dim=-1)


# %% [markdown]
# Turning changes no length. And of the two positions, the product of two turned vectors feels the **distance** alone: from 2
# to 5 it is the same as from 0 to 3. **You should see** `True` twice, then `False`: another distance, another product.

# %%
# NBVAL_CHECK_OUTPUT
q, k = torch.randn(2, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
turned_q, turned_k = rope(q.expand(8, C)), rope(k.expand(8, C))  # the same vector at positions 0 to 7
print("lengths stay:", torch.allclose(turned_q.norm(dim=-1), q.norm()))
print("distance 3 == distance 3:", torch.allclose(turned_q[5] @ turned_k[2], turned_q[3] @ turned_k[0]))
print("distance 3 == distance 1:", torch.allclose(turned_q[5] @ turned_k[2], turned_q[3] @ turned_k[2]))

# %% [markdown]
# Inside a chunk all distances are small and always the same ones, 0 to $S$, forwards and backwards. So the encoder meets
# every distance it will ever see in its first training step. Positions are harmless **here**. Why they are *not* harmless
# far away is the subject of [notebook 05](05_layer.ipynb).
#
# ### Step 3: look both ways
#
# A language model may only look back: token $t$ must not see what it is about to predict. Inside a complete chunk there
# is no such rule. All readers of the chunk come after its end, so to them all of it is past. The encoder therefore looks
# **both ways**: in `the code is 7` the key of `code` may know that a `7` follows.
#
# Here is one block of the encoder, with the weights of the package's own block. It is an ordinary transformer block. What
# is special is a line that is *not* there: there is no mask.


# %%
def heads_of(x, qkv):
    """x [N, S+1, C] -> q, k, v [N, H, S+1, D]; queries and keys normed, then turned."""
    q, k, v = (project(x).unflatten(-1, (-1, qkv.head_dim)).transpose(1, 2) for project in (qkv.q, qkv.k, qkv.v))
    share = q.shape[1] // k.shape[1]  # query heads that use the same key and value head
    q, k = rope(qkv.q_norm(q)), rope(qkv.k_norm(k))
    return q, k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)


def encoder_block(x, block):
    """All positions of a chunk attend to all, then the MLP: x [N, S+1, C] -> [N, S+1, C]."""
    q, k, v = heads_of(block.attention_norm(x), block.qkv)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # [N, H, S+1, S+1]
    read = scores.softmax(dim=-1) @ v  # no mask: both ways
    x = x + block.out(read.transpose(1, 2).flatten(-2))
    return x + block.mlp(block.mlp_norm(x))


# %% [markdown]
# ### Step 4: one reading, three results
#
# In the paper's symbols: chunk $i$ gives keys $K_{[i]}$ and values $V_{[i]}$, one for each of its $S$ tokens, and one
# landmark $L_i$ (it plays the part of $K^{slc}_i$ in Eq. (1), as notebook 03 shows). `[CLS]` is put last.
#
# * The $S$ token outputs give $K_{[i]}$ and $V_{[i]}$ by two linear maps. Whoever retrieves the chunk attends to these.
# * The `[CLS]` output gives the landmark by a third. Whoever is *choosing* compares with this.
#
# Keys and landmarks are normed, so that scores stay in a sane range. In the shapes below $J$ is the number of key/value
# heads, $D$ the size of a head and $R$ that of a landmark.


# %%
def encode_chunks(chunks, encoder):
    """chunks [N, S, C] -> k and v [N, S, J, D], landmarks [N, R]."""
    x = torch.cat((chunks, encoder.cls.expand(len(chunks), 1, -1)), dim=1)  # [CLS] last: [N, S+1, C]
    for block in encoder.blocks:
        x = encoder_block(x, block)
    x = encoder.norm(x)
    tokens, summary = x[:, :-1], x[:, -1]
    k, v = (project(tokens).unflatten(-1, (-1, encoder.config.hsa_head_dim)) for project in (encoder.k, encoder.v))
    return encoder.k_norm(k), v, encoder.landmark_norm(encoder.landmark(summary))


# %% [markdown]
# **You should see** that this is the encoder of the package, `hsa_mini.model.chunk_encoder.ChunkEncoder`, number for number.
# We take it from a tiny model with random weights; from now on we import it.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
tiny = dataclasses.replace(PRESETS["debug"], hsa_heads=2, hsa_kv_heads=1, retrieval_heads=1)
encoder = HSAModel(tiny, dtype=torch.float64).encoder.requires_grad_(False)
k, v, landmarks = encoder(chunks[None])  # [B, N, S, C] -> [B, N, S, J, D] twice, [B, N, 1, R]: one retrieval head
ours = encode_chunks(chunks, encoder)
print("k:", list(k.shape), " v:", list(v.shape), " landmarks:", list(landmarks.shape))
print("ours == package:", all(torch.allclose(a, b[0].reshape(a.shape), atol=1e-6) for a, b in zip(ours, (k, v, landmarks))))

# %% [markdown]
# ## Now the order counts
#
# The same 24 orders again. **You should see** one mean, but 24 different landmarks. (How different, training decides. A
# random encoder can only show that the difference is *there*.)


# %%
def count_distinct(vectors):
    """How many of the vectors [M, R] are farther than 0.001 from all earlier ones."""
    close = torch.cdist(vectors, vectors) < 1e-3
    return int((close.tril(-1).sum(dim=1) == 0).sum())


# %%
# NBVAL_CHECK_OUTPUT
shuffled = torch.cat([code_is_7[:, order] for order in orders])  # [24, S, C]
print("distinct means    :", count_distinct(mean_landmarks(shuffled)))
print("distinct landmarks:", count_distinct(encoder(shuffled[None])[2][0, :, 0]))

# %% [markdown]
# And the keys look both ways. Change the last word of the chunk. **You should see** the key of the *first* word change.

# %%
# NBVAL_CHECK_OUTPUT
other = code_is_7.clone()
other[0, 3] = other[0, 3].roll(20)  # the code is 8: a word with another place
change = (encoder(other[None])[0] - encoder(code_is_7[None])[0]).abs()[0, 0, 0].max()
print("the key of `the` knows the word at the end:", change.item() > 1e-3)

# %% [markdown]
# ### Move it
#
# Put the chunk into another order and compare three summaries with the original. The bar is the angle between the two
# vectors. Where it is 0 degrees, the two are one and the same, and no query can tell them apart.

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


def draw_orders(figure, order, chunk):
    original = chunks[chunk : chunk + 1]
    moved = original[:, list(ORDERS[order])]
    summaries = {
        "mean": mean_landmarks,
        "[CLS] without positions": lambda x: read_by_cls(x[0], cls)[None],
        "chunk encoder": lambda x: encoder(x[None])[2][0, :, 0],
    }
    angles = [angle_between(summary(original), summary(moved)) for summary in summaries.values()]
    ax = figure.subplots()
    plots.weight_bars(ax, angles, list(summaries), limit=60, digits=0)
    ax.set_xlabel("angle between the summaries before and after, in degrees")
    words = " ".join(WORDS[chunk * 4 + i] for i in ORDERS[order])
    named = (f"{name} {angle:.0f}°" for name, angle in zip(summaries, angles))
    return f"Order: {words}. Angles: {', '.join(named)}."


explore(
    draw_orders,
    alt="Three bars: how like its original a reordered chunk looks to the mean, to [CLS] without positions and to the encoder.",
    size=(8.5, 2.6),
    order=Control(list(ORDERS), start="7 is code the", label="order, as in chunk 0"),
    chunk=Control((0, 2), label="chunk"),
)

# %% [markdown]
# ## What falls between two chunks
#
# Back to $S = 3$, where `the code is` and `7 birds sing` are different chunks. Is the `7` lost? Not in the model. The
# encoder does not read bare words, it reads what the **middle layer** made of them, and the window attention of the lower
# layers has already told the `7` what stood before it.
#
# We imitate that with one real window layer of $W = 4$: every token adds what it reads in its window. Then we ask how
# well chunk 1, `7 birds sing`, answers to the query `code`: the cosine of the two vectors. **You should see** it rise
# from nothing.

# %%
# NBVAL_CHECK_OUTPUT
as_heads = hidden[None, :, None]  # [1, T, 1, C]
equal_shares = torch.zeros_like(as_heads)  # a query of zeros reads all keys in its window alike
mixed = hidden + sliding_window_attention(equal_shares, as_heads, as_heads, window=4)[0, :, 0]
for name, source in (("bare words", hidden), ("after a window layer", mixed)):
    chunk_1 = mean_landmarks(split_into_chunks(source, 3)[0])[1]
    likeness = cosine_similarity(hidden[11], chunk_1, dim=0).item()
    print(f"{name}: likeness of chunk 1 to `code`: {likeness:.2f}")

# %%
figure = make_figure(9, 3.2)
for ax, (name, source) in zip(figure.subplots(1, 2), (("bare words", hidden), ("after a window layer", mixed))):
    means = mean_landmarks(split_into_chunks(source, 3)[0])
    labels = [" ".join(WORDS[i * 3 : i * 3 + 3]) for i in range(4)]
    plots.weight_bars(ax, cosine_similarity(hidden[11][None], means), labels, limit=0.7)
    ax.set(title=name, xlabel="likeness to `code`")
show(
    figure,
    "Two bar charts of how like the query code each of four chunks of three words is. With bare words, 7 birds sing is "
    "not like it at all; after a window layer it is.",
)

# %% [markdown]
# (Chunk 3, `is the code`, is like it too: it holds the query itself. It is not complete before token 11, so it cannot be
# chosen. And our query is still the bare word; in a model it is mixed as well.)
#
# ## How large should a chunk be?
#
# * **Small chunks**: precise, but many. 16M tokens with $S = 64$ make 262,144 landmarks, and every token scores all of
#   them.
# * **Large chunks**: few landmarks, but one vector has to speak for more tokens, and whoever wants one word reads all of
#   them.
#
# The paper and this project take $S = 64$; the toy takes 4.
#
# ## Exercises
#
# **1. Is `[CLS]` needed?** Take the *mean of the keys* that the encoder gives as the landmark, with no `[CLS]` output at
# all. Is it blind to order, like the mean of the words? Guess first, then use `shuffled`, `encoder` and `count_distinct`.
#
# <details>
# <summary>Solution</summary>
#
# It is not blind. The positions have already changed each token's output before the mean is taken.
#
# ```python
# keys = encoder(shuffled[None])[0][0, :, :, 0]  # [24, S, D]
# print(count_distinct(keys.mean(dim=1)))
# assert count_distinct(keys.mean(dim=1)) == 24
# ```
#
# So why `[CLS]`? Because a heading and a page have different jobs. The outputs of the tokens are made to be *read*; the
# landmark is made to be *found*. `[CLS]` can give a rare name more of itself than four commas. A mean gives each token
# the same share.
#
# </details>
#
# **2. Which chunk sizes keep the fact whole?** For which $S$ from 1 to 6 do `code` (token 1) and `7` (token 3) lie in one
# chunk, and from which token on can that chunk be read?
#
# <details>
# <summary>Solution</summary>
#
# Token $t$ lies in chunk $\lfloor t/S \rfloor$. Chunk 0 can be read from token $S$ on, when it is complete.
#
# ```python
# whole = [S for S in range(1, 7) if 1 // S == 3 // S]
# print(whole)  # [4, 5, 6], readable from token 4, 5 and 6 on
# for S in whole:
#     indices, _ = choose(hidden, mean_landmarks(split_into_chunks(hidden, S)[0]), S, top_k=1)
#     assert int((indices[:, 0] == 0).nonzero()[0]) == S
# ```
#
# </details>
#
# ## What comes next
#
# Every chunk now has a heading. [Notebook 03, *Which chunks matter to this token?*](03_retrieval.ipynb) opens `retrieve`:
# scores, the choice of the best $K$, and the weights that let a model *learn* where to look. 25 minutes.
