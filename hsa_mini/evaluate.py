"""Questions of every task over haystacks of any length, scored by greedy generation.

Samples may share a haystack: it is encoded once, and for each sample only the tokens that its sentences and
their lower-decoder reach touch are encoded again. Exact, not an approximation (tests compare with encoding from scratch).
"""

import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .data.corpus import load_corpus
from .data.sentences import EVALUATION
from .data.tasks import MOST_DISTRACTORS, TASKS, Sample, place, tile
from .generate import SEGMENT, Generation, continue_from, tail_start
from .memory import ChunkMemory
from .model import Aux, HSAModel, Output

LENGTHS = (4096, 16384, 65536, 262144, 1048576, 4194304, 16777216)  # of the paper's Figure 4
DEPTHS = tuple(round(i / 9, 4) for i in range(10))
# What the paper's 8B reached at these lengths, lowest and highest percent (Figure 4; of S-NIAH we keep the range that it prints
# after long-context mid-training, of the other two the best curve).
PUBLISHED = {
    "s_niah": ((94, 100),) * 7,
    "mq_niah": tuple((x, x) for x in (100, 98, 96, 98, 90, 90, 75)),
    "vt": tuple((x, x) for x in (96, 100, 98, 100, 98, 100, 90)),
}
SHARED_FROM = 1 << 20  # from this length on the samples of a length share one haystack
CONTROLS = {"absent": "what is asked for is nowhere in the text", "shuffled": "the memory holds the sentences of another sample"}


def wilson_interval(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a share (Wilson 1927)."""
    if samples == 0:
        return 0.0, 1.0
    share, spread = correct / samples, z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / samples / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


class Haystack:
    """A text whose chunks are encoded once, and then asked many questions: text int64 [T] on the model's device."""

    def __init__(self, model: HSAModel, text: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        self.model, self.text = model, text
        self.memory = ChunkMemory(model.config, reserve_tokens=len(text) + SEGMENT)
        with torch.no_grad():
            for part in text[None].split(SEGMENT, dim=1):
                model.read(part, self.memory)
                if progress:
                    progress(part.shape[1])

    @torch.no_grad()
    def ask(self, sample: Sample, *, answer_tokens: int, remembered: Sample | None = None) -> Generation:
        """Put the sample's sentences and question into the text, answer greedily, and take them out again.

        remembered: the memory holds this sample's sentences instead; the sample's own are read only in the last tokens.
        """
        remembered = remembered or sample
        with self._written(remembered):
            undo = [self._encode_again(first, last) for first, last in self._touched(remembered)]
        with self._written(sample):
            output = self._read_tail()
        generation = continue_from(self.model, output, max_new_tokens=answer_tokens)
        for first, chunks in undo:
            self.memory.replace(first, *chunks)
        return generation

    @contextmanager
    def _written(self, sample: Sample) -> Iterator[None]:
        """As long as this lasts the text is the sample's."""
        places = np.concatenate([np.arange(first, first + len(patch)) for first, patch in sample.patches])
        fresh = np.concatenate([patch.astype(np.int64) for _, patch in sample.patches])
        places, fresh = (torch.from_numpy(x).to(self.text.device) for x in (places, fresh))
        before = self.text[places]
        self.text[places] = fresh
        yield
        self.text[places] = before

    def _touched(self, sample: Sample) -> Iterable[tuple[int, int]]:
        """Ranges of complete chunks [first, last) that the patches reach, merged where they meet, cut where they are long."""
        S, reach = self.model.config.chunk_size, self.model.config.lower_reach
        ranges: list[list[int]] = []
        for start, patch in sorted(sample.patches, key=lambda patch: patch[0]):
            first, last = start // S, min(-(-(start + len(patch) + reach) // S), self.memory.chunks)
            if ranges and first <= ranges[-1][1]:
                ranges[-1][1] = max(last, ranges[-1][1])
            elif first < last:
                ranges.append([first, last])
        most = max(SEGMENT // S, 1)
        return [(i, min(i + most, last)) for first, last in ranges for i in range(first, last, most)]

    def _encode_again(self, first: int, last: int) -> tuple[int, tuple[torch.Tensor, ...]]:
        S = self.model.config.chunk_size
        hidden, _ = self._lower(first * S, last * S)
        return first, self.memory.replace(first, *self.model.encoder(hidden.unflatten(1, (last - first, S))))

    def _read_tail(self) -> Output:
        """The upper decoder over the last tokens, with the caches that decoding needs."""
        model, total = self.model, len(self.text)
        unfinished = total % model.config.chunk_size
        first = tail_start(model, total)
        hidden, branch = self._lower(min(first, total - unfinished), total)
        branch.partial = hidden[:, hidden.shape[1] - unfinished :]
        branch.position = total
        hidden, retrievals = model.look_up(hidden[:, -(total - first) :], first, branch)
        return Output(model.predict(hidden[:, -1:]), branch, Aux(retrievals))

    def _lower(self, first: int, last: int) -> tuple[torch.Tensor, ChunkMemory]:
        """The lower decoder's output for tokens [first, last), from as far back as it depends on."""
        branch = self.memory.branch()
        branch.position = max(first - self.model.config.lower_reach, 0)
        branch.lower, branch.upper = [None] * len(branch.lower), [None] * len(branch.upper)
        branch.block_queries = [None] * len(branch.block_queries)
        hidden = self.model.lower_decoder(self.text[None, branch.position : last], branch)
        return hidden[:, first - branch.position :], branch


@dataclass(frozen=True)
class Row:
    """The questions of one length and depth: correct and retrieved are counts.

    depth: the place of the first sentence that the question needs (the asked needle, the first of two, or the head of the
    chain); all others lie anywhere. retrieved: any HSA layer kept a chunk of that sentence for the first answer token.
    """

    tokens: int
    depth: float
    samples: int
    correct: int
    retrieved: int
    distinct_tokens: int
    seed: int


@dataclass(frozen=True)
class ControlRow(Row):
    """Questions that cannot be answered; depth and retrieved are of the place where the sentence would stand."""

    control: str  # one of CONTROLS


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
    if not 0 <= distractors <= MOST_DISTRACTORS:
        raise ValueError(f"distractors: got {distractors}, accepted is 0 to {MOST_DISTRACTORS}")
    device, corpus = next(model.parameters()).device, load_corpus("validation").tokens
    rows, controls = [], []
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
            found = dict(zip(longest_first, pool.map(partial(_evaluate_one, task, options), longest_first)))
        except BaseException:  # Ctrl-C too: it is heard here alone
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    return tuple(list(chain.from_iterable(found[tokens][part] for tokens in lengths)) for part in range(2))


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


def chunks_retrieved(aux: Aux) -> list[set[int]]:
    """The chunks that each HSA layer kept for the last token read (batch entry 0, all heads)."""
    return [set(retrieval.indices[0, -1].flatten().tolist()) - {-1} for retrieval in aux.retrievals]


def read_results(path: Path) -> tuple[list[Row], list[ControlRow], str]:
    """Rows and control rows that a command wrote into `path`, and into NAME_far.json beside it, of further lengths, if that is
    there; and the hardware that was asked."""
    paths = [p for p in (path, path.with_name(f"{path.stem}_far.json")) if p == path or p.is_file()]
    found = [json.loads(p.read_text()) for p in paths]
    rows = [Row(**row) for part in found for row in part["rows"]]
    controls = [ControlRow(**row) for part in found for row in part["control_rows"]]
    return rows, controls, " and ".join(sorted({part["hardware"] for part in found}))


def by_length(rows: list[Row]) -> list[dict]:
    """Rows of one length added up, the shortest first, with share and 95% interval."""
    table = []
    for tokens in sorted({row.tokens for row in rows}):
        same = [row for row in rows if row.tokens == tokens]
        samples, correct, retrieved = (sum(getattr(row, name) for row in same) for name in ("samples", "correct", "retrieved"))
        low, high = wilson_interval(correct, samples)
        entry = {"tokens": tokens, "samples": samples, "correct": correct, "retrieved": retrieved}
        table.append({**entry, "accuracy": correct / samples, "low": low, "high": high})
    return table
