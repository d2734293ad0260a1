# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · How far does it reach?
#
# A small model has learned from short texts how to find a sentence. We hide the sentence in sixteen million tokens, and
# ask the model for it. Does the model find it? How sure may we be, after how many questions? And how do we know that
# the answer was not luck, or a leak?
#
# After this notebook you will be able to
#
# * explain in plain sentences the three tasks of the paper, and when an answer counts as right,
# * say what "10 of 10" proves and what it does not, with pencil and paper,
# * ask a trained model on your own processor, and see which chunk it read for its answer,
# * tell finding from guessing, with two controls, one of them with a proof,
# * read the heat maps of a model by length and depth, and say what they leave out.
#
# **Time:** 25 minutes to read, a minute to run on two CPU cores. **Needs:** [notebook 09](09_memory.ipynb), or at least
# chunks, landmarks and early exit. No GPU. This notebook asks trained models that come with the repository. Longer
# evaluations ran earlier on a GPU, and the notebook reads their results from files.
#
# [← 11 training](11_training.ipynb) · [map of the course](00_start.ipynb) · [13 laboratory →](13_laboratory.ipynb)

# %%
import dataclasses
import json
import math
import os
import time
from itertools import product

import numpy as np
import torch

from hsa_mini import HSAModel
from hsa_mini.data.corpus import load_corpus
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.perplexity import measure_perplexity
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, read_results
from hsa_mini.evaluation.retrievals import chunks_retrieved
from hsa_mini.evaluation.runner import ask_one
from hsa_mini.evaluation.statistics import by_length, wilson_interval
from hsa_mini.inference.generate import generate
from hsa_mini.paths import data_dir
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import place, tile
from hsa_mini.tasks.sentences import encode
from hsa_mini.viz import Control, explore, explore_retrieval, make_figure, show
from hsa_mini.viz.course import side_by_side
from hsa_mini.viz.plots import needle_strip
from hsa_mini.viz.results import TITLES, context_curve, count_marks, heat_map, percent_interval
from hsa_mini.viz.style import length_name

NAME = os.environ.get("HSA_MINI_MODEL", "mini")  # the shipped model to ask
TOKENS = int(os.environ.get("HSA_MINI_TOKENS", 32_768))  # the longest haystack read here; try 1048576
folder = data_dir() / "checkpoints" / NAME
model = HSAModel.from_pretrained(folder).requires_grad_(False)
S = model.config.chunk_size
W = model.config.window
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # questions are small work: one core is faster than several that wait for each other
corpus = load_corpus("validation").tokens
tokenizer = load_tokenizer()
print(f"{NAME}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters,", end=" ")
stages = json.loads((folder / "training.json").read_text())["recipe"]["stages"]
print(f"trained on sequences of at most {max(stage['tokens'] for stage in stages):,} tokens")

# %% [markdown]
# ## The question in plain words
#
# Take a long text that the model has never seen: plays, program code, documentation. That is the **haystack**. Write a
# few new sentences into it, which appear in no book: the **needles**. At the end of the text ask about one of them. To
# answer, the model must have read the needle, must have kept it, and must find it again among everything else.
#
# There are three tasks, in the style of the RULER benchmark, with our own sentences:
#
# * **S-NIAH** (single needle in a haystack): the question asks for one needle. Five others of the same form are in the
#   text, so that finding *any* needle is not enough.
# * **MQ-NIAH** (multi-query): one question asks for two needles. Four others are distractors.
# * **VT** (variable tracking): a number is passed on from name to name, $A = 48291307$, $B = A$, $C = B$. Which names
#   have it? Another chain of three is in the text, and the six sentences come in any order.
#
# One thing about these models first: they were *trained for retrieval*, on questions of all or some of these forms.
# They are not general language models. We measure how far the **mechanism** reaches, not how much a model understands.
#
# ## In symbols
#
# | symbol | what it is | in code |
# |---|---|---|
# | $T$ | tokens of haystack, needles and question together, exactly | `tokens` |
# | depth | the position of the first needed sentence: 0 is the start of the text, 1 its end, just before the window | `depth` |
# | $n$, $k$ | questions asked, right answers | `samples`, `correct` |
# | $\hat p = k / n$, $p$ | the observed share, and the true share, which we never observe | |
# | $z$ | 1.96, for intervals that contain the truth in 95% of all cases | `z` |
#
# The next cell prints one problem of each task. `>` marks the sentences that the question needs.

# %%
# NBVAL_CHECK_OUTPUT
for name, draw in TASKS.items():
    problem = draw(np.random.default_rng(0))
    print(name)
    print("\n".join(f"   {'>' if s in problem.question.needed else ' '}{s}" for s in problem.sentences))
    print(f"   question {problem.question.text.strip()!r}\n   answer   {problem.question.answer!r}\n")

# %% [markdown]
# The question ends where the answer begins, so the model only has to continue the text. It does so **greedily**: it
# always takes the most probable token. An answer is right if *every* token is right, up to and including the full stop.
# Five right digits of six are wrong. The keys in these questions never occur in training: about one key in ten is
# reserved for tests.
#
# ## What 10 of 10 proves
#
# We ask a model ten times, and all ten answers are right. Is the model perfect? A model that is right nine times in ten
# would also answer ten of ten, once in three tries ($0.9^{10} = 0.35$). So what do we know about the true share $p$?
#
# The familiar formula $\hat p \pm z \sqrt{\hat p (1 - \hat p) / n}$ gives $1 \pm 0$: certainty, after ten questions. It
# uses the spread at $\hat p$, which we observed, instead of the spread at $p$, which produced it. Wilson (1927)
# reversed this: **keep every $p$ for which $\hat p$ would be no surprise**,
#
# $$(\hat p - p)^2 \le z^2 \, \frac{p (1 - p)}{n}$$
#
# By hand, for $\hat p = 1$: $(1 - p)^2 \le z^2 p (1 - p) / n$. Divide by $1 - p$, and solve: $p \ge n / (n + z^2)$.
# With $n = 10$ that is $10 / 13.84 =$ **72%**. With $n = 100$ it is 96.3%. In general it is a quadratic equation in
# $p$.


# %%
def wilson(correct, samples, z=1.96):
    """Both ends of the range of all p with (share - p)^2 <= z^2 p (1 - p) / samples."""
    share = correct / samples
    spread = z * z / samples
    a = 1 + spread  # a p^2 + b p + c <= 0
    b = -(2 * share + spread)
    c = share * share
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


# %%
# NBVAL_CHECK_OUTPUT
for k, n in ((10, 10), (9, 10), (100, 100), (0, 70)):
    low, high = wilson(k, n)
    print(f"{k:3} of {n:3}: {low:.1%} to {high:.1%}; package: {np.allclose((low, high), wilson_interval(k, n))}")
print("by hand, 10 of 10:", round(10 / (10 + 1.96**2), 3))


# %% [markdown]
# **You should see** 72.2% twice. And 0 of 70 does not mean "never": it means "at most one in twenty". Below, every
# share is printed with its interval.
#
# ## Ask it
#
# `place` writes a problem into a text of exactly $T$ tokens. A `Haystack` is a text that the model reads **once** and
# then answers many questions about. That is exact, for two reasons that [notebook 09](09_memory.ipynb) has shown.
# First, a changed token affects only the few chunks within reach of the lower decoder. So we encode the chunks around
# the needles again and keep all others. Second, with early exit the upper decoder reads only the last few hundred
# tokens.


# %%
def sample_of(task, tokens, depth, seed):
    """A sample of a task for a haystack of so many tokens."""
    rng = np.random.default_rng(seed)
    return place(rng, TASKS[task](rng), tokens=tokens, depth=depth, chunk_size=S, window=W)


def stretch(tokens):
    """Held-out text, int64 [tokens]."""
    return torch.from_numpy(tile(corpus, tokens, len(corpus) // 4).astype(np.int64))


# %% [markdown]
# Is this the same as reading each text from scratch? We test it in double precision, with one question of each task:

# %%
# NBVAL_CHECK_OUTPUT
exact = HSAModel.from_pretrained(folder, dtype=torch.float64).requires_grad_(False)
haystack = Haystack(exact, stretch(1024))
for task in TASKS:
    sample = sample_of(task, 1024, 0.3, seed=1)
    ids = torch.from_numpy(sample.apply(stretch(1024).numpy()))
    new = len(sample.answer)
    from_haystack = haystack.ask(sample, answer_tokens=new).ids
    from_scratch = generate(exact, ids[None], max_new_tokens=new).ids
    print(f"{task:8} one haystack == from scratch: {torch.equal(from_haystack, from_scratch)}")

# %% [markdown]
# **You should see** `True` three times. Now we ask the real questions, on your processor, in single precision. The
# model reads three haystacks. After that each question takes only a moment. (`HSA_MINI_TOKENS=1048576` in the
# environment makes the longest haystack a million tokens, in about a minute. `HSA_MINI_MODEL` names another shipped
# model.)

# %%
haystacks = {}
torch.set_num_threads(THREADS)
for T in sorted({4096, 8192, TOKENS}):
    began = time.perf_counter()
    haystacks[T] = Haystack(model, stretch(T))
    print(f"{T:9,} tokens read in {time.perf_counter() - began:.1f} s")
torch.set_num_threads(1)


# %%
def answer(haystack, sample, **options):
    """The model's answer, and the chunks that each HSA layer kept for the first token of it."""
    generation = haystack.ask(sample, answer_tokens=len(sample.answer), **options)
    return tokenizer.decode(generation.ids[0].tolist()), chunks_retrieved(generation.first)


def verdict(sample, given):
    wanted = sample.problem.question.answer
    return f"{given}   (right)" if given == wanted else f"{given!r}   (wrong: it is {wanted!r})"


def lookup(sample, kept):
    """For each sentence that the question needs: the chunks that contain it, and which of these were retrieved."""
    for (start, ids), sentence in zip(sample.patches, sample.problem.question.needed):
        chunks = range(start // S, (start + len(ids) - 1) // S + 1)
        yield sentence, list(chunks), sorted(set(chunks) & set().union(*kept))


# %% [markdown]
# The next cell asks one question of each task at each length. It prints the question, the answer, and the chunks of the
# needed sentences. *Retrieved* means that an HSA layer kept the chunk for the **first** token of the answer. The model
# may retrieve chunks for a later part of the answer later. At the end you see the text of one retrieved chunk that
# contains a needed sentence, or the end of it.


# %%
def report(task, tokens, depth=0.4, seed=2):
    """Ask a question, and print the question, the answer and the chunks."""
    sample = sample_of(task, tokens, depth, seed)
    given, kept = answer(haystacks[tokens], sample)
    print(f"{task}, {tokens:,} tokens: {sample.problem.question.text.strip().splitlines()[0]}")
    print(f"  answer  {verdict(sample, given)}")
    read = []
    for sentence, chunks, found in lookup(sample, kept):
        print(f"  needle {sentence}  in chunk {chunks}, retrieved {found or 'none'}")
        read += found
    return sample, read[-1:]


for task in TASKS:
    for T in haystacks:
        sample, read = report(task, T)
    for chunk in read:
        text = tokenizer.decode(sample.apply(stretch(T).numpy())[chunk * S : (chunk + 1) * S].tolist())
        print(f"  chunk {chunk} of {T // S}, as the model read it:", *text.splitlines(), sep="\n      | ")
    print()

# %% [markdown]
# ### Move it
#
# Which chunks does the model find relevant? Every dot is the retrieval score of a chunk, for the last token of the
# question. The star is the chunk of the first needed sentence, and circles are the chunks that a layer retrieved. Move
# the needle through the text, and change the length. A longer text has more chunks, so the highest of their scores is
# higher too: *that* is the difficulty of a longer text for a model whose retrieval has no positions. How far above all
# the others is the star? A needle on the border of two chunks has two stars.


# %%
def search(haystack, sample):
    """The answer; scores of visible chunks for the question's last token [layers, N]; the chunks each layer kept."""
    layers = [block.hsa for block in model.upper if block.hsa is not None]
    scores = []

    def record(hsa, given, out):  # given: x, and a source of chunks with landmarks [1, N, J_r, R]
        query = out[1].queries[0, -1]  # [J_r, R]
        dots = torch.einsum("njr,jr->nj", given[1].landmarks[0], query).amax(-1) / query.shape[-1] ** 0.5
        scores.append(dots[: (sample.tokens - 1) // S].numpy())

    hooks = [hsa.register_forward_hook(record) for hsa in layers]
    given, kept = answer(haystack, sample)
    for hook in hooks:
        hook.remove()
    return given, np.stack(scores), [sorted(chunks) for chunks in kept]


def name_ranks(sample, given, scores):
    """The answer, and how high its chunk stands among all, in words."""
    needle = sample.first_chunks(S)
    best = [1 + min(int((row > row[i]).sum()) for i in needle) for row in scores]
    ranks = ", ".join(f"{rank} in layer {layer}" for layer, rank in enumerate(best))
    where = f"Needle at token {sample.start:,} of {sample.tokens:,}."
    return f"{where} Answer {verdict(sample, given)}. Rank of its chunk: {ranks}."


def draw_search(figure, task, tokens, depth, seed):
    sample = sample_of(task, tokens, depth, seed)
    given, scores, kept = search(haystacks[tokens], sample)
    needle_strip(figure, scores, sample.first_chunks(S), kept, S)
    return name_ranks(sample, given, scores)


explore(
    draw_search,
    alt="The retrieval score of every chunk over the haystack, one panel per HSA layer. A star marks the needle's chunk.",
    size=(10, 4.2),
    task=list(TASKS),
    depth=Control((0.0, 1.0, 0.1), start=0.3, label="depth"),
    tokens=Control([(length_name(T), T) for T in haystacks], start=max(haystacks), label="tokens"),
    seed=Control((0, 9), start=3, label="another question"),
)

# %% [markdown]
# ### Your own needle
#
# The strip shows one token, the last one of the question. The next picture shows all of them. Move through question and
# answer with the arrow keys, and follow each token: the scores of all chunks, the chunks that a layer keeps and their
# weights, what each head reads inside them, the blend, and the likeliest next tokens. Then type a needle and a question
# of your own. Ask also for a code that you have not hidden: what does the model answer?

# %%
explore_retrieval(model, tokenizer.decode(stretch(4096).tolist()))

# %% [markdown]
# **You should see** that the digits of a hidden code come with a probability near 1. For a code that is nowhere the
# probabilities are spread over several digits: the model makes an answer up, and the picture marks it as wrong.
#
# ## Finding or guessing
#
# A right answer may have other reasons. Perhaps the answer leaks from somewhere else. So every evaluation has two
# **controls**:
#
# * **absent**: the needle of the question is nowhere in the text. Everything else is the same.
# * **shuffled**: the memory holds *another* sample's sentences. The question, and the last tokens, are the sample's
#   own.
#
# By chance an answer is right once in a million: it has six digits, drawn uniformly. Here are a few questions of each
# kind:

# %%
# NBVAL_CHECK_OUTPUT
rng = np.random.default_rng(0)
chance = 1e-6
right = {}
for control, asked in {None: 10, **dict.fromkeys(CONTROLS, 4)}.items():
    right[control] = sum(ask_one(haystacks[4096], rng, "s_niah", 0.5, control).correct for _ in range(asked))
    low, high = wilson_interval(right[control], asked)
    print(f"{control or 'own memory':10} {asked:2} questions; the interval contains chance: {low <= chance <= high}")
print("own memory, at least 9 of 10 right:", right[None] >= 9)

# %% [markdown]
# **You should see** `False` for its own memory, `True` for both controls, and `True` in the last line. But counting
# cannot prove that a control is right only by chance: the interval of 0 of 4 goes up to 49%.
#
# ### The equality of this notebook: shuffled memory == chance
#
# So here is a proof. Leave the question as it is, and the shuffled memory too. Change *the value in the needle that the
# question asks for*. If the answer depended on this value in any way other than through the memory, the answer would
# change. If the answer is the same for every value, then it equals a value drawn uniformly from a million with a
# probability of **exactly** one in a million.


# %%
def with_value(sample, value):
    """The same sample with another value in the needle of the question, and so with another right answer."""
    (first, ids), *others = sample.patches
    ending = encode(f"{value}.")
    ids = np.concatenate([ids[: -len(ending)], ending])
    return dataclasses.replace(sample, patches=((first, ids), *others), answer=ending)


# %%
# NBVAL_CHECK_OUTPUT
sample = sample_of("s_niah", 4096, 0.5, seed=2)
other = sample_of("s_niah", 4096, 0.5, seed=5)
versions = [with_value(sample, value) for value in ("000000", "482913", "999999")]
shuffled = {answer(haystacks[4096], version, remembered=other)[0] for version in versions}
own = {answer(haystacks[4096], version)[0] for version in versions}
print("shuffled: the same answer for every value:", len(shuffled) == 1)
print("own memory: the answer changes with the value:", len(own) > 1)

# %% [markdown]
# **You should see** `True` twice. The model knows the needle through the memory, and through nothing else.
#
# ## The heat maps
#
# The full evaluation goes up to 16 million tokens, on a GPU, in some minutes per task. It asks questions as this
# notebook does, with `python -m hsa_mini eval mini --task s_niah` (or `mq_niah`, `vt`), and writes a file. Some lengths
# go beyond the paper's, up to 128 million tokens, with few questions. From here on, the notebook computes every number
# from these files when it runs.

# %%
MODELS = ("mini", "mini_moe", "small_moe")
results = {}
FILES = {}  # (model, task) -> the name of its file
missing = []
for name, task in product(MODELS, TASKS):
    path = data_dir() / "results" / f"{name}_{task}.json"
    if path.is_file():
        FILES[name, task] = f"{name}, {TITLES[task]}"
        results[FILES[name, task]] = read_results(path)
    else:
        missing.append(f"{name} on {TITLES[task]}")
ASKED = sorted({row.tokens for rows, _, _ in results.values() for row in rows})
print("measured:", "; ".join(f"{file} (on {hardware})" for file, (_, _, hardware) in results.items()))
if missing:
    print("not measured, so nothing is known:", "; ".join(missing))

# %% [markdown]
# ### Move it
#
# A cell of the map is one length and one depth. It shows how many of its questions had right answers, and below, in
# percent, the interval of the true share. The colour is the lower end of this interval: what the cell *proves*. A cell of
# two questions proves little, even when both answers are right. The colours begin just below the darkest cell of a map,
# so look at the colour bar before you compare two maps. Choose a map, a length and a depth. In the maps with distractors
# or a border the questions are harder ("What breaks it", below, explains them).


# %%
HARDER = {
    f"{path.stem.split('_s_niah_')[0]}, S-NIAH, {path.stem.split('_s_niah_')[1].replace('_', ' ')}": read_results(path)
    for path in sorted((data_dir() / "results").glob("*_s_niah_*.json"))
    if not path.stem.endswith("_far")
}
MAPS = results | HARDER
DEPTHS = sorted({row.depth for rows, _, _ in MAPS.values() for row in rows})


def name_cell(file, tokens, depth, cell):
    """What one cell of a map proves, in words."""
    where = f"{file}, {length_name(tokens)} tokens, depth {depth:.2f}:"
    if not cell:
        return f"{where} no questions were asked."
    asked, right, kept = (sum(getattr(row, name) for row in cell) for name in ("samples", "correct", "retrieved"))
    low, high = wilson(right, asked)
    share = f"{right} of {asked} right, so {low:.0%} to {high:.0%}"
    return f"{where} {share}; the needle's chunk was retrieved {kept} times."


def draw_heat(figure, file, tokens, depth):
    rows = MAPS[file][0]
    cell = [row for row in rows if (row.tokens, row.depth) == (tokens, depth)]
    heat_map(figure.subplots(), rows, at=(tokens, depth) if cell else None)
    return name_cell(file, tokens, depth, cell)


explore(
    draw_heat,
    alt="A heat map: lengths from left to right, depths from top to bottom. Every cell shows the right answers and the interval.",
    size=(8.5, 3.7),
    file=list(MAPS),
    tokens=Control([(length_name(T), T) for T in ASKED], start=LENGTHS[-1], label="tokens"),
    depth=Control([(f"{depth:.2f}", depth) for depth in DEPTHS], start=DEPTHS[0], label="depth"),
)

# %% [markdown]
# Next, the three tasks of one model side by side, at the lengths of the paper, with the counts of right answers only:


# %%
def at_the_papers_lengths(file):
    return [row for row in results[file][0] if row.tokens in LENGTHS]


def in_words(file):
    """The content of a heat map in one sentence."""
    rows = at_the_papers_lengths(file)
    table = by_length(rows)
    worst = min(rows, key=lambda row: row.correct / row.samples)
    first, last = (f"{e['correct']} of {e['samples']} at {length_name(e['tokens'])}" for e in (table[0], table[-1]))
    cell = f"{length_name(worst.tokens)}, {worst.depth:.2f}"
    return f"{file}: {first} and {last}; no cell below {worst.correct} of {worst.samples} ({cell})."


shown = [file for file in results if file.startswith("mini,")]
figure = side_by_side.heat_maps({file: at_the_papers_lengths(file) for file in shown})
show(figure, f"Heat maps of right answers, lengths by depths. {' '.join(map(in_words, shown))}")
print("\n".join(map(in_words, results)))

# %% [markdown]
# A column adds up ten depths, so it is much stronger evidence than a cell. The next picture shows one share per length,
# with the paper's results next to ours.
#
# This is no contest. The paper's model has 8 billion parameters and can talk about anything. Our models have a
# hundredth of these parameters, or a thousandth, and can only answer questions of these forms. What we can compare is
# the **shape**: does a curve fall as the text grows, and where?

# %%
panels = {task: {} for task in TASKS}
for (name, task), file in FILES.items():
    panels[task][name] = at_the_papers_lengths(file)
words = " ".join(map(in_words, results))
show(side_by_side.curves_by_task(panels), f"Percent right against length with 95% intervals, next to the paper's results. {words}")

# %%
for file, (rows, _, _) in results.items():
    print(f"{file}\n   tokens    right (95% interval)       needle's chunk retrieved   distinct tokens of text")
    for entry in by_length(rows):
        distinct = next(row.distinct_tokens for row in rows if row.tokens == entry["tokens"])
        share = f"{entry['accuracy']:6.1%} ({entry['low']:.1%} to {entry['high']:.1%})"
        found = f"{entry['retrieved']} of {entry['samples']}"
        print(f"   {length_name(entry['tokens']):>6}    {share:26} {found:>24} {distinct:>25,}")

# %% [markdown]
# Two columns deserve attention. **Retrieved**: where the chunk was always retrieved and answers are still wrong, the
# model *found* the sentence and did not *read* it well, or it missed the other sentences of the question. **Distinct
# tokens**: where this number is smaller than the length, the held-out text had come to its end and started again. The
# needles do not repeat.
#
# And here are the **controls**, over all lengths, next to the normal questions:

# %%
for file, (rows, controls, _) in results.items():
    kinds = {"own memory": rows} | {name: [row for row in controls if row.control == name] for name in CONTROLS}
    print(f"{file:20}", end="")
    for kind, same in kinds.items():
        right = sum(row.correct for row in same)
        asked = sum(row.samples for row in same)
        share = f"{right} of {asked} ({percent_interval(right, asked)})" if asked else "no questions"
        print(f"  {kind} {share}", end="")
    print()

# %% [markdown]
# ## What breaks it
#
# Good numbers are a reason for harder tests. The next cell runs two of them on 4,096 tokens, with four questions each.
#
# **Many similar needles.** So far the text had five other needles. Now we hide many more, all of the same form. It is
# no longer enough that a landmark marks "here is a secret code". It must also tell *whose* code it is.
#
# **A border through the needle.** Chunks have fixed borders, wherever a needle is. We place *every* sentence across a
# border. When key and value are in different chunks, the chunk with the value does not contain the key's tokens. The
# model can still find it, since its tokens have *seen* the key: through the windows of the lower decoder, which ignore
# chunk borders. That is one reason why the chunk encoder reads the output of the lower decoder, and not the embedding.

# %%
rng = np.random.default_rng(1)
pushed = {}
cases = {f"{5 + more} others": {"distractors": more} for more in (0, 80)}
cases["every sentence on a border"] = {"border": True}
for name, options in cases.items():
    right = sum(ask_one(haystacks[4096], rng, "s_niah", depth, **options).correct for depth in np.linspace(0, 1, 4))
    pushed[name] = right, 4

# %%
figure = make_figure(9, 2.6)
count_marks(figure.subplots(), pushed)
words = ", ".join(f"{name}: {right} of {asked}" for name, (right, asked) in pushed.items())
show(figure, f"Shares right with their 95% intervals in 4,096 tokens. {words}.")

# %% [markdown]
# The intervals of four questions are wide. The following results come from hundreds of questions on longer texts, asked
# with `python -m hsa_mini eval mini --distractors 64` (or 1024) and `--border`:

# %%
for file, (rows, _, hardware) in HARDER.items():
    shares = ", ".join(f"{length_name(row['tokens'])} {row['correct']}/{row['samples']}" for row in by_length(rows))
    print(f"{file}: {shares} (on {hardware})")

# %% [markdown]
# ## Perplexity, and what it does not show
#
# Needles are a narrow test. The usual test is broad: how well does the model predict ordinary text? If a model used
# distant text, then more text in front should make the *same* tokens easier to predict. So we take some stretches of
# held-out text. The model predicts the last 512 tokens of each, with more and more of the preceding text in front of
# them. The loss is in nats per token, and perplexity is $e^{\text{loss}}$: a perplexity of $m$ means that the model is
# as uncertain as if it had to choose among $m$ equally likely tokens.

# %%
paths = sorted((data_dir() / "results").glob("*_perplexity.json"))
tables = {path.stem.removesuffix("_perplexity"): json.loads(path.read_text())["rows"] for path in paths}
if NAME not in tables:
    print(f"no file of `python -m hsa_mini perplexity {NAME}`: measured here, on a few short stretches")
    tables[NAME] = [vars(row) for row in measure_perplexity(model, lengths=(1024, 4096), stretches=3)]
words = {}
for name, rows in tables.items():
    losses = np.array([row["losses"] for row in rows]).T  # [stretches, lengths]
    gain = losses[:, 0] - losses[:, -1]
    error = 1.96 * gain.std(ddof=1) / math.sqrt(len(gain))
    values = ", ".join(f"{row['perplexity']:.2f} at {length_name(row['tokens'])}" for row in rows)
    words[name] = f"{name}: perplexity {values}; gained {gain.mean():+.3f} nats per token, plus or minus {error:.3f}."
print("\n".join(words.values()))
rows = tables[NAME]
figure = make_figure(8, 3.2)
context_curve(figure.subplots(), [row["tokens"] for row in rows], np.array([row["losses"] for row in rows]).T)
show(figure, f"Nats gained per token against tokens read, for each stretch of text, and their mean. {words[NAME]}")

# %% [markdown]
# The targets are the same at every length, so we can compare each stretch *with itself*: each grey line starts at 0,
# however difficult its text is. Look at the sign and the size of the gain, and then at the heat maps. The two tests
# measure different things. Most tokens of ordinary text need nothing from far away, and a mean over all tokens hides
# the few that do. The needle is such a token by construction. A model may pass either test and fail the other, so we
# report **both**. (In the paper three ways to warm up a 0.5 B model end at perplexities of 16.77, 16.50 and 15.96 at
# 16K, and find 0, 93 and 66 percent of needles at 1M.)
#
# ## What this does not show
#
# * The models are small, and were trained *on questions of these forms*. They find; they do not understand. They do not
#   answer a question of a form that training did not contain.
# * Needles look foreign: capital letters and digits in prose and code. A fact in the language of its surroundings is
#   harder to find, and six sentences in millions of tokens are few.
# * There is one seed and one checkpoint of each model. The intervals contain the randomness of the questions, not that
#   of another training run.
#
# ## Exercises
#
# Write each function and run its cell. The line below the cell says whether the function is right, and if it is not,
# what is wrong. Difficulty and importance go from 1 to 5.

# %%
from hsa_mini.exercises.evaluation.needles import check_evaluate_needles, check_questions_needed, check_scores

# %% [markdown]
# **1. How many questions?** *Difficulty 2, importance 4, 10 minutes.* The next version of a model is right in 98% of
# cases, the present one in 95%. How many questions does it take until the interval of $k = 0.98 n$ excludes 95%? Guess
# first. Is a heat map of 70 cells with ten questions each enough?


# %%
def questions_needed(share, bound):
    """The smallest n of 50, 100, 150 ... 5000 for which round(share * n) right answers exclude the bound."""
    # your code


check_questions_needed(questions_needed)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def questions_needed(share, bound):
#     return next(n for n in range(50, 5001, 50) if wilson(round(share * n), n)[0] > bound)
#
#
# check_questions_needed(questions_needed)
# print(questions_needed(0.98, 0.95), "questions")
# assert 250 <= questions_needed(0.98, 0.95) <= 700
# ```
#
# It takes some hundreds of questions. The whole map is enough. A column of it (100 questions) is not enough, and a
# single cell is far from enough. If you compare two models by the colour of cells, you compare noise.
#
# </details>

# %% [markdown]
# **2. All or nothing.** *Difficulty 1, importance 4, 5 minutes.* A model copies each digit correctly with a probability of
# 90%, independently. How often is an S-NIAH answer right? An answer with two codes? And what would a score be that gives
# partial credit for each right digit? What would you conclude from a heat map at 53%?


# %%
def scores(p, codes, digits):
    """The share of right answers, and the score with partial credit; each digit is right with probability p."""
    # your code


check_scores(scores)

# %% [markdown]
# <details><summary>Solution</summary>
#
# All six digits: $0.9^6 = 53\%$. Twelve: $0.9^{12} = 28\%$. The partial score would be 90% in both cases.
#
# ```python
# def scores(p, codes, digits):
#     return p ** (codes * digits), p
#
#
# check_scores(scores)
# digits = np.random.default_rng(0).random((100_000, 12)) < 0.9
# for codes in (1, 2):
#     drawn = digits[:, : 6 * codes]
#     strict, partial_credit = scores(0.9, codes, 6)
#     print(f"{codes} codes: {strict:.1%}, with partial credit {partial_credit:.1%}")
#     assert abs(drawn.all(axis=1).mean() - strict) < 0.01 and abs(drawn.mean() - partial_credit) < 0.01
# ```
#
# "All or nothing" is strict, and makes small weaknesses look large. So 53% may mean that the model loses the needle in
# half of the cases, or that it always finds the needle and reads it badly. The heat map cannot tell the two apart. The
# column *retrieved* can.
#
# </details>

# %% [markdown]
# **3. The needle evaluation.** *Difficulty 3, importance 5, 20 minutes.* Now write the evaluation itself. For each depth,
# and for so many questions: draw a problem of `s_niah` and *place* it in the text, *ask* the haystack, and *compare* the
# answer with the sample's. Every question is a new one. Then give the *interval* of each depth. You need `place` (or look
# at `sample_of`), `haystack.ask(sample, answer_tokens=...)`, whose result has the tokens of the answer in `ids[0]`,
# `sample.answer` and `wilson`. The text has `len(haystack.text)` tokens, chunks of S and a window of W. (The check has a
# haystack that answers by plan: right, or wrong at one token.)


# %%
def evaluate_needles(haystack, depths, questions):
    """A row for each depth: the number of right answers, and both ends of the interval of their share."""
    # your code


check_evaluate_needles(evaluate_needles)

# %% [markdown]
# <details><summary>Solution</summary>
#
# One random generator draws all questions, so no two are equal. `sample.answer` contains the full stop.
#
# ```python
# def evaluate_needles(haystack, depths, questions):
#     rng = np.random.default_rng(0)
#     draw = TASKS["s_niah"]
#     sizes = dict(tokens=len(haystack.text), chunk_size=S, window=W)
#     rows = []
#     for depth in depths:
#         right = 0
#         for _ in range(questions):
#             sample = place(rng, draw(rng), depth=depth, **sizes)
#             given = haystack.ask(sample, answer_tokens=len(sample.answer)).ids[0]
#             right += given.tolist() == sample.answer.tolist()
#         rows.append((right, *wilson(right, questions)))
#     return rows
#
#
# check_evaluate_needles(evaluate_needles)
# rows = evaluate_needles(haystacks[4096], (0.0, 0.5, 1.0), 4)
# rng = np.random.default_rng(0)
# for depth, (right, low, high) in zip((0.0, 0.5, 1.0), rows):
#     print(f"depth {depth}: {right} of 4, so {low:.0%} to {high:.0%}")
#     assert right == sum(ask_one(haystacks[4096], rng, "s_niah", depth)[0] for _ in range(4))
# ```
#
# The package's `evaluate` does the same with the two controls, and below a million tokens each of its samples has its
# own text.
#
# </details>

# %% [markdown]
# ## What comes next
#
# You have measured models. *Why* do they reach so far: because of the missing positions, the noise, the self-copy? To
# find out, remove one thing at a time, train again, and ask again.
#
# [Notebook 13](13_laboratory.ipynb), *Which of the paper's claims hold in small models?*, does that, in about 30
# minutes. `make demo ARGS="--tokens 262144 --depth 0.9"` asks for a needle in your terminal.
