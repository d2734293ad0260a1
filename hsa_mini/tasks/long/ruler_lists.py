"""RULER's other tasks in the wording of lm-eval 0.4.13: variable tracking and lists of words.

    vt     which five variables have a value; it passes from one to the next, in a repeated line
    cwe    the ten most common words of a numbered list
    fwe    the three most frequent words of a coded text

lm-eval's lists end where all words are used up, at about 240,000 tokens of ours: in longer ones,
every word stands there more often.
"""

import math
import random
import string
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from hsa_mini.checks import quoted
from hsa_mini.tasks.long.ruler import (
    MAX_TRIED,
    NOISE,
    ORDER,
    WHOLE,
    Asked,
    Draws,
    Whole,
    count,
    fitting,
    largest,
    niah_texts,
)
from hsa_mini.tasks.long.ruler_words import listed

CHAIN_ROOM = 30  # tokens for the answer
CHAIN_OPENING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
)
CHAIN_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
CHAIN_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are "
    "assgined the value {value}, they are:"
)  # with lm-eval's spelling
NAMES = 5  # of a chain
EXAMPLE_TOKENS = 500

LIST_ROOM = 120
LIST_OPENING = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
LIST_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
COMMON = 10
LIST_TOKENS = 200_000  # lm-eval's words fill about this many

CODE_OPENING = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. "
)
CODE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three "
    "most frequently appeared words in the above coded text?"
)
CODE_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
CODE_LETTERS = 6


def ruler_texts(
    task: str, tokens: int, *, samples: int, seed: int, questions: int = 1
) -> Iterator[Whole]:
    """Texts of at most `tokens` tokens of one of the tasks `WHOLE`; task, length and seed decide
    them.

    questions: asked of each text, where it has so many (the two tasks whose text consists of
    needles). Raises ValueError for another task, and for a length in which no text fits.
    """
    if task not in WHOLE:
        raise ValueError(f"task: got {quoted(task)}, accepted are {', '.join(WHOLE)}")
    draws = Draws.seeded(task, tokens, seed)
    lists = {"vt": chain_texts, "cwe": list_texts, "fwe": code_texts}
    if task in lists:
        return lists[task](draws, tokens, samples)
    return niah_texts(task, draws, tokens, samples, questions)


# Variable tracking


def chain_text(draws: Draws, lines: int, letters: int = 5) -> Whole:
    """A chain of `NAMES` variables in that many lines of noise."""
    names = draw_names(draws.choices, NAMES, letters)
    value = str(draws.numbers.randint(10000, 99999))
    chain = chain_links(value, names)
    sentences = [f"{NOISE}\n"] * lines
    if len(sentences) <= len(chain):
        parts = [part for line in sentences for part in line.split(".")]
        sentences = [f"{part}." if part.strip() else part for part in parts]
    places = sorted(draws.choices.sample(range(len(sentences)), len(chain)))
    for i, (place, link) in enumerate(zip(places, chain)):
        sentences.insert(place + i, link)
    body = " ".join(sentences).replace(". \n", ".\n")
    return Whole(f"{CHAIN_OPENING}{body}", (ask_names(value, names),))


def chain_links(value: str, names: list[str]) -> list[str]:
    """The assignments of a chain, in its order."""
    links = (f"VAR {b} = VAR {a} " for a, b in pairwise(names))
    return [f"VAR {names[0]} = {value}", *links]


def ask_names(value: str, names: list[str]) -> Asked:
    """The question for all variables of a chain."""
    question, prefix = (part.format(value=value) for part in (CHAIN_QUESTION, CHAIN_PREFIX))
    return Asked(question, prefix, tuple(names))


def draw_names(rng: random.Random, number: int, letters: int) -> list[str]:
    """Different names of capital letters."""
    while True:
        names = ["".join(rng.choices(string.ascii_uppercase, k=letters)) for _ in range(number)]
        if len(set(names)) == number:
            return names


def chain_texts(draws: Draws, tokens: int, samples: int) -> Iterator[Whole]:
    """Texts behind an example with its answer, whose variables have other names in each text."""
    (shown,) = _chains(draws, EXAMPLE_TOKENS, 1, step=5, letters=3)
    example = f"{_in_full(shown)} {' '.join(shown.questions[0].answers)}\n\n"
    for one in _chains(draws, tokens - count(example), samples, step=10):
        changed = _renamed(draws.choices, example)
        yield Whole(f"{changed}\n\n{one.text}", one.questions)


def _chains(
    draws: Draws, tokens: int, samples: int, *, step: int, letters: int = 5
) -> Iterator[Whole]:
    most = tokens - CHAIN_ROOM

    def make(lines: int) -> Whole:
        return chain_text(draws, lines, letters)

    def measure(lines: int) -> int:
        made = make(lines)
        return count(f"{_in_full(made)} {list(made.questions[0].answers)}")

    size, step = largest(measure, most, step)
    for _ in range(samples):
        yield fitting(make, size, step, lambda made: count(_in_full(made)) <= most)


def _in_full(made: Whole) -> str:
    """Text, question and prefix, as lm-eval counts them."""
    return f"{made.text}{made.questions[0].question}{made.questions[0].prefix} "


def _renamed(rng: random.Random, example: str) -> str:
    """The example with another name for each of its variables."""
    for name in example[example.index("they are: ") + 10 :].split():
        example = example.replace(name, "".join(rng.choices(string.ascii_uppercase, k=len(name))))
    return example


# The most common words of a list


def list_texts(draws: Draws, tokens: int, samples: int) -> Iterator[Whole]:
    short = tokens < 4096
    times = -(-tokens // LIST_TOKENS)
    often, seldom = (6, 1) if short else (30, 3)
    most = tokens - LIST_ROOM

    def make(words: int) -> Whole:
        # lm-eval draws an example that its prompt does not have, and does not fit into short ones.
        _listed(draws, *((20, 3, 1) if short else (40, 10, 3)))
        body, common = _listed(draws, words, often * times, seldom * times)
        asked = Asked(LIST_QUESTION, f"\n\n{LIST_PREFIX.strip()}", tuple(common))
        return Whole(f"{LIST_OPENING}{body}", (asked,))

    def size_of(made: Whole, answers: str = "") -> int:
        return count(f"{made.text}{LIST_QUESTION}{LIST_PREFIX}{answers}")

    def measure(words: int) -> int:
        made = make(words)
        return size_of(made, f" {numbered(made.questions[0].answers)}")

    size, step = largest(measure, most, 10, greatest=len(listed()))
    for _ in range(samples):
        yield fitting(make, size, step, lambda made: size_of(made) <= most)


def _listed(draws: Draws, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
    """A numbered list of that many words, and the common ones among them."""
    chosen = draws.choices.sample(listed(), words)
    items = chosen[:COMMON] * often + chosen[COMMON:] * seldom
    draws.lists.shuffle(items)
    return numbered(items), chosen[:COMMON]


def numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


# The most frequent words of a coded text


def code_texts(draws: Draws, tokens: int, samples: int) -> Iterator[Whole]:
    step = tokens // 32

    def in_full(body: str) -> str:
        return f"{CODE_OPENING}{body}{CODE_QUESTION}{CODE_PREFIX}"

    words = coded_words(draws.choices, tokens // 50)
    size = tokens // CODE_LETTERS
    if tokens > MAX_TRIED:
        size = int(0.99 * tokens / count(in_full(coded(words, size))) * size)
        step = size // 100
    else:
        while count(in_full(coded(words, size))) < tokens:
            size += step
        size -= step
    for _ in range(samples):
        words = coded_words(draws.choices, tokens // 50)
        shorter = size
        while count(in_full(body := coded(words, shorter))) > tokens:
            shorter -= step
        asked = Asked(CODE_QUESTION, CODE_PREFIX, tuple(words[1:4]))
        yield Whole(f"{CODE_OPENING}{body}", (asked,))


def coded_words(rng: random.Random, number: int) -> list[str]:
    """Different words, the most frequent first; the first of all is the noise."""

    def word() -> str:
        return "".join(rng.choices(string.ascii_lowercase, k=CODE_LETTERS))

    words = [word() for _ in range(number)]
    while len(set(words)) < number:
        words.append(word())
    words = sorted(set(words))
    random.Random(ORDER).shuffle(words)
    return ["...", *words[1:]]


def coded(words: list[str], number: int) -> str:
    """About `number` words; the k-th most frequent one is a share of 1 / (k^2 zeta(2))."""
    ranks = np.arange(1, len(words) + 1)
    counts = (number * ranks**-2.0 / (math.pi**2 / 6)).astype(int)
    drawn = [word for word, times in zip(words, counts) for _ in range(times)]
    random.Random(ORDER).shuffle(drawn)
    return " ".join(drawn)
