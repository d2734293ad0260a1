# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · How do 8 billion parameters cost one?
#
# The paper's large model has 8 billion parameters. A single token uses 1 billion of them. The other seven billion stay
# in memory and serve other tokens. This notebook builds the part that makes this possible, a **mixture of experts**,
# and then the whole model around it.
#
# After this notebook you will be able to
#
# * route tokens to experts by hand, and explain what a gate is and what a bias is,
# * write the layer twice, as a loop and as grouped matrix products, and prove that both are equal, gradients included,
# * build a complete HSA model from its parts, equal to the package's, and count its parameters with pencil and paper,
# * watch a router collapse while a small model learns, and repair it with one number per expert,
# * read the bill of the 8B model: where its parameters are, which of them a token uses, what 16 million tokens cost.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at
# least what a block of a transformer is. No GPU.
#
# [← 09 memory](09_memory.ipynb) · [map of the course](00_start.ipynb) · [11 training →](11_training.ipynb)

# %%
import dataclasses
import time
from functools import lru_cache

import torch
from torch import nn
from torch.nn.functional import cross_entropy, grouped_mm, silu

from hsa_mini import PRESETS, HSAModel
from hsa_mini.data.corpus import load_corpus
from hsa_mini.memory.chunk_source import DeviceChunks
from hsa_mini.model.block import Block
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.cost_estimate import PRINTED, estimate_cost, scaled
from hsa_mini.model.mlp import MLP
from hsa_mini.model.moe import MoE
from hsa_mini.model.norm import RMSNorm
from hsa_mini.ops.rope import rope_table
from hsa_mini.viz import Control, explore, make_figure, models, show
from hsa_mini.viz.course import side_by_side
from hsa_mini.viz.style import length_name

# %% [markdown]
# ## The question in plain words
#
# A block of a transformer does two things with a token. First it looks around (attention). Then a small network, the
# MLP (also called feed-forward network), processes this token separately from all others. Most parameters are in these
# networks. They are where a model keeps what it knows.
#
# A model that has to know twice as much needs MLPs that are twice as wide. Then every token costs twice as many
# multiplications. But does `7` need everything that is known about birds?
#
# So we cut the wide network into many narrow ones, the **experts**. A **router** looks at each token and sends it to a
# few of them. The number of parameters grows with the number of experts. The work grows with the number of experts *per
# token*.
#
# ## In symbols
#
# The layer computes this for the vector $x_t$ of one token. There are $E$ experts, and each token uses $A$ of them
# (DeepSeek-V3, arXiv 2412.19437, §2.1.2; the paper of this course builds on it):
#
# $$s_{t,e} = \mathrm{sigmoid}(x_t \cdot r_e) \qquad I_t = \text{the } A \text{ experts of the largest } s_{t,e} + b_e \qquad
# g_{t,e} = \frac{s_{t,e}}{\sum_{j \in I_t} s_{t,j}}$$
#
# $$y_t = \mathrm{MLP}_\mathrm{shared}(x_t) + \sum_{e \in I_t} g_{t,e}\, \mathrm{MLP}_e(x_t)$$
#
# | symbol | what it is | in code | shape |
# |---|---|---|---|
# | $r_e$ | the direction that expert $e$ looks for | `router` | `[E, C]` |
# | $s_{t,e}$ | the affinity of token and expert, 0 to 1 | `affinity` | `[M, E]`, M tokens |
# | $b_e$ | a bias for expert $e$, used only for the choice | `bias` | `[E]` |
# | $I_t$ | the chosen experts | `chosen` | `[M, A]` |
# | $g_{t,e}$ | the weight of each expert's output | `gates` | `[M, A]`, they sum to 1 |
#
# One expert is **shared**: every token uses it. What all tokens need does not have to be learned 64 times.
#
# You have already seen this structure: [notebook 04](04_fusion.ipynb) called HSA a mixture of experts whose experts are
# chunks.

# %% [markdown]
# ## Twelve tokens, four experts
#
# We take our twelve tokens and four experts with fixed rules: one for function words, one for things, one for numbers,
# one for actions. A table of affinities replaces a trained router. Each token uses two experts, A = 2.

# %%
WORDS = "the code is 7 birds sing at dawn what is the code".split()
EXPERTS = ["function words", "things", "numbers", "actions"]
TABLE = {
    "the is at what": (0.9, 0.3, 0.2, 0.1),
    "code birds dawn": (0.3, 0.9, 0.2, 0.1),
    "7": (0.1, 0.3, 0.9, 0.2),
    "sing": (0.2, 0.3, 0.1, 0.9),
}
row_of = {word: row for words, row in TABLE.items() for word in words.split()}
affinity = torch.tensor([row_of[word] for word in WORDS])  # [M, E]


def choose(affinity, bias, A):
    """affinity [M, E], bias [E] -> the chosen experts [M, A] and their gates [M, A], which sum to 1."""
    chosen = (affinity + bias).topk(A, dim=-1).indices
    gates = affinity.gather(-1, chosen)  # without the bias
    return chosen, gates / gates.sum(dim=-1, keepdim=True)


def load_of(chosen, E):
    """The share of all assignments that each expert gets [E]; 1/E each is a perfect balance."""
    return torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()


# %% [markdown]
# By hand: `7` has 0.9 for numbers and 0.3 for things. The gates are 0.9 / 1.2 = **0.75** and **0.25**. And which
# experts are busy? An assignment is one pair of a token and an expert that it uses. Six function words and four things
# are assigned to the first expert. *Every* word is assigned to the second expert, either as its first choice or as its
# second: 12 of 24 assignments, where a fair share is 6.

# %%
# NBVAL_CHECK_OUTPUT
chosen, gates = choose(affinity, torch.zeros(4), A=2)
print("`7` uses", {EXPERTS[e]: round(g, 2) for e, g in zip(chosen[3].tolist(), gates[3].tolist())})
print("assignments:", dict(zip(EXPERTS, (24 * load_of(chosen, 4)).round().int().tolist())))

# %% [markdown]
# **You should see** 0.75 and 0.25, and the assignments 10, 12, 1, 1.
#
# That is a waste. Two experts do nearly all the work. The other two learn nearly nothing, because an expert that is not
# chosen gets no gradient. If the experts are spread over several GPUs, two GPUs wait for the other two.
#
# The remedy is the **bias**. After every step, the bias of each expert with more than the mean load becomes a little
# smaller, and the bias of each expert with less becomes a little larger:
#
# $$b_e \leftarrow b_e + \text{rate} \cdot \mathrm{sign}\!\left(\tfrac{1}{E} - \text{load}_e\right)$$
#
# The bias changes only the *choice*. The gates do not contain it, so it distorts no output. And the loss needs no extra
# term that would compete with the language task.


# %%
def update_bias(bias, load, rate):
    """One step of the bias [E] towards equal loads [E]."""
    return bias + rate * torch.sign(1 / len(load) - load)


# %%
# NBVAL_CHECK_OUTPUT
pushed = update_bias(torch.zeros(4), load_of(chosen, 4), rate=0.15)
chosen, gates = choose(affinity, pushed, A=2)
print("bias:", [round(b, 2) for b in pushed.tolist()])
print("`7` uses", {EXPERTS[e]: round(g, 2) for e, g in zip(chosen[3].tolist(), gates[3].tolist())})
print("assignments:", dict(zip(EXPERTS, (24 * load_of(chosen, 4)).round().int().tolist())))

# %% [markdown]
# **You should see** that `7` now uses numbers and actions. Its gates are 0.9 / 1.1 = 0.82 and 0.2 / 1.1 = 0.18: these
# are affinities without the bias. And the assignments are 6, 4, 12, 2. Most tokens have moved to numbers. **The step
# was too large**, and the next one would push them back. Steps have to be small, and there have to be many.
#
# ### Move it
#
# Each column is a token, each row an expert, and the number is the gate. Raise the bias of `things`: nothing happens,
# since every word uses this expert already. Lower it: at which bias does the first word change its expert? Then let
# each token use one expert, or all four. With A = 4 no bias matters any more. Why?


# %%
def draw_routes(figure, A, bias):
    """The gates of the twelve tokens, and the number of assignments of each expert."""
    chosen, gates = choose(affinity, torch.tensor([0, bias, 0, 0]), A)
    counts = (12 * A * load_of(chosen, 4)).round().int()
    fair = 3 * A
    left, right = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    models.gate_grid(left, chosen, gates, WORDS, EXPERTS)
    models.load_bars(right, counts, fair)
    left.set_title(f"gates, with a bias of {bias:+.2f} for `things`")
    right.set_title("assignments")
    busiest = f"the busiest expert has {counts.max()} assignments"
    return f"A = {A}: {busiest}, {counts.max() / fair:.2f} times its fair share of {fair}."


explore(
    draw_routes,
    alt="Twelve tokens from left to right, four experts from top to bottom. Shades of blue show the gates. "
    "Bars count the assignments of each expert.",
    size=(9, 2.9),
    A=Control((1, 4), start=2, label="experts per token A"),
    bias=Control((-1.0, 1.0, 0.25), start=0.0, label="bias of `things`"),
)

# %% [markdown]
# ## The layer, as a loop
#
# In a real model an expert is an MLP with a gate inside, SwiGLU. It has two projections up. One of them passes through
# `silu`, then both are multiplied, and a third projection leads down again. These are three matrices of $C \times$
# `hidden`. The cell below defines one expert, and then the equation of $y_t$, term by term.


# %%
def expert(x, up_and_gate, down):
    """SwiGLU: x [M, C], up_and_gate [C, 2*hidden], down [hidden, C] -> [M, C]."""
    up, gate = (x @ up_and_gate).chunk(2, dim=-1)
    return (up * silu(gate)) @ down


def loop_over_experts(layer, x):
    """One token after the other, and for each token one expert after the other: x [B, T, C] -> [B, T, C]."""
    tokens = x.flatten(0, 1)  # [M, C]
    chosen, gates = choose((tokens @ layer.router.weight.T).sigmoid(), layer.bias, layer.top_k)
    out = []
    for t, experts in enumerate(chosen.tolist()):
        token = tokens[t : t + 1]
        parts = [gates[t, a] * expert(token, layer.up_and_gate[e], layer.down[e]) for a, e in enumerate(experts)]
        shared = expert(token, layer.shared.up_and_gate.weight.T, layer.shared.down.weight.T)
        out.append(shared + sum(parts))
    return torch.cat(out).view_as(x)


# %% [markdown]
# First we ask: does a wide MLP lose anything if we cut it into experts? No. If every token uses *all* experts and every
# gate is 1, then the experts are one wide MLP, cut into pieces. So a mixture is a wide MLP in which each token uses
# some of the columns. We take the experts of the preset `mini_moe`, with random weights.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
config = PRESETS["mini_moe"]
layer = HSAModel(config).lower[1].mlp  # the first block is dense, the second has experts
E = config.experts
A = config.experts_active
C = config.width
hidden = config.expert_width
print(f"{E} experts of {hidden}, {A} per token, width {C}")
x = torch.randn(2, 30, C)
up, gate = layer.up_and_gate.unflatten(-1, (2, hidden)).permute(2, 1, 0, 3).flatten(2)  # each [C, E*hidden]
wide = expert(x, torch.cat((up, gate), dim=1), layer.down.flatten(0, 1))
pieces = sum(expert(x, *both) for both in zip(layer.up_and_gate, layer.down))
print("all experts together == one wide MLP:", torch.allclose(pieces, wide, atol=1e-4))

# %% [markdown]
# ## The layer, grouped
#
# The loop computes a tiny product for every pair of a token and an expert. A processor is faster with a few large
# products. So we list every pair (token, expert) and **sort the pairs by expert**. Now the tokens of each expert form
# one block. `grouped_mm` multiplies block by block, each block with the matrix of its own expert. Then we undo the
# sorting.
#
# `order // A` is the only trick. Pair number $p$ belongs to token $p // A$, since each token has $A$ pairs.


# %%
def grouped_experts(layer, x):
    """All tokens of an expert at once: x [B, T, C] -> [B, T, C]."""
    tokens = x.flatten(0, 1)  # [M, C]
    chosen, gates = choose((tokens @ layer.router.weight.T).sigmoid(), layer.bias, layer.top_k)
    order = chosen.flatten().argsort(stable=True)  # [M*A] pairs, those of expert 0 first
    expert_offsets = torch.bincount(chosen.flatten(), minlength=len(layer.bias)).cumsum(0).int()  # ends of the blocks
    rows = tokens[order // layer.top_k]  # [M*A, C]
    up, gate = grouped_mm(rows, layer.up_and_gate, offs=expert_offsets).chunk(2, dim=-1)
    outputs = grouped_mm(up * silu(gate), layer.down, offs=expert_offsets)
    unsorted = outputs[order.argsort()].unflatten(0, (-1, layer.top_k))  # [M, A, C], in the order of the tokens
    return layer.shared(x) + (gates[..., None] * unsorted).sum(dim=1).view_as(x)


# %% [markdown]
# The next cell sorts the twelve tokens once more, with A = 2.

# %%
# NBVAL_CHECK_OUTPUT
chosen, _ = choose(affinity, torch.zeros(4), A=2)
order = chosen.flatten().argsort(stable=True)
expert_offsets = torch.bincount(chosen.flatten(), minlength=4).cumsum(0)
for name, block in zip(EXPERTS, torch.tensor_split(order // 2, expert_offsets[:-1])):
    print(f"{name:14} {len(block):2}:", " ".join(WORDS[t] for t in block))

# %% [markdown]
# **You should see** the tokens in the block of each expert. The counts are the same as above: 10, 12, 1 and 1.
#
# ## The equality of this notebook
#
# The loop, the grouped products and the package's layer have the same output. They also have the same gradients for the
# input, the router, the shared expert and all routed experts. (The bias has no gradient. It is updated by counting.)


# %%
def output_and_gradients(mixture, layer, x):
    """The output, and the gradients of x and of every weight, for a loss with random factors."""
    x = x.clone().requires_grad_()
    out = mixture(layer, x)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * factors).sum(), [x, *layer.parameters()])]


# %%
# NBVAL_CHECK_OUTPUT
looped = output_and_gradients(loop_over_experts, layer, x)
grouped = output_and_gradients(grouped_experts, layer, x)
package = output_and_gradients(lambda layer, x: layer(x), layer, x)
names = ["output", "x", *(name for name, _ in layer.named_parameters())]
for name, a, b, c in zip(names, looped, grouped, package):
    same = torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)
    print(f"{name:24} loop == grouped == package: {same}")


# %% [markdown]
# **You should see** `True` seven times. How do they compare in time? We also time the wide MLP. It has as many
# parameters as all experts together, and each token uses all of them. In the mixture a token uses two of the eight
# experts and the shared one, so it needs 3/8 of the work of the wide MLP.


# %%
def milliseconds(run, times=5):
    """The fastest of some runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


many = torch.randn(1, 2048, C)
dense = MLP(C, E * hidden)
with torch.no_grad():
    few = many[:, :128]
    each = milliseconds(lambda: loop_over_experts(layer, few), times=2) / few.shape[1]
    print(f"loop:     {2048 * each:7.1f} ms for 2,048 tokens (measured on {few.shape[1]})")
    print(f"grouped:  {milliseconds(lambda: grouped_experts(layer, many)):7.1f} ms")
    print(f"wide MLP: {milliseconds(lambda: dense(many)):7.1f} ms")

# %% [markdown]
# ## The whole model, from its parts
#
# Now all parts are known. A text passes through
#
# 1. the **embedding**, a vector for each token,
# 2. the **lower decoder**, blocks with a window and an MLP or experts,
# 3. the **chunk encoder**, which makes keys, values and landmarks of each complete chunk ([notebook
#    02](02_chunks.ipynb)),
# 4. the **upper decoder**, groups of blocks; the first block of each group also retrieves ([notebook
#    05](05_layer.ipynb)),
# 5. a norm and the **head**, which is the transposed embedding.


# %%
def build(c):
    """The parts of a model, in the order in which a token passes through them."""
    dense_or_experts = [bool(c.experts) and i > 0 for i in range(c.lower_layers)]
    with_hsa = [i % c.layers_per_group == 0 for i in range(c.groups * c.layers_per_group)]
    parts = nn.ModuleDict()
    parts["embedding"] = nn.Embedding(c.vocab_size, c.width)
    parts["lower"] = nn.ModuleList(Block(c, with_hsa=False, with_experts=experts) for experts in dense_or_experts)
    parts["encoder"] = ChunkEncoder(c)
    parts["upper"] = nn.ModuleList(Block(c, with_hsa=hsa, with_experts=bool(c.experts)) for hsa in with_hsa)
    parts["norm"] = RMSNorm(c.width)
    parts["head"] = nn.Linear(c.width, c.vocab_size, bias=False)
    parts["head"].weight = parts["embedding"].weight
    return parts


def logits(parts, ids, c):
    """ids [B, T] -> logits [B, T, vocabulary]."""
    x = parts["embedding"](ids)
    table = rope_table(torch.arange(ids.shape[1]), c.head_dim, c.rope_base)
    for block in parts["lower"]:
        x, _ = block(x, table, None, 0)
    complete = ids.shape[1] // c.chunk_size
    chunks = x[:, : complete * c.chunk_size].unflatten(1, (complete, c.chunk_size))
    encoded = parts["encoder"](chunks)
    source = DeviceChunks(encoded.k, encoded.v, encoded.landmarks)  # what HSA layers look into
    for block in parts["upper"]:
        x, _ = block(x, table, None, 0, lambda hsa, x: hsa(x, source, position=0)[0])
    return parts["head"](parts["norm"](x))


# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
model = HSAModel(config).eval()
parts = build(config).eval()
parts.load_state_dict(model.state_dict())
ids = torch.randint(config.vocab_size, (1, 700))
with torch.no_grad():
    same = torch.allclose(logits(parts, ids, config), model(ids).logits, atol=1e-4)
print("parts put together == package's model:", same)

# %% [markdown]
# **You should see** `True`. The weights even have the same names, so they could be copied over in one line.
#
# ## Counting
#
# Now we count with pencil and paper. A matrix has rows times columns parameters, and a norm has one parameter per
# dimension. The argument `experts` is the number of experts to count in each layer: all of them for the total, $A$ for
# what one token uses.


# %%
def window_parameters(c):
    """Window attention of a block: queries and output, keys and values."""
    return 2 * c.width * c.head_dim * (c.heads + c.kv_heads)


def mlp_parameters(c, experts):
    """The MLP of a block; or its router, its shared expert, and so many routed experts."""
    if not c.experts:
        return 3 * c.width * c.mlp_width
    return c.width * c.experts + 3 * c.width * c.expert_width * (1 + experts)


def head_norms(c):
    """Norms over the heads of an HSA layer (its queries) or of the encoder (its keys and landmarks)."""
    return c.hsa_head_dim + c.retrieval_norm * c.retrieval_dim


def encoder_parameters(c):
    outputs = 2 * c.hsa_kv_heads * c.hsa_head_dim + c.retrieval_heads * c.retrieval_dim  # keys and values, landmark
    mlp = 3 * c.width * (c.encoder_mlp_width or c.mlp_width)
    norms = 3 * c.width + 2 * c.head_dim + head_norms(c)
    return window_parameters(c) + mlp + c.width * (1 + outputs) + norms  # the 1 is [CLS]


def hsa_parameters(c):
    queries = 2 * c.hsa_heads * c.hsa_head_dim + c.retrieval_heads * c.retrieval_dim  # with the output; for retrieval
    recency = c.recency * (c.width + 1) * c.hsa_kv_heads  # an option: how much a token prefers newer chunks
    return c.width * (queries + 1) + head_norms(c) + recency  # the 1 is a norm


def parameters(c, experts):
    """Parameters of each part, with so many routed experts counted in each layer."""
    dense = 3 * c.width * c.mlp_width  # the first block never has experts
    blocks = c.lower_layers + c.upper_layers
    return {
        "embedding and head": c.vocab_size * c.width,
        "lower window attention": c.lower_layers * window_parameters(c),
        "lower MLPs and experts": dense + (c.lower_layers - 1) * mlp_parameters(c, experts),
        "chunk encoder": encoder_parameters(c),
        "upper window attention": c.upper_layers * window_parameters(c),
        "HSA": c.groups * hsa_parameters(c),
        "upper MLPs and experts": c.upper_layers * mlp_parameters(c, experts),
        "norms": blocks * 2 * (c.width + c.head_dim) + c.width,
    }


# %%
# NBVAL_CHECK_OUTPUT
for name in ("mini_moe", "ul_0_5b", "ul_8b_a1b"):
    by_hand = parameters(PRESETS[name], PRESETS[name].experts)
    print(f"{name:9} by hand == package, part by part:", by_hand == estimate_cost(name).params_by_part)
of_one_token = parameters(config, A)
active = sum(of_one_token.values()) - of_one_token["embedding and head"]
print(f"mini_moe: {sum(parameters(config, E).values()):,} in all, {active:,} active")

# %% [markdown]
# **You should see** `True` three times, so every part agrees. Here the *active* parameters do not include the embedding
# and the head. With them, `mini_moe` has 6.6 million active parameters and the 8B has 1.29 billion. We always state
# which of the two we mean.
#
# Is it true that a token uses no more than that? We can test it. Every parameter that a token uses gets a **gradient**,
# and the others get none. We let `mini_moe` read 700 tokens, then one more, and count the weights whose gradient is not
# zero. (The encoder ran before this token, and the token only reads what the encoder wrote. So the parameters of the
# encoder get no gradient here, and we add them by hand.)


# %%
def reached(model):
    """Parameters that have a gradient, without embedding and head; an expert counts only if it was chosen."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    gradients = [grad for name, grad in named if not name.startswith(("embedding", "head"))]
    return sum(part.numel() for grad in gradients for part in (grad if grad.dim() == 3 else [grad]) if part.any())


# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    memory = model(ids).memory
model(ids[:, :1], memory).logits.sum().backward()
print("parameters with a gradient + encoder == active:", reached(model) + of_one_token["chunk encoder"] == active)

# %% [markdown]
# **You should see** `True`.
#
# ## Watch a router collapse
#
# Now we take a real router. A small model with eight experts in three of its four blocks learns to predict real text:
# 120 steps of 512 tokens. We train it twice, with the same text, the same seed and the same steps. In one run the
# biases stay at 0. In the other run each step updates them. At every step we record the loss, and
#
# * the **load**: the share of all assignments that each expert got,
# * the **similarity** of the tokens at the router: the mean cosine between the vectors that the router receives.


# %%
SMALL = dataclasses.replace(PRESETS["nano"], experts=8, experts_active=2, expert_width=32)
TEXT = torch.from_numpy(load_corpus("train").tokens[:2_000_000].astype("int64"))


def similarity(x):
    """The mean cosine between all pairs of tokens [B, T, C]: 1 if all vectors point in the same direction."""
    return nn.functional.normalize(x.detach().flatten(0, 1), dim=-1).mean(dim=0).square().sum()


def learning_step(model, optimizer, batch=8, tokens=64):
    """One step of training on random passages of the text; returns the loss."""
    starts = torch.randint(len(TEXT) - tokens - 1, (batch,))
    text = torch.stack([TEXT[i : i + tokens + 1] for i in starts])
    loss = cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def counting_mixtures(model):
    """The mixtures of experts of a model; from now on they count the tokens of every expert."""
    mixtures = [part for part in model.modules() if isinstance(part, MoE)]
    for mixture in mixtures:
        mixture.count_tokens()
    return mixtures


def learn(rate, steps=120):
    """-> the model; for every step the loss, the load of the last block's experts [E], and its tokens' similarity."""
    torch.manual_seed(0)
    model = HSAModel(SMALL).train()
    mixtures = counting_mixtures(model)
    inputs = []
    mixtures[-1].register_forward_hook(lambda layer, given, out: inputs.append(given[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    log = []
    for _ in range(steps):
        loss = learning_step(model, optimizer)
        load = [mixture.update_bias(rate).load for mixture in mixtures][-1]
        log.append((loss, load, similarity(inputs.pop())))
    return model, *map(torch.stack, zip(*log))


# %%
threads = torch.get_num_threads()
torch.set_num_threads(1)  # these tensors are small: one core is faster than several that wait for each other
without_bias, *record_without = learn(rate=0.0)

# %%
with_bias, *record_with = learn(rate=0.02)
torch.set_num_threads(threads)


# %% [markdown]
# What is a good load? Two numbers describe it. The **max over mean load** is the largest load divided by the mean. 1 is
# perfect. $E/A$ = 4 is the worst case, in which all tokens use the same two experts. The **entropy** is
# $-\sum \text{load} \log \text{load}$. $\log 8$ = 2.08 is perfect, and $\log 2$ = 0.69 is the worst case.


# %%
def max_over_mean_load(load):
    return load.max(dim=-1).values * load.shape[-1]


def entropy(load):
    return -torch.xlogy(load, load).sum(dim=-1)


for name, (loss, load, _) in {"without updates": record_without, "with updates": record_with}.items():
    last = load[-20:].mean(dim=0)
    loads = f"max over mean load {max_over_mean_load(last):.2f}, entropy {entropy(last):.2f}"
    print(f"{name}, mean of the last 20 steps: loss {loss[-20:].mean():.2f}, {loads}")
at_steps = [round(record_without[2][step].item(), 2) for step in (0, 20, 60, 119)]
print("similarity of the tokens at steps 0, 20, 60, 119:", at_steps)

# %%
# NBVAL_CHECK_OUTPUT
worst = max_over_mean_load(record_without[1][20:40]).mean()
best = max_over_mean_load(record_with[1][-20:].mean(dim=0))
difference = (record_without[0] - record_with[0])[-20:].mean().abs()
print("without updates, two experts soon get nearly all tokens       :", bool(worst > 3.5))
print("with updates, in the end no expert gets twice the mean load   :", bool(best < 2))
print("both runs end at about the same loss                          :", bool(difference < 0.3))


# %%
histories = {
    name: (load, max_over_mean_load(load), likeness)
    for name, (_, load, likeness) in {"bias stays at 0": record_without, "bias is updated": record_with}.items()
}
figure = make_figure(9, 4.2)
models.load_history(figure, histories)
show(
    figure,
    "Two runs of 120 steps. Above, brightness shows the load of eight experts. Without bias updates, two rows soon "
    "take half each and the others go dark. With updates the bright rows change, and later all are about equally "
    "bright. Below, the max over mean load jumps up in both runs, when the tokens are most similar. Without updates "
    "it stays at 4, with updates it falls.",
)

# %% [markdown]
# Play the steps one by one. In which step does the first expert fall idle, and does it come back?


# %%
def draw_load(figure, step):
    models.load_at_step(figure, {name: load[step] for name, (load, *_) in histories.items()})
    idle = {name: int((load[step] < 0.01).sum()) for name, (load, *_) in histories.items()}
    return f"Step {step}: " + ", ".join(f"{count} of 8 experts idle where the {name}" for name, count in idle.items()) + "."


explore(
    draw_load,
    alt="Two panels with a bar for the load of each of eight experts, at one step of the two runs. Dashed: the mean load.",
    size=(8.5, 2.8),
    play="step",
    step=Control((0, 119), start=119, label="training step"),
)

# %% [markdown]
# Why does the router collapse? The blue line, the similarity of the tokens, shows the reason. At first the model learns
# what is true for *all* tokens: which words are frequent. Then all vectors point in nearly the same direction, and the
# expert that one token prefers is preferred by all. Two experts get everything, and the others learn nothing. Later the
# tokens become different again, but the two experts keep their lead.
#
# The bias corrects the loads, whatever their cause. While all tokens are similar, it can only move all of them together
# from one expert to the next: you see this as bright spots that jump from row to row. As soon as the tokens differ, the
# bias spreads them.
#
# And the loss? It is about the same here. In 120 steps an idle expert makes hardly any difference. With 64 experts and
# trillions of tokens an idle expert is a part of the model that was paid for and never used. How large the step of the
# bias should be depends on the number of steps: ours is 0.02 for 120 steps, the package trains with 0.001 for
# thousands.
#
# ### Move it
#
# We take the router of the run without bias updates, and 16,384 tokens of text that it has not seen. The router does
# not learn any more. Only the bias changes, by the rule above, for 200 steps.
#
# * **rate**: if it is too small, 200 steps are not enough to balance the loads. If it is too large, the bias
#   oscillates.
# * **tokens**: the number of tokens counted in each step. With few tokens the load is uneven by chance, and the bias
#   follows chance.
# * **A**: with more experts per token, the worst case is milder: it is $E/A$.


# %%
@torch.no_grad()
def affinities(model, tokens=16_384):
    """The affinities of the last block's router for held-out text, 128 tokens at a time -> [M, E]."""
    outputs = []
    hook = model.upper[-1].mlp.router.register_forward_hook(lambda router, given, out: outputs.append(out))
    text = torch.from_numpy(load_corpus("validation").tokens[:tokens].astype("int64"))
    model.eval()(text.view(-1, 128))
    hook.remove()
    return torch.cat(outputs).sigmoid()


lopsided = affinities(without_bias)


def even_out(affinity, tokens, A, rate, steps=200):
    """Update the bias by the load of random tokens in each step -> load before, after, and at every step [steps, E]."""
    E = affinity.shape[1]
    random = torch.Generator().manual_seed(0)
    bias = torch.zeros(E)
    loads = []
    for _ in range(steps):
        some = affinity[torch.randint(len(affinity), (tokens,), generator=random)]
        loads.append(load_of(choose(some, bias, A)[0], E))
        bias = update_bias(bias, loads[-1], rate)
    before = load_of(choose(affinity, torch.zeros(E), A)[0], E)
    after = load_of(choose(affinity, bias, A)[0], E)
    return before, after, torch.stack(loads)


# %%
def draw_balance(figure, rate, tokens, A):
    before, after, loads = even_out(lopsided, tokens, A, rate)
    models.load_before_and_after(figure, before, after, max_over_mean_load(loads), A)
    ratios = f"{max_over_mean_load(before):.2f} before, {max_over_mean_load(after):.2f} after (1 is perfect)"
    entropies = f"{entropy(before):.2f} before, {entropy(after):.2f} after (2.08 is perfect)"
    return f"Max over mean load {ratios}; entropy {entropies}."


explore(
    draw_balance,
    alt="Left, bars show the loads of eight experts before and after balancing. Right, the max over mean load in 200 steps.",
    size=(9, 3.2),
    rate=Control([0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1], start=0.003, label="rate"),
    tokens=Control([32, 128, 512, 2048], start=512, label="tokens per step"),
    A=Control([1, 2, 4], start=2, label="experts per token A"),
)

# %% [markdown]
# ## The 8B
#
# Now we look at the large model. We cannot build it here: its weights take 16 GB. But `estimate_cost` builds it on
# PyTorch's *meta* device, where tensors have a shape and no memory, and counts. The paper prints the totals of two
# models, and it states that a token uses 4 of 64 experts. It prints no widths and depths. The widths and depths of the
# presets are **ours**. We chose them so that the totals agree.

# %%
# NBVAL_CHECK_OUTPUT
for name, printed in PRINTED.items():
    for what, theirs in printed.items():
        ours = getattr(estimate_cost(name), what)
        difference = f"{100 * (ours / theirs - 1):+.1f}%"
        print(f"{name:9} {what:24} ours {ours / 1e6:7,.1f} M, paper {theirs / 1e6:7,.1f} M: {difference}")

# %% [markdown]
# **You should see** that all of them agree within 3%. With pencil and paper: an expert has three matrices of 2048
# × 672. There are 64 experts in each of 27 blocks (the first block is dense). These are nearly all parameters of
# the model. A token uses 4 of the 64.

# %%
# NBVAL_CHECK_OUTPUT
big = PRESETS["ul_8b_a1b"]
blocks = big.lower_layers + big.upper_layers - 1
each = 3 * big.width * big.expert_width
for who, experts in (("all routed experts", big.experts), ("those of one token", big.experts_active)):
    print(f"{who}: {blocks} x {experts:2} x {each:,} = {blocks * experts * each / 1e9:.2f} B")

# %%
figure = make_figure(9, 3.7)
models.parameter_bars(figure, parameters(big, big.experts), parameters(big, big.experts_active))
show(
    figure,
    "Bars cut into parts. All parameters, 7.98 billion: MLPs and experts are nine tenths. Those of one token, 1.29 "
    "billion: MLPs and experts are almost half, embedding and head a quarter, window attention nearly a quarter; HSA "
    "and encoder are thin.",
)

# %% [markdown]
# HSA and the chunk encoder make sixteen million tokens readable. Together they have 84 million parameters: 1% of the
# whole. The dense preset `ul_0_5b` has 520.7 million parameters without them, and 538.1 million with them.
#
# ### Move it
#
# "Costs one billion" is about *one* token. In the picture each row is a block and each cell an expert. The left column
# shows the shared experts. One token has five coloured cells in a row. Now let more tokens go through at once, as in a
# prefill, or when many people use a model at the same time. Soon some token uses each expert. The **work** stays at 1
# billion per token. But the weights that have to be *fetched from memory* are soon those of the whole model. (The
# experts here are drawn at random, as a perfectly balanced router would choose them.)


# %%
def used_by(tokens, layers, E, A):
    """The experts that at least one of the tokens uses [layers, E]; each token draws its experts at random."""
    order = torch.rand(layers, tokens, E, generator=torch.Generator().manual_seed(tokens)).argsort(dim=-1)
    return torch.zeros(layers, E, dtype=torch.bool).scatter_(1, order[..., :A].flatten(1), True)


def draw_experts(figure, tokens):
    used = used_by(tokens, blocks, big.experts, big.experts_active)
    models.expert_squares(figure.subplots(), used)
    share = used.float().mean().item()
    fetched = 2 * sum(parameters(big, share * big.experts).values())  # 2 bytes per weight
    used = f"They use {share:.0%} of all routed experts"
    return f"Tokens at once: {tokens}. {used}; weights to fetch: {fetched / 1e9:.1f} GB."


explore(
    draw_experts,
    alt="27 rows of 64 squares and one shared square. A square is coloured if at least one token uses this expert.",
    size=(9, 3.9),
    tokens=Control([1, 2, 4, 8, 16, 32, 64, 128], start=1, label="tokens at once"),
)

# %% [markdown]
# ## What 16 million tokens cost
#
# We compute the work for one more token by hand. Each parameter that a token uses is a multiplication and an addition,
# 2 FLOP. Attention has no parameters of its own: it takes 4 FLOP for each query head, dimension and key. And each HSA
# layer compares the query with every landmark once.


# %%
def decode_flop(c, T):
    """One new token after T others, head included, as a dictionary."""
    blocks = c.lower_layers + c.upper_layers
    chunks = T // c.chunk_size
    kept_tokens = min(c.top_k, chunks) * c.chunk_size
    return {
        "parameters": 2 * sum(parameters(c, c.experts_active).values()),
        "windows": 4 * blocks * c.heads * c.head_dim * min(T + 1, c.window),
        "landmarks": 2 * c.groups * c.retrieval_heads * c.retrieval_dim * chunks,
        "chunks": 4 * c.groups * c.hsa_heads * c.hsa_head_dim * kept_tokens,
    }


# %%
# NBVAL_CHECK_OUTPUT
for T in (1 << 12, 1 << 24):
    by_hand = decode_flop(big, T)
    theirs = estimate_cost("ul_8b_a1b", T).decode_flops_per_token
    named = ", ".join(f"{name} {flop / 1e9:.2f}" for name, flop in by_hand.items())
    total = f"{sum(by_hand.values()) / 1e9:.2f} GFLOP"
    print(f"{length_name(T):>3} tokens: {named}; in all {total}, plan {theirs / 1e9:.2f}")

# %% [markdown]
# **You should see** 3.76 and 4.23 GFLOP. From 4 thousand to 16 million tokens the work per token grows by **an
# eighth**. (In the output, *plan* is the result of `estimate_cost`. It also takes into account that a norm is no matrix
# and that the encoder reads [CLS] with each chunk. This changes the total by less than 1%.)
#
# ### Move it
#
# This is the whole bill, next to that of a model with the same blocks and full attention in each of them. The axes are
# logarithmic: from one grid line to the next is a factor of ten. Move the length. Which bars change, and which do not?
# At which length does full attention keep more bytes than the model's own weights?


# %%
@lru_cache
def bill(tokens):
    return estimate_cost("ul_8b_a1b", tokens)


def kept_bytes(p):
    kept = {"weights": p.weight_bytes, "K, V of chunks": p.kv_bytes, "landmarks": p.landmark_bytes}
    return kept | {"window caches": p.window_cache_bytes, "full: K, V": p.full_attention_kv_bytes}


def work_per_token(p):
    return {
        "prefill": p.prefill_flops_per_token,
        "decode": p.decode_flops_per_token,
        "full: prefill": p.full_attention_prefill_flops_per_token,
        "full: decode": p.full_attention_decode_flops_per_token,
    }


def compare(tokens, kept, work):
    """The two bills in words."""
    ours = kept["K, V of chunks"] + kept["landmarks"] + kept["window caches"]
    times = work["full: decode"] / work["decode"]
    compared = f"HSA keeps {scaled(ours, 'B')}, full attention keeps {scaled(kept['full: K, V'], 'B')}"
    return f"{length_name(tokens)} tokens: {compared} and does {times:,.1f} times the work for the next token."


def draw_bill(figure, tokens):
    kept = kept_bytes(bill(tokens))
    work = work_per_token(bill(tokens))
    side_by_side.bills(figure, kept, work)
    return compare(tokens, kept, work)


explore(
    draw_bill,
    alt="Left, bytes kept: weights, K and V, landmarks, window caches, and the cache of full attention. Right, FLOP per token.",
    size=(10, 3.1),
    tokens=Control([(length_name(1 << n), 1 << n) for n in range(12, 25, 2)], start=1 << 24, label="tokens"),
)

# %% [markdown]
# Two things deserve a second look. At this length **prefill is cheaper than decode**: the upper decoder reads only the
# tail of a long text, and the head reads only its last token ([notebook 09](09_memory.ipynb) shows why that is exact).
# And the memory of 16 million tokens, 8.9 GB, is *one* set of keys and values for all seven HSA layers.
#
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.memory.experts import check_by_expert, check_cut_finer, check_share_used

# %% [markdown]
# **1. How soon all are used.** *Difficulty 2, importance 4, 10 minutes.* In the picture of the experts, 16 tokens at once
# used about two thirds of them. Find the formula: which share of $E$ experts do $n$ tokens use, if each token draws $A$
# different experts at random? Compare with `used_by`. From how many tokens on is 99% of the 8B fetched?


# %%
def share_used(n, E, A):
    """The expected share of E experts that at least one of n tokens uses; each draws A different ones at random."""
    # your code


check_share_used(share_used)

# %% [markdown]
# <details><summary>Solution</summary>
#
# One token leaves out an expert with probability $1 - A/E$, and $n$ tokens leave it out with probability $(1 - A/E)^n$.
# So the share is $1 - (1 - A/E)^n$.
#
# ```python
# import math
#
#
# def share_used(n, E, A):
#     return 1 - (1 - A / E) ** n
#
#
# check_share_used(share_used)
# for n in (1, 4, 16, 64):
#     drawn = used_by(n, 200, 64, 4).float().mean().item()
#     print(n, round(share_used(n, 64, 4), 3), round(drawn, 3))
#     assert abs(share_used(n, 64, 4) - drawn) < 0.02
# n = math.ceil(math.log(0.01) / math.log(1 - 4 / 64))
# print(n, "tokens")
# assert n == 72 and share_used(71, 64, 4) < 0.99 < share_used(72, 64, 4)
# ```
#
# So a mixture of experts always saves *work*. It saves *traffic* only for a few tokens at a time. It never saves
# memory.
#
# </details>

# %% [markdown]
# **2. Cut finer.** *Difficulty 3, importance 3, 15 minutes.* Take 128 experts of half the width, and let each token use 8
# of them. What happens to the total and active parameters of the 8B? In how many ways can a token's experts be chosen,
# before and after? Count one layer: the router, one shared expert as wide as a routed one, and the routed experts.


# %%
def cut_finer(C, E, A, hidden, factor):
    """Cut each of E experts of width `hidden`, of which a token uses A, into `factor` equal pieces.

    Returns the parameters of the layer, those that a token uses, and the logarithm (base 10) of the number of ways.
    """
    # your code


check_cut_finer(cut_finer)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# import math
#
#
# def cut_finer(C, E, A, hidden, factor):
#     E *= factor
#     A *= factor
#     expert = 3 * C * (hidden // factor)
#     router = C * E
#     return router + (1 + E) * expert, router + (1 + A) * expert, math.log10(math.comb(E, A))
#
#
# check_cut_finer(cut_finer)
# for factor in (1, 2):
#     c = dataclasses.replace(big, experts=64 * factor, experts_active=4 * factor, expert_width=672 // factor)
#     total, active, ways = cut_finer(big.width, 64, 4, 672, factor)
#     p = estimate_cost(c)
#     print(f"{p.params_total / 1e9:.2f} B in all, {p.params_active / 1e9:.2f} B active, {10**ways:.1e} ways")
#     assert (total, active) == (mlp_parameters(c, c.experts), mlp_parameters(c, c.experts_active))
# ```
#
# Both totals become a little smaller, because the shared expert now has half its width too. The routers are twice as
# large, which adds little. But there are two million times as many ways to compose the network of a token. That is the
# argument for many small experts (DeepSeekMoE, arXiv 2401.06066). The argument against them is that a GPU computes
# small products less efficiently.
#
# </details>

# %% [markdown]
# **3. One expert after the other.** *Difficulty 3, importance 5, 15 minutes.* The loop above goes token by token, and the
# grouped version sorts. The usual third way is a loop over the *experts*: each takes all of its tokens at once, and its
# outputs are added to the rows of these tokens. To keep it short, an expert is a single matrix here.


# %%
def by_expert(x, chosen, gates, experts):
    """x [M, C], chosen experts and gates [M, A], experts [E, C, C] -> [M, C]: the sum of gate * (token @ expert)."""
    # your code


check_by_expert(by_expert)

# %% [markdown]
# <details><summary>Solution</summary>
#
# `(chosen == e).nonzero()` gives the tokens of an expert, and the slot of each. A token occurs at most once for an
# expert, so `+=` is safe here. (If it could occur twice, only one of its additions would count. Then you need
# `index_add_`.)
#
# ```python
# def by_expert(x, chosen, gates, experts):
#     out = torch.zeros_like(x)
#     for e, matrix in enumerate(experts):
#         token, slot = (chosen == e).nonzero(as_tuple=True)
#         out[token] += gates[token, slot, None] * (x[token] @ matrix)
#     return out
#
#
# check_by_expert(by_expert)
# torch.manual_seed(0)
# tokens = torch.randn(40, 8)
# matrices = torch.randn(6, 8, 8)
# chosen, gates = choose(torch.rand(40, 6), torch.zeros(6), A=2)
# order = chosen.flatten().argsort(stable=True)
# offsets = torch.bincount(chosen.flatten(), minlength=6).cumsum(0).int()
# outputs = grouped_mm(tokens[order // 2], matrices, offs=offsets)[order.argsort()].unflatten(0, (-1, 2))
# grouped = (gates[..., None] * outputs).sum(dim=1)
# assert torch.allclose(by_expert(tokens, chosen, gates, matrices), grouped, atol=1e-5)
# ```
#
# With 64 experts these are 64 small products, one after the other, and for each of them the CPU has to wait until it
# knows how many tokens the expert has. The grouped version starts one large product and never asks.
#
# </details>

# %% [markdown]
# ## What comes next
#
# You have built the model, and counted its parameters and its work. It is not trained yet.
#
# [Notebook 11](11_training.ipynb), *How does a model learn to retrieve?*, trains a small model from random weights
# while you watch, in about 35 minutes.
