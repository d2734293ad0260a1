# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 14 · How would one train the 8B?
#
# The large model of this course has 8 billion parameters. No single GPU holds what its training needs, and the paper
# trained it with 8 trillion tokens. So many GPUs have to work on one model. What does each of them hold, what do they
# send each other, and when do more of them stop helping?
#
# After this notebook you will be able to
#
# * say what training keeps for each parameter, and compute how many GPUs hold it,
# * cut a batch, a sequence or the experts among processes, and show that two processes compute what one computes,
# * compute which bytes an HSA model sends per step, and compare them with full attention,
# * read a prediction for 1 to 1,024 GPUs, and say which of its numbers were measured and which were not.
#
# **Time:** 25 minutes to read, half a minute to run on two CPU cores. **Needs:** [notebook 09](09_memory.ipynb) for
# the chunk memory, [notebook 10](10_model_and_experts.ipynb) for the experts, and [notebook 11](11_training.ipynb) for a
# training step. You need no GPU.
#
# [← 13 laboratory](13_laboratory.ipynb) · [map of the course](00_start.ipynb)

# %%
import inspect
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from hsa_mini import PRESETS, HSAModel
from hsa_mini.model.cost_estimate import estimate_cost, scaled
from hsa_mini.paths import data_dir
from hsa_mini.training.parallel.context import part_bounds, split_sequences
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.trainer import MeshTrainer
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.scale.memory import memory_bytes
from hsa_mini.training.scale.plan import plans
from hsa_mini.training.scale.seconds import Links, Measured
from hsa_mini.training.scale.shares import TrainingRun
from hsa_mini.training.scale.traffic import bytes_by_kind, ring_bytes, traffic
from hsa_mini.training.trainer import Trainer
from hsa_mini.viz import Control
from hsa_mini.viz.course.scale import explore_scale
from hsa_mini.viz.style import length_name

CONTEXTS = (1 << 14, 1 << 17, 1 << 20)
big = PRESETS["ul_8b_a1b"]
torch.set_num_threads(1)

# %% [markdown]
# ## The question in plain words
#
# Training keeps four numbers for each parameter: the weight, its gradient, and the two running averages of Adam. Each
# is a float32 of 4 bytes, because small changes would be lost in fewer bits. That makes 16 bytes. **You should see**
# 127.7 GB. One GPU of 80 GB cannot hold that, and two would be four fifths full before they compute anything.

# %%
# NBVAL_CHECK_OUTPUT
parameters = estimate_cost(big).params_total
state = 16 * parameters
print(f"{parameters:,} parameters x 16 bytes = {state / 1e9:.1f} GB")
for gpus in (1, 2, 4, 8):
    print(f"{gpus} GPUs: {state / gpus / 1e9:5.1f} GB each")

# %% [markdown]
# ## Three ways to cut
#
# A **process** is a running program; each GPU has one. Processes can share the work of a training step in three ways,
# and a **mesh** says how many of them share which way.
#
# | in code | name | what is cut | what travels |
# |---|---|---|---|
# | `dp` | data parallelism | the batch: every group reads other rows | sums of gradients |
# | `cp` | context parallelism | each row: every process reads one part of the sequence | what a part needs of the others |
# | `ep` | expert parallelism | the experts of each MoE layer | tokens, to their experts and back |
#
# A mesh `dp=2,cp=4` has 8 processes: two groups of four. Whatever the mesh, each process also holds only its **share** of
# the weights, gradients and averages. A block's weights are gathered just before the block computes, and forgotten just
# after. This is called fully sharded data parallelism (FSDP), and PyTorch brings it.
#
# Only `cp` is special to HSA. What does a part need of the others? A window reaches $W - 1$ tokens back, so a part needs
# the keys and values of the last $W - 1$ tokens of the part on its left: the **halo**. And the HSA layers may choose any
# chunk of the whole sequence, so each process needs the whole **chunk memory**. All HSA layers share this one memory, so
# it travels once. Everything else works token by token and needs nothing.
#
# ## Two processes compute what one computes
#
# Let us see it. First, the work that both programs will do: three steps of training, and then the logits of a text.
# The model is the smallest preset, and its weights are random, but the same everywhere. `share` cuts a batch: it takes
# some of the rows (`dp`) and a part of each row (`cp`).


# %%
def recipe():
    """Three steps on four rows of 32 tokens, without noise."""
    return Recipe((Stage(steps=3, batch=4, tokens=32, gumbel_noise=False),), warmup=1)


def fresh_model():
    """The same random weights in every process."""
    torch.manual_seed(0)
    return HSAModel(PRESETS["debug"]).train()


def batch(step):
    """Four rows of 33 tokens (the last one is only a target), and which part of the loss each token belongs to."""
    ids = torch.randint(512, (4, 33), generator=torch.Generator().manual_seed(step))
    return ids, torch.zeros_like(ids, dtype=torch.int8)


def share(x, mesh):
    """What one process reads of [4, 33]: its rows, and its part of them with one more token, the last target."""
    rows = x.chunk(mesh.data_ranks)[mesh.data_rank]
    first, last = part_bounds(32, 4, mesh.sizes.cp)[mesh.cp : mesh.cp + 2]
    return rows[:, first : last + 1]


def work(name):
    """What a process of a mesh does. Returns the losses of three steps, and the logits of what it reads."""
    mesh = Mesh(MeshSizes.parse(name), torch.device("cpu"))
    trainer = MeshTrainer(fresh_model(), recipe(), mesh)
    parts = [tuple(share(x, mesh) for x in batch(step)) for step in range(3)]
    losses = [float(trainer.train_step(part).loss) for part in parts]
    model = fresh_model().eval()
    if mesh.sizes.cp > 1:
        split_sequences(model, mesh.context, 32)
    with torch.no_grad():
        return losses, model(parts[0][0][:, :-1]).logits


# %% [markdown]
# Now we start two processes. Each is a Python program of its own, which gets the functions above as a file. They
# find each other through another file, and talk through `gloo`, which needs no GPU. (On GPUs the same code talks
# through NCCL.)

# %%
HEAD = """
import sys
import torch
import torch.distributed as dist
from hsa_mini import PRESETS, HSAModel
from hsa_mini.training.parallel.context import part_bounds, split_sequences
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.trainer import MeshTrainer
from hsa_mini.training.recipes import Recipe, Stage

"""
TAIL = """
rank, folder, *names = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
torch.save([work(name) for name in names], f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def run_two(*names):
    """Run `work` for each mesh in two processes; what they return, [process][mesh]."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program.py"
        functions = (recipe, fresh_model, batch, share, work)
        program.write_text(HEAD + "\n\n".join(map(inspect.getsource, functions)) + TAIL)
        commands = [[sys.executable, program, str(rank), folder, *names] for rank in range(2)]
        started = [subprocess.Popen(command, env=environment) for command in commands]
        try:
            assert [process.wait(timeout=120) for process in started] == [0, 0]
        finally:
            for process in started:
                process.kill()
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


(dp_left, cp_left), (dp_right, cp_right) = run_two("dp=2", "cp=2")

# %% [markdown]
# And the same alone, in this process. Predict: which of the results below are equal, to the last bit or nearly?

# %%
# NBVAL_CHECK_OUTPUT
alone = Trainer(fresh_model(), recipe())
losses = [float(alone.train_step(batch(step)).loss) for step in range(3)]
with torch.no_grad():
    logits = fresh_model().eval()(batch(0)[0][:, :-1]).logits
for name, left, right, dim in (("dp=2", dp_left, dp_right, 0), ("cp=2", cp_left, cp_right, 1)):
    joined = torch.cat((left[1], right[1]), dim)  # other rows, or other parts of the rows
    gap = max(abs(a - b) for a, b in zip(left[0], losses))
    print(f"{name}: each process reads {list(left[1].shape[:2])} of {list(logits.shape[:2])} tokens")
    print("  losses of three steps equal within 1e-6:", gap < 1e-6, " both say the same:", left[0] == right[0])
    print("  logits equal within 1e-6:", bool((joined - logits).abs().max() < 1e-6))

# %% [markdown]
# **You should see** `True` six times. The second process of `cp=2` never saw the first half of any text. It got a halo
# of 7 keys in every block ($W = 8$) and four chunks of memory, and that was enough. The losses differ in the last bits,
# because sums of gradients are added in another order.
#
# ## What travels
#
# Now the 8B, on a sequence of 1,048,576 tokens that is cut into eight parts. We count what one process *receives* in one
# step. A block's halo travels three times: forward, again when the block is recomputed in the backward pass, and as
# gradients back. The memory is gathered once, 2 bytes a number, and its gradients return as float32. If every block had
# full attention, each process would need the keys and values of **all** other parts in **every** block, three times, and
# send their gradients back.


# %%
def received_by_hand(c, T, parts):
    """Bytes of halo, chunk memory, and full attention, for one process in one step."""
    blocks = c.lower_layers + c.upper_layers
    key = 2 * c.kv_heads * c.head_dim * 2  # K and V of a token in one block, bfloat16
    others = T * (parts - 1) // parts
    chunk = 2 * c.chunk_size * c.hsa_kv_heads * c.hsa_head_dim + c.retrieval_heads * c.retrieval_dim
    return 3 * blocks * (c.window - 1) * key, others // c.chunk_size * chunk * (2 + 4), 4 * blocks * others * key


# %%
# NBVAL_CHECK_OUTPUT
for T in CONTEXTS:
    halo, memory, full = received_by_hand(big, T, 8)
    run = TrainingRun(big, T, MeshSizes(cp=8))
    found = bytes_by_kind(traffic(run))
    same = (halo, memory, full) == (found["halo"], found["memory"], ring_bytes(run))
    print(f"{length_name(T):>4}: halo {scaled(halo, 'B')}, memory {scaled(memory, 'B')}, full {scaled(full, 'B')}")
    print(f"      share {(halo + memory) / full:.1%}; the package counts the same: {same}")

# %% [markdown]
# **You should see** 22% at 16K tokens, where the halo is almost everything, but only 1% at 1M. The package's numbers
# are more than formulas: a test runs a step in two processes, counts every byte that each collective brings, and finds
# exactly these numbers (`tests/test_scale.py`).
#
# The weights travel too, on every mesh: gathered forward, gathered again backward (2 bytes each), and their gradients
# added up (4 bytes). That is 8 bytes a parameter, 55 GB for each of eight GPUs in every step. So why does it not take
# forever? NVLink brings a GPU 450 GB a second, and the weights of the next block travel *while* this block computes.
#
# ## What a GPU holds
#
# Besides its share of the state, a GPU holds the gathered weights of two blocks, the chunk memory of the whole sequence
# and, most of all, **activations**: what the forward pass keeps for the backward pass. With *checkpointing* a block
# keeps only its input, and computes the rest again when it is needed. How much does that save, if each of eight GPUs
# reads a sequence of 131,072 tokens? **You should see** 59 GB in place of 386 GB.

# %%
# NBVAL_CHECK_OUTPUT
for checkpoint in (True, False):
    sizes = memory_bytes(TrainingRun(big, 1 << 17, MeshSizes(dp=8), checkpoint_blocks=checkpoint))
    named = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    print(f"checkpointing {checkpoint}: {named}; in all {sum(sizes.values()) / 1e9:.0f} GB")

# %% [markdown]
# ## What was measured, and what is predicted
#
# A step takes the time to compute and the time to exchange. For computing we have measurements, made on one GPU. For
# links we only have what the makers state. Here is every number that goes in.

# %%
measured = Measured.read(data_dir() / "results")
for file, what in measured.sources.items():
    print(f"{file}: {what}")
print(f"a step on {measured.tokens:,} tokens: {measured.step:.3f} s; product: {measured.product / 1e12:.0f} TFLOP/s")
print("an HSA layer, ms:", {length_name(n): round(1e3 * t, 1) for n, t in measured.attention.items() if n in CONTEXTS})
links = Links()
print(f"NVLink (HGX H100, H200): {links.nvlink / 1e9:.0f} GB/s received by a GPU, {links.gpus_per_host} GPUs in a host")
print(f"InfiniBand NDR, 400 Gb/s for each GPU: {links.network / 1e9:.0f} GB/s")
print(
    f"NCCL's own constants: start {links.start * 1e6:.1f} us, a step by NVLink {links.nvlink_hop * 1e6:.1f} us, by network {links.network_hop * 1e6:.0f} us"
)

# %% [markdown]
# The computing time of one process is that of its part: the HSA kernels as measured at the length of the whole sequence,
# everything else by its FLOP. On one GPU with 16,384 tokens the prediction must return the measurement, and it does, because
# it was made from it. But the **memory** was not made from a measurement. The measured run kept its state in bfloat16, half
# of our bytes. **You should see** that the prediction is within 5% of what PyTorch reported.

# %%
# NBVAL_CHECK_OUTPUT
sizes = memory_bytes(TrainingRun(big, 1 << 14))
half = sum(sizes[name] for name in ("weights", "gradients", "Adam")) / 2
rest = sum(sizes[name] for name in ("gathered", "activations", "chunk memory"))
peak = json.loads((data_dir() / "results" / "ul_8b_a1b.json").read_text())["train_16k_peak_bytes"]
print("predicted peak within 5% of the measured one:", abs((half + rest) / peak - 1) < 0.05)

# %% [markdown]
# This was one GPU. On **eight** GPUs this project has not measured anything yet. So the next table is a prediction, and it was
# written into a file before any measurement (`python -m hsa_mini plan ul_8b_a1b --gpus 8 --context ...`). Each range goes from
# a step in which nothing overlaps to a step in which all gathers overlap. A real step would lie between the two if links
# reached the rates that their makers state. No real link does, so it may be slower than both.

# %%
stored = json.loads((data_dir() / "results" / "scale_prediction.json").read_text())
print(stored["label"])
for tokens, best in stored["contexts"].items():
    for plan in best:
        slow, fast = plan["tokens_per_second_without_overlap"], plan["tokens_per_second"]
        mfu = f"MFU {plan['mfu'] * slow / fast:.2f} to {plan['mfu']:.2f}"
        note = "" if plan["fits"] else "  (does not fit into 80 GB)"
        rates = f"{slow:>7,.0f} to {fast:,.0f} tokens/s"
        print(f"{int(tokens):>9,} {plan['mesh']:15} {plan['peak_bytes'] / 1e9:5.1f} GB  {rates}, {mfu}{note}")

# %% [markdown]
# MFU is the share of a GPU's measured product rate that useful arithmetic reaches. It cannot rise above that of one GPU
# in such a prediction, so here the question is only how much is lost. At 1M tokens one mesh fits, `cp=8`.
#
# ## Move it
#
# Choose a context, and how the batch grows. Then move over the picture with the mouse or with the arrow keys: for each
# number of GPUs you see the best mesh. Left, what a GPU holds; the dashed line is what fits. Middle, what it receives in
# a step, on a logarithmic axis. Right, the tokens per second of a GPU, as a share of those of one GPU alone. Predict first: at a fixed batch of four million
# tokens, from how many GPUs on do more GPUs hardly help? Does a longer context move this point?


# %%
@cache
def best_plans(tokens, batch):
    """The best plan for 1, 2, 4, ..., 1,024 GPUs."""
    return [plans(big, tokens, 1 << k, measured, batch=batch)[0] for k in range(11)]


explore_scale(
    best_plans,
    place=8,
    tokens=Control([(length_name(T), T) for T in CONTEXTS], start=CONTEXTS[0], label="training context"),
    batch=Control([("4M tokens a step", 1 << 22), ("grows with the GPUs", 0)], start=1 << 22, label="batch"),
)

# %% [markdown]
# ## Where it stops
#
# The same in numbers, for a batch of four million tokens of 16K context.

# %%
heads = f"{'GPUs':>6} {'mesh':17} {'tokens':>8} {'compute':>8} {'gathers':>8}   efficiency"
print(heads)
for plan in best_plans(CONTEXTS[0], 1 << 22)[3:]:
    gathers = plan.seconds["weights"] + plan.seconds["gradients"]
    ends = f"{plan.efficiency_without_overlap:.0%} to {plan.efficiency:.0%}"
    each = plan.step_tokens // plan.gpus
    print(f"{plan.gpus:6,} {plan.mesh:17} {each:8,} {plan.seconds['compute']:7.2f}s {gathers:7.2f}s   {ends}")

# %%
# NBVAL_CHECK_OUTPUT
found = {plan.gpus: plan for plan in best_plans(CONTEXTS[0], 1 << 22)}
for gpus in (256, 1024):
    gathers = found[gpus].seconds["weights"] + found[gpus].seconds["gradients"]
    print(f"{gpus} GPUs: gathers take longer than computing:", gathers > found[gpus].seconds["compute"])

# %% [markdown]
# **You should see** `False`, then `True`. Three things happen when a fixed batch is cut finer and finer:
#
# 1. *Computing shrinks, gathering does not.* Each GPU reads fewer tokens, but it still gathers all weights of the model.
#    At 1,024 GPUs a GPU reads 4,096 tokens, and the gathers no longer hide behind them.
# 2. *Rings get long.* A gather among 1,024 GPUs has 1,023 steps from GPU to GPU. Even with nothing to carry, each step
#    takes some microseconds, and a training step has about ninety gathers and sums.
# 3. *Products get small.* With 4,096 tokens an expert sees 256 of them. Small products are less efficient. The
#    prediction does not know this, so it is too good there.
#
# A longer context hardly moves the point: HSA's own exchange (`cp`) stays small. What helps is a larger batch. Then efficiency
# stays near 100%, but each step sees more tokens, and beyond some batch size a model no longer learns more from a step.
# Which size that is, no plan can tell.
#
# ## What this does not show
#
# * Nothing on more than one GPU was measured in this notebook. When eight GPUs have been measured, the numbers will stand
#   beside the prediction.
# * Links between hosts, and between 16 and 1,024 GPUs: stated by makers, not measured by us.
# * How much really overlaps, how fast small parts compute, and what the parts of FSDP that move memory inside a GPU cost.
# * What breaks: with a thousand GPUs, one of them fails every few days.
#
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.scale import check_gpus_needed, check_share_of_full, check_tokens_to_hide

# %% [markdown]
# **1. How many GPUs?** *Difficulty 1, importance 4, 5 minutes.* A GPU has `memory` bytes, of which activations and
# gathered weights need `kept`. How many GPUs, a power of two, hold the training state of a model?


# %%
def gpus_needed(parameters, memory, kept):
    """The smallest power of two of GPUs that hold weights, gradients and Adam's averages in float32."""
    # your code


check_gpus_needed(gpus_needed)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def gpus_needed(parameters, memory, kept):
#     gpus = 1
#     while 16 * parameters / gpus > memory - kept:
#         gpus *= 2
#     return gpus
#
#
# check_gpus_needed(gpus_needed)
# print(gpus_needed(parameters, 80e9, 10e9), "GPUs for the 8B")
# assert gpus_needed(parameters, 80e9, 10e9) == 2
# assert gpus_needed(parameters, 80e9, 50e9) == 8  # with long parts of a sequence
# ```
#
# </details>

# %% [markdown]
# **2. A share of full attention.** *Difficulty 3, importance 4, 10 minutes.* A sequence of $T$ tokens is cut into `parts`.
# In one forward pass, the last part receives the halo of each block and the chunk memory of the other parts. Which share is
# that of what it would receive with full attention in each block? Mind short sequences: the halo cannot be longer than what
# lies in front of the part.


# %%
def share_of_full(T, parts, W, layers, key_bytes, memory_bytes):
    """key_bytes: of K and V of a token in one block. memory_bytes: of the chunk memory, for each token."""
    # your code


check_share_of_full(share_of_full)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# def share_of_full(T, parts, W, layers, key_bytes, memory_bytes):
#     others = T * (parts - 1) / parts
#     halo = layers * min(W - 1, others) * key_bytes
#     return (halo + others * memory_bytes) / (layers * others * key_bytes)
#
#
# check_share_of_full(share_of_full)
# for T in CONTEXTS:
#     print(f"{length_name(T)}: {share_of_full(T, 8, big.window, 28, 2048, 516):.1%}")
# limit = share_of_full(1 << 40, 8, big.window, 28, 2048, 516)
# assert abs(limit - 516 / (28 * 2048)) < 1e-6
# ```
#
# The share of the halo falls as $1/T$. What remains is one memory in place of 28 caches with four heads each: 0.9%.
#
# </details>

# %% [markdown]
# **3. Enough to hide behind.** *Difficulty 2, importance 5, 10 minutes.* How many tokens must a GPU read in a step so that
# computing takes at least as long as all gathers? A weight travels twice as bfloat16 and its gradient once as
# float32. A token takes 6 FLOP for each active parameter. (Leave out attention, and what is computed again.)


# %%
def tokens_to_hide(parameters, active, rate, link):
    """The smallest whole number of tokens; rate: FLOP per second. link: bytes per second."""
    # your code


check_tokens_to_hide(tokens_to_hide)

# %% [markdown]
# <details>
# <summary>Solution</summary>
#
# ```python
# import math
#
#
# def tokens_to_hide(parameters, active, rate, link):
#     gathering = (2 * 2 + 4) * parameters / link
#     return math.ceil(gathering * rate / (6 * active))
#
#
# check_tokens_to_hide(tokens_to_hide)
# active = estimate_cost(big).params_active_with_head
# for share in (0.26, 0.5):  # of the product rate
#     needed = {link: tokens_to_hide(parameters, active, share * measured.product, link) for link in (450e9, 50e9)}
#     print(f"at {share:.0%}: NVLink {needed[450e9]:,} tokens, one InfiniBand port {needed[50e9]:,}")
#     assert needed[50e9] > 8 * needed[450e9]
# ```
#
# A faster GPU needs *more* tokens to hide the same gathers. That is why mixtures of experts are hard to scale: all
# weights travel, and a token pays for few of them.
#
# </details>

# %% [markdown]
# ## What comes next
#
# This was the last notebook. You know the mechanism, its kernels, the model, its training, what of the paper's claims
# holds in small, and what it would take to make it large. [The start page](00_start.ipynb) leads back to every part.
# `python -m hsa_mini plan ul_8b_a1b --gpus 64 --context 1048576` answers for your own cluster, and with a configuration
# file in place of the preset, for your own model.
