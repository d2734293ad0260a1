"""Training sequences for the tasks in long texts: RULER's texts in full, and stories, threads and
notes (see `tasks/rows.py`), with words and names that evaluation never uses.
"""

from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np

from hsa_mini.tasks import words
from hsa_mini.tasks.long import ruler
from hsa_mini.tasks.long import ruler_lists as lists
from hsa_mini.tasks.long.series import tell_notes, tell_threads
from hsa_mini.tasks.long.stories import LENGTHS, tell_story
from hsa_mini.tasks.rows import ANSWER, NONE, TEXT, Row, ids_of
from hsa_mini.tasks.tellings import Told

Pieces = list[tuple[list[int], int]]  # ids and their part in the loss


def draw_story(rng: Random, most: int) -> Told:
    """A story of at most about `most` sentences, with its questions."""
    kind = rng.choice([kind for kind in LENGTHS if LENGTHS[kind][0] <= most] or ["qa1"])
    return tell_story(rng, kind, rng.randint(1, 6), False, most=most)


def draw_threads(rng: Random, most: int) -> Told:
    """One to four threads of at most `most` links."""
    steps = rng.randint(1, min(8, most))
    threads = rng.randint(1, min(4, max(most // steps, 1)))
    return tell_threads(rng, steps, threads, False, threads=threads)


def draw_notes(rng: Random, most: int) -> Told:
    """Up to eight notes about each of one to four topics."""
    times = rng.randint(1, min(8, most))
    topics = rng.randint(1, min(4, max(most // times, 1)))
    return tell_notes(rng, times, rng.randint(1, 6), False, topics=topics)


TOLD: dict[str, Callable[[Random, int], Told]] = {
    "stories": draw_story, "threads": draw_threads, "notes": draw_notes,
}  # fmt: skip


def ruler_row(rng: Random, text: list[int]) -> Row:
    """One of RULER's texts with its answer at the end, behind real text; as many tokens as `text`,
    from which all real text comes.
    """
    tokens = int(len(text) * rng.choice((0.5, 0.75, 1.0)))
    makers = {needles_in_text: 6, needles_only: 3, chain: 2, common_words: 1, coded_words: 1}
    make = rng.choices(list(makers), list(makers.values()))[0]
    while True:
        pieces = make(rng, tokens, text)
        kept = len(text) - sum(len(ids) for ids, _ in pieces)
        if kept >= 0:
            break
        tokens = tokens * 7 // 8
    pieces = [(text[:kept], TEXT), *pieces]
    ids = [i for some, _ in pieces for i in some]
    return np.array(ids), np.repeat([part for _, part in pieces], [len(x) for x, _ in pieces])


def training_word(rng: Random, kind: str) -> str:
    """A key or a value, as `ruler.draw`, from the words for training."""
    if kind == "words":
        return words.hyphenated(rng, held_out=False)
    return ruler.draw(rng, kind)


def answered(asked: ruler.Asked, answer: str) -> Pieces:
    return [(ids_of(asked.question + asked.prefix), NONE), (ids_of(f" {answer}"), ANSWER)]


def listed(values: tuple[str, ...]) -> str:
    """The values as in a sentence."""
    *others, last = values
    return f"{', '.join(others)}, and {last}." if others else f"{last}."


def scattered(rng: Random, sentences: list[str], filler: list[int], part: int) -> Pieces:
    """The sentences, in their order, with pieces of the filler before each and at the end."""
    cuts = sorted(rng.randint(0, len(filler)) for _ in sentences)
    pieces = []
    for sentence, (start, end) in zip([*sentences, ""], pairwise((0, *cuts, len(filler)))):
        pieces += [(filler[start:end], part), (ids_of(sentence), NONE)]
    return pieces


def noise(tokens: int) -> list[int]:
    return np.resize(ids_of(f" {ruler.NOISE}\n"), max(tokens, 0)).tolist()


def needles_in_text(rng: Random, tokens: int, text: list[int]) -> Pieces:
    """Few needles in real text or in a repeated line."""
    niah = rng.choice(list(ruler.IN_TEXT.values()))
    needles, values = ruler.draw_needles(rng, niah, training_word)
    # HSA knows no positions, so which of several values came first cannot be known.
    mixed = {key: rng.sample(some, len(some)) for key, some in values.items()}
    asked = ruler.ask_some(rng, niah, mixed)
    said = listed(asked.answers)
    if niah.asked > 1:  # each value behind its key, so that it is one retrieval
        key_of = {value: key for key, some in values.items() for value in some}
        said = f"{', '.join(f'{key_of[value]}: {value}' for value in asked.answers)}."
    end = answered(asked, said)
    head = ids_of(ruler.opening(niah))
    sentences = [f" {needle}" for needle in needles]
    taken = len(head) + sum(len(ids) for ids, _ in end) + sum(len(ids_of(x)) for x in sentences)
    spare = max(tokens - taken, 0)
    filler, part = (noise(spare), NONE) if rng.random() < 0.25 else (text[-spare:], TEXT)
    return [(head, NONE), *scattered(rng, sentences, filler[:spare], part), *end]


def needles_only(rng: Random, tokens: int, text: list[int]) -> Pieces:
    """A text of needles, some of which are asked for."""
    niah = rng.choice(list(ruler.NEEDLES_ONLY.values()))
    size = 36 if niah.values == "numbers" else 100  # tokens of a needle, roughly
    pairs = {training_word(rng, niah.keys): training_word(rng, niah.values)
             for _ in range(max(tokens // size - 4, 1))}  # fmt: skip
    lines = [ruler.needle(niah, key, value) for key, value in pairs.items()]
    pieces = [(ids_of(ruler.opening(niah) + "\n".join(lines)), NONE)]
    for key in rng.sample(list(pairs), min(rng.randint(1, 4), len(pairs))):
        pieces += answered(ruler.ask(niah, {key: [pairs[key]]}, [key]), f"{pairs[key]}.")
    return pieces


def chain(rng: Random, tokens: int, text: list[int]) -> Pieces:
    """One chain of variables in a repeated line or in real text."""
    names = lists.draw_names(rng, lists.NAMES, 5)
    value = str(rng.randint(10000, 99998))
    asked = lists.ask_names(value, names)
    links = [f" {link}" for link in lists.chain_links(value, names)]
    end = answered(asked, f"{' '.join(names)}\n")
    spare = max(tokens - 60 - 15 * len(links) - sum(len(ids) for ids, _ in end), 0)
    filler, part = (noise(spare), NONE) if rng.random() < 0.7 else (text[:spare], TEXT)
    return [(ids_of(lists.CHAIN_OPENING), NONE), *scattered(rng, links, filler, part), *end]


def common_words(rng: Random, tokens: int, text: list[int]) -> Pieces:
    """A numbered list, of which ten words stand there more often than the others."""
    often, seldom = rng.choice(((6, 1), (4, 1), (6, 2)))
    number = max((tokens // 8 - 10 * often) // seldom, 5)
    chosen = rng.sample(words.vocabulary(), min(number + 10, len(words.vocabulary())))
    items = chosen[:10] * often + chosen[10:] * seldom
    rng.shuffle(items)
    prefix = f"\n\n{lists.LIST_PREFIX.strip()}"
    asked = ruler.Asked(lists.LIST_QUESTION, prefix, tuple(chosen[:10]))
    body = ids_of(lists.LIST_OPENING + lists.numbered(items))
    return [(body, NONE), *answered(asked, f"{lists.numbered(asked.answers)}\n")]


def coded_words(rng: Random, tokens: int, text: list[int]) -> Pieces:
    """A coded text, of which three words are the most frequent."""
    coded = lists.coded_words(rng, max(tokens // 50, 5))
    body = ids_of(lists.CODE_OPENING + lists.coded(coded, tokens // 5))
    asked = ruler.Asked(lists.CODE_QUESTION, lists.CODE_PREFIX, tuple(coded[1:4]))
    return [(body, NONE), *answered(asked, listed(asked.answers))]
