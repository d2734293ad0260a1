"""Texts that are crowded with needles."""

from dataclasses import dataclass

import numpy as np

from hsa_mini.tasks.needles import ask, draw_needles
from hsa_mini.tasks.placement import tile
from hsa_mini.tasks.sentences import encode


@dataclass(frozen=True)
class Crowds:
    """What a model of the grid is asked.

    tokens: of a text. needles: the numbers of needles in a text, which 214 of them would fill.
    top_k: the numbers of chunks kept. questions: for each pair of both, each in a text of its own.
    """

    tokens: int = 4096
    needles: tuple[int, ...] = (8, 32, 64, 128, 192)
    top_k: tuple[int, ...] = (4, 8, 16, 32)
    questions: int = 64


@dataclass(frozen=True)
class CrowdedText:
    """ids int64 [tokens], which end with a question, and the answer uint16 [A].

    starts: the first token of every needle, in order. asked: which of them the question asks for.
    length: the tokens of a needle.
    """

    ids: np.ndarray
    answer: np.ndarray
    starts: np.ndarray
    asked: int
    length: int

    def together(self, chunk_size: int) -> int:
        """How many needles have a token in the chunk with the last digit of the one asked for."""
        chunk = (self.starts[self.asked] + self.length - 2) // chunk_size
        first = self.starts // chunk_size
        last = (self.starts + self.length - 1) // chunk_size
        return int(((first <= chunk) & (chunk <= last)).sum())

    def is_cut(self, chunk_size: int) -> bool:
        """Whether a border between two chunks cuts the needle that is asked for."""
        start = self.starts[self.asked]
        return bool(start // chunk_size != (start + self.length - 1) // chunk_size)


def crowded_text(
    rng: np.random.Generator, corpus: np.ndarray, tokens: int, needles: int, near: int
) -> CrowdedText:
    """A text with so many needles at random places, and a question about one of those that end
    more than `near` tokens before the end of the text.

    Raises ValueError for more needles than the text has room for.
    """
    drawn = draw_needles(rng, needles, held_out=True)
    sentences = [encode(needle.sentence) for needle in drawn]
    length = len(sentences[0])
    questions = [ask([needle]) for needle in drawn]
    body = tokens - len(encode(questions[0].text))
    spare = body - needles * length
    if spare < 0:
        raise ValueError(
            f"needles: got {needles} in {tokens} tokens, accepted are at most {body // length}"
        )
    starts = np.sort(rng.integers(0, spare + 1, needles)) + length * np.arange(needles)
    asked = int(rng.integers(max((starts + length <= tokens - near).sum(), 1)))
    ids = tile(corpus, tokens, int(rng.integers(len(corpus)))).astype(np.int64)
    for start, sentence in zip(starts, sentences):
        ids[start : start + length] = sentence
    ids[body:] = encode(questions[asked].text)
    return CrowdedText(ids, encode(questions[asked].answer), starts, asked, length)
