"""Retrieval tasks in the style of RULER: sentences hidden in real text, and a question about some of them at its end.

    s_niah    one needle is asked for; five others of the same form are in the text: finding any needle is not enough
    mq_niah   two needles are asked for in one question; four others are in the text
    vt        all names in one chain of three are asked for; another chain of three is in the text

Keys and names are held-out ones (see `sentences`).
"""

from bisect import bisect, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hsa_mini.tasks.chains import draw_chains
from hsa_mini.tasks.needles import ask, draw_needles
from hsa_mini.tasks.sentences import Question, encode

NEEDLES = 6
CHAINS = 2
CHAIN_NAMES = 3
MAX_DISTRACTORS = 10_000  # some 16,000 keys are held out


@dataclass(frozen=True)
class Problem:
    """Sentences to hide, those that the question needs first."""

    sentences: tuple[str, ...]
    question: Question

    def least_tokens(self, chunk_size: int, window: int, *, border: bool = False) -> int:
        """The shortest text in which the first sentence fits outside the window, and half the room (of the borders between
        chunks too, if each sentence takes one) is left to text."""
        taken = sum(max(len(encode(sentence)), chunk_size * border) for sentence in self.sentences)
        return window + chunk_size + 2 * taken + len(encode(self.question.text))


def s_niah(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    """`distractors`: further sentences of the same form; no key stands in the text `absent_from`. So for every task."""
    return _needles(rng, 1, distractors, absent_from)


def mq_niah(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    return _needles(rng, 2, distractors, absent_from)


def vt(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    whole, rest = divmod(distractors, CHAIN_NAMES)
    lengths = [CHAIN_NAMES] * (CHAINS + whole) + [rest] * (rest > 0)
    chains = draw_chains(rng, lengths, held_out=True, absent_from=absent_from)
    return Problem(
        tuple(sentence for chain in chains for sentence in chain.sentences), chains[0].question
    )


def _needles(rng: np.random.Generator, asked: int, distractors: int, absent_from: str) -> Problem:
    needles = draw_needles(rng, NEEDLES + distractors, held_out=True, absent_from=absent_from)
    return Problem(tuple(needle.sentence for needle in needles), ask(needles[:asked]))


TASKS: dict[str, Callable[..., Problem]] = {"s_niah": s_niah, "mq_niah": mq_niah, "vt": vt}


@dataclass(frozen=True)
class Sample:
    """A problem over a haystack: `patches` (first token, ids) are written over its text, the question last."""

    problem: Problem
    tokens: int  # text, sentences and question together
    depth: float
    start: int  # first token of the first sentence
    patches: tuple[tuple[int, np.ndarray], ...]
    answer: np.ndarray

    def apply(self, haystack: np.ndarray) -> np.ndarray:
        """`haystack` [tokens] -> int64 ids [tokens] with sentences and question in place."""
        ids = haystack.astype(np.int64)
        for first, patch in self.patches:
            ids[first : first + len(patch)] = patch
        return ids

    def first_chunks(self, chunk_size: int) -> list[int]:
        """The chunks that hold a token of the first sentence: the asked needle, or the head of the chain."""
        last = self.start + len(encode(self.problem.sentences[0])) - 1
        return list(range(self.start // chunk_size, last // chunk_size + 1))


def place(
    rng: np.random.Generator,
    problem: Problem,
    *,
    tokens: int,
    depth: float,
    chunk_size: int,
    window: int,
    border: bool = False,
    absent: bool = False,
) -> Sample:
    """The problem in a text of exactly `tokens` tokens, its first sentence at `depth`, the others anywhere.

    depth 0: it opens the text; 1: it ends the last complete chunk outside the window. `border`: every sentence is moved
    so that it lies across the nearest border of two chunks. `absent`: what the question needs is nowhere in the text.
    Raises ValueError for a depth outside 0..1 or too few tokens.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: got {depth}, accepted is 0 to 1")
    least = problem.least_tokens(chunk_size, window, border=border)
    if tokens < least:
        raise ValueError(f"tokens: got {tokens}, accepted are at least {least}")
    question = encode(problem.question.text)
    hidden = [encode(sentence) for sentence in problem.sentences]
    body = tokens - len(question)
    end = tokens - max(window, len(question))
    last = end // chunk_size * chunk_size
    step = chunk_size if border else None
    start = to_border(rng, round(depth * (last - len(hidden[0]))), len(hidden[0]), last, step)
    patches = list(zip(scatter(rng, start, [len(ids) for ids in hidden], body, step), hidden))
    if absent:
        patches = patches[len(problem.question.needed) :]
    return Sample(
        problem, tokens, depth, start, (*patches, (body, question)), encode(problem.question.answer)
    )


def scatter(
    rng: np.random.Generator, first: int, lengths: list[int], room: int, step: int | None = None
) -> list[int]:
    """Places in `room` tokens for stretches of these lengths: `first` for the first, drawn for the others; none overlap.

    step: each lies across a multiple of it.
    """
    taken = [(first, first + lengths[0])]
    places = [first]
    for length in lengths[1:]:
        while len(places) == len(taken):
            start = to_border(rng, int(rng.integers(0, room - length + 1)), length, room, step)
            i = bisect(taken, (start,))
            if (i == 0 or taken[i - 1][1] <= start) and (
                i == len(taken) or start + length <= taken[i][0]
            ):
                insort(taken, (start, start + length))
        places.append(start)
    return places


def to_border(
    rng: np.random.Generator, start: int, length: int, room: int, step: int | None
) -> int:
    """A place near `start` where a stretch lies across a multiple of `step` within `room`; None: `start` itself."""
    if step is None:
        return start
    border = min(max(round((start + length / 2) / step), 1), (room - length + 1) // step) * step
    return border - int(rng.integers(1, min(length, border + 1)))


def tile(text: np.ndarray, tokens: int, first: int = 0) -> np.ndarray:
    """`tokens` tokens of `text` from `first` on, starting over at its end as often as needed."""
    repeats = -(-(first + tokens) // len(text))
    return (
        np.tile(text, repeats)[first : first + tokens]
        if repeats > 1
        else np.asarray(text[first : first + tokens])
    )
