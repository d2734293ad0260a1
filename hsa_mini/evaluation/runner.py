"""Questions of every retrieval task over texts of any length, answered greedily and counted.

Long texts are shared: from `SHARED_FROM` tokens on, all samples of a length use one `Haystack`,
which is encoded once.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from hsa_mini.checks import quoted
from hsa_mini.data.corpus import load_corpus
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, ControlRow, RetrievalRow
from hsa_mini.evaluation.retrievals import chunks_retrieved
from hsa_mini.hsa_model import HSAModel
from hsa_mini.tasks.forms import MAX_DISTRACTORS, TASKS
from hsa_mini.tasks.placement import Sample, place, tile
from hsa_mini.tasks.sentences import EVALUATION

DEPTHS = tuple(round(i / 9, 4) for i in range(10))
CONTROL_DEPTH = 0.5
SHARED_FROM = 1 << 20  # tokens: from this length on all samples of a length share one haystack

Condition = tuple[float, str | None]  # depth, and a control or None
Report = Callable[[int, list[RetrievalRow], list[ControlRow]], object]
Counts = dict[Condition, tuple[int, int, int]]  # samples, correct, retrieved


def evaluate(
    model: HSAModel,
    task: str,
    *,
    lengths: Iterable[int] = LENGTHS,
    depths: Iterable[float] = DEPTHS,
    samples: int = 10,
    seed: int = 1,
    distractors: int = 0,
    border: bool = False,
    report: Report | None = None,
) -> tuple[list[RetrievalRow], list[ControlRow]]:
    """Evaluate one of TASKS on held-out text: a row per length and depth, and a row per length and
    control.

    samples: questions per row. Every sample has its own sentences and question; below `SHARED_FROM`
    tokens it has its own text too.
    distractors: further sentences of the same form in every text.
    border: every sentence crosses a border between two chunks.
    lengths: one that is named twice counts once.
    report: called with each length and its rows as soon as these are complete.
    Raises ValueError for an unknown task or too many distractors, and as `place` does.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {quoted(task)}, accepted are {', '.join(TASKS)}")
    if not 0 <= distractors <= MAX_DISTRACTORS:
        raise ValueError(f"distractors: got {distractors}, accepted is 0 to {MAX_DISTRACTORS}")
    corpus = load_corpus("validation").tokens
    conditions = [(depth, None) for depth in depths for _ in range(samples)]
    conditions += [(CONTROL_DEPTH, control) for control in CONTROLS for _ in range(samples)]
    ask = partial(ask_one, task=task, distractors=distractors, border=border)
    rows = []
    controls = []
    for tokens in dict.fromkeys(lengths):
        rng = np.random.default_rng((EVALUATION, seed, tokens))
        counts = _ask_all(model, corpus, rng, tokens, conditions, ask)
        distinct = min(tokens, len(corpus))
        asked = [
            RetrievalRow(tokens, depth, *numbers, distinct, seed)
            for (depth, control), numbers in counts.items()
            if control is None
        ]
        controlled = [
            ControlRow(tokens, depth, *numbers, distinct, seed, control)
            for (depth, control), numbers in counts.items()
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
    conditions: Sequence[Condition],
    ask: Callable[..., tuple[bool, bool]],
) -> Counts:
    """Ask one question per entry of `conditions` in texts of `tokens` tokens, and count by
    condition.
    """
    device = next(model.parameters()).device
    counts: Counts = dict.fromkeys(conditions, (0, 0, 0))
    haystack = None
    with tqdm(conditions, desc=f"{tokens:,} tokens", unit="question", mininterval=0.5) as bar:
        for condition in bar:
            if haystack is None or tokens < SHARED_FROM:
                first = int(rng.integers(len(corpus)))
                text = tile(corpus, tokens, first).astype(np.int64)
                haystack = Haystack(model, torch.from_numpy(text).to(device))
            depth, control = condition
            correct, retrieved = ask(haystack, rng, depth=depth, control=control)
            before = counts[condition]
            counts[condition] = (before[0] + 1, before[1] + correct, before[2] + retrieved)
    return counts


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
) -> tuple[bool, bool]:
    """Ask one question; returns (correct, retrieved).

    correct: every token of the greedy answer is right. retrieved: any HSA layer chose a chunk of
    the first sentence for the first answer token.
    """
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
    return correct, retrieved
