"""Retrieval tasks in the style of RULER (arXiv 2404.06654): sentences hidden in real text, and one
question at its end.

    s_niah    asks for one needle; five others have the same form, so the model must tell them apart
    mq_niah   asks for two needles in one question; there are four others
    vt        asks for all names in one chain of three; there is another chain of three

All keys and names are held-out ones (see `sentences`). `placement` writes a problem into a text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hsa_mini.checks import check_integer
from hsa_mini.tasks.chains import draw_chains
from hsa_mini.tasks.needles import ask, draw_needles
from hsa_mini.tasks.sentences import Encode, Question, encode

NEEDLES = 6
CHAINS = 2
CHAIN_NAMES = 3
MAX_DISTRACTORS = 10_000  # about 16,000 keys are held out


@dataclass(frozen=True)
class Problem:
    """A question and the sentences to hide in a text. The sentences that the question needs come
    first.
    """

    sentences: tuple[str, ...]
    question: Question

    def min_tokens(
        self, chunk_size: int, window: int, *, border: bool = False, encode: Encode = encode
    ) -> int:
        """The length in tokens of the shortest text that may hold this problem.

        The first sentence must fit outside the window, and the sentences may cover at most half of
        the text. With `border` each sentence also needs a border between two chunks to itself.
        encode: the course's tokenizer, or the model's own. Raises ValueError for sizes below 1.
        """
        check_integer("chunk_size", chunk_size, 1)
        check_integer("window", window, 1)
        taken = sum(max(len(encode(sentence)), chunk_size * border) for sentence in self.sentences)
        return window + chunk_size + 2 * taken + len(encode(self.question.text))


def s_niah(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    """One needle is asked for (S-NIAH: single needle in a haystack).

    distractors: the number of further sentences of the same form, up to `MAX_DISTRACTORS`.
    absent_from: no key occurs in this text. Both arguments mean the same for every task.
    """
    return _needles(rng, 1, distractors, absent_from)


def mq_niah(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    """Two needles are asked for in one question (MQ-NIAH: multiple queries)."""
    return _needles(rng, 2, distractors, absent_from)


def vt(rng: np.random.Generator, *, distractors: int = 0, absent_from: str = "") -> Problem:
    """All names of one chain are asked for (VT: variable tracking)."""
    check_integer("distractors", distractors, 0, MAX_DISTRACTORS)
    whole, rest = divmod(distractors, CHAIN_NAMES)
    lengths = [CHAIN_NAMES] * (CHAINS + whole) + [rest] * (rest > 0)
    chains = draw_chains(rng, lengths, held_out=True, absent_from=absent_from)
    sentences = tuple(sentence for chain in chains for sentence in chain.sentences)
    return Problem(sentences, chains[0].question)


def _needles(rng: np.random.Generator, asked: int, distractors: int, absent_from: str) -> Problem:
    check_integer("distractors", distractors, 0, MAX_DISTRACTORS)
    needles = draw_needles(rng, NEEDLES + distractors, held_out=True, absent_from=absent_from)
    return Problem(tuple(needle.sentence for needle in needles), ask(needles[:asked]))


TASKS: dict[str, Callable[..., Problem]] = {"s_niah": s_niah, "mq_niah": mq_niah, "vt": vt}
