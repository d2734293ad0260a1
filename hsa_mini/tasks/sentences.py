"""What the sentences of every task are made of: keys of four consonants, numbers, and questions
with their answers.

A hash of the key decides whether it is held out; about one key in ten is. Training draws only from
the other keys, evaluation and demo only from the held-out ones. So no key that they ask for was
ever trained on.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hsa_mini.checks import check_integer
from hsa_mini.data.tokenizer import load_tokenizer

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # only consonants, so no key is a word
KEY_LETTERS = 4
MAX_TRIES = 500  # keys drawn per key wanted
# Keys drawn at once, if held out and if not: three quarters of all, because the last ones would
# take long to find.
MAX_KEYS = {True: 12_000, False: 108_000}
# The first number of every seed. It keeps the random streams of the three purposes apart.
TRAINING = 1
EVALUATION = 2
DEMO = 3


Encode = Callable[[str], np.ndarray]  # text -> ids [tokens]


@dataclass(frozen=True)
class Question:
    """A question's text, the answer that continues it, and the sentences that the answer follows
    from (`needed`).
    """

    text: str
    answer: str
    needed: tuple[str, ...]


def encode(text: str) -> np.ndarray:
    """uint16 ids [tokens] of `text`. Each letter of a key and each digit is one token, so texts of
    one form are equally long.
    """
    return np.array(load_tokenizer().encode_ordinary(text), dtype=np.uint16)


def is_held_out(key: str) -> bool:
    """Whether the key is reserved for evaluation and demo."""
    return zlib.crc32(key.encode()) % 10 == 0


def draw_keys(
    rng: np.random.Generator, count: int, *, held_out: bool, absent_from: str = ""
) -> list[str]:
    """`count` different keys, all held out or none, none of which occurs in the text `absent_from`.

    Raises ValueError for a count outside 0 to `MAX_KEYS`, and if the text holds so many keys that
    not enough others are found.
    """
    check_integer("count", count, 0, MAX_KEYS[held_out])
    keys: dict[str, None] = {}
    tries = 0
    while len(keys) < count:
        tries += 1
        if tries > MAX_TRIES * count:
            raise ValueError(
                "absent_from: got a text that holds every key tried,"
                " accepted is one without most of them"
            )
        key = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=KEY_LETTERS))
        if is_held_out(key) == held_out and key not in absent_from:
            keys[key] = None
    return list(keys)
