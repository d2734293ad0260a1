"""Training sequences of facts in many forms: few or many of them, scattered or dense, with
questions of every kind (see `tasks/tellings.py`), and questions about spans of real text.

Dimensions: T tokens; a sequence has T+1 (inputs and targets overlap).
"""

from collections.abc import Callable, Collection, Sequence
from itertools import accumulate, pairwise
from random import Random

import numpy as np

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.tasks import tellings as t
from hsa_mini.tasks import words
from hsa_mini.tasks.chains import Chain
from hsa_mini.tasks.facts import draw_facts
from hsa_mini.tasks.frames import ruler_frames, told_frames
from hsa_mini.tasks.needles import Needle, ask
from hsa_mini.tasks.sentences import Question, encode
from hsa_mini.tasks.wordings import HeldOut, draw_source, draw_wording

NONE, TEXT, COPY, ANSWER = range(4)  # the parts of the loss
# Of each item its pieces: ids, and whether they are an answer.
Items = list[list[tuple[list[int], bool]]]

Row = tuple[np.ndarray, np.ndarray]  # ids [T+1] and the part of each token [T+1]

TRAINING = HeldOut()
# The kinds of problem, with their shares.
SHARES = {"facts": 0.50, "attributes": 0.06, "updates": 0.13, "all": 0.06, "early": 0.11,
          "chains": 0.14}  # fmt: skip
MAX_FACTS = 60
MIN_FACT_TOKENS = 160  # a sequence of fewer has no place for most facts and their questions
MIN_RULER_TOKENS = 512
SPAN_FORMS = (
    ('What follows "{span}"?\n{span}', "\n"), ("Continue: {span}", "\n"), ("{span}", "\n"),
    ('Quote the text from "{span}" on.\n"{span}', '"'), ("And how did it go on? {span}", "\n"),
)  # fmt: skip


def ids_of(text: str) -> list[int]:
    """The token ids of a text, as a list."""
    return load_tokenizer().encode_ordinary(text)


def draw_told(rng: Random, most: int, held_out: HeldOut = TRAINING) -> t.Told:
    """A problem of at most `most` facts, of a kind drawn by SHARES."""
    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    count = min(round(2 ** rng.uniform(0, 6)), most)
    wanted = rng.randint(2, 10)
    if kind == "chains":
        lengths = [rng.randint(2, 6) for _ in range(max(count // 5, 1))]
        return t.tell_chains(rng, lengths, wanted, held_out)
    values = words.draw_kind(rng, words.VALUES)
    told = draw_source(rng, held_out)
    asked = told if rng.random() < 0.5 else draw_source(rng, held_out)
    in_digits = values in words.OF_DIGITS
    wording = draw_wording(rng, held_out, in_digits=in_digits, told=told, asked=asked)
    noun = ""
    if "ruler" in (told, asked) and rng.random() < 0.7:
        noun = ruler_frames.NOUN.format(type=rng.choice(("number", "word", "uuid")))
    elif told == "first" and rng.random() < 0.7:
        noun = told_frames.FIRST_NOUN
    keys = words.code if told == "first" and rng.random() < 0.6 else None
    similar = 0.5 * (rng.random() < 0.3)
    drawn = draw_facts(rng, count, held_out, keys=keys, values=values, noun=noun, similar=similar)
    if kind == "attributes":
        return t.tell_attributes(rng, wording, drawn, wanted, held_out)
    if kind == "updates":
        return t.tell_updates(rng, wording, drawn, wanted)
    if kind == "all":
        return t.tell_all_values(rng, wording, drawn, wanted)
    if kind == "early":
        return t.tell_early_questions(rng, wording, drawn, rng.choice((1, 1, 2, 4)), held_out)
    return t.tell_facts(rng, wording, drawn, wanted)


def told_items(rng: Random, tokens: int, draw: Callable[[Random, int], t.Told]) -> Items:
    """Sentences and questions of a problem that takes at most `tokens` tokens."""
    most = MAX_FACTS
    while True:
        told = draw(rng, most)
        sentences = [ids_of(text) for text in told.sentences]
        spare = tokens - sum(map(len, sentences))
        if spare > 0 and (items := with_questions(rng, told, sentences, spare)):
            return items
        most = max(most * 2 // 3, 1)


def with_questions(
    rng: Random, told: t.Told, sentences: Sequence[list[int]], spare: int
) -> Items | None:
    """The sentences, and behind what they need as many questions as `spare` tokens hold.

    Some questions stand among the sentences, the others at the end; None if none fits.
    """
    among = rng.choice((0.0, 0.0, 0.4, 0.8))
    place = {text: i for i, text in enumerate(told.sentences)}
    behind: dict[int, list[Question]] = {}
    last = len(sentences) - 1
    found = False
    for question in told.questions:
        length = len(ids_of(question.text)) + len(ids_of(question.answer))
        if length > spare:
            continue
        spare -= length
        after = max(place[text] for text in question.needed)
        inside = found and rng.random() < among
        behind.setdefault(rng.randint(after, last) if inside else last, []).append(question)
        found = True
    if not found:
        return None
    items: Items = []
    for i, ids in enumerate(sentences):
        items.append([(ids, False)])
        for question in behind.get(i, ()):
            items.append([(ids_of(question.text), False), (ids_of(question.answer), True)])
    return items


def gaps(rng: Random, count: int, items: int) -> list[int]:
    """The numbers of tokens of text in front of each item, `count` in all.

    Scattered: every item has a gap of its own. Dense: most items follow the one before at once.
    """
    glued = rng.choice((0.0, 0.0, 0.5, 0.8, 0.95, 1.0))
    sizes = [rng.expovariate(1) * (i == 0 or rng.random() >= glued) for i in range(items)]
    ends = [round(count * end / sum(sizes)) for end in accumulate(sizes)]
    return [end - start for start, end in pairwise((0, *ends))]


def span_questions(rng: Random, text: list[int], tokens: int) -> Items:
    """Questions about spans of the first half of `text`: what follows some tokens that stand there.

    They take at most `tokens` tokens.
    """
    items: Items = []
    used = 0
    while True:
        start = rng.randrange(max(len(text) // 2 - 40, 1))
        middle = start + rng.randint(5, 9)
        form, end = rng.choice(SPAN_FORMS)
        first, *others = form.split("{span}")
        question = ids_of("\n" + first)
        for part in others:
            question = question + text[start:middle] + ids_of(part)
        answer = text[middle : middle + rng.randint(4, 20)]
        pieces = [(question, False), (answer, True), (ids_of(end), False)]
        used += sum(len(ids) for ids, _ in pieces)
        if used > tokens:
            return items
        items.append(pieces)


def row(rng: Random, items: Items, text: Sequence[int], part_of_text: int) -> Row:
    """A sequence: items with pieces of `text` in front."""
    ids: list[int] = []
    parts: list[int] = []
    done = 0
    for gap, item in zip(gaps(rng, len(text), len(items)), items):
        item_ids, item_parts = joined(item)
        ids += [*text[done : done + gap], *item_ids]
        parts += [*[part_of_text] * gap, *item_parts]
        done += gap
    return np.array(ids), np.array(parts)


def span_row(rng: Random, text: list[int]) -> Row:
    """Real text, then questions about spans of it, as many tokens as `text` in all."""
    items = span_questions(rng, text, len(text) // 2)
    ids, parts = joined([piece for item in items for piece in item])
    kept = len(text) - len(ids)
    return np.array(text[:kept] + ids), np.array([TEXT] * kept + parts)


def joined(pieces: Sequence[tuple[list[int], bool]]) -> tuple[list[int], list[int]]:
    """The ids of all pieces, and their parts in the loss."""
    ids = [i for piece, _ in pieces for i in piece]
    parts = [ANSWER if is_answer else NONE for piece, is_answer in pieces for _ in piece]
    return ids, parts


def pieces_of(item: str | Question) -> list[tuple[np.ndarray, int]]:
    """Ids and part in the loss: of a sentence, or of a question and its answer."""
    if isinstance(item, str):
        return [(encode(item), NONE)]
    return [(encode(item.text), NONE), (encode(item.answer), ANSWER)]


def question_tokens(question: Question) -> int:
    """The number of tokens of a question and its answer."""
    return sum(len(ids) for ids, _ in pieces_of(question))


def min_tokens(kinds: Collection[str]) -> int:
    """The fewest tokens of a sequence that holds a problem of any of the kinds, with a question."""
    needle = Needle("BBBB", "000000")  # any other is as long
    chain = Chain("00000000", ("BBBB", "CCCC", "DDDD"))
    fewest = {
        "needles": len(encode(needle.sentence)) + question_tokens(ask([needle])) - 1,
        "chains": sum(map(len, map(encode, chain.sentences))) + question_tokens(chain.question) - 1,
        "facts": MIN_FACT_TOKENS,
        "spans": MIN_FACT_TOKENS,
        "ruler": MIN_RULER_TOKENS,
        **dict.fromkeys(("stories", "threads", "notes"), MIN_FACT_TOKENS),
    }
    return max((fewest.get(kind, 1) for kind in kinds), default=1)
