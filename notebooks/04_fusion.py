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
# In [notebook 03](03_retrieval.ipynb) a token scored every chunk and kept the best K. Now it has to **read** them.
# And it has to make **one** answer of what K chunks say.
#
# After this notebook you will be able to
#
# * read chunks as Hierarchical Sparse Attention (HSA) does: attention inside each chunk, then a weighted sum,
# * say what each of its two softmaxes does, and check both by hand,
# * show why this blend teaches the model *what to retrieve*, and why the most natural alternative teaches it nothing.
#
# **Time:** 25 minutes to read, 15 seconds to run on two CPU cores. **Needs:** to know what a matrix is and what
# softmax does; notebook 03 helps, and is repeated where it matters.

# %%
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from matplotlib.patches import Rectangle
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention

from hsa_mini import reference
from hsa_mini.reference import retrieve
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREY, INK, PALE, RED, weight_bars

S = 4  # tokens in a chunk

# %% [markdown]
# ## The question in plain words
#
# Here are our twelve tokens, three chunks of four:
#
# > `the code is 7` | `birds sing at dawn` | `what is the code`
#
# The last token, `code`, must guess what comes next. Two chunks are complete and lie before it. One of them holds the
# answer. The other is about birds.
#
# Suppose retrieval hands over both chunks and says: *I believe in the first one, 82 to 18.* What should the token do?
#
# * It could lay the eight tokens end to end and attend to them all. Then the 82 and the 18 are thrown away.
# * Or it could read **each chunk by itself**, get one answer from each, and blend the answers 82 to 18.
#
# HSA does the second. This notebook is about why.

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
# | $q_t$ | what the token asks | `q` | `[B, T, H, D]` |
# | $K_{[i]}, V_{[i]}$ | keys and values of chunk $i$ | `k`, `v` | `[B, N, S, J, D]` |
# | $I_t$ | the chunks kept, $-1$ is an empty slot | `indices` | `[B, T, J, K]` |
# | $w_{t,i}$ | how much each is believed | `weights` | `[B, T, J, K]` |
# | $o_{t,i}$ | what chunk $i$ answers | | `[D]`, one token, one head |
# | $O_t$ | the blend | `out` | `[B, T, H, D]` |
#
# B is the batch, T the tokens, H the query heads, J the key/value heads, D the size of a head, N the chunks, S the
# tokens of a chunk and K the chunks kept. In our example B, H and J are 1.
#
# There are **two** softmaxes. One runs over the S tokens *inside* a chunk. The other runs over the K chunks.

# %% [markdown]
# ## Twelve tokens that can be checked by hand
#
# We have no trained model yet, so a simple rule stands in for one:
#
# * every word is its own axis. There are nine different words, so D = 9;
# * a token **asks** for its own word (in notebook 03 it asked for its last four);
# * a token's **key** is the word *two places before it* in its chunk. So `7` can be found under `code`. (A trained
#   model builds such keys in its first layers, which see nearby tokens.)
# * a token's **value** is its own word, so that an answer can be read off as "how much of each word";
# * a chunk's **landmark**, which retrieval compares with, is the set of its words.
#
# Everything that is compared goes through `norm`, which scales a vector until its mean square is 1. A single 1 among
# nine numbers becomes a 3.


# %%
def norm(x):
    return rms_norm(x, x.shape[-1:])


@dataclass(frozen=True)
class Toy:
    """A text as HSA sees it. B = J = H = 1; `words` are the T tokens, `vocabulary` names the D axes."""

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
    asks = norm(own)[None, :, None]  # [T, D] -> [1, T, 1, D]
    landmarks = norm(v.sum(dim=2))  # [1, N, 1, D]
    return Toy(words, vocabulary, asks, norm(two_before), v, asks, landmarks)


toy = read_by_rule("the code is 7 | birds sing at dawn | what is the code")

# %% [markdown]
# The last token has position 11. We let retrieval keep up to two chunks for every token.
#
# By hand: the landmark of chunk 0 has four words out of nine, so `norm` makes each of them 1.5. The query is a 3 on
# the axis `code`. The score is 3 × 1.5 / √9 = **1.5** for chunk 0, and **0** for the birds. So the weights are
# $e^{1.5} / (e^{1.5} + e^0)$ = 0.82 and 0.18.

# %%
# NBVAL_CHECK_OUTPUT
indices, weights = retrieve(toy.retrieval_q, toy.landmarks, chunk_size=S, top_k=2)
for chunk, weight in zip(indices[0, 11, 0].tolist(), weights[0, 11, 0].tolist()):
    print(f"token 11 `{toy.words[11]}` keeps chunk {chunk} with weight {weight:.3f}")


# %% [markdown]
# **You should see** chunk 0 with 0.818 and chunk 1 with 0.182.
#
# ## Step one: ask one chunk
#
# Attention over the S tokens of one chunk, and over nothing else. It is one line.


# %%
def attend_chunk(q, k, v, scale):
    """Softmax over the S tokens of one chunk alone: q [D], k and v [S, D] -> [D]."""
    return (k @ q * scale).softmax(dim=0) @ v


# %% [markdown]
# By hand: the key of `7` is `code`, so its score is 3 × 3 / √9 = 3. The other three tokens of the chunk score 0. The
# share of `7` is $e^3 / (e^3 + 3)$ = 0.87. In the chunk of birds nothing matches, so all four words get the same
# share. A chunk with nothing to say *still says something*. That is why it needs a weight.

# %%
# NBVAL_CHECK_OUTPUT
for chunk in (0, 1):
    answer = attend_chunk(toy.q[0, 11, 0], toy.k[0, chunk, :, 0], toy.v[0, chunk, :, 0], scale=9**-0.5)
    print(f"chunk {chunk} answers", {word: round(x, 2) for word, x in zip(toy.vocabulary, answer.tolist()) if x})


# %% [markdown]
# **You should see** `7` with 0.87 in chunk 0, and four times 0.25 in chunk 1.
#
# ## Step two: blend
#
# Now Eq. (2) in full, the way one would say it aloud: for every token and every head, for every chunk it kept, add
# that chunk's answer times its weight. It is slow and it is plain. A token that kept nothing keeps its zeros.


# %%
def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """Eq. (2), one token, one head, one chunk after the other -> [B, T, H, D]."""
    (B, T, H, D), J = q.shape, k.shape[3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, t, h in product(range(B), range(T), range(H)):
        j = h * J // H  # the key/value head that this query head shares
        for i, weight in zip(indices[b, t, j].tolist(), weights[b, t, j]):
            if i >= 0:  # -1 is an empty slot
                out[b, t, h] += weight * attend_chunk(q[b, t, h], k[b, i, :, j], v[b, i, :, j], scale)
    return out


# %% [markdown]
# The answer of token 11, word by word. By hand: `7` gets 0.818 × 0.870 = 0.711.

# %%
# NBVAL_CHECK_OUTPUT
out = chunk_attention(toy.q, toy.k, toy.v, indices, weights)
for word, share in sorted(zip(toy.vocabulary, out[0, 11, 0].tolist()), key=lambda pair: -pair[1])[:4]:
    print(f"{word:6} {share:.3f}")
print("all shares together:", round(out[0, 11, 0].sum().item(), 6))

# %% [markdown]
# **You should see** `7` first with 0.711, far ahead of everything else. All shares add up to 1: a blend of blends is
# a blend.
#
# And tokens 0 to 3? For them no chunk is complete yet. They get exactly zero, and must live off their neighbours
# (that is [notebook 05](05_layer.ipynb)).

# %%
# NBVAL_CHECK_OUTPUT
print("chunks kept by tokens 0 to 11:", (indices[0, :, 0] >= 0).sum(dim=-1).tolist())
print("tokens 0 to 3 get exactly zero:", bool((out[0, :4] == 0).all()))

# %% [markdown]
# ## The same thing, without loops
#
# The package does this with three `einsum`s: open [`chunk_attention.py`](../hsa_mini/reference/chunk_attention.py), it
# is short. Ours must give the same numbers, on the toy and on random tensors with two sequences, four query heads,
# two key/value heads and empty slots.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
randoms = partial(torch.randn, dtype=torch.float64)
q, k, v = randoms(2, 30, 4, 8), randoms(2, 7, S, 2, 8), randoms(2, 7, S, 2, 8)
chosen = retrieve(randoms(2, 30, 2, 8), randoms(2, 7, 2, 8), chunk_size=S, top_k=3)
print("toy:   ", torch.allclose(out, reference.chunk_attention(toy.q, toy.k, toy.v, indices, weights)))
print("random:", torch.allclose(chunk_attention(q, k, v, *chosen), reference.chunk_attention(q, k, v, *chosen)))

# %% [markdown]
# **You should see** `True` twice.
#
# ## The equality of this notebook
#
# If a token keeps **one** chunk, its weight is 1, and HSA is ordinary attention over that chunk. If that one chunk is
# *the whole text*, HSA is ordinary full attention. So HSA is not a different kind of attention. It is attention with
# a cut in it.

# %%
# NBVAL_CHECK_OUTPUT
one, all_of_it = torch.zeros(2, 30, 2, 1, dtype=torch.int32), torch.ones(2, 30, 2, 1, dtype=torch.float64)
whole_k, whole_v = k.flatten(1, 2), v.flatten(1, 2)  # [B, N, S, J, D] -> [B, N*S, J, D]
heads_first = [x.transpose(1, 2) for x in (q, whole_k, whole_v)]  # [B, T, H, D] -> [B, H, T, D], as PyTorch wants it
dense = scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
ours = chunk_attention(q, whole_k[:, None], whole_v[:, None], one, all_of_it)
print("one chunk that is the whole text == dense attention:", torch.allclose(ours, dense))

# %% [markdown]
# **You should see** `True`. And with several chunks? Then dense attention, too, is a fusion of chunks. It only uses
# other weights: each chunk counts by its share of the attention, $\log \sum_{j} e^{q \cdot k_j / \sqrt D}$ over its
# tokens $j$, put through a softmax.

# %%
# NBVAL_CHECK_OUTPUT
every_chunk = torch.arange(7, dtype=torch.int32).expand(2, 30, 4, 7)
k_4, v_4 = (x.repeat_interleave(2, dim=3) for x in (k, v))  # a key/value head for each query head
mass = (torch.einsum("bthd,bnshd->bthns", q, k_4) * 8**-0.5).logsumexp(dim=-1)  # [B, T, H, N]
ours = chunk_attention(q, k_4, v_4, every_chunk, mass.softmax(dim=-1))
print("fusion with these weights == dense attention:", torch.allclose(ours, dense))

# %% [markdown]
# **You should see** `True`. This says what retrieval really is: **a cheap guess at how much attention a chunk would
# get**. To know it exactly, one has to read all keys of the chunk. A landmark costs one dot product. The guess is
# allowed to be better than the original: it is trained for the answer, not to imitate.

# %% [markdown]
# ## See it
#
# One picture of what a token does: its chunks in rows, its weights on the left, the attention inside each chunk as
# shades of blue, the blend on the right. First the two functions that fetch the numbers and draw them.


# %%
def read_token(toy, token, keep, temperature=1.0):
    """-> weight of every chunk [N], attention inside every chunk [N, S], and what the token gets [D]."""
    asks = toy.retrieval_q[:, token : token + 1] / temperature
    indices, weights = retrieve(asks, toy.landmarks, chunk_size=S, top_k=keep, offset=token)
    kept = indices[0, 0, 0] >= 0
    by_chunk = torch.zeros(toy.landmarks.shape[1], dtype=torch.float64)
    by_chunk[indices[0, 0, 0, kept].long()] = weights[0, 0, 0, kept]
    inside = (toy.k[0, :, :, 0] @ toy.q[0, token, 0] * toy.q.shape[-1] ** -0.5).softmax(dim=-1)
    out = reference.chunk_attention(toy.q[:, token : token + 1], toy.k, toy.v, indices, weights)
    return by_chunk, inside, out[0, 0, 0]


def draw_chunks(axes, toy, token, by_chunk, inside):
    """The chunk grid: a row a chunk; blue where a kept chunk is read, grey where the token may not look yet."""
    for i, word in enumerate(toy.words):
        row, column = divmod(i, S)
        kept, hidden = by_chunk[row] > 0, (row + 1) * S > token
        shade = inside[row, column].item() if kept else 0.0
        colour = PALE if hidden else (1 - shade, 1 - 0.55 * shade, 1 - 0.3 * shade)
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=colour, edgecolor=GREY, linewidth=0.6))
        ink = "white" if shade > 0.6 else INK if kept or i == token else GREY
        axes.text(column + 0.5, row + 0.5, word, ha="center", va="center", color=ink, fontsize=10)
    row, column = divmod(token, S)
    axes.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor=RED, linewidth=2.5))
    axes.set(xlim=(0, S), ylim=(len(toy.words) // S, 0), xticks=[], yticks=[])


def draw_fusion(figure, toy, token, keep, temperature=1.0):
    """Weights | chunks | blend, side by side; returns what is seen in one line."""
    by_chunk, inside, out = read_token(toy, token, keep, temperature)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.3, 2.6, 1.3))
    weight_bars(left, by_chunk)
    left.set_ylim(len(by_chunk) - 0.5, -0.5)  # a bar beside each row of the grid
    draw_chunks(middle, toy, token, by_chunk, inside)
    best = out.topk(min(6, len(out)))
    weight_bars(right, best.values, [toy.vocabulary[i] for i in best.indices])
    for axes, title in ((left, "weight of each chunk"), (middle, "attention inside each chunk"), (right, "the blend")):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("")
    kept, first = int((by_chunk > 0).sum()), toy.vocabulary[best.indices[0]]
    said = f"its blend says `{first}` with {best.values[0]:.2f}" if kept else "it gets exactly 0"
    return f"Token {token} `{toy.words[token]}` reads {kept} of {token // S} complete chunks; {said}."


# %%
figure = make_figure(8.5, 2.5)
summary = draw_fusion(figure, toy, token=11, keep=2)
show(
    figure,
    "Three panels. Weights: chunk 0 has 0.82, chunk 1 has 0.18, chunk 2 none. Chunk grid: in `the code is 7` the "
    "word 7 is dark blue, in `birds sing at dawn` all four are equally pale, the last chunk is grey. Blend: 7 has 0.71.",
)
print(summary)

# %% [markdown]
# The framed word is the token that asks. Its own chunk is grey: it is not complete, so nobody can retrieve it yet.
#
# ### Move it
#
# Now a longer text, ten chunks of four, by the same rule. Move the **token** and watch which chunks it believes. Then
# take a token with several good chunks, such as the last `the`, and move **K**. The **temperature** divides the
# scores: small makes the best chunk take all, large makes all kept chunks equal. A trained model sets its own
# temperature: the norms of queries and landmarks have a learned gain.

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
    token=Control((0, 39), start=39, label="token that asks"),
    temperature=Control([0.25, 0.5, 1.0, 2.0, 4.0, 8.0], start=1.0, label="temperature"),
)

# %% [markdown]
# Try this: set K = 9 and raise the temperature to 8. The share of `7` drops from 0.65 to 0.15: the answer drowns.
# Every chunk without an answer still speaks, and now all are believed alike. With K = 1 it is back, at any
# temperature. (Of equal scores the newest chunk is kept. That is why the last chunks come first when nothing
# matches.)
#
# ## You know this machine already: mixture of experts
#
# Replace a few words and Eq. (2) is a mixture of experts, in its classic form:
#
# | mixture of experts | HSA |
# |---|---|
# | expert: a small network | chunk: four (in earnest 64) tokens to attend to |
# | router: scores all experts | retrieval: scores all chunks by their landmarks |
# | top-A experts run, the rest cost nothing | top-K chunks are read, the rest cost nothing |
# | gates: softmax over the chosen scores | weights: softmax over the kept scores |
# | output: sum of gate × expert's output | output: sum of weight × chunk's answer |
# | the gates carry the gradient to the router | **the weights carry the gradient to retrieval** |
# | experts are learned once, and fixed | chunks are written while reading, without end |
#
# A chunk is even built like an expert: a layer with S hidden units. Its first matrix is $K_{[i]}$, its second
# $V_{[i]}$, and between them stands a softmax. Here is a mixture of experts in one line, fed with chunks.


# %%
# NBVAL_CHECK_OUTPUT
def mixture(x, experts, gates):
    """Every expert's answer to x, times its gate, added up."""
    return sum(gate * expert(x) for expert, gate in zip(experts, gates))


experts = [partial(attend_chunk, k=toy.k[0, i, :, 0], v=toy.v[0, i, :, 0], scale=9**-0.5) for i in indices[0, 11, 0].tolist()]
print("mixture of chunk experts == HSA:", torch.allclose(mixture(toy.q[0, 11, 0], experts, weights[0, 11, 0]), out[0, 11, 0]))

# %% [markdown]
# ## How does the loss teach retrieval?
#
# Choosing the K best is a hard decision. There is no gradient through it: move a score a little, and the same chunks
# are chosen. So how can a model learn *which* chunks to choose?
#
# Through the weights. Let $L$ be the loss and $g = \partial L / \partial O_t$. Because $w$ is a softmax of the
# scores,
#
# $$\frac{\partial L}{\partial s_{t,i}} = w_{t,i}\; g \cdot (o_{t,i} - O_t).$$
#
# Read it slowly: a chunk whose answer is **better than the blend** gets a higher score, a chunk whose answer is worse
# gets a lower one. It is a competition, and the language-model loss is the judge. We check the formula with autograd.
# The loss is $-\log$ of the share of `7`.

# %%
# NBVAL_CHECK_OUTPUT
scores = torch.tensor([1.5, 0.0], dtype=torch.float64, requires_grad=True)  # of chunks 0 and 1, as computed above
blend = mixture(toy.q[0, 11, 0], experts, scores.softmax(dim=0))
loss = -blend[toy.vocabulary.index("7")].log()
(g,) = torch.autograd.grad(loss, blend, retain_graph=True)
loss.backward()
formula = [w * g @ (expert(toy.q[0, 11, 0]) - blend) for w, expert in zip(scores.softmax(dim=0), experts)]
print("autograd:", [round(x, 3) for x in scores.grad.tolist()])
print("formula: ", [round(x.item(), 3) for x in formula])

# %% [markdown]
# **You should see** −0.182 and +0.182 twice. Gradient descent goes against the gradient: the score of the chunk with
# the code goes up, that of the birds goes down.
#
# From the score it goes on to the landmark, and from there into everything that made the landmark:


# %%
# NBVAL_CHECK_OUTPUT
def gradient_of_landmarks(blend):
    """Retrieve with landmarks that can learn, blend, take the loss of token 11 -> gradient of the landmarks."""
    landmarks = toy.landmarks.clone().requires_grad_()
    indices, weights = retrieve(toy.retrieval_q, landmarks, chunk_size=S, top_k=2)
    k = toy.k.clone().requires_grad_()  # keys can learn too, so that there is always something to differentiate
    out = blend(toy.q, k, toy.v, indices, weights)
    (-out[0, 11, 0, toy.vocabulary.index("7")].log()).backward()
    return landmarks.grad


fused = gradient_of_landmarks(chunk_attention)
print("gradient at each landmark, fused:", [round(x, 3) for x in fused[0, :, 0].norm(dim=-1).tolist()])

# %% [markdown]
# **You should see** 0.182 for both chunks that were read, and 0 for the third, which is not visible.
#
# ## The natural alternative, and what it loses
#
# Most sparse attention works otherwise: choose chunks, lay them **end to end**, and run one softmax over all their
# tokens. The selected branch of NSA (arXiv 2502.11089) and MoBA (arXiv 2502.13189) do this. In code it is the same
# loop. Only the weights have nowhere to go.


# %%
def select_then_concatenate(q, k, v, indices, weights=None, *, scale=None):
    """One softmax over the tokens of all kept chunks, laid end to end -> [B, T, H, D]. The weights are not used."""
    (B, T, H, D), J = q.shape, k.shape[3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b, t, h in product(range(B), range(T), range(H)):
        j = h * J // H
        kept = indices[b, t, j][indices[b, t, j] >= 0].long()
        if len(kept):
            out[b, t, h] = attend_chunk(q[b, t, h], k[b, kept, :, j].flatten(0, 1), v[b, kept, :, j].flatten(0, 1), scale)
    return out


# %%
# NBVAL_CHECK_OUTPUT
side_by_side = select_then_concatenate(toy.q, toy.k, toy.v, indices)
print("the code is 7, fused:", round(out[0, 11, 0, toy.vocabulary.index("7")].item(), 3))
print("the code is 7, laid end to end:", round(side_by_side[0, 11, 0, toy.vocabulary.index("7")].item(), 3))
print("gradient of the landmarks, laid end to end:", gradient_of_landmarks(select_then_concatenate))

# %% [markdown]
# **You should see** 0.711 and 0.742: as an *answer* the alternative is fine, here even a little better. But the
# gradient is `None`. Not small: **there is no path**. The landmarks only decided who was chosen, and a choice has no
# slope.
#
# NSA and MoBA go around it. NSA trains its block scores in a second branch, which attends to compressed blocks. MoBA
# takes the mean of a block's keys as its landmark and trains those keys as keys. Both teach the scores a neighbouring
# task, and rely on it to make good choices. In HSA the answer itself teaches the choice.

# %% [markdown]
# ## Watch landmarks learn
#
# A small experiment, with the same data, seeds, parameters and steps in both arms. Every sample is a fresh page: 64
# different words out of 128 in 16 chunks of four. One word is named. The answer is the word that follows it on the
# page. The model may read K = 2 chunks of 16, so a blind choice is right once in eight times.
#
# Four matrices learn, from random starts: one makes landmarks from the mean of a chunk's words, one makes retrieval
# queries, one keys, one queries. Nobody says which chunk is the right one. There is only the loss on the answer.

# %%
WORDS, C, N, PAGES = 128, 64, 16, 32


def new_pages(generator):
    """-> words [B, N, S], the word asked for [B], the word that follows it [B], the chunk where both stand [B]."""
    order = torch.rand(PAGES, WORDS, generator=generator).argsort(dim=-1)
    words, b = order[:, : N * S].unflatten(1, (N, S)), torch.arange(PAGES)
    chunk = torch.randint(N, (PAGES,), generator=generator)
    place = torch.randint(S - 1, (PAGES,), generator=generator)
    return words, words[b, chunk, place], words[b, chunk, place + 1], chunk


def answer(blend, weight, embedding, words, asked):
    """Retrieve two chunks a page, read and blend them -> what is said [B, C], and the chunks chosen [B, K]."""
    tokens, ask = embedding[words], embedding[asked][:, None, None]  # [B, N, S, C], [B, 1, 1, C]
    before = torch.cat((torch.zeros_like(tokens[:, :, :1]), tokens[:, :, :-1]), dim=2)  # each token's neighbour in its chunk
    landmarks = norm(tokens.mean(dim=2) @ weight["landmark"])[:, :, None]
    indices, weights = retrieve(norm(ask @ weight["retrieval_q"]), landmarks, chunk_size=S, top_k=2, offset=N * S)
    k, v = norm(before @ weight["k"])[:, :, :, None], tokens[:, :, :, None]
    return blend(norm(ask @ weight["q"]), k, v, indices, weights)[:, 0, 0], indices[:, 0, 0]


def learn(blend, steps=300, seed=0):
    """-> for each step: the share of pages whose right chunk was among the two chosen."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(WORDS, C, generator=generator)
    start = {name: torch.randn(C, C, generator=generator) / C**0.5 for name in ("landmark", "retrieval_q", "k", "q")}
    weight = torch.nn.ParameterDict(start)
    optimizer, hits = torch.optim.Adam(weight.parameters(), lr=0.01), []
    for _ in range(steps):
        words, asked, follows, chunk = new_pages(generator)
        said, chosen = answer(blend, weight, embedding, words, asked)
        optimizer.zero_grad()
        cross_entropy(said @ embedding.T / 4, follows).backward()
        optimizer.step()
        hits.append((chosen == chunk[:, None]).any(dim=-1).float().mean().item())
    return torch.tensor(hits)


# %%
# NBVAL_CHECK_OUTPUT
threads = torch.get_num_threads()
torch.set_num_threads(1)  # these tensors are tiny: one core is faster than several that wait for each other
hits = {"fused, as in HSA": learn(reference.chunk_attention), "laid end to end": learn(select_then_concatenate)}
torch.set_num_threads(threads)
early, late = slice(0, 20), slice(-20, None)
fused, end_to_end = hits.values()
print("at first both are near blind choice, 1 in 8:", all(0.05 < x[early].mean() < 0.3 for x in (fused, end_to_end)))
print("fused, at the end right most of the time:   ", bool(fused[late].mean() > 0.7))
print("laid end to end, still at blind choice:     ", bool(0.05 < end_to_end[late].mean() < 0.2))


# %%
def draw_learning(figure, hits):
    axes = figure.subplots()
    for (name, curve), colour in zip(hits.items(), (BLUE, RED)):
        smooth = curve.unfold(0, 20, 1).mean(dim=-1)
        axes.plot(range(20, 20 + len(smooth)), smooth, color=colour, linewidth=2)
        axes.text(len(curve) + 4, smooth[-1], name, color=INK, va="center", fontsize=11)
    axes.plot((0, len(curve)), (2 / N, 2 / N), color=GREY, linewidth=1, linestyle=":")
    axes.text(3, 2 / N - 0.09, "blind choice: 1 in 8", color=GREY, fontsize=10)
    axes.set(xlabel="training steps", ylabel="right chunk among the two read")
    axes.set(ylim=(0, 1), xlim=(0, len(curve) * 1.22), xticks=range(0, len(curve) + 1, 50))
    axes.spines[["top", "right"]].set_visible(False)


figure = make_figure(7.5, 3.2)
draw_learning(figure, hits)
show(
    figure,
    "Two curves over 300 training steps: how often the right chunk is among the two read. With fused scores it "
    "climbs from one in eight to about nine in ten. Laid end to end, it stays at blind choice, one in eight.",
)

# %% [markdown]
# Fused, retrieval goes from blind to right most of the time, and nobody ever told it which chunk was right. Laid end to
# end, it stays blind, and would for ever: its landmarks never get a gradient, although keys and queries learn as well as
# they can. Real models are larger, but the path of the gradient is this one.
#
# One honest remark. A chunk that is never chosen gets no gradient in either arm. Here 300 steps with fresh pages are
# enough to try everything. In earnest a little random noise is added to the choice in training, as in [notebook
# 03](03_retrieval.ipynb).

# %% [markdown]
# ## Exercises
#
# **1.** Set K = 1. What is the gradient of the landmark now? Think first, then try `gradient_of_landmarks` with
# `top_k=1`.
#
# <details><summary>Solution</summary>
#
# Exactly zero. A softmax over one score is 1, whatever the score is, so the loss cannot reach it. In the formula:
# with one chunk, $o_{t,i} = O_t$, and the bracket vanishes. A competition needs two. Mixtures of experts that choose
# one expert meet the same trouble, and weigh it by its share among *all* experts, or by a sigmoid. HSA's other
# weighting, `weighting="stick_breaking"`, escapes in the same way: its weight for a single chunk is a sigmoid of the
# score.
#
# ```python
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
#
# **2.** `birds sing at dawn` has nothing to say about the code, and still takes 18% of the blend. Must that be so?
# Give every chunk a fifth token that holds *nothing*: key 0, value 0. Now what does the chunk of birds answer, and
# what does the share of `7` become?
#
# <details><summary>Solution</summary>
#
# A softmax must give its attention to somebody. With an empty token it may give it to nobody: the birds now answer
# 0.2 for each word, 0.8 in all, instead of 1. That is still much, because no match (score 0) weighs as much as the
# empty token. A learned empty key with a score of 2 would take 65% of the birds and 24% of chunk 0. The share of `7`
# falls from 0.711 to 0.682, and its lead over the next word, 16-fold before, grows to 19-fold. Such empty slots are
# called *attention sinks*.
#
# ```python
# from torch.nn.functional import pad
#
# k, v = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (toy.k, toy.v))  # [1, N, S, 1, D] -> [1, N, S+1, 1, D]
# with_sink = chunk_attention(toy.q, k, v, indices, weights)[0, 11, 0]
# print({word: round(x, 3) for word, x in zip(toy.vocabulary, with_sink.tolist())})
# assert round(with_sink.max().item(), 3) == 0.682
# ```
#
# </details>

# %% [markdown]
# ## What comes next
#
# A token can now read chunks from anywhere. But words next to it it must see too, and in order. [Notebook
# 05](05_layer.ipynb) joins the two: a sliding window *with* positions, HSA *without* any, and shows why it has to be
# this way round. About 25 minutes.
#
# How the loops above become a GPU kernel, and where the gradient formula returns, is for notebooks
# [06](06_forward_kernel.ipynb) and [07](07_backward_kernel.ipynb).
