"""Sentences and questions with slots in braces.

{noun} what the value is, {key} whose it is, {value}; {nouns}, {keys} and {values} are the plurals.
`«a|b»` stands for one of its alternatives (see `expand`).
"""

import re
from dataclasses import dataclass
from random import Random


def expand(rng: Random, frame: str) -> str:
    """The frame with one alternative of every `«a|b»`; the innermost are chosen first."""
    while "«" in frame:
        frame = re.sub("«([^«»]*)»", lambda part: rng.choice(part[1].split("|")), frame)
    return frame


@dataclass(frozen=True)
class Frames:
    """The frames that training uses, and those that are held out for evaluation."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]

    def of(self, held_out: bool) -> tuple[str, ...]:
        return self.held_out if held_out else self.training
