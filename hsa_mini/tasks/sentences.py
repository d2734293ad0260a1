"""What the sentences of every task are made of: keys of four consonants, numbers, and questions with their answers.

About one key in ten is held out, by a hash of the key: training draws from the others alone, evaluation and demo from the
held-out ones alone, so that no key that is asked for there was ever trained on.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from hsa_mini.data.tokenizer import load_tokenizer

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # consonants: no key is a word
KEY_LETTERS = 4
TRIES = 500  # keys drawn for each that is wanted
# the first word of every seed: no two purposes ever draw alike
TRAINING = 1
EVALUATION = 2
DEMO = 3


@dataclass(frozen=True)
class Question:
    """What is asked, the answer that goes on where `text` ends, and the sentences that it follows from."""

    text: str
    answer: str
    needed: tuple[str, ...]


def encode(text: str) -> np.ndarray:
    """uint16 ids [tokens] of `text`. Symbol by symbol in keys and numbers: texts of one form have equally many tokens."""
    return np.array(load_tokenizer().encode_ordinary(text), dtype=np.uint16)


def is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % 10 == 0


def draw_keys(
    rng: np.random.Generator, count: int, *, held_out: bool, absent_from: str = ""
) -> list[str]:
    """`count` different keys, all held out or none, none of which stands in the text `absent_from`."""
    keys: dict[str, None] = {}
    tries = 0
    while len(keys) < count:
        if (tries := tries + 1) > TRIES * count:
            raise ValueError(
                "absent_from: got a text that holds every key tried, accepted is one without most of them"
            )
        key = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=KEY_LETTERS))
        if is_held_out(key) == held_out and key not in absent_from:
            keys[key] = None
    return list(keys)
