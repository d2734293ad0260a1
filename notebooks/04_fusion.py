# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · How are chunks read and blended?
#
# In [notebook 03](03_retrieval.ipynb) a token scored every chunk and kept the best K chunks. Now it has to **read**
# them. It also has to combine K results into **one** output.
#
# After this notebook you will be able to
#
# * read chunks as Hierarchical Sparse Attention (HSA) does: attention inside each chunk, then a weighted sum,
# * say what each of its two softmaxes does, and check both by hand,
# * show why this blend teaches the model *which chunks to retrieve*, and why the most natural alternative does not.
#
# **Time:** 25 minutes to read, 15 seconds to run on two CPU cores. **Needs:** You know what a matrix is and what
# softmax does. [Notebook 03](03_retrieval.ipynb) helps; this notebook repeats the parts of it that it needs.
#
# [← 03 retrieval](03_retrieval.ipynb) · [map of the course](00_start.ipynb) · [05 layer →](05_layer.ipynb)

# %%
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention

from hsa_mini import reference
from hsa_mini.reference import retrieve
from hsa_mini.viz import Control, explore, make_figure, mechanism, show

S = 4  # tokens in a chunk

# %% [markdown]
# ## The question in plain words
#
# Here are our twelve tokens, three chunks of four:
#
# > `the code is 7` | `birds sing at dawn` | `what is the code`
#
# The last token, `code`, must predict the next token. Two chunks are complete and lie before it. One of them contains
# the answer. The other one is about birds.
#
# Suppose retrieval keeps both chunks, with a weight of 0.82 for the first one and 0.18 for the second. What should the
# token do?
#
# * It could lay the eight tokens end to end and attend to all of them. Then the two weights are not used.
# * Or it could read **each chunk by itself** and get one result from each chunk. Then it adds up the results,
#   multiplied by the weights 0.82 and 0.18. We call this *fusion*, and its result the *blend*.
#
# HSA uses fusion. This notebook shows why.

# %% [markdown]
# ## In the paper's symbols
#
# Token $t$ has kept the chunks $I_t$, with scores $s_{t,i}$. Eq. (2), §2.2, in three steps:
#
# $$o_{t,i} = \mathrm{softmax}\!\left(\frac{\mathrm{norm}(q_t)\,\mathrm{norm}(K_{[i]})^\top}{\sqrt{D}}\right) V_{[i]}
# \qquad
# w_{t,i} = \frac{e^{s_{t,i}}}{\sum_{j \in I_t} e^{s_{t,j}}}
# \qquad
# O_t = \sum_{i \in I_t} w_{t,i}\; o_{t,i}$$
#
# | symbol | what it is | in code | shape |
# |---|---|---|---|
# | $q_t$ | query of token $t$ | `q` | `[B, T, H, D]` |
# | $K_{[i]}, V_{[i]}$ | keys and values of chunk $i$ | `k`, `v` | `[B, N, S, J, D]` |
# | $I_t$ | the kept chunks; $-1$ marks an empty slot | `indices` | `[B, T, J, K]` |
# | $w_{t,i}$ | weight of each kept chunk | `weights` | `[B, T, J, K]` |
# | $o_{t,i}$ | result of chunk $i$ | | `[D]`, for one token and one head |
# | $O_t$ | the blend of all results | `out` | `[B, T, H, D]` |
#
# B: sequences in the batch; T: tokens; H: query heads; J: key/value heads; D: numbers per head; N: chunks; S: tokens
# per chunk; K: kept chunks. In our example B, H and J are 1.
#
# There are **two** softmaxes. One runs over the S tokens *inside* a chunk. The other runs over the K chunks.

# %% [markdown]
# ## Twelve tokens that can be checked by hand
#
# We have no trained model yet, so a simple rule replaces it:
#
# * Every word is an axis of its own. There are nine different words, so D = 9.
# * The **query** of a token is its own word. (In notebook 03 it was the last four words.)
# * The **key** of a token is the word *two places before it* in its chunk. So the query `code` finds `7`. (A trained
#   model builds such keys in its first layers, which see nearby tokens.)
# * The **value** of a token is its own word. So we can read an output as "how much of each word".
# * The **landmark** of a chunk is the set of its words. Retrieval compares the query with it.
#
# The function `norm` is applied to every vector that is compared. It scales a vector until its mean square is 1. A
# single 1 among nine numbers becomes a 3.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


@dataclass(frozen=True)
class Toy:
    """A text in HSA's tensors. B = J = H = 1; `words` are the T tokens, `vocabulary` names the D axes."""

    words: list
    vocabulary: list
    q: torch.Tensor  # [1, T, 1, D]
    k: torch.Tensor  # [1, N, S, 1, D]
    v: torch.Tensor  # [1, N, S, 1, D]
    retrieval_q: torch.Tensor  # [1, T, 1, D]
    landmarks: torch.Tensor  # [1, N, 1, D]


def in_chunks(x):
    return x.unflatten(0, (-1, S))[None, :, :, None]  # [T, D] -> [1, N, S, 1, D]


def read_by_rule(text):
    """The rule above, in place of a trained model."""
    words = text.replace("|", " ").split()
    vocabulary = list(dict.fromkeys(words))
    own = torch.eye(len(vocabulary), dtype=torch.float64)[[vocabulary.index(word) for word in words]]  # [T, D]
    v = in_chunks(own)
    two_before = torch.cat((torch.zeros_like(v[:, :, :2]), v[:, :, :-2]), dim=2)  # the first two of a chunk have no key
    queries = norm(own)[None, :, None]  # [T, D] -> [1, T, 1, D]
    landmarks = norm(v.sum(dim=2))  # [1, N, 1, D]
    return Toy(words, vocabulary, queries, norm(two_before), v, queries, landmarks)


toy = read_by_rule("the code is 7 | birds sing at dawn | what is the code")

# %% [markdown]
# The last token has position 11. Retrieval may keep up to two chunks for every token.
#
# By hand: the landmark of chunk 0 has four words out of nine, so `norm` turns each of them into 1.5. The query is a 3
# on the axis `code`. The score is 3 × 1.5 / √9 = **1.5** for chunk 0, and **0** for the chunk of birds. So the weights
# are $e^{1.5} / (e^{1.5} + e^0)$ = 0.82 and 0.18. **You should see** chunk 0 with 0.818 and chunk 1 with 0.182.

# %%
# NBVAL_CHECK_OUTPUT
indices, weights = retrieve(toy.retrieval_q, toy.landmarks, chunk_size=S, top_k=2)
for chunk, weight in zip(indices[0, 11, 0].tolist(), weights[0, 11, 0].tolist()):
    print(f"token 11 `{toy.words[11]}` keeps chunk {chunk} with weight {weight:.3f}")


# %% [markdown]
# ## Step one: attend to one chunk
#
# The first step is attention over the S tokens of one chunk, and over no other tokens. It takes one line.


# %%
def attend_chunk(q, k, v, scale):
    """Softmax over the S tokens of one chunk: q [D], k and v [S, D] -> [D]."""
    return (k @ q * scale).softmax(dim=0) @ v


# %% [markdown]
# By hand: the key of `7` is `code`, so its score is 3 × 3 / √9 = 3. The other three tokens of the chunk score 0. The
# share of `7` is $e^3 / (e^3 + 3)$ = 0.87. In the chunk of birds no key matches, so all four words get the same share.
# A chunk without the answer *still returns a result*. That is why the result of a chunk needs a weight. **You should
# see** `7` with 0.87 in chunk 0, and four times 0.25 in chunk 1.

# %%
# NBVAL_CHECK_OUTPUT
for chunk in (0, 1):
    result = attend_chunk(toy.q[0, 11, 0], toy.k[0, chunk, :, 0], toy.v[0, chunk, :, 0], scale=9**-0.5)
    print(f"chunk {chunk} gives", {word: round(x, 2) for word, x in zip(toy.vocabulary, result.tolist()) if x})


# %% [markdown]
# ## Step two: blend
#
# The next function is Eq. (2) in full. For every token and every head it goes through the kept chunks and adds the
# result of each chunk, multiplied by its weight. It is slow, but it is easy to read. A token that kept no chunk gets
# zeros.


# %%
def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """Eq. (2), one token, one head, one chunk after the other -> [B, T, H, D]."""
    B, T, H, D = q.shape
    J = k.shape[3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, t, h in product(range(B), range(T), range(H)):
        j = h * J // H  # the key/value head of this query head
        for i, weight in zip(indices[b, t, j].tolist(), weights[b, t, j]):
            if i >= 0:  # -1 is an empty slot
                out[b, t, h] += weight * attend_chunk(q[b, t, h], k[b, i, :, j], v[b, i, :, j], scale)
    return out


# %% [markdown]
# The next cell prints the output of token 11, word by word. By hand: `7` gets 0.818 × 0.870 = 0.711. **You should see**
# `7` first with 0.711, far ahead of all other words. All shares add up to 1: the result of each chunk adds up to 1, and
# so do the weights.

# %%
# NBVAL_CHECK_OUTPUT
out = chunk_attention(toy.q, toy.k, toy.v, indices, weights)
for word, share in sorted(zip(toy.vocabulary, out[0, 11, 0].tolist()), key=lambda pair: -pair[1])[:4]:
    print(f"{word:6} {share:.3f}")
print("all shares together:", round(out[0, 11, 0].sum().item(), 6))

# %% [markdown]
# What about tokens 0 to 3? No chunk is complete before them. Chunk attention gives them exactly zero, so they depend on
# the window ([notebook 05](05_layer.ipynb) adds it). **You should see** how many chunks each token keeps, and then
# `True`.

# %%
# NBVAL_CHECK_OUTPUT
print("chunks kept by tokens 0 to 11:", (indices[0, :, 0] >= 0).sum(dim=-1).tolist())
print("tokens 0 to 3 get exactly zero:", bool((out[0, :4] == 0).all()))

# %% [markdown]
# ## The same result, without loops
#
# The package computes this with three `einsum`s. Open [`chunk_attention.py`](../hsa_mini/reference/chunk_attention.py);
# it is short. Our loops must give the same numbers, on the toy and on random tensors with two sequences, four query
# heads, two key/value heads and empty slots. **You should see** `True` twice.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
randoms = partial(torch.randn, dtype=torch.float64)
q = randoms(2, 30, 4, 8)
k = randoms(2, 7, S, 2, 8)
v = randoms(2, 7, S, 2, 8)
chosen = retrieve(randoms(2, 30, 2, 8), randoms(2, 7, 2, 8), chunk_size=S, top_k=3)
print("toy:   ", torch.allclose(out, reference.chunk_attention(toy.q, toy.k, toy.v, indices, weights)))
print("random:", torch.allclose(chunk_attention(q, k, v, *chosen), reference.chunk_attention(q, k, v, *chosen)))

# %% [markdown]
# ## The equality of this notebook
#
# If a token keeps **one** chunk, the weight of this chunk is 1, and HSA is ordinary attention over the chunk. If that
# one chunk is *the whole text*, HSA is ordinary full attention. So HSA does not replace attention. It applies attention
# to parts of the text. **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
first_chunk = torch.zeros(2, 30, 2, 1, dtype=torch.int32)
full_weight = torch.ones(2, 30, 2, 1, dtype=torch.float64)
whole_k = k.flatten(1, 2)  # [B, N, S, J, D] -> [B, N*S, J, D]
whole_v = v.flatten(1, 2)
heads_first = [x.transpose(1, 2) for x in (q, whole_k, whole_v)]  # [B, T, H, D] -> [B, H, T, D], PyTorch's layout
dense = scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
ours = chunk_attention(q, whole_k[:, None], whole_v[:, None], first_chunk, full_weight)
print("one chunk that is the whole text == dense attention:", torch.allclose(ours, dense))

# %% [markdown]
# What happens with several chunks? Dense attention, too, is a weighted sum over chunks. Only its weights are different:
# the weight of a chunk is its share of the attention. Compute $\log \sum_{j} e^{q \cdot k_j / \sqrt D}$ over the tokens
# $j$ of each chunk, and put these numbers through a softmax. **You should see** `True`.

# %%
# NBVAL_CHECK_OUTPUT
every_chunk = torch.arange(7, dtype=torch.int32).expand(2, 30, 4, 7)
k_4, v_4 = (x.repeat_interleave(2, dim=3) for x in (k, v))  # a key/value head for each query head
mass = (torch.einsum("bthd,bnshd->bthns", q, k_4) * 8**-0.5).logsumexp(dim=-1)  # [B, T, H, N]
ours = chunk_attention(q, k_4, v_4, every_chunk, mass.softmax(dim=-1))
print("fusion with these weights == dense attention:", torch.allclose(ours, dense))

# %% [markdown]
# This shows what retrieval really is: **a cheap estimate of the attention that a chunk would get**. The exact number
# needs all keys of the chunk. A landmark needs one dot product. The estimate may even be better than the exact number,
# because training optimises it for the answer, not for a copy of dense attention.

# %% [markdown]
# ## See it
#
# One picture shows how a token reads: its chunks in rows, its weights on the left, the attention inside each chunk as
# shades of blue, and the blend on the right. The first function computes the numbers. The second one draws them.


# %%
def read_token(toy, token, keep, temperature=1.0):
    """-> weight of every chunk [N], attention inside every chunk [N, S], and the output of the token [D]."""
    query = toy.retrieval_q[:, token : token + 1] / temperature
    indices, weights = retrieve(query, toy.landmarks, chunk_size=S, top_k=keep, offset=token)
    kept = indices[0, 0, 0] >= 0
    per_chunk = torch.zeros(toy.landmarks.shape[1], dtype=torch.float64)
    per_chunk[indices[0, 0, 0, kept].long()] = weights[0, 0, 0, kept]
    inside = (toy.k[0, :, :, 0] @ toy.q[0, token, 0] * toy.q.shape[-1] ** -0.5).softmax(dim=-1)
    out = reference.chunk_attention(toy.q[:, token : token + 1], toy.k, toy.v, indices, weights)
    return per_chunk, inside, out[0, 0, 0]


def draw_fusion(figure, toy, token, keep, temperature=1.0):
    """Weights | chunks | blend, side by side; returns one line that describes the picture."""
    per_chunk, inside, out = read_token(toy, token, keep, temperature)
    largest = out.topk(min(6, len(out)))
    blend = {toy.vocabulary[i]: share.item() for i, share in zip(largest.indices, largest.values)}
    mechanism.fusion(figure, toy.words, per_chunk, inside, blend, token=token)
    kept = int((per_chunk > 0).sum())
    word = next(iter(blend))
    result = f"`{word}` has the largest share in its blend, {blend[word]:.2f}" if kept else "its output is exactly 0"
    return f"Token {token} `{toy.words[token]}` reads {kept} of {token // S} complete chunks; {result}."


# %%
figure = make_figure(8.5, 2.5)
summary = draw_fusion(figure, toy, token=11, keep=2)
show(
    figure,
    "Three panels. Weights: chunk 0 has 0.82, chunk 1 has 0.18, chunk 2 has none. Chunk grid: in `the code is 7` the "
    "word 7 is dark blue, in `birds sing at dawn` all four words are equally pale, the last chunk is grey. In the "
    "blend 7 has 0.71.",
)
print(summary)

# %% [markdown]
# The framed word is the token that reads. Its own chunk is grey, because it is not complete: no token can retrieve it
# yet.
#
# ### Move it
#
# The next text is longer: ten chunks of four, by the same rule. Move the **token** and see which chunks get the largest
# weights. Then take a token with several good chunks, such as the last `the`, and move **K**. The **temperature**
# divides the scores. A low temperature gives almost all weight to the best chunk. A high temperature gives all kept
# chunks nearly the same weight. A trained model sets its own temperature: the norms of queries and landmarks have a
# learned gain.

# %%
story = read_by_rule(
    "the code is 7 | birds sing at dawn | the door is red | rain falls on roofs | my name is Ada | "
    "cats sleep all day | the key is brass | waves roll to shore | the sea is deep | what is the code"
)
explore(
    lambda figure, token, K, temperature: draw_fusion(figure, story, token, K, temperature),
    alt="Weights of ten chunks as bars, the words of each chunk shaded by the attention inside it, the blend as bars.",
    size=(8.5, 4.6),
    K=Control((1, 9), start=4, label="chunks kept K"),
    token=Control((0, 39), start=39, label="token that reads"),
    temperature=Control([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], start=1.0, label="temperature"),
)

# %% [markdown]
# Try this: set K = 9 and raise the temperature to 8. The share of `7` drops from 0.65 to 0.15, so the answer is lost.
# Every chunk without an answer still contributes its result, and now all chunks have nearly the same weight. With K = 1
# the answer is back, at any temperature. (Ties go to the newest chunk. That is why the last chunks come first when no
# chunk matches.)
#
# ## HSA is a mixture of experts
#
# Replace a few words, and Eq. (2) is a mixture of experts in its classic form:
#
# | mixture of experts | HSA |
# |---|---|
# | expert: a small network | chunk: four tokens to attend to (64 in a real model) |
# | router: scores all experts | retrieval: scores all chunks by their landmarks |
# | top-A experts run, the other experts cost nothing | top-K chunks are read, reading the others costs nothing |
# | gates: softmax over the scores of the chosen experts | weights: softmax over the scores of the kept chunks |
# | output: sum of gate × output of the expert | output: sum of weight × result of the chunk |
# | the gates carry the gradient to the router | **the weights carry the gradient to retrieval** |
# | experts are learned once, and then fixed | new chunks are written while the model reads, without limit |
#
# A chunk is even built like an expert: it is a layer with S hidden units. Its first matrix is $K_{[i]}$, its second
# matrix is $V_{[i]}$, and its activation function is a softmax. The next cell defines a mixture of experts in one line
# and uses chunks as its experts. **You should see** `True`.


# %%
# NBVAL_CHECK_OUTPUT
def mixture(x, experts, gates):
    """Sum over the experts: output of the expert for x, times its gate."""
    return sum(gate * expert(x) for expert, gate in zip(experts, gates))


query = toy.q[0, 11, 0]
kept = indices[0, 11, 0].tolist()
experts = [partial(attend_chunk, k=toy.k[0, i, :, 0], v=toy.v[0, i, :, 0], scale=9**-0.5) for i in kept]
print("mixture of chunk experts == HSA:", torch.allclose(mixture(query, experts, weights[0, 11, 0]), out[0, 11, 0]))

# %% [markdown]
# ## How does the loss teach retrieval?
#
# The choice of the K best chunks is a hard decision. It has no gradient: if a score changes a little, the same chunks
# are chosen. So how can a model learn *which* chunks to choose?
#
# It learns through the weights. Let $L$ be the loss and $g = \partial L / \partial O_t$. Because $w$ is a softmax of
# the scores,
#
# $$\frac{\partial L}{\partial s_{t,i}} = w_{t,i}\; g \cdot (o_{t,i} - O_t).$$
#
# Read it slowly. A chunk whose result is **better than the blend** gets a higher score. A chunk whose result is worse
# gets a lower score. The chunks compete, and the loss of the language model decides. We check the formula with
# autograd. The loss is $-\log$ of the share of `7`. **You should see** −0.182 and +0.182 twice. Gradient descent goes
# against the gradient, so the score of the chunk with the code goes up, and the score of the chunk of birds goes down.

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.tensor([1.5, 0.0], dtype=torch.float64, requires_grad=True)  # of chunks 0 and 1, as computed above
blend = mixture(query, experts, scores.softmax(dim=0))
loss = -blend[toy.vocabulary.index("7")].log()
(g,) = torch.autograd.grad(loss, blend, retain_graph=True)
loss.backward()
formula = [w * g @ (expert(query) - blend) for w, expert in zip(scores.softmax(dim=0), experts)]
print("autograd:", [round(x, 3) for x in scores.grad.tolist()])
print("formula: ", [round(x.item(), 3) for x in formula])

# %% [markdown]
# The gradient flows on from the score to the landmark, and from there into everything that made the landmark. **You
# should see** 0.182 for both chunks that were read, and 0 for the third chunk, which is not visible.


# %%
# NBVAL_CHECK_OUTPUT
def gradient_of_landmarks(blend):
    """Retrieve with landmarks that can learn, blend, take the loss of token 11 -> gradient of the landmarks."""
    landmarks = toy.landmarks.clone().requires_grad_()
    indices, weights = retrieve(toy.retrieval_q, landmarks, chunk_size=S, top_k=2)
    k = toy.k.clone().requires_grad_()  # keys can learn too, so backward() always finds a gradient to compute
    out = blend(toy.q, k, toy.v, indices, weights)
    (-out[0, 11, 0, toy.vocabulary.index("7")].log()).backward()
    return landmarks.grad


fused = gradient_of_landmarks(chunk_attention)
print("gradient at each landmark, fused:", [round(x, 3) for x in fused[0, :, 0].norm(dim=-1).tolist()])

# %% [markdown]
# ## The natural alternative, and what it loses
#
# Most sparse attention works differently: choose chunks, lay them **end to end**, and run one softmax over all their
# tokens. The selected branch of NSA (arXiv 2502.11089) and MoBA (arXiv 2502.13189) do this. The code is the same loop,
# but it has no use for the weights.


# %%
def select_then_concatenate(q, k, v, indices, weights=None, *, scale=None):
    """One softmax over the tokens of all kept chunks, laid end to end -> [B, T, H, D]. It ignores the weights."""
    B, T, H, D = q.shape
    J = k.shape[3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, t, h in product(range(B), range(T), range(H)):
        j = h * J // H
        kept = indices[b, t, j][indices[b, t, j] >= 0].long()
        if len(kept):
            keys, values = (x[b, kept, :, j].flatten(0, 1) for x in (k, v))  # [kept * S, D]
            out[b, t, h] = attend_chunk(q[b, t, h], keys, values, scale)
    return out


# %% [markdown]
# **You should see** 0.711 and 0.742: as an *output* the alternative is fine, and here it is even a little better. But
# the gradient is `None`. It is not small: **there is no path**. The landmarks only decided which chunks were chosen,
# and this choice has no gradient.

# %%
# NBVAL_CHECK_OUTPUT
end_to_end = select_then_concatenate(toy.q, toy.k, toy.v, indices)
print("the code is 7, fused:", round(out[0, 11, 0, toy.vocabulary.index("7")].item(), 3))
print("the code is 7, laid end to end:", round(end_to_end[0, 11, 0, toy.vocabulary.index("7")].item(), 3))
print("gradient of the landmarks, laid end to end:", gradient_of_landmarks(select_then_concatenate))

# %% [markdown]
# NSA and MoBA use other methods to train their scores. NSA trains its block scores in a second branch, which attends to
# compressed blocks. MoBA takes the mean of the keys of a block as its landmark and trains those keys as keys. In both,
# the scores learn a related task, and the method relies on this task to give good choices. In HSA the output itself
# teaches the choice.

# %% [markdown]
# ## Watch landmarks learn
#
# A small experiment compares the two methods. It has two training runs, its *arms*: one with fusion, one with the
# chunks laid end to end. Both arms have the same data, seeds, parameters and steps. Every sample is a new page: 64
# different words out of 128, in 16 chunks of four. The question is one of these words. The answer is the word that
# follows it on the page. The model may read K = 2 chunks of 16, so a blind choice is right in one of eight cases.
#
# Four matrices learn, from random starts. One makes landmarks from the mean of the words of a chunk, one makes
# retrieval queries, one makes keys, and one makes queries. The model is never told which chunk is the right one. It
# gets only the loss on the answer.

# %%
WORDS = 128
C = 64
N = 16
PAGES = 32


def new_pages(generator):
    """-> words [B, N, S], the question word [B], the word that follows it [B], the chunk that holds both [B]."""
    order = torch.rand(PAGES, WORDS, generator=generator).argsort(dim=-1)
    words = order[:, : N * S].unflatten(1, (N, S))
    b = torch.arange(PAGES)
    chunk = torch.randint(N, (PAGES,), generator=generator)
    place = torch.randint(S - 1, (PAGES,), generator=generator)
    return words, words[b, chunk, place], words[b, chunk, place + 1], chunk


TEST = [x[:8] for x in new_pages(torch.Generator().manual_seed(1))]  # eight pages on which nothing is trained


def answer(blend, weight, embedding, words, question):
    """Retrieve two chunks per page, read and blend them -> output [B, C], and the chunks chosen [B, K]."""
    tokens = embedding[words]  # [B, N, S, C]
    query = embedding[question][:, None, None]  # [B, 1, 1, C]
    before = torch.cat((torch.zeros_like(tokens[:, :, :1]), tokens[:, :, :-1]), dim=2)  # the word before each token
    landmarks = norm(tokens.mean(dim=2) @ weight["landmark"])[:, :, None]
    indices, weights = retrieve(norm(query @ weight["retrieval_q"]), landmarks, chunk_size=S, top_k=2, offset=N * S)
    k = norm(before @ weight["k"])[:, :, :, None]
    v = tokens[:, :, :, None]
    return blend(norm(query @ weight["q"]), k, v, indices, weights)[:, 0, 0], indices[:, 0, 0]


def initial_weights(generator):
    """The four matrices that learn, and the word vectors, which stay fixed."""
    embedding = torch.randn(WORDS, C, generator=generator)
    start = {name: torch.randn(C, C, generator=generator) / C**0.5 for name in ("landmark", "retrieval_q", "k", "q")}
    return torch.nn.ParameterDict(start), embedding


@torch.no_grad()
def shares(weight, embedding, words, question):
    """The softmax over the scores of all chunks [B, N]: what retrieval thinks of the landmarks."""
    landmarks = norm(embedding[words].mean(dim=2) @ weight["landmark"])  # [B, N, C]
    query = norm(embedding[question] @ weight["retrieval_q"])
    return (landmarks @ query[:, :, None]).squeeze(-1).div(C**0.5).softmax(dim=-1)


def learn(blend, steps=300, seed=0):
    """-> for each step: the share of pages whose right chunk was among the two chosen, and the `shares` of TEST pages."""
    generator = torch.Generator().manual_seed(seed)
    weight, embedding = initial_weights(generator)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.01)
    hits, seen = [], []
    for _ in range(steps):
        words, question, follows, chunk = new_pages(generator)
        output, chosen = answer(blend, weight, embedding, words, question)
        optimizer.zero_grad()
        cross_entropy(output @ embedding.T / 4, follows).backward()
        optimizer.step()
        hits.append((chosen == chunk[:, None]).any(dim=-1).float().mean().item())
        seen.append(shares(weight, embedding, *TEST[:2]))
    return torch.tensor(hits), torch.stack(seen)


# %% [markdown]
# **You should see** `True` three times: both arms start near a blind choice, the arm with fusion learns to choose the
# right chunk, and the other arm stays at a blind choice.

# %%
# NBVAL_CHECK_OUTPUT
threads = torch.get_num_threads()
torch.set_num_threads(1)  # these tensors are tiny: several cores would only wait for each other
runs = {"fused, as in HSA": learn(reference.chunk_attention), "laid end to end": learn(select_then_concatenate)}
hits = {name: hit for name, (hit, _) in runs.items()}
torch.set_num_threads(threads)
early = slice(0, 20)
late = slice(-20, None)
fused, end_to_end = hits.values()
print("at first both are near blind choice, 1 in 8:", all(0.05 < x[early].mean() < 0.3 for x in (fused, end_to_end)))
print("fused, at the end right most of the time:   ", bool(fused[late].mean() > 0.7))
print("laid end to end, still at blind choice:     ", bool(0.05 < end_to_end[late].mean() < 0.2))


# %%
figure = make_figure(7.5, 3.2)
smooth = {name: curve.unfold(0, 20, 1).mean(dim=-1) for name, curve in hits.items()}  # means of 20 steps
mechanism.hit_curves(figure.subplots(), smooth, first_step=20, blind=2 / N, blind_name="blind choice: 1 in 8")
show(
    figure,
    "Two curves over 300 training steps: how often the right chunk is among the two chunks read. With fused scores the "
    "curve climbs from one in eight to about nine in ten. Laid end to end, it stays at blind choice, one in eight.",
)

# %% [markdown]
# ### Watch the landmarks learn
#
# The rows are eight pages on which neither arm was trained. Each row shows how retrieval shares itself out over the 16 chunks: the
# softmax of the scores of their landmarks. A red frame marks the chunk that holds the answer. Play the 300 steps. Which
# arm moves its shares into the frames?


# %%
def draw_landmarks(figure, step):
    now = {name: seen[step] for name, (_, seen) in runs.items()}
    mechanism.page_shares(figure, now, TEST[3])
    means = {name: share[range(8), TEST[3]].mean() for name, share in now.items()}
    return f"Step {step}: the mean share of the right chunk is " + ", ".join(f"{mean:.2f} {name}" for name, mean in means.items()) + "."


explore(
    draw_landmarks,
    alt="Two panels of eight pages by 16 chunks. Blue: the share of a chunk. Red frame: the chunk with the answer.",
    size=(8.5, 3.4),
    play="step",
    step=Control((0, 299), start=299, label="training step"),
)

# %% [markdown]
# With fusion, retrieval starts with a blind choice and in the end is right most of the time, although it was never told
# which chunk is right. Laid end to end, retrieval stays blind. More steps would not help: its landmarks never get a
# gradient, although keys and queries learn as well as they can. Real models are larger, but their gradients take the
# same path.
#
# One caveat: a chunk that is never chosen gets no gradient in either arm. Here 300 steps with new pages are
# enough to try every chunk. The training of a real model adds a little random noise to the choice, as in [notebook
# 03](03_retrieval.ipynb).

# %% [markdown]
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.mechanism.fusion import check_attend_with_sink, check_blend, check_score_gradient

# %% [markdown]
# **1. Blend without a loop.** *Difficulty 2, importance 5, 10 minutes.* One token has kept $K$ chunks. Read all of them
# at once and blend the results.


# %%
def blend(q, k, v, weights, scale):
    """Eq. (2) for one token and one head: q [D], k and v [K, S, D], weights [K] -> [D]."""
    # your code


check_blend(blend)

# %% [markdown]
# <details><summary>Solution</summary>
#
# `k @ q` gives the scores of all chunks, one row per chunk. The softmax runs over each row.
#
# ```python
# def blend(q, k, v, weights, scale):
#     inside = (k @ q * scale).softmax(dim=1)  # [K, S]
#     results = (inside[:, :, None] * v).sum(dim=1)  # [K, D]
#     return weights @ results
#
#
# check_blend(blend)
# kept = indices[0, 11, 0].long()
# ours = blend(toy.q[0, 11, 0], toy.k[0, kept, :, 0], toy.v[0, kept, :, 0], weights[0, 11, 0], 9**-0.5)
# assert torch.allclose(ours, out[0, 11, 0])
# ```
#
# </details>

# %% [markdown]
# **2. The gradient of a score.** *Difficulty 3, importance 5, 10 minutes.* Write the formula of this notebook for one
# token: the gradient of each kept chunk's score. Then set $K = 1$. What is the gradient of the landmark now? Think
# first, then try it.


# %%
def score_gradient(weights, results, g):
    """weights [K], results of the chunks [K, D], gradient g of the blend [D] -> gradient of the scores [K]."""
    # your code


check_score_gradient(score_gradient)

# %% [markdown]
# <details><summary>Solution</summary>
#
# With $K = 1$ it is exactly zero. A softmax over one score is 1, whatever the score is, so the loss does not depend on
# the score. In the formula: with one chunk, $o_{t,i} = O_t$, and the bracket vanishes. Chunks can compete only if there
# are at least two. A mixture of experts that chooses one expert has the same problem. Its remedy is another gate: the
# share of the expert among *all* experts, or a sigmoid. HSA's other weighting, `weighting="stick_breaking"`, has the
# same remedy: its weight for a single chunk is a sigmoid of the score.
#
# ```python
# def score_gradient(weights, results, g):
#     return weights * ((results - weights @ results) @ g)
#
#
# check_score_gradient(score_gradient)
# for weighting in ("softmax", "stick_breaking"):
#     landmarks = toy.landmarks.clone().requires_grad_()
#     chosen = retrieve(toy.retrieval_q, landmarks, chunk_size=S, top_k=1, weighting=weighting)
#     out = chunk_attention(toy.q, toy.k, toy.v, *chosen)
#     (-out[0, 11, 0, toy.vocabulary.index("7")].log()).backward()
#     print(weighting, round(landmarks.grad.abs().max().item(), 3))
#     assert (landmarks.grad.abs().max() > 1e-9) == (weighting == "stick_breaking")
# ```
#
# </details>

# %% [markdown]
# **3. An empty token.** *Difficulty 2, importance 2, 10 minutes.* `birds sing at dawn` contains nothing about the code,
# and it still takes 18% of the blend. Must that be so? Give every chunk a fifth token that contains *nothing*: its key
# is 0 and its value is 0. What is the result of the chunk of birds now, and what is the share of `7`?


# %%
def attend_with_sink(q, k, v, scale):
    """Like `attend_chunk`, with one more token whose key and value are zeros: q [D], k and v [S, D] -> [D]."""
    # your code


check_attend_with_sink(attend_with_sink)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The shares of a softmax add up to 1, so some tokens must get attention. The empty token can take a part of it, and
# this part then goes to no word. The result of the chunk of birds is now 0.2 for each word. That is 0.8 in all, instead
# of 1. This is still much, because a word that does not match has the score 0, the same score as the empty token. A
# learned empty key with a score of 2 would take 65% of the attention in the chunk of birds, and 24% in chunk 0. The
# share of `7` falls from 0.711 to 0.682. Before, `7` had 16 times the share of the next word. Now it has 19 times that
# share. Such empty slots are called *attention sinks*.
#
# ```python
# from torch.nn.functional import pad
#
#
# def attend_with_sink(q, k, v, scale):
#     return attend_chunk(q, pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1)), scale)  # [S, D] -> [S+1, D]
#
#
# check_attend_with_sink(attend_with_sink)
# read = [attend_with_sink(toy.q[0, 11, 0], toy.k[0, i, :, 0], toy.v[0, i, :, 0], 9**-0.5) for i in (0, 1)]
# shares = torch.tensor([1.5, 0.0], dtype=torch.float64).softmax(0) @ torch.stack(read)
# print({word: round(x, 3) for word, x in zip(toy.vocabulary, shares.tolist())})
# assert round(shares.max().item(), 3) == 0.682
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# A token can now read chunks from anywhere. But it must also see the words next to it, and it must see them in order.
# [Notebook 05](05_layer.ipynb) joins the two: a sliding window *with* positions, and HSA *without* positions. It shows
# why positions belong to the window and not to HSA. It takes about 25 minutes.
#
# Notebook [06](06_forward_kernel.ipynb) turns the loops above into a GPU kernel. Notebook
# [07](07_backward_kernel.ipynb) uses the gradient formula again.
