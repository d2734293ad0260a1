"""Questions of every retrieval task over texts of any length, answered greedily and counted.

Every text is encoded once, for one question (or more) in each tenth of its depth. Where in its
tenth a sentence stands is drawn, so that chunk borders cut it as often as they cut any sentence.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hsa_mini.checks import check_integer, quoted
from hsa_mini.data.corpus import load_corpus
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, ControlRow, RetrievalRow
from hsa_mini.evaluation.retrievals import chunks_retrieved
from hsa_mini.hsa_model import HSAModel
from hsa_mini.tasks.forms import MAX_DISTRACTORS, TASKS
from hsa_mini.tasks.placement import Sample, place, tile
from hsa_mini.tasks.sentences import EVALUATION

BANDS = 10  # of depth
TEXTS = 20  # of each length

Condition = tuple[int, str | None]  # band, and a control or None
Report = Callable[[int, list[RetrievalRow], list[ControlRow]], object]


class Asked(NamedTuple):
    """correct: every token of the greedy answer is right. retrieved: any HSA layer chose a chunk of
    the first sentence for the first answer token. whole: this sentence lies in a single chunk.
    """

    correct: bool
    retrieved: bool
    whole: bool


def evaluate(
    model: HSAModel,
    task: str,
    *,
    lengths: Iterable[int] = LENGTHS,
    texts: int = TEXTS,
    samples: int = 1,
    seed: int = 1,
    distractors: int = 0,
    border: bool = False,
    longer: bool = False,
    report: Report | None = None,
) -> tuple[list[RetrievalRow], list[ControlRow]]:
    """Evaluate one of TASKS on held-out text: a row per length and band of depth, and a row per
    length and control.

    texts: of each length; they start at equal distances in the corpus, from a random place on.
    samples: questions in each of the `BANDS` bands of every text, and of each control. Every
    question has its own sentences.
    distractors: further sentences of the same form for every question.
    border: every sentence crosses a border between two chunks.
    longer: the texts are of the longer corpus.
    lengths: one that is named twice counts once.
    report: called with each length and its rows as soon as these are complete.
    Raises ValueError for an unknown task, too many distractors or no text, and as `place` does.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {quoted(task)}, accepted are {', '.join(TASKS)}")
    if not 0 <= distractors <= MAX_DISTRACTORS:
        raise ValueError(f"distractors: got {distractors}, accepted is 0 to {MAX_DISTRACTORS}")
    check_integer("texts", texts, 1)
    check_integer("samples", samples, 1)
    corpus = load_corpus("validation", longer=longer).tokens
    ask = partial(ask_one, task=task, distractors=distractors, border=border)
    rows = []
    controls = []
    for tokens in dict.fromkeys(lengths):
        rng = np.random.default_rng((EVALUATION, seed, tokens))
        answers = _ask_all(model, corpus, rng, tokens, texts, samples, ask)
        common: dict[str, Any] = {
            "tokens": tokens,
            "distinct_tokens": min(tokens, len(corpus)),
            "seed": seed,
        }
        asked = [
            RetrievalRow(depth=(band + 0.5) / BANDS, **_counts(by_text), **common)
            for (band, control), by_text in answers.items()
            if control is None
        ]
        controlled = [
            ControlRow(depth=0.5, **_counts(by_text), **common, control=control)
            for (_, control), by_text in answers.items()
            if control is not None
        ]
        rows += asked
        controls += controlled
        if report:
            report(tokens, asked, controlled)
    return rows, controls


def _ask_all(
    model: HSAModel,
    corpus: np.ndarray,
    rng: np.random.Generator,
    tokens: int,
    texts: int,
    samples: int,
    ask: Callable[..., Asked],
) -> dict[Condition, list[list[Asked]]]:
    """Ask all questions about `texts` texts of `tokens` tokens: of each band and control, the
    answers by text.
    """
    device = next(model.parameters()).device
    conditions = [*((band, None) for band in range(BANDS)), *((-1, name) for name in CONTROLS)]
    answers: dict[Condition, list[list[Asked]]] = {condition: [] for condition in conditions}
    first = int(rng.integers(len(corpus)))
    total = texts * len(conditions) * samples
    with tqdm(total=total, desc=f"{tokens:,} tokens", unit="question", mininterval=0.5) as bar:
        for i in range(texts):
            start = (first + i * len(corpus) // texts) % len(corpus)
            text = torch.from_numpy(tile(corpus, tokens, start).astype(np.int64))
            haystack = Haystack(model, text.to(device))
            for band, control in conditions:
                answers[band, control].append([])
                for _ in range(samples):
                    depth = rng.random() if control else (band + rng.random()) / BANDS
                    asked = ask(haystack, rng, depth=depth, control=control)
                    answers[band, control][-1].append(asked)
                    bar.update()
            del haystack  # before the next one is encoded
    return answers


def _counts(by_text: list[list[Asked]]) -> dict[str, Any]:
    """The counts of a row."""
    answers = [answer for some in by_text for answer in some]
    return {
        "samples": len(answers),
        "correct": sum(answer.correct for answer in answers),
        "retrieved": sum(answer.retrieved for answer in answers),
        "whole": sum(answer.whole for answer in answers),
        "whole_correct": sum(answer.whole and answer.correct for answer in answers),
        "correct_by_text": tuple(sum(answer.correct for answer in some) for some in by_text),
    }


def evaluate_side_by_side(
    load: Callable[[], HSAModel],
    task: str,
    *,
    lengths: Iterable[int],
    jobs: int,
    report: Report | None = None,
    **options,
) -> tuple[list[RetrievalRow], list[ControlRow]]:
    """What `evaluate` returns for the model that `load` returns, computed for `jobs` lengths at
    once.

    Each job is a process with its own copy of the model. On a GPU this pays because a question
    consists of many small kernels, which one process cannot launch fast enough to keep the GPU
    busy. Raises ChildProcessError if a process is killed.
    """
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    lengths = list(dict.fromkeys(lengths))
    results = {}
    with ProcessPoolExecutor(jobs, context, _begin, (context.RLock(), load)) as pool:
        try:
            with without_interrupts():
                waiting = {
                    pool.submit(_evaluate_length, task, options, tokens): tokens
                    for tokens in sorted(lengths, reverse=True)
                }
            for future in as_completed(waiting):
                tokens = waiting[future]
                results[tokens] = future.result()
                if report:
                    report(tokens, *results[tokens])
        except BaseException as error:  # including Ctrl-C
            for process in multiprocessing.active_children():
                process.terminate()
            if isinstance(error, BrokenExecutor):
                raise ChildProcessError("jobs: a process that evaluates was killed") from None
            raise
    rows = [row for tokens in lengths for row in results[tokens][0]]
    controls = [row for tokens in lengths for row in results[tokens][1]]
    return rows, controls


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Processes that start inside the `with` block never see Ctrl-C: their parent ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(lock, load: Callable[[], HSAModel]) -> None:
    """Start a worker process: it loads the model once and keeps it for every length."""
    global _model
    tqdm.set_lock(lock)
    _model = load()


def _evaluate_length(
    task: str, options: dict, tokens: int
) -> tuple[list[RetrievalRow], list[ControlRow]]:
    return evaluate(_model, task, lengths=(tokens,), **options)


def ask_one(
    haystack: Haystack,
    rng: np.random.Generator,
    task: str,
    depth: float,
    control: str | None = None,
    *,
    distractors: int = 0,
    border: bool = False,
) -> Asked:
    """Ask one question, whose first sentence stands at `depth`."""
    config = haystack.model.config

    def draw() -> Sample:
        return place(
            rng,
            TASKS[task](rng, distractors=distractors),
            tokens=len(haystack.text),
            depth=depth,
            chunk_size=config.chunk_size,
            window=config.window,
            border=border,
            absent=control == "absent",
        )

    sample = draw()
    remembered = draw() if control == "shuffled" else sample
    generation = haystack.ask(sample, answer_tokens=len(sample.answer), remembered=remembered)
    correct = generation.ids[0].tolist() == sample.answer.tolist()
    wanted = set(sample.first_chunks(config.chunk_size))
    retrieved = any(wanted & chunks for chunks in chunks_retrieved(generation.first))
    return Asked(correct, retrieved, len(wanted) == 1)
