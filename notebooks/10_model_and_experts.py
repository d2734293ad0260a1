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
# The paper's large model has 8 billion parameters. A token meets 1 billion of them. The other seven lie in memory and
# wait for other tokens. This notebook builds the part that makes it so, a **mixture of experts**, and then the whole model
# around it.
#
# After this notebook you will be able to
#
# * route tokens to experts by hand, and say what a gate is and what a bias is,
# * write the layer twice, as a loop and as grouped matrix products, and prove that both are the same, gradients included,
# * build a complete HSA model from its parts, equal to the package's, and count its parameters with pencil and paper,
# * watch a router collapse while a small model learns, and mend it with one number for each expert,
# * read the bill of the 8B model: where its parameters lie, which a token meets, what 16 million tokens cost.
#
# **Time:** 30 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at least
# what a block of a transformer is. No GPU.

# %%
import dataclasses
import math
import time
from functools import lru_cache

import torch
from matplotlib.patches import Rectangle
from torch import nn
from torch.nn.functional import cross_entropy, grouped_mm, silu

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.data.corpus import load_corpus
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.cost_estimate import PRINTED, estimate_cost, scaled
from hsa_mini.model.mlp import MLP
from hsa_mini.model.core import Block
from hsa_mini.model.moe import MoE
from hsa_mini.model.norm import RMSNorm
from hsa_mini.ops.rope import rope_table
from hsa_mini.viz import Control, explore, make_figure, show
from hsa_mini.viz.plots import BLUE, GREY, HEAT, INK, ORANGE, PALE, PURPLE, RED, SKY, length_name

# %% [markdown]
# ## The question in plain words
#
# A block of a transformer does two things with a token. It looks around (attention), and then it thinks: a small network,
# the MLP, which sees that token alone. Most parameters sit in these networks. They are where a model keeps what it knows.
#
# Whoever wants a model to know twice as much makes them twice as wide. Then every token costs twice as many
# multiplications. But does `7` need everything that is known about birds?
#
# So cut the wide network into many narrow ones, the **experts**. A **router** looks at each token and sends it to a few.
# Parameters grow with the number of experts. Work grows with the number that is *asked*.
#
# ## In symbols
#
# Block by block, for the vector $x_t$ of one token, with $E$ experts of which $A$ are asked (DeepSeek-V3, arXiv
# 2412.19437, §2.1.2; the paper of this course builds on it):
#
# $$s_{t,e} = \mathrm{sigmoid}(x_t \cdot r_e) \qquad I_t = \text{the } A \text{ experts of the largest } s_{t,e} + b_e \qquad
# g_{t,e} = \frac{s_{t,e}}{\sum_{j \in I_t} s_{t,j}}$$
#
# $$y_t = \mathrm{MLP}_\mathrm{shared}(x_t) + \sum_{e \in I_t} g_{t,e}\, \mathrm{MLP}_e(x_t)$$
#
# | symbol | what it is | in code | shape |
# |---|---|---|---|
# | $r_e$ | what expert $e$ listens for | `router` | `[E, C]` |
# | $s_{t,e}$ | the affinity of token and expert, 0 to 1 | `affinity` | `[M, E]`, M tokens |
# | $b_e$ | a push for expert $e$, in the choice alone | `bias` | `[E]` |
# | $I_t$ | the experts that are asked | `chosen` | `[M, A]` |
# | $g_{t,e}$ | how much each answer counts | `gates` | `[M, A]`, they sum to 1 |
#
# One expert is **shared**: every token asks it. What all tokens need does not have to be learned 64 times.
#
# You have met this machine: [notebook 04](04_fusion.ipynb) called HSA a mixture of experts whose experts are chunks.

# %% [markdown]
# ## Twelve tokens, four experts
#
# Our twelve tokens, and four experts by rule: one for little words, one for things, one for numbers, one for doings. A
# table of affinities stands in for a trained router. Two experts are asked, A = 2.

# %%
WORDS = "the code is 7 birds sing at dawn what is the code".split()
EXPERTS = ["little words", "things", "numbers", "doings"]
TABLE = {
    "the is at what": (0.9, 0.3, 0.2, 0.1),
    "code birds dawn": (0.3, 0.9, 0.2, 0.1),
    "7": (0.1, 0.3, 0.9, 0.2),
    "sing": (0.2, 0.3, 0.1, 0.9),
}
row_of = {word: row for words, row in TABLE.items() for word in words.split()}
affinity = torch.tensor([row_of[word] for word in WORDS])  # [M, E]


def choose(affinity, bias, A):
    """affinity [M, E], bias [E] -> the experts that are asked [M, A] and their gates [M, A], which sum to 1."""
    chosen = (affinity + bias).topk(A, dim=-1).indices
    gates = affinity.gather(-1, chosen)  # without the bias
    return chosen, gates / gates.sum(dim=-1, keepdim=True)


def load_of(chosen, E):
    """The share of all askings that each expert gets [E]: 1/E each if all are asked alike."""
    return torch.bincount(chosen.flatten(), minlength=E) / chosen.numel()


# %% [markdown]
# By hand: `7` has 0.9 for numbers and 0.3 for things. The gates are 0.9 / 1.2 = **0.75** and **0.25**. And who is busy? Six
# little words and four things ask the first expert. *Every* word asks the second, some first and some second: 12 of 24
# askings, where a fair share is 6.

# %%
# NBVAL_CHECK_OUTPUT
chosen, gates = choose(affinity, torch.zeros(4), A=2)
print("`7` asks", {EXPERTS[e]: round(g, 2) for e, g in zip(chosen[3].tolist(), gates[3].tolist())})
print("askings:", dict(zip(EXPERTS, (24 * load_of(chosen, 4)).round().int().tolist())))

# %% [markdown]
# **You should see** 0.75 and 0.25, and the askings 10, 12, 1, 1.
#
# That is a waste. Two experts do nearly all the work, and the other two learn nearly nothing, because who is not asked
# gets no gradient. On several GPUs, with the experts spread over them, two GPUs would wait for the other two.
#
# The remedy is the **bias**. After every step, whoever was asked more than the mean gets a little less, whoever was asked
# less gets a little more:
#
# $$b_e \leftarrow b_e + \text{rate} \cdot \mathrm{sign}\!\left(\tfrac{1}{E} - \text{load}_e\right)$$
#
# It moves the *choice*. The gates do not know it, so it distorts no answer. And it needs no extra term in the loss that
# would pull against the language.


# %%
def balance(bias, load, rate):
    """One step of the bias [E] against the load [E]."""
    return bias + rate * torch.sign(1 / len(load) - load)


# %%
# NBVAL_CHECK_OUTPUT
pushed = balance(torch.zeros(4), load_of(chosen, 4), rate=0.15)
chosen, gates = choose(affinity, pushed, A=2)
print("bias:", [round(b, 2) for b in pushed.tolist()])
print("`7` asks", {EXPERTS[e]: round(g, 2) for e, g in zip(chosen[3].tolist(), gates[3].tolist())})
print("askings:", dict(zip(EXPERTS, (24 * load_of(chosen, 4)).round().int().tolist())))

# %% [markdown]
# **You should see** that `7` now asks numbers and doings. Its gates are 0.9 / 1.1 = 0.82 and 0.2 / 1.1 = 0.18: clean
# affinities. And the askings are 6, 4, 12, 2. The crowd has moved to numbers. **The step was too large**, and the next one
# would push it back. Steps have to be small, and many.
#
# ### Move it
#
# Each column is a token, each row an expert, and the number is the gate. Push `things` up: nothing happens, since every word
# asks it already. Push it down: at which bias does the first word change its expert? Then ask one expert, or all four. With
# A = 4 no bias matters any more. Why?


# %%
def draw_gates(axes, chosen, gates):
    """The gates of the twelve tokens [M, A] as a grid of tokens and experts."""
    for t, e, gate in zip(torch.arange(12).repeat_interleave(chosen.shape[1]), chosen.flatten(), gates.flatten().tolist()):
        axes.add_patch(Rectangle((t - 0.5, e - 0.5), 1, 1, facecolor=BLUE, alpha=0.15 + 0.85 * gate))
        axes.text(t, e, f"{gate:.2f}", ha="center", va="center", fontsize=10, color="white" if gate > 0.5 else INK)
    axes.set(xlim=(-0.5, 11.5), ylim=(3.5, -0.5))
    axes.set_xticks(range(12), WORDS, rotation=40, ha="right")
    axes.set_yticks(range(4), EXPERTS)


def draw_routes(figure, A, bias):
    """Gates of the twelve tokens, and how often each expert is asked."""
    chosen, gates = choose(affinity, torch.tensor([0, bias, 0, 0]), A)
    left, right = figure.subplots(1, 2, width_ratios=(4, 1), sharey=True)
    draw_gates(left, chosen, gates)
    left.set_title(f"gates, with a bias of {bias:+.2f} for `things`")
    asked, fair = (12 * A * load_of(chosen, 4)).round().int(), 3 * A
    right.bar_label(right.barh(range(4), asked, color=ORANGE), padding=3)
    right.axvline(fair, color=GREY, linestyle="--")
    right.set(title="askings", xlim=(0, 15), xticks=[])
    right.spines[["top", "right", "bottom"]].set_visible(False)
    return f"A = {A}: the busiest expert is asked {asked.max()} times, {asked.max() / fair:.2f} times its fair share of {fair}."


explore(
    draw_routes,
    alt="Twelve tokens from left to right, four experts from top to bottom, gates as shades of blue; bars count the askings.",
    size=(9, 2.9),
    A=Control((1, 4), start=2, label="experts asked A"),
    bias=Control((-1.0, 1.0, 0.25), start=0.0, label="bias of `things`"),
)

# %% [markdown]
# ## The layer, as a loop
#
# In earnest an expert is an MLP with a gate inside, SwiGLU: two maps up, one of them through `silu`, their product, one map
# down. Three matrices of $C \times$ `hidden`. Here is one expert, and Eq. "$y_t$" the way one would say it aloud.


# %%
def expert(x, up_and_gate, down):
    """SwiGLU: x [M, C], up_and_gate [C, 2*hidden], down [hidden, C] -> [M, C]."""
    up, gate = (x @ up_and_gate).chunk(2, dim=-1)
    return (up * silu(gate)) @ down


def loop_over_experts(layer, x):
    """One token after the other, and for each token one expert after the other: x [B, T, C] -> [B, T, C]."""
    tokens = x.flatten(0, 1)  # [M, C]
    chosen, gates = choose((tokens @ layer.router.weight.T).sigmoid(), layer.bias, layer.active)
    out = []
    for t in range(len(tokens)):
        token = tokens[t : t + 1]
        parts = [gates[t, a] * expert(token, layer.up_and_gate[e], layer.down[e]) for a, e in enumerate(chosen[t].tolist())]
        out.append(expert(token, layer.shared.up_and_gate.weight.T, layer.shared.down.weight.T) + sum(parts))
    return torch.cat(out).view_as(x)


# %% [markdown]
# First, what does cutting cost? Nothing. If *all* experts are asked and every gate is 1, they are one wide MLP, cut into
# pieces. So a mixture is a wide MLP in which each token uses some of the columns. We take the experts of the preset
# `mini_moe`, with random weights.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
config = PRESETS["mini_moe"]
layer = HSAModel(config).lower[1].mlp  # the first block is dense, the second has experts
E, A, C, hidden = config.experts, config.experts_active, config.width, config.expert_width
print(f"{E} experts of {hidden}, {A} asked, width {C}")
x = torch.randn(2, 30, C)
up, gate = layer.up_and_gate.unflatten(-1, (2, hidden)).permute(2, 1, 0, 3).flatten(2)  # each [C, E*hidden]
wide = expert(x, torch.cat((up, gate), dim=1), layer.down.flatten(0, 1))
pieces = sum(expert(x, *both) for both in zip(layer.up_and_gate, layer.down))
print("all experts together == one wide MLP:", torch.allclose(pieces, wide, atol=1e-4))

# %% [markdown]
# ## The layer, grouped
#
# The loop makes a tiny product for every token and expert. A processor likes few large products. So: write down every
# pair (token, expert), **sort the pairs by expert**, and each expert has its tokens in one block. `grouped_mm` multiplies
# block by block, each with the matrix of its own expert. Then sort back.
#
# `order // A` is the only trick. Pair number $p$ belongs to token $p // A$, since each token has $A$ pairs.


# %%
def grouped_experts(layer, x):
    """All tokens of an expert at once: x [B, T, C] -> [B, T, C]."""
    tokens = x.flatten(0, 1)  # [M, C]
    chosen, gates = choose((tokens @ layer.router.weight.T).sigmoid(), layer.bias, layer.active)
    order = chosen.flatten().argsort(stable=True)  # [M*A] pairs, those of expert 0 first
    ends = torch.bincount(chosen.flatten(), minlength=len(layer.bias)).cumsum(0).int()  # where each expert's block ends
    rows = tokens[order // layer.active]  # [M*A, C]
    up, gate = grouped_mm(rows, layer.up_and_gate, offs=ends).chunk(2, dim=-1)
    answers = grouped_mm(up * silu(gate), layer.down, offs=ends)
    back = answers[order.argsort()].unflatten(0, (-1, layer.active))  # [M, A, C], as they stood before the sorting
    return layer.shared(x) + (gates[..., None] * back).sum(dim=1).view_as(x)


# %% [markdown]
# The twelve tokens once more, with A = 2. **You should see** who sits in whose block: the same counts as above, 10, 12, 1
# and 1.

# %%
# NBVAL_CHECK_OUTPUT
chosen, _ = choose(affinity, torch.zeros(4), A=2)
order = chosen.flatten().argsort(stable=True)
ends = torch.bincount(chosen.flatten(), minlength=4).cumsum(0)
for name, block in zip(EXPERTS, torch.tensor_split(order // 2, ends[:-1])):
    print(f"{name:12} {len(block):2}:", " ".join(WORDS[t] for t in block))


# %% [markdown]
# ## The equality of this notebook
#
# Loop, grouped products and the package's layer: the same output, and the same gradient for the input, the router, the
# shared expert and all others. (The bias has none. It is moved by counting.)


# %%
def output_and_gradients(mixture, layer, x):
    """The output, and the gradients of x and of every weight, for a loss with random factors."""
    x = x.clone().requires_grad_()
    out = mixture(layer, x)
    factors = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out, *torch.autograd.grad((out * factors).sum(), [x, *layer.parameters()])]


# %%
# NBVAL_CHECK_OUTPUT
looped, grouped, package = (
    output_and_gradients(mixture, layer, x) for mixture in (loop_over_experts, grouped_experts, lambda layer, x: layer(x))
)
names = ["output", "x", *(name for name, _ in layer.named_parameters())]
for name, a, b, c in zip(names, looped, grouped, package):
    print(f"{name:24} loop == grouped == package: {torch.allclose(a, b, atol=1e-4) and torch.allclose(a, c, atol=1e-4)}")


# %% [markdown]
# **You should see** `True` seven times. How do they compare in time? Beside them stands the wide MLP, which has as many
# parameters as all experts together and asks all of them. Two of eight experts and the shared one are 3/8 of its work.


# %%
def milliseconds(run, times=5):
    """The fastest of some runs."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


many, dense = torch.randn(1, 2048, C), MLP(C, E * hidden)
with torch.no_grad():
    few = many[:, :128]
    each = milliseconds(lambda: loop_over_experts(layer, few), times=2) / few.shape[1]
    print(f"loop:     {2048 * each:7.1f} ms for 2,048 tokens (measured on {few.shape[1]})")
    print(f"grouped:  {milliseconds(lambda: grouped_experts(layer, many)):7.1f} ms")
    print(f"wide MLP: {milliseconds(lambda: dense(many)):7.1f} ms")

# %% [markdown]
# ## The whole model, from its parts
#
# Everything is there now. A text goes through
#
# 1. the **embedding**, a vector for each token,
# 2. the **lower decoder**, blocks with a window and an MLP or experts,
# 3. the **chunk encoder**, which makes keys, values and landmarks of each complete chunk ([notebook 02](02_chunks.ipynb)),
# 4. the **upper decoder**, groups of blocks; the first block of each group also retrieves ([notebook 05](05_layer.ipynb)),
# 5. a norm and the **head**, which is the embedding, used backwards.


# %%
def build(c):
    """The parts of a model, in the order in which a token meets them."""
    lower = (Block(c, with_hsa=False, with_experts=bool(c.experts) and i > 0) for i in range(c.lower_layers))
    kinds = [i % c.layers_per_group == 0 for i in range(c.groups * c.layers_per_group)]
    parts = nn.ModuleDict()
    parts["embedding"] = nn.Embedding(c.vocab_size, c.width)
    parts["lower"] = nn.ModuleList(lower)
    parts["encoder"] = ChunkEncoder(c)
    parts["upper"] = nn.ModuleList(Block(c, with_hsa=hsa, with_experts=bool(c.experts)) for hsa in kinds)
    parts["norm"] = RMSNorm(c.width)
    parts["head"] = nn.Linear(c.width, c.vocab_size, bias=False)
    parts["head"].weight = parts["embedding"].weight
    return parts


def logits(parts, ids, c):
    """ids [B, T] -> logits [B, T, vocabulary]."""
    x, table = parts["embedding"](ids), rope_table(torch.arange(ids.shape[1]), c.head_dim, c.rope_base)
    for block in parts["lower"]:
        x, _ = block(x, table, None)
    complete, memory = ids.shape[1] // c.chunk_size, ChunkMemory(c)
    memory.append(*parts["encoder"](x[:, : complete * c.chunk_size].unflatten(1, (complete, c.chunk_size))))
    for block in parts["upper"]:
        x, _ = block(x, table, None, lambda hsa, asks: hsa(asks, memory.landmarks, memory.attend, position=0)[0])
    return parts["head"](parts["norm"](x))


# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
model, parts = HSAModel(config).eval(), build(config).eval()
parts.load_state_dict(model.state_dict())
ids = torch.randint(config.vocab_size, (1, 700))
with torch.no_grad():
    print("parts put together == package's model:", torch.allclose(logits(parts, ids, config), model(ids).logits, atol=1e-4))

# %% [markdown]
# **You should see** `True`. The weights even have the same names, so they could be copied over in one line.
#
# ## Counting
#
# With pencil and paper. Every matrix is rows times columns, and every norm has one number a dimension. The argument
# `experts` says how many are counted in each layer: all of them for the total, $A$ for what one token meets.


# %%
def parameters(c, experts):
    """Parameters of each part, with so many experts counted in a layer (the shared one comes on top)."""
    window, mlp = 2 * c.width * c.head_dim * (c.heads + c.kv_heads), 3 * c.width * c.mlp_width
    mixture = c.width * c.experts + 3 * c.width * c.expert_width * (1 + experts) if c.experts else mlp
    asks = 2 * c.hsa_heads * c.hsa_head_dim + c.retrieval_heads * c.retrieval_dim  # queries and output, retrieval queries
    files = 2 * c.hsa_kv_heads * c.hsa_head_dim + c.retrieval_heads * c.retrieval_dim  # keys and values, landmark
    encoder = window + 3 * c.width * (c.encoder_mlp_width or c.mlp_width) + c.width * (1 + files)  # the 1 is [CLS]
    lower, upper, norms = c.lower_layers, c.upper_layers, 2 * (c.width + c.head_dim)  # of a block with a window
    gains = c.hsa_head_dim + c.retrieval_norm * c.retrieval_dim  # of norms: of keys and landmarks, or of queries of both kinds
    return {
        "embedding and head": c.vocab_size * c.width, "lower window attention": lower * window,
        "lower MLPs and experts": mlp + (lower - 1) * mixture, "chunk encoder": encoder + norms + c.width + gains,
        "upper window attention": upper * window, "HSA": c.groups * (c.width * (asks + 1) + gains),
        "upper MLPs and experts": upper * mixture, "norms": (lower + upper) * norms + c.width,
    }  # fmt: skip


# %%
# NBVAL_CHECK_OUTPUT
for name in ("mini_moe", "ul_0_5b", "ul_8b_a1b"):
    by_hand = parameters(PRESETS[name], PRESETS[name].experts)
    print(f"{name:9} by hand == package, part by part:", by_hand == estimate_cost(name).params_by_part)
met = parameters(config, A)
active = sum(met.values()) - met["embedding and head"]
print(f"mini_moe: {sum(parameters(config, E).values()):,} in all, {active:,} active")

# %% [markdown]
# **You should see** `True` three times, so every part agrees. *Active* here leaves out the embedding and
# the head. With them, `mini_moe` has 6.6 million and the 8B 1.29 billion. We always say which of the two we mean.
#
# Is it true that a token meets no more than that? We need not believe it. What a token meets gets a **gradient**, and the
# rest gets none. We let `mini_moe` read 700 tokens, then one more, and count the weights whose gradient is not zero. (The
# encoder did its work before: the token reads what it made. So it is added by hand.)


# %%
def reached(model):
    """Parameters that have a gradient, embedding and head aside; an expert counts only if it was asked."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    gradients = [grad for name, grad in named if not name.startswith(("embedding", "head"))]
    return sum(part.numel() for grad in gradients for part in (grad if grad.dim() == 3 else [grad]) if part.any())


# %%
# NBVAL_CHECK_OUTPUT
with torch.no_grad():
    memory = model(ids).memory
model(ids[:, :1], memory).logits.sum().backward()
print("parameters with a gradient + encoder == active:", reached(model) + met["chunk encoder"] == active)

# %% [markdown]
# **You should see** `True`.
#
# ## Watch a router collapse
#
# Now a real one. A small model with eight experts in three of its four blocks learns to predict real text: 120 steps of 512
# tokens. It runs twice, with the same text, the same seed, the same steps. In one run the biases stay at 0. In the other
# each step moves them. Besides the loss we record, for every step,
#
# * the **load**: which share of all askings each expert got,
# * how **alike** the tokens are to the router: the mean cosine between the vectors that it sees.


# %%
SMALL = dataclasses.replace(PRESETS["nano"], experts=8, experts_active=2, expert_width=32)
TEXT = torch.from_numpy(load_corpus("train").tokens[:2_000_000].astype("int64"))


def alike(x):
    """The mean cosine between all pairs of tokens [B, T, C]: 1 if all point the same way."""
    return nn.functional.normalize(x.detach().flatten(0, 1), dim=-1).mean(dim=0).square().sum()


def learn(rate, steps=120, batch=8, tokens=64):
    """-> the model; for every step the loss, the load of the last block's experts [E], and how alike its tokens are."""
    torch.manual_seed(0)
    model, log, seen = HSAModel(SMALL).train(), [], []
    mixtures = [part for part in model.modules() if isinstance(part, MoE)]
    mixtures[-1].register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        text = torch.stack([TEXT[i : i + tokens + 1] for i in torch.randint(len(TEXT) - tokens - 1, (batch,))])
        loss = cross_entropy(model(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append((loss.detach(), [mixture.balance(rate).load for mixture in mixtures][-1], alike(seen.pop())))
    return model, *map(torch.stack, zip(*log))


# %%
threads = torch.get_num_threads()
torch.set_num_threads(1)  # these tensors are small: one core is faster than several that wait for each other
left_alone, *record_alone = learn(rate=0.0)

# %%
evened_out, *record_evened = learn(rate=0.02)
torch.set_num_threads(threads)


# %% [markdown]
# What is a good load? Two numbers say it. **Imbalance** is the largest load over the mean: 1 is perfect, and $E/A$ = 4 is the
# worst, when two experts are asked by everybody. **Entropy** is $-\sum \text{load} \log \text{load}$: $\log 8$ = 2.08 is
# perfect, $\log 2$ = 0.69 the worst.


# %%
def imbalance(load):
    return load.max(dim=-1).values * load.shape[-1]


def entropy(load):
    return -torch.xlogy(load, load).sum(dim=-1)


for name, (loss, load, likeness) in {"left alone": record_alone, "evened out": record_evened}.items():
    last = load[-20:].mean(dim=0)
    measures = f"loss {loss[-20:].mean():.2f}, imbalance {imbalance(last):.2f}, entropy {entropy(last):.2f}"
    print(f"{name}, mean of the last 20 steps: {measures}")
print("how alike tokens are at steps 0, 20, 60, 119:", [round(record_alone[2][step].item(), 2) for step in (0, 20, 60, 119)])

# %%
# NBVAL_CHECK_OUTPUT
worst, best = imbalance(record_alone[1][20:40]).mean(), imbalance(record_evened[1][-20:].mean(dim=0))
print("left alone, two experts soon get nearly everything:", bool(worst > 3.5))
print("evened out, in the end nobody gets twice the mean :", bool(best < 2))
print("the losses are alike                              :", bool((record_alone[0] - record_evened[0])[-20:].mean().abs() < 0.3))


# %%
def plain(*several):
    """Axes without a line above and to the right."""
    for axes in several:
        axes.spines[["top", "right"]].set_visible(False)


def draw_loads(figure, records):
    """The load of every expert over the steps, and imbalance over the steps, one column a run."""
    rows = figure.subplots(2, len(records), sharex=True, sharey="row", height_ratios=(3, 2))
    for column, (name, (_, load, likeness)) in enumerate(records.items()):
        top, bottom = rows[:, column]
        image = top.imshow(load.T, aspect="auto", cmap=HEAT, vmin=0, vmax=0.5, interpolation="nearest")
        top.set_title(name, fontsize=11)
        bottom.plot(imbalance(load), color=RED, linewidth=2, label="imbalance (1 to 4)")
        bottom.plot(likeness, color=BLUE, linewidth=2, linestyle="--", label="how alike tokens are (0 to 1)")
        bottom.set(xlabel="step", ylim=(0, 4.3), yticks=range(5))
    plain(*rows[1])
    rows[0, 0].set(ylabel="expert")
    figure.colorbar(image, ax=rows[0].tolist(), label="load", pad=0.01)
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10)


figure = make_figure(9, 4.2)
draw_loads(figure, {"left alone": record_alone, "evened out": record_evened})
show(
    figure,
    "Two runs of 120 steps. Above, the load of eight experts as brightness. Left alone, two rows soon take half each and the "
    "others go dark. With the bias the bright rows change and then all are about equally bright. Below, the imbalance jumps "
    "up in both runs, when tokens are most alike. Left alone it stays at 4, with the bias it falls.",
)

# %% [markdown]
# Why does it collapse? The blue line says it. At first the model learns what is true for *all* tokens: which words are
# frequent. Then all vectors point nearly the same way, and whoever is dear to one is dear to all. Two experts get
# everything, and the others learn nothing. Later the tokens become different again, but who is far ahead by then stays
# ahead.
#
# The bias breaks this without asking why. While all tokens are alike it can only hand the crowd on from one expert to the
# next: those are the bright spots that jump from row to row. As soon as the tokens differ, it spreads them.
#
# And the loss? About the same here. In 120 steps an idle expert is hardly missed. With 64 experts and trillions of
# tokens it is a part of the model that was paid for and never used. How large the step of the bias should be depends on how
# many steps there are: ours is 0.02 for 120 steps, the package trains with 0.001 for thousands.
#
# ### Move it
#
# We take the router of the run that was left alone, and 16,384 tokens of text that it has not seen. The router does not
# learn any more. Only the bias moves, by the rule above, for 200 steps.
#
# * **rate**: too small and it does not arrive. Too large and it jumps about.
# * **tokens**: how many are counted in each step. With few, the load is uneven by chance, and the bias runs after chance.
# * **A**: with more experts asked, the worst case is milder: it is $E/A$.


# %%
@torch.no_grad()
def affinities(model, tokens=16_384):
    """What the router of the last block says to held-out text, 128 tokens at a time -> [M, E]."""
    mixture, seen = model.upper[-1].mlp, []
    hook = mixture.router.register_forward_hook(lambda router, given, out: seen.append(out))
    text = torch.from_numpy(load_corpus("validation").tokens[:tokens].astype("int64"))
    model.eval()(text.view(-1, 128))
    hook.remove()
    return torch.cat(seen).sigmoid()


lopsided = affinities(left_alone)


def even_out(affinity, tokens, A, rate, steps=200):
    """Move the bias by the load of so many random tokens a step -> load before, after, and in every step [steps, E]."""
    E, random = affinity.shape[1], torch.Generator().manual_seed(0)
    bias, loads = torch.zeros(E), []
    for _ in range(steps):
        some = affinity[torch.randint(len(affinity), (tokens,), generator=random)]
        loads.append(load_of(choose(some, bias, A)[0], E))
        bias = balance(bias, loads[-1], rate)
    before, after = (load_of(choose(affinity, b, A)[0], E) for b in (torch.zeros(E), bias))
    return before, after, torch.stack(loads)


# %%
def draw_balance(figure, rate, tokens, A):
    before, after, loads = even_out(lopsided, tokens, A, rate)
    (left, right), order = figure.subplots(1, 2, width_ratios=(1, 1.3)), before.argsort(descending=True)
    for shift, load, color, name in ((-0.2, before, ORANGE, "before"), (0.2, after, BLUE, "after")):
        left.bar([i + shift for i in range(8)], load[order], 0.38, color=color, label=name)
    left.axhline(1 / 8, color=GREY, linestyle="--", linewidth=1)
    left.set(xlabel="experts, the busiest first", ylabel="load of all 16,384 tokens", ylim=(0, 1.05 / A + 0.03), xticks=[])
    left.legend(frameon=False)
    right.plot(imbalance(loads), color=RED, linewidth=1.5)
    right.axhline(1, color=GREY, linestyle="--", linewidth=1)
    right.set(xlabel="step", ylabel="imbalance of the step's tokens", ylim=(0.8, max(8 / A, 1.3) + 0.1))
    plain(left, right)
    (a, b), (c, d) = ((imbalance(load), entropy(load)) for load in (before, after))
    return f"Imbalance {a:.2f} before, {c:.2f} after (1 is perfect); entropy {b:.2f} before, {d:.2f} after (2.08 is perfect)."


explore(
    draw_balance,
    alt="Left, the load of eight experts before and after balancing, as bars. Right, the imbalance over 200 steps.",
    size=(9, 3.2),
    rate=Control([0.0, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1], start=0.003, label="rate"),
    tokens=Control([32, 128, 512, 2048], start=512, label="tokens a step"),
    A=Control([1, 2, 4], start=2, label="experts asked A"),
)

# %% [markdown]
# ## The 8B
#
# Now the large one. We cannot make it here: its weights alone take 16 GB. But `estimate_cost` makes it on PyTorch's *meta* device, where
# tensors have a shape and no memory, and counts. The paper prints the totals of two models, and 64 experts of which 4 are
# asked. It prints no widths and depths. Those of the presets are **ours**, chosen so that the totals come out.

# %%
# NBVAL_CHECK_OUTPUT
for name, printed in PRINTED.items():
    for what, theirs in printed.items():
        ours = getattr(estimate_cost(name), what)
        print(f"{name:9} {what:24} ours {ours / 1e6:7,.1f} M, paper {theirs / 1e6:7,.1f} M: {100 * (ours / theirs - 1):+.1f}%")

# %% [markdown]
# **You should see** all of them within 3%. With pencil and paper: an expert has three matrices of 2048 × 672. There are 64 in
# each of 27 blocks (the first is dense). That is nearly everything there is. A token meets 4 of the 64.

# %%
# NBVAL_CHECK_OUTPUT
big = PRESETS["ul_8b_a1b"]
blocks, each = big.lower_layers + big.upper_layers - 1, 3 * big.width * big.expert_width
for who, experts in (("all routed experts", big.experts), ("those of one token", big.experts_active)):
    print(f"{who}: {blocks} x {experts:2} x {each:,} = {blocks * experts * each / 1e9:.2f} B")


# %%
PARTS = {
    "embedding and head": ORANGE, "window attention": SKY, "norms": GREY,
    "chunk encoder": PURPLE, "HSA": RED, "MLPs and experts": BLUE,
}  # fmt: skip


def stack_parts(axes, c, experts, y=0):
    """One bar of billions of parameters, part by part; returns its length."""
    count, left = parameters(c, experts), 0
    for part, colour in PARTS.items():
        size = sum(n for name, n in count.items() if name.endswith(part)) / 1e9
        axes.barh(y, size, left=left, color=colour, edgecolor="white", linewidth=0.5, label=part)
        left += size
    axes.set(yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    return left


def draw_parts(figure, c):
    """Where the parameters lie, which of them one token meets, and these once more, enlarged."""
    upper, lower = figure.subplots(2, 1, height_ratios=(2, 1))
    total, met = stack_parts(upper, c, c.experts), stack_parts(upper, c, c.experts_active, y=1)
    upper.set(yticks=[0, 1], yticklabels=[f"all\n{total:.2f} B", f"of one token\n{met:.2f} B"], ylim=(1.5, -0.5))
    stack_parts(lower, c, c.experts_active)
    lower.set(yticks=[0], yticklabels=["the same,\nenlarged"], xlabel="billions of parameters")
    figure.legend(lower.containers, list(PARTS), loc="outside lower center", ncols=3, frameon=False, fontsize=10)


figure = make_figure(9, 3.7)
draw_parts(figure, big)
show(
    figure,
    "Bars cut into parts. All parameters, 7.98 billion: MLPs and experts are nine tenths. Those of one token, 1.29 billion: MLPs "
    "and experts are almost half, embedding and head a quarter, window attention nearly a quarter; HSA and encoder are thin.",
)

# %% [markdown]
# HSA and the chunk encoder, all that makes sixteen million tokens readable, are 84 million: 1% of the whole. In the dense model
# they are the difference between 520.7 and 538.1 million.
#
# ### Move it
#
# "Costs one billion" is about *one* token. Each row below is a block, each cell an expert, and the left column are the shared
# ones. One token has five coloured cells in a row. Now let more tokens go through at once, as in a prefill, or when many people
# use a model at the same time. Soon every expert is asked by somebody. **Work** stays at 1 billion a token. But the weights that
# have to be *fetched from memory* are soon those of the whole model. (The experts here are drawn at random, as by a
# perfectly even router.)


# %%
def asked_by(tokens, layers, E, A):
    """Which experts at least one of the tokens asks [layers, E], each token's drawn at random."""
    order = torch.rand(layers, tokens, E, generator=torch.Generator().manual_seed(tokens)).argsort(dim=-1)
    return torch.zeros(layers, E, dtype=torch.bool).scatter_(1, order[..., :A].flatten(1), True)


def draw_experts(figure, tokens):
    asked = asked_by(tokens, blocks, big.experts, big.experts_active)
    shown = torch.cat((torch.full((blocks, 1), 2), torch.zeros(blocks, 1), asked), dim=1)
    axes, colours = figure.subplots(), {2: ORANGE, 1: BLUE, 0: PALE}
    for value, colour in colours.items():
        where = (shown[:, [0, *range(2, 66)]] == value).nonzero()
        axes.scatter(where[:, 1] + (where[:, 1] > 0), where[:, 0], s=34, marker="s", color=colour, linewidths=0)
    axes.set(xlim=(-1.5, 66), ylim=(blocks, -1), xticks=[0, 33], xticklabels=["shared", "64 routed experts"])
    axes.set(ylabel="block with experts", yticks=[0, blocks - 1], yticklabels=["1", str(blocks)])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    share = asked.float().mean().item()
    fetched = sum(parameters(big, share * big.experts).values())
    return f"Tokens at once: {tokens}. They ask {share:.0%} of all routed experts; weights to fetch: {2 * fetched / 1e9:.1f} GB."


explore(
    draw_experts,
    alt="27 rows of 64 squares and one shared. A square is coloured if some token asks this expert.",
    size=(9, 3.9),
    tokens=Control([1, 2, 4, 8, 16, 32, 64, 128], start=1, label="tokens at once"),
)

# %% [markdown]
# ## What 16 million tokens cost
#
# The work of one more token, by hand. Each parameter that a token meets is a multiplication and an addition, 2 FLOP. Attention
# has no parameters of its own: 4 FLOP for each query head, dimension and key. And every landmark is compared once in each HSA
# layer.


# %%
def decode_flop(c, T):
    """One new token behind T others, head included, as a dictionary."""
    blocks, kept = c.lower_layers + c.upper_layers, min(c.top_k, T // c.chunk_size) * c.chunk_size
    return {
        "parameters": 2 * sum(parameters(c, c.experts_active).values()),
        "windows": 4 * blocks * c.heads * c.head_dim * min(T + 1, c.window),
        "landmarks": 2 * c.groups * c.retrieval_heads * c.retrieval_dim * (T // c.chunk_size),
        "chunks": 4 * c.groups * c.hsa_heads * c.hsa_head_dim * kept,
    }


# %%
# NBVAL_CHECK_OUTPUT
for T in (1 << 12, 1 << 24):
    by_hand, theirs = decode_flop(big, T), estimate_cost("ul_8b_a1b", T).decode_flops_per_token
    named = ", ".join(f"{name} {flop / 1e9:.2f}" for name, flop in by_hand.items())
    print(f"{length_name(T):>3} tokens: {named}; in all {sum(by_hand.values()) / 1e9:.2f} GFLOP, plan {theirs / 1e9:.2f}")

# %% [markdown]
# **You should see** 3.76 and 4.23 GFLOP. From 4 thousand to 16 million tokens the work for a token grows by **an eighth**.
# (The plan also knows that a norm is no matrix and that the encoder reads [CLS] with each chunk: less than 1%.)
#
# ### Move it
#
# The whole bill, beside that of a model of the same blocks with full attention everywhere. Logarithmic axes: a grid line is a
# factor of ten. Move the length. Which bars move, and which do not? At which length does full attention keep more than
# the model's own weights?


# %%
@lru_cache
def bill(tokens):
    return estimate_cost("ul_8b_a1b", tokens)


def log_bars(axes, values, colours, unit, limits):
    """Horizontal bars over a logarithmic axis, the first on top, each with its number."""
    bars = axes.barh(list(values), list(values.values()), color=colours, height=0.7)
    axes.bar_label(bars, [scaled(value, unit) for value in values.values()], padding=3, fontsize=10)
    axes.set(xscale="log", xlim=limits)
    axes.invert_yaxis()
    axes.grid(axis="x", color=PALE)
    axes.set_axisbelow(True)
    plain(axes)


def draw_bill(figure, tokens):
    p = bill(tokens)
    kept = {"weights": p.weight_bytes, "K, V of chunks": p.kv_bytes, "landmarks": p.landmark_bytes}
    kept |= {"window caches": p.window_cache_bytes, "full: K, V": p.full_attention_kv_bytes}
    work = {"prefill": p.prefill_flops_per_token, "decode": p.decode_flops_per_token}
    work |= {"full: prefill": p.full_attention_prefill_flops_per_token, "full: decode": p.full_attention_decode_flops_per_token}
    left, right = figure.subplots(1, 2)
    log_bars(left, kept, [GREY, BLUE, BLUE, BLUE, RED], "B", (1e4, 3e14))
    log_bars(right, work, [BLUE, BLUE, RED, RED], "FLOP", (3e8, 2e14))
    left.set_xlabel("bytes kept")
    right.set_xlabel("FLOP a token")
    ours = p.kv_bytes + p.landmark_bytes + p.window_cache_bytes
    times = p.full_attention_decode_flops_per_token / p.decode_flops_per_token
    kept = f"keeps {scaled(ours, 'B')}, full attention {scaled(p.full_attention_kv_bytes, 'B')}"
    return f"{length_name(tokens)} tokens: {kept} and {times:,.1f} times the work for the next token."


explore(
    draw_bill,
    alt="Left, bytes kept: weights, K and V, landmarks, window caches, and the cache of full attention. Right, FLOP a token.",
    size=(10, 3.1),
    tokens=Control([(length_name(1 << n), 1 << n) for n in range(12, 25, 2)], start=1 << 24, label="tokens"),
)

# %% [markdown]
# Two things are worth a second look. At this length **prefill is cheaper than decode**: the upper decoder reads only the tail
# of a long text, and the head only its last token ([notebook 09](09_memory.ipynb) shows why that is exact). And what is kept of
# 16 million tokens, 8.9 GB, is *one* set of keys and values for all seven HSA layers.
#
# ## Exercises
#
# **1.** In the picture above, 16 tokens at once asked about two thirds of the experts. Find the formula: which share of $E$
# experts do $n$ tokens ask, if each asks $A$ at random? Compare with `asked_by`. From how many tokens on is 99% of the 8B
# fetched?
#
# <details><summary>Solution</summary>
#
# An expert is left out by one token with chance $1 - A/E$, and by all with $(1 - A/E)^n$. So the share is $1 - (1 - A/E)^n$.
#
# ```python
# for n in (1, 4, 16, 64):
#     drawn = asked_by(n, 200, 64, 4).float().mean().item()
#     print(n, round(1 - (1 - 4 / 64) ** n, 3), round(drawn, 3))
#     assert abs(1 - (1 - 4 / 64) ** n - drawn) < 0.02
# n = math.ceil(math.log(0.01) / math.log(1 - 4 / 64))
# print(n, "tokens")
# assert n == 72
# ```
#
# So a mixture of experts saves *work* always, and *traffic* only for a few tokens at a time. It never saves memory.
#
# </details>
#
# **2.** Cut finer: 128 experts of half the width, of which 8 are asked. What happens to total and active parameters of the
# 8B? In how many ways can a token's experts be chosen, before and after?
#
# <details><summary>Solution</summary>
#
# ```python
# finer = dataclasses.replace(big, experts=128, experts_active=8, expert_width=big.expert_width // 2)
# for c in (big, finer):
#     p = estimate_cost(c)
#     ways = math.comb(c.experts, c.experts_active)
#     print(f"{p.params_total / 1e9:.2f} B in all, {p.params_active / 1e9:.2f} B active, {ways:.1e} ways")
# assert estimate_cost(finer).params_total < estimate_cost(big).params_total and math.comb(128, 8) > 10**6 * math.comb(64, 4)
# ```
#
# Both totals fall a little, because the shared expert has become half as wide too. The routers are twice as large, which is
# little. But there are two million times as many ways to put a token's network together. That is the argument for many
# small experts (DeepSeekMoE, arXiv 2401.06066). Against it stand smaller products, which a GPU does less well.
#
# </details>

# %% [markdown]
# ## What comes next
#
# You have built the model, and counted it. Nobody has trained it yet.
#
# [Notebook 11](11_training.ipynb), *How does a model learn to retrieve?*, trains a small one from nothing while you watch, in about
# 35 minutes.
