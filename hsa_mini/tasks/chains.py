"""Chains for variable tracking (VT): a number passes from name to name, one plain English sentence
per step.

A = number   " The number 48291307 is given to QXZB."
B = A        " The number of QXZB is given to WQNH."
C = B        " The number of WQNH is given to JKLM."
question     "\\nWhich names are given the number 48291307?\\nThe number 48291307 is given to "
answer       "QXZB, WQNH, JKLM."
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_mini.checks import check_integer
from hsa_mini.tasks.sentences import Question, draw_keys

NUMBER_DIGITS = 8


@dataclass(frozen=True)
class Chain:
    """A number and the names that receive it, in order."""

    number: str
    names: tuple[str, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The head, which states the number, then the links in the chain's order."""
        links = (f" The number of {a} is given to {b}." for a, b in itertools.pairwise(self.names))
        return (f" The number {self.number} is given to {self.names[0]}.", *links)

    @property
    def question(self) -> Question:
        """Asks for all names in the chain's order. Its text ends where the first letter of the
        answer belongs.
        """
        asked = f"\nWhich names are given the number {self.number}?"
        return Question(
            text=f"{asked}\nThe number {self.number} is given to ",
            answer=f"{', '.join(self.names)}.",
            needed=self.sentences,
        )


def draw_chains(
    rng: np.random.Generator, lengths: Sequence[int], *, held_out: bool, absent_from: str = ""
) -> list[Chain]:
    """One chain per entry of `lengths`, with that many names. All names and all numbers differ; see
    `draw_keys`. Raises ValueError for a length below 1.
    """
    for length in lengths:
        check_integer("lengths", length, 1)
    names = iter(draw_keys(rng, sum(lengths), held_out=held_out, absent_from=absent_from))
    numbers = rng.choice(10**NUMBER_DIGITS, len(lengths), replace=False)
    return [
        Chain(f"{number:0{NUMBER_DIGITS}d}", tuple(itertools.islice(names, length)))
        for number, length in zip(numbers, lengths)
    ]
