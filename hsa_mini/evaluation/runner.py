"""Questions of every task over haystacks of any length, scored by greedy generation.

Samples may share a haystack: it is encoded once, and for each sample only the tokens that its sentences and
their lower-decoder reach touch are encoded again. Exact, not an approximation (tests compare with encoding from scratch).
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain

import numpy as np
import torch
from tqdm import tqdm

from hsa_mini.data.corpus import load_corpus
from hsa_mini.evaluation.haystack import Haystack, chunks_retrieved
from hsa_mini.evaluation.results import CONTROLS, LENGTHS, ControlRow, Row
from hsa_mini.hsa_model import HSAModel
from hsa_mini.tasks.forms import MAX_DISTRACTORS, TASKS, Sample, place, tile
from hsa_mini.tasks.sentences import EVALUATION

DEPTHS = tuple(round(i / 9, 4) for i in range(10))
SHARED_FROM = 1 << 20  # from this length on the samples of a length share one haystack


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
    report: Callable[[Row], None] | None = None,
) -> tuple[list[Row], list[ControlRow]]:
    """One of TASKS on held-out text: rows by length and depth, and by length the controls.

    samples: questions per depth, and per control, of each length. Every sample has its own text below `SHARED_FROM` tokens,
    its own sentences and question always. distractors: further sentences of the same form in every text. border: every
    sentence lies across two chunks. Raises ValueError for an unknown task, distractors out of range, and as `place` does.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, accepted are {', '.join(TASKS)}")
    if not 0 <= distractors <= MAX_DISTRACTORS:
        raise ValueError(f"distractors: got {distractors}, accepted is 0 to {MAX_DISTRACTORS}")
    device = next(model.parameters()).device
    corpus = load_corpus("validation").tokens
    rows = []
    controls = []
    for tokens in lengths:
        rng = np.random.default_rng((EVALUATION, seed, tokens))
        plan = [(depth, None) for depth in depths for _ in range(samples)]
        plan += [(0.5, control) for control in CONTROLS for _ in range(samples)]
        counts = {key: [0, 0, 0] for key in plan}
        haystack = None
        with tqdm(plan, desc=f"{tokens:,} tokens", unit="question", mininterval=0.5) as bar:
            for key in bar:
                if haystack is None or tokens < SHARED_FROM:
                    text = tile(corpus, tokens, int(rng.integers(len(corpus)))).astype(np.int64)
                    haystack = Haystack(model, torch.from_numpy(text).to(device))
                scores = ask_one(haystack, rng, task, *key, distractors=distractors, border=border)
                counts[key] = [x + y for x, y in zip(counts[key], (1, *scores))]
        for (depth, control), (asked, correct, retrieved) in counts.items():
            values = (tokens, depth, asked, correct, retrieved, min(tokens, len(corpus)), seed)
            row = Row(*values) if control is None else ControlRow(*values, control)
            (rows if control is None else controls).append(row)
            if report:
                report(row)
    return rows, controls


def evaluate_side_by_side(
    load: Callable[[], HSAModel], task: str, *, lengths: Iterable[int], jobs: int, **options
) -> tuple[list[Row], list[ControlRow]]:
    """What `evaluate` returns for the model that `load` gives, with `jobs` lengths at once, each in a process of its own.

    On a GPU a question is many small kernels, which keep it less busy than the processor that launches them.
    """
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    lengths = list(lengths)
    longest_first = sorted(set(lengths), reverse=True)
    with ProcessPoolExecutor(jobs, context, _begin, (context.RLock(), load)) as pool:
        try:
            found = dict(
                zip(longest_first, pool.map(partial(_evaluate_one, task, options), longest_first))
            )
        except BaseException:  # Ctrl-C too: it is heard here alone
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return tuple(
        list(chain.from_iterable(found[tokens][part] for tokens in lengths)) for part in range(2)
    )


def _begin(lock, load: Callable[[], HSAModel]) -> None:
    global _model
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(lock)
    _model = load()


def _evaluate_one(task: str, options: dict, tokens: int) -> tuple[list[Row], list[ControlRow]]:
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
    """One question: was the greedy answer wholly right, and was a chunk of the first sentence retrieved for its first token?"""
    config = haystack.model.config

    def draw() -> Sample:
        return place(
            rng, TASKS[task](rng, distractors=distractors), tokens=len(haystack.text), depth=depth,
            chunk_size=config.chunk_size, window=config.window, border=border, absent=control == "absent",
        )  # fmt: skip

    sample = draw()
    remembered = draw() if control == "shuffled" else sample
    generation = haystack.ask(sample, answer_tokens=len(sample.answer), remembered=remembered)
    right = generation.ids[0].tolist() == sample.answer.tolist()
    wanted = set(sample.first_chunks(config.chunk_size))
    return right, any(wanted & chunks for chunks in chunks_retrieved(generation.first))
