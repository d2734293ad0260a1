"""Needles in haystacks: the retrieval task S-NIAH (RULER style), in plain English sentences.

    needle    " The secret code of QXZB is 482913."          a sentence somewhere in real text
    question  "\\nWhat is the secret code of QXZB?\\nThe secret code of QXZB is "
    answer    "482913."

Needles of the same form with other keys stand in the text too: finding any needle is not enough.
"""

from dataclasses import dataclass

import numpy as np
import tiktoken

LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # consonants: no key is a word
KEY_LETTERS, VALUE_DIGITS = 4, 6
DISTRACTORS = 5
TRIES = 500  # keys drawn for each that is wanted


@dataclass(frozen=True)
class Needle:
    """One key and its value, and the three sentences made of them."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        return f" The secret code of {self.key} is {self.value}."

    @property
    def question(self) -> str:
        """What is asked; ends where the first digit of the answer belongs."""
        return f"\nWhat is the secret code of {self.key}?\nThe secret code of {self.key} is "

    @property
    def answer(self) -> str:
        return f"{self.value}."


@dataclass(frozen=True)
class Sample:
    """One question over a haystack: `patches` (first token, ids) are written over its text, the question last."""

    needle: Needle
    tokens: int  # text, needles and question together
    depth: float
    start: int  # the needle's first token
    patches: tuple[tuple[int, np.ndarray], ...]
    answer: np.ndarray

    def apply(self, haystack: np.ndarray) -> np.ndarray:
        """`haystack` [tokens] -> int64 ids [tokens] with needles and question in place."""
        ids = haystack.astype(np.int64)
        for first, patch in self.patches:
            ids[first : first + len(patch)] = patch
        return ids

    def needle_chunks(self, chunk_size: int, needle_tokens: int) -> list[int]:
        return list(range(self.start // chunk_size, (self.start + needle_tokens - 1) // chunk_size + 1))


class NeedleTask:
    """Draws needles and questions as token ids; pieces are encoded once, since no token spans a symbol."""

    def __init__(self, tokenizer: tiktoken.Encoding) -> None:
        self.tokenizer = tokenizer
        # Symbol by symbol: the sentence of one needle with its symbols exchanged is the sentence of another.
        key, value = LETTERS[:KEY_LETTERS], "0123456789"[:VALUE_DIGITS]
        model = Needle(key, value)
        self._symbols = np.zeros(128, dtype=np.uint16)
        for symbol in LETTERS + "0123456789":
            self._symbols[ord(symbol)] = tokenizer.encode_single_token(symbol)
        self._sentence, self._question, self._answer = (
            self._template(text, model) for text in (model.sentence, model.question, model.answer)
        )

    def _template(self, text: str, model: Needle) -> tuple[np.ndarray, np.ndarray]:
        """Ids of `text`, and for every token the index of the symbol of key + value that it is (-1: none)."""
        ids = np.array(self.tokenizer.encode_ordinary(text), dtype=np.uint16)
        symbols = list(self._symbols[[ord(c) for c in model.key + model.value]])
        return ids, np.array([symbols.index(i) if i in symbols else -1 for i in ids])

    def _fill(self, template: tuple[np.ndarray, np.ndarray], needle: Needle) -> np.ndarray:
        ids, places = template
        symbols = self._symbols[[ord(c) for c in needle.key + needle.value]]
        return np.where(places < 0, ids, symbols[places])

    def sentence(self, needle: Needle) -> np.ndarray:
        """uint16 ids of the needle's sentence; all sentences have `sentence_tokens` of them."""
        return self._fill(self._sentence, needle)

    def question(self, needle: Needle) -> np.ndarray:
        return self._fill(self._question, needle)

    def answer(self, needle: Needle) -> np.ndarray:
        return self._fill(self._answer, needle)

    @property
    def sentence_tokens(self) -> int:
        return len(self._sentence[0])

    @property
    def question_tokens(self) -> int:
        return len(self._question[0])

    def needles(self, rng: np.random.Generator, count: int, *, absent_from: str = "") -> list[Needle]:
        """`count` needles of different keys, none of which stands in the text `absent_from`."""
        keys: dict[str, None] = {}
        tries = 0
        while len(keys) < count:
            if (tries := tries + 1) > TRIES * count:
                raise ValueError("absent_from: got a text that holds every key tried, accepted is one without most of them")
            key = "".join(rng.choice(list(LETTERS), KEY_LETTERS))
            if key not in absent_from:
                keys[key] = None
        return [Needle(key, f"{rng.integers(10**VALUE_DIGITS):0{VALUE_DIGITS}d}") for key in keys]

    def least_tokens(self, chunk_size: int, window: int) -> int:
        """The shortest sample in which needles fit outside the window."""
        return window + chunk_size + (DISTRACTORS + 1) * 2 * self.sentence_tokens + self.question_tokens

    def sample(
        self,
        rng: np.random.Generator,
        *,
        tokens: int,
        depth: float,
        chunk_size: int,
        window: int,
        absent_from: str = "",
        control: bool = False,
    ) -> Sample:
        """One S-NIAH question of exactly `tokens` tokens.

        depth 0: the needle opens the text; 1: it ends the last complete chunk outside the window. `control`: the asked
        key is nowhere in the text. Raises ValueError for a depth outside 0..1 or too few tokens.
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"depth: got {depth}, accepted is 0 to 1")
        least = self.least_tokens(chunk_size, window)
        if tokens < least:
            raise ValueError(f"tokens: got {tokens}, accepted are at least {least}")
        needle, *others = self.needles(rng, DISTRACTORS + 1, absent_from=absent_from)
        n, body = self.sentence_tokens, tokens - self.question_tokens
        end = tokens - max(window, self.question_tokens)
        start = round(depth * (end // chunk_size * chunk_size - n))
        taken = [start]
        while len(taken) <= len(others):
            place = int(rng.integers(0, body - n + 1))
            if all(abs(place - other) >= n for other in taken):
                taken.append(place)
        patches = [(place, self.sentence(other)) for place, other in zip(taken[1:], others)]
        if not control:
            patches.append((start, self.sentence(needle)))
        patches.append((body, self.question(needle)))
        return Sample(needle, tokens, depth, start, tuple(patches), self.answer(needle))


def tile(text: np.ndarray, tokens: int, first: int = 0) -> np.ndarray:
    """`tokens` tokens of `text` from `first` on, starting over at its end as often as needed."""
    repeats = -(-(first + tokens) // len(text))
    return np.tile(text, repeats)[first : first + tokens] if repeats > 1 else np.asarray(text[first : first + tokens])
