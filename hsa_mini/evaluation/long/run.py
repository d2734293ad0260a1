"""RULER's tasks, stories, threads and notes in texts of any length, answered greedily and counted.

Every text is read once. The tasks of `SCATTERED` share their texts: the sentences of a problem
overwrite a few chunks of a `Haystack`. The texts of `WHOLE` are made for one task, and each
question about one goes on from a fork of its memory.
"""

import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from tqdm import tqdm

from hsa_mini.checks import quoted
from hsa_mini.data.corpus import Corpus
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.long.rows import TextRow
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import stream_from
from hsa_mini.inference.prefill import SEGMENT, prefill
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Output
from hsa_mini.tasks.long.ruler import NEEDLE_ROOM, WHOLE, WORD_END, Asked, Whole, encode_long
from hsa_mini.tasks.long.ruler_lists import ruler_texts
from hsa_mini.tasks.long.scattered import SCATTERED, Placed, scatter
from hsa_mini.tasks.placement import tile
from hsa_mini.tasks.sentences import EVALUATION, encode

LONG_TASKS = (*WHOLE, *SCATTERED)
MIN_TOKENS = 2048  # with fewer, some texts have no room for their sentences
MADE = "made for the task"  # the haystack of the tasks in `WHOLE`
TAIL = 400  # characters of a text, of which the last ones are read with every question


@dataclass(frozen=True)
class Plan:
    """The texts of one length: how many, and how many questions of every task about each; one
    question more for each control.
    """

    tokens: int
    texts: int
    questions: int
    seed: int

    def rng(self, *more: str | int) -> Random:
        words = (EVALUATION, self.seed, self.tokens, *more)
        return Random(zlib.crc32(" ".join(map(str, words)).encode()))

    def starts(self, corpus_tokens: int) -> list[int]:
        """Where the texts start in the corpus: at equal distances, from a random place on."""
        first = self.rng("starts").randrange(corpus_tokens)
        step = max(corpus_tokens // self.texts, 1)
        return [(first + i * step) % corpus_tokens for i in range(self.texts)]


def evaluate(
    model: HSAModel,
    corpus: Corpus,
    plan: Plan,
    tasks: Collection[str] = LONG_TASKS,
    *,
    finished: Sequence[TextRow] = (),
    report: Callable[[TextRow], object] | None = None,
) -> list[TextRow]:
    """A row for each of the tasks and each text of the plan's length.

    corpus: the real text of the tasks in `SCATTERED`. finished: rows of this plan that need not be
    measured again. report: called with each other row as soon as it is complete.
    Raises ValueError for an unknown task, and for too few tokens.
    """
    for task in tasks:
        if task not in LONG_TASKS:
            raise ValueError(f"tasks: got {quoted(task)}, accepted are {', '.join(LONG_TASKS)}")
    if plan.tokens < MIN_TOKENS:
        raise ValueError(f"tokens: got {plan.tokens}, accepted are at least {MIN_TOKENS}")
    rows = list(finished)
    missing = {(task, i) for task in tasks for i in range(plan.texts)}
    missing -= {(row.task, row.text) for row in rows}
    with tqdm(total=len(missing), desc=f"{plan.tokens:,} tokens", unit="task", delay=1) as bar:
        for row in _measured(model, corpus, plan, missing):
            rows.append(row)
            bar.update()
            if report:
                report(row)
    order = {task: i for i, task in enumerate(tasks)}
    return sorted(rows, key=lambda row: (order[row.task], row.text))


def _measured(
    model: HSAModel, corpus: Corpus, plan: Plan, missing: set[tuple[str, int]]
) -> Iterator[TextRow]:
    device = next(model.parameters()).device
    for i, start in enumerate(plan.starts(len(corpus))):
        asked = [task for task in SCATTERED if (task, i) in missing]
        if asked:
            text = torch.from_numpy(tile(corpus.tokens, plan.tokens, start).astype(np.int64))
            haystack = Haystack(model, text.to(device))
            for task in asked:
                yield _row(plan, task, i, corpus.name, start, scattered(haystack, plan, task, i))
            del haystack  # before the next one is read
    for task in WHOLE:
        last = max((i for name, i in missing if name == task), default=-1)
        if last < 0:
            continue
        (other,) = ruler_texts(task, MIN_TOKENS, samples=1, seed=plan.seed + 1)
        texts = ruler_texts(
            task, plan.tokens, samples=last + 1, seed=plan.seed, questions=plan.questions
        )
        for i, text in enumerate(texts):
            if (task, i) in missing:
                counts = whole(model, text, other.questions[0])
                yield _row(plan, task, i, MADE, 0, counts)


def _row(
    plan: Plan, task: str, text: int, haystack: str, start: int, counts: dict[str, float]
) -> TextRow:
    zeros = dict.fromkeys(TextRow.__annotations__, 0)
    given = {"task": task, "tokens": plan.tokens, "text": text, "haystack": haystack}
    return TextRow(**{**zeros, **given, "start": start, "seed": plan.seed, **counts})


@torch.no_grad()
def scattered(haystack: Haystack, plan: Plan, task: str, text: int) -> dict[str, float]:
    """Counts of questions of one of the tasks in `SCATTERED`, each with sentences of its own."""
    rng = plan.rng(task, text)
    S = haystack.model.config.chunk_size

    def draw(absent: bool = False) -> Placed:
        return scatter(rng, SCATTERED[task](rng), plan.tokens, absent=absent)

    def share(placed: Placed, remembered: Placed | None = None) -> float:
        problem = placed.problem
        with haystack.read(placed, remembered=remembered) as output:
            return said(haystack.model, output, problem.answers, exact=problem.exact)

    drawn = [draw() for _ in range(plan.questions)]
    shares = [share(placed) for placed in drawn]
    uncut = [placed.first[0] // S == placed.first[1] // S for placed in drawn]
    return {
        "questions": len(drawn),
        "right": sum(x == 1 for x in shares),
        "found": sum(shares),
        "whole": sum(uncut),
        "whole_right": sum(is_uncut and x == 1 for is_uncut, x in zip(uncut, shares)),
        "absent": 1,
        "absent_right": int(share(draw(absent=True)) == 1),
        "shuffled": 1,
        "shuffled_right": int(share(draw(), draw()) == 1),
    }


@torch.no_grad()
def whole(model: HSAModel, text: Whole, other: Asked) -> dict[str, float]:
    """Counts of the questions about a text of its own. other: a question of another text."""
    device = next(model.parameters()).device
    end = next(found.start() for found in WORD_END.finditer(text.text, len(text.text) - TAIL))
    rest = text.text[end:]
    ids = torch.from_numpy(encode_long(text.text[:end]).astype(np.int64))[None].to(device)
    memory = ChunkMemory(model.config)
    dtype = model.memory_dtype(device)
    memory.reserve(ids.shape[1] + SEGMENT, batch=1, dtype=dtype, device=device)
    prefill(model, ids, memory)

    def share(asked: Asked) -> float:
        tail = encode(rest + asked.question + asked.prefix).astype(np.int64)
        output = prefill(model, torch.from_numpy(tail)[None].to(device), memory.fork())
        return said(model, output, asked.answers, exact=False)

    shares = [share(asked) for asked in text.questions]
    right = sum(x == 1 for x in shares)
    counts = {"questions": len(shares), "right": right, "found": sum(shares)}
    return {**counts, "shuffled": 1, "shuffled_right": int(share(other) == 1)}


def said(model: HSAModel, output: Output, answers: Sequence[str], *, exact: bool) -> float:
    """The share of the answers that the model gives greedily.

    exact: there is one, and the model has to begin with it and to end it there. Otherwise each
    counts that occurs in what the model says, in capitals or not, as RULER counts them; the model
    may name the keys too, so it may say four times as much as the answers take, and at most RULER's
    128 tokens.
    """
    wanted = [answer.lower() for answer in answers]
    room = sum(len(encode(f" {answer}")) for answer in answers)
    most = room + 3 if exact else min(4 * room + 8, NEEDLE_ROOM)
    tokens: list[int] = []
    text = ""
    for token in stream_from(model, output, max_new_tokens=most):
        tokens.append(int(token))
        text = load_tokenizer().decode(tokens).lstrip()
        if exact and len(text) > len(answers[0]):
            break
        if not exact and all(answer in text.lower() for answer in wanted):
            break
    if exact:
        follows = text[len(answers[0]) :]
        return float(text.startswith(answers[0]) and not follows[:1].isalnum())
    return sum(answer in text.lower() for answer in wanted) / len(wanted)
