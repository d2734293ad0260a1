"""Needles: a key and its value in a plain English sentence, and questions about one (S-NIAH) or
several (MQ-NIAH).

needle    " The secret code of QXZB is 482913."          a sentence somewhere in real text
question  "\\nWhat is the secret code of QXZB?\\nThe secret code of QXZB is "
answer    "482913."
question  "\\nWhat are the secret codes of QXZB and WQNH?\\nThe secret code of QXZB is "
answer    "482913. The secret code of WQNH is 394149."
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_mini.tasks.sentences import Question, draw_keys

VALUE_DIGITS = 6


@dataclass(frozen=True)
class Needle:
    """A key and its value."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f" The secret code of {self.key} is {self.value}."


def ask(needles: Sequence[Needle]) -> Question:
    """One question about one or several needles. Its text ends where the first digit of the answer
    belongs. Raises ValueError if there is no needle.
    """
    if not needles:
        raise ValueError("needles: got none, accepted is at least one")
    first, *others = needles
    what = "What are the secret codes" if others else "What is the secret code"
    keys = " and ".join(needle.key for needle in needles)
    return Question(
        text=f"\n{what} of {keys}?\nThe secret code of {first.key} is ",
        answer=f"{first.value}." + "".join(needle.sentence for needle in others),
        needed=tuple(needle.sentence for needle in needles),
    )


def draw_needles(
    rng: np.random.Generator, count: int, *, held_out: bool, absent_from: str = ""
) -> list[Needle]:
    """`count` needles with different keys; see `draw_keys`."""
    keys = draw_keys(rng, count, held_out=held_out, absent_from=absent_from)
    return [Needle(key, f"{rng.integers(10**VALUE_DIGITS):0{VALUE_DIGITS}d}") for key in keys]
