"""Where the sentences of a problem stand in a text of a given length: `place` chooses,
`Sample.apply` writes them.
"""

from bisect import bisect, insort
from dataclasses import dataclass

import numpy as np

from hsa_mini.checks import check_integer, check_number
from hsa_mini.tasks.forms import Problem
from hsa_mini.tasks.sentences import Encode, encode

MAX_TRIES = 100_000  # places drawn for one stretch


@dataclass(frozen=True)
class Sample:
    """A problem placed in a text of `tokens` tokens.

    patches: (first token, ids) of every sentence and, last, of the question. They overwrite the
    text.
    """

    problem: Problem
    tokens: int  # text, sentences and question together
    depth: float
    start: int  # first token of the first sentence
    patches: tuple[tuple[int, np.ndarray], ...]
    answer: np.ndarray

    def apply(self, haystack: np.ndarray) -> np.ndarray:
        """`haystack` [tokens] -> int64 ids [tokens] with sentences and question in place.

        Raises ValueError for a haystack of another length.
        """
        if len(haystack) != self.tokens:
            raise ValueError(f"haystack: got {len(haystack)} tokens, accepted are {self.tokens}")
        ids = haystack.astype(np.int64)
        for first, patch in self.patches:
            ids[first : first + len(patch)] = patch
        return ids

    def first_chunks(self, chunk_size: int, *, encode: Encode = encode) -> list[int]:
        """The chunks that hold a token of the first sentence: the needle asked for, or the head of
        the chain. encode: see `place`. Raises ValueError for a chunk_size below 1.
        """
        check_integer("chunk_size", chunk_size, 1)
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
    encode: Encode = encode,
) -> Sample:
    """Place the problem in a text of exactly `tokens` tokens: the first sentence at `depth`, the
    others at random.

    depth: at 0 the first sentence opens the text; at 1 it stands at the end of the last complete
    chunk outside the window.
    border: every sentence moves so that it crosses the nearest border between two chunks.
    absent: the sentences that the question needs are left out.
    encode: the course's tokenizer, or the model's own.
    Raises ValueError if depth is outside 0..1, a size is below 1 or the text is too short.
    """
    check_number("depth", depth, 0, 1)
    check_integer("tokens", tokens, 1)
    min_tokens = problem.min_tokens(chunk_size, window, border=border, encode=encode)
    if tokens < min_tokens:
        raise ValueError(f"tokens: got {tokens}, accepted are at least {min_tokens}")
    question = encode(problem.question.text)
    hidden = [encode(sentence) for sentence in problem.sentences]
    lengths = [len(ids) for ids in hidden]
    body = tokens - len(question)
    end = tokens - max(window, len(question))
    last = end // chunk_size * chunk_size
    step = chunk_size if border else None
    start = to_border(rng, round(depth * (last - lengths[0])), lengths[0], last, step)
    patches = list(zip(scatter(rng, start, lengths, body, step), hidden))
    if absent:
        patches = patches[len(problem.question.needed) :]
    patches.append((body, question))
    answer = encode(problem.question.answer)
    return Sample(problem, tokens, depth, start, tuple(patches), answer)


def scatter(
    rng: np.random.Generator, first: int, lengths: list[int], space: int, step: int | None = None
) -> list[int]:
    """First tokens of stretches of these lengths within `space` tokens, none overlapping another.

    first: where the first stretch starts; the other starts are drawn. step: each stretch crosses a
    multiple of it. Raises ValueError where no place is found for a stretch.
    """
    taken = [(first, first + lengths[0])]  # sorted
    starts = [first]
    for length in lengths[1:]:
        for _ in range(MAX_TRIES):  # until the stretch has a place of its own
            start = to_border(rng, int(rng.integers(0, space - length + 1)), length, space, step)
            i = bisect(taken, (start,))
            free_in_front = i == 0 or taken[i - 1][1] <= start
            free_behind = i == len(taken) or start + length <= taken[i][0]
            if free_in_front and free_behind:
                insort(taken, (start, start + length))
                starts.append(start)
                break
        else:
            raise ValueError(
                f"space: got {space} tokens, accepted are enough for stretches of {sum(lengths)}"
            )
    return starts


def to_border(
    rng: np.random.Generator, start: int, length: int, space: int, step: int | None
) -> int:
    """A start near `start` from which a stretch crosses a multiple of `step` within `space` tokens.

    step: None leaves `start` as it is.
    """
    if step is None:
        return start
    nearest = round((start + length / 2) / step)
    border = min(max(nearest, 1), (space - length + 1) // step) * step
    return border - int(rng.integers(1, min(length, border + 1)))


def tile(text: np.ndarray, tokens: int, first: int = 0) -> np.ndarray:
    """`tokens` tokens of `text`, from token `first` on. At the end of the text it starts over, as
    often as needed. Raises ValueError for an empty text and for negative numbers.
    """
    check_integer("tokens", tokens, 0)
    check_integer("first", first, 0)
    if not len(text):
        raise ValueError("text: got no token, accepted is at least one")
    repeats = -(-(first + tokens) // len(text))
    if repeats > 1:
        text = np.tile(text, repeats)
    return np.asarray(text[first : first + tokens])
