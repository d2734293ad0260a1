"""RULER's synthetic tasks (arXiv 2404.06654) in the wording of lm-eval 0.4.13.

    niah_single_1             a needle in a repeated line
    niah_single_2, _3         a needle in real text; its value is a number, or a uuid
    niah_multikey_1           one of four needles in real text
    niah_multikey_2, _3       one of many needles: the text consists of nothing else
    niah_multivalue           the four values of a key, in real text
    niah_multiquery           four keys in one question, in real text
    vt, cwe, fwe              see `ruler_lists`

The texts of `WHOLE` are lm-eval's own, word for word, for the same random numbers. lm-eval finds
how many sentences fit by tokenizing a text of every size; above `MAX_TRIED` tokens the number is
estimated instead. The tasks in real text (`IN_TEXT`) would download essays: here their sentences
stand at random places of a text of ours.
"""

import os
import random
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.tasks.long.ruler_words import compounds

NEEDLE = "One of the special magic {values} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
OPENING = (
    "Some special magic {values} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {values} afterwards.\n"
)
QUESTION = "\nWhat are all the special magic {values} for {query} mentioned in the provided text?"
PREFIX = "The special magic {values} for {query} mentioned in the provided text are"
Made = TypeVar("Made")
ONE = (("Some", "A"), ("are all", "is"), ("are", "is"))  # what lm-eval replaces for one value
ORDER = 42  # seed of the order of the needles, whatever the keys
NEEDLE_ROOM = 128  # tokens for the answer
PART = 1 << 20  # characters
WORD_END = re.compile("(?<=[a-z]) ")  # a text can be cut in front of this space: no token has both
MAX_TRIED = 80_000  # tokens; of longer texts, the number of sentences is estimated


@dataclass(frozen=True)
class Asked:
    """A question and the prefix of its answer, which holds every one of `answers`.

    lm-eval calls the text up to the end of the question `input`, and the prefix `gen_prefix`. What
    it puts between them stands in front of our prefix.
    """

    question: str
    prefix: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """A text, and questions that continue it; the first one is lm-eval's."""

    text: str
    questions: tuple[Asked, ...]


@dataclass(frozen=True)
class Draws:
    """The three generators that lm-eval's functions draw from."""

    choices: random.Random
    numbers: np.random.RandomState
    lists: random.Random

    @classmethod
    def seeded(cls, task: str, tokens: int, seed: int) -> "Draws":
        choices = random.Random(f"{seed} {task} {tokens}")
        return cls(choices, np.random.RandomState(seed), random.Random(seed))


@dataclass(frozen=True)
class Niah:
    """The needles of a task: how many keys, values of each, and keys that one question names."""

    values: str = "numbers"
    keys: str = "words"
    key_count: int = 1
    value_count: int = 1
    asked: int = 1

    @property
    def needles(self) -> int:
        return self.key_count * self.value_count


IN_TEXT = {
    "niah_single_2": Niah(),
    "niah_single_3": Niah("uuids"),
    "niah_multikey_1": Niah(key_count=4),
    "niah_multivalue": Niah(value_count=4),
    "niah_multiquery": Niah(key_count=4, asked=4),
}
REPEATED = {"niah_single_1": Niah()}
NEEDLES_ONLY = {"niah_multikey_2": Niah(), "niah_multikey_3": Niah("uuids", "uuids")}
WHOLE = (*REPEATED, *NEEDLES_ONLY, "vt", "cwe", "fwe")


def draw(rng: random.Random, kind: str) -> str:
    """A key or a value: one of "numbers", "words", "uuids"."""
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return rng.choice(compounds())


def draw_needles(
    rng: random.Random, niah: Niah, draw: Callable[[random.Random, str], str] = draw
) -> tuple[list[str], dict[str, list[str]]]:
    """The sentences in the order in which they stand in the text, and the values by key.

    draw: makes a key or a value of one of the kinds of `draw`.
    """
    values: dict[str, list[str]] = {}
    needles = []
    for _ in range(niah.key_count):
        while (key := draw(rng, niah.keys)) in values:
            pass
        values[key] = [draw(rng, niah.values) for _ in range(niah.value_count)]
        needles += [needle(niah, key, value) for value in values[key]]
    random.Random(ORDER).shuffle(needles)
    return needles, values


def needle(niah: Niah, key: str, value: str) -> str:
    return NEEDLE.format(values=niah.values, key=key, value=value)


def opening(niah: Niah) -> str:
    """The first line of the text."""
    return _worded(niah, OPENING)


def ask(niah: Niah, values: dict[str, list[str]], keys: list[str]) -> Asked:
    """The question for all values of these keys."""
    query = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    question, prefix = (_worded(niah, text, query) for text in (QUESTION, PREFIX))
    return Asked(question, f" {prefix}", tuple(value for key in keys for value in values[key]))


def _worded(niah: Niah, text: str, query: str = "") -> str:
    """The text for one value or for several."""
    values = niah.values
    if niah.asked * niah.value_count == 1:
        for many, one in ONE:
            text = text.replace(many, one)
        values = values[:-1]
    return text.format(values=values, query=query)


def ask_some(rng: random.Random, niah: Niah, values: dict[str, list[str]]) -> Asked:
    """The question for as many keys as the task names."""
    keys = list(values)
    return ask(niah, values, [keys[i] for i in rng.sample(range(len(keys)), niah.asked)])


def needle_text(task: str, rng: random.Random, sentences: int, questions: int = 1) -> Whole:
    """A text of that many sentences and the needles; more than one question only where the text
    consists of needles.
    """
    niah = (REPEATED | NEEDLES_ONLY)[task]
    needles, values = draw_needles(rng, niah)
    others: list[tuple[str, str]] = []
    if task in REPEATED:
        lines = [NOISE] * sentences
    else:
        others = [(draw(rng, niah.keys), draw(rng, niah.values)) for _ in range(sentences)]
        lines = [needle(niah, *pair) for pair in others]
    places = sorted(rng.sample(range(sentences), len(needles)), reverse=True)
    for place, sentence in zip(places, needles):
        lines.insert(place, sentence)
    asked = [ask_some(rng, niah, values)]
    counts: dict[str, int] = dict.fromkeys(values, 1)
    for key, _ in others:
        counts[key] = counts.get(key, 0) + 1
    once = [pair for pair in others if counts[pair[0]] == 1]
    further = random.Random(sentences).sample(once, min(questions - 1, len(once)))
    asked += [ask(niah, {key: [value]}, [key]) for key, value in further]
    return Whole(opening(niah) + "\n".join(lines), tuple(asked))


def encode_long(text: str) -> np.ndarray:
    """uint16 ids [tokens] of a text, its parts encoded side by side."""
    parts = []
    start = 0
    while cut := WORD_END.search(text, start + PART):
        parts.append(text[start : cut.start()])
        start = cut.start()
    parts.append(text[start:])
    ids = load_tokenizer().encode_ordinary_batch(parts, num_threads=os.cpu_count() or 1)
    return np.concatenate([np.array(some, dtype=np.uint16) for some in ids])


def count(text: str) -> int:
    """Tokens of a text."""
    return len(encode_long(text))


def largest(
    measure: Callable[[int], int], most: int, step: int, *, least: int = 0, greatest: int = 1 << 40
) -> tuple[int, int]:
    """How many sentences a text of at most `most` tokens has, and the step in which a text that is
    still too long is made shorter.

    measure: tokens of a new text of that many sentences. Up to `MAX_TRIED` tokens, as lm-eval does,
    every size is tried, from the smallest on.
    """
    size = max(step, least)
    found = 0
    if most > MAX_TRIED:
        found = measure(size)
        while not 0.97 * most < found <= most and (size < greatest or found > most):
            size = min(max(int(size * 0.99 * most / found), step), greatest)
            found = measure(size)
        return size, max(size // 200, 1)
    while found < most:
        found = measure(size)
        if found > most:
            return max(size - step, least), step
        size += step
        if size > greatest:
            return greatest, step
    return size, step


def fitting(
    make: Callable[[int], Made], size: int, step: int, fits: Callable[[Made], bool]
) -> Made:
    """A text of `size` sentences, or of fewer if that does not fit.

    Raises ValueError if no text fits.
    """
    while size > 0:
        if fits(made := make(size)):
            return made
        size -= step
    raise ValueError("tokens: got too few for this task, accepted are 1024 and more")


def niah_texts(
    task: str, draws: Draws, tokens: int, samples: int, questions: int
) -> Iterator[Whole]:
    """Texts of at most `tokens` tokens, room for the answer included."""
    rng = draws.choices
    niah = (REPEATED | NEEDLES_ONLY)[task]
    most = tokens - NEEDLE_ROOM

    def size_of(made: Whole, answers: str = "") -> int:
        return count(f"{made.text}{made.questions[0].question}{answers}")

    def measure(sentences: int) -> int:
        made = needle_text(task, rng, sentences)
        return size_of(made, " ".join(made.questions[0].answers))

    size, step = largest(measure, most, 25 if tokens >= 4096 else 5, least=niah.needles)
    for _ in range(samples):
        yield fitting(
            lambda sentences: needle_text(task, rng, sentences, questions),
            size,
            step,
            lambda made: size_of(made) <= most,
        )
