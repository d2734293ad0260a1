"""Facts (whose, what, value): how they are drawn, told in a sentence and asked for."""

from dataclasses import dataclass, replace
from random import Random

from hsa_mini.tasks import words
from hsa_mini.tasks.frames import ruler_frames, told_frames
from hsa_mini.tasks.sentences import Question, is_held_out
from hsa_mini.tasks.wordings import HeldOut, Wording, pick, worded


@dataclass(frozen=True)
class Fact:
    noun: str
    key: str
    value: str

    def say(self, frame: str, **more: str) -> str:
        """The frame with this fact in its slots."""
        slots = dict(noun=self.noun, nouns=plural(self.noun), key=self.key, value=self.value)
        return frame.format(**slots | more)


def plural(noun: str) -> str:
    if noun.endswith(("s", "sh", "x")):
        return f"{noun}es"
    return f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"


def draw_facts(
    rng: Random,
    count: int,
    held_out: HeldOut,
    *,
    keys: words.Kind | None = None,
    values: words.Kind | None = None,
    noun: str = "",
    similar: float = 0.0,
) -> list[Fact]:
    """`count` facts with one noun, different keys and different values.

    keys, values: their kinds, drawn if None. noun: drawn if empty. similar: the share whose key
    differs from another key in one character.
    """
    key_kind = keys or words.draw_kind(rng, words.KEYS)
    value_kind = values or words.draw_kind(rng, words.VALUES)
    noun = noun or draw_noun(rng, held_out)
    taken: set[str] = set()
    drawn = words.distinct(rng, key_kind, count, held_out.keys, taken)
    found = words.distinct(rng, value_kind, count, held_out.keys, taken)
    if similar and key_kind in (words.code, words.long_code, words.short_number):
        for i in range(1, len(drawn), 2):
            if rng.random() < similar:
                drawn[i] = near(rng, drawn[i - 1], drawn[i], taken, held_out.keys)
    return [Fact(noun, key, value) for key, value in zip(drawn, found)]


def near(rng: Random, model: str, other: str, taken: set[str], held_out: bool) -> str:
    """`model` with one character of `other`, or `other` if that is no new key of the same split."""
    i = rng.randrange(min(len(model), len(other)))
    key = model[:i] + other[i] + model[i + 1 :]
    if key in taken or is_held_out(key) != held_out:
        return other
    taken.add(key)
    return key


def draw_noun(rng: Random, held_out: HeldOut) -> str:
    if not held_out.nouns and rng.random() < 0.2:
        return " ".join(rng.choices(words.vocabulary(), k=rng.choice((1, 1, 2))))
    if not held_out.nouns and held_out.ruler and rng.random() < 0.1:
        return ruler_frames.NOUN.format(type=rng.choice(("number", "word", "uuid")))
    return rng.choice(told_frames.NOUN.of(held_out.nouns))


def sentence(rng: Random, wording: Wording, fact: Fact, told: tuple[str, ...] = ()) -> str:
    """The fact told, with white space in front."""
    text = fact.say(pick(rng, told or wording.told))
    return ("\n" if text.endswith("\n") and rng.random() < 0.5 else " ") + text


def put(
    rng: Random, question: str, lead: str, slot: str, answer: str, needed: tuple[str, ...]
) -> Question:
    """The question and the lead up to its slot; the answer, from the slot on.

    question, lead: with every slot but `slot` filled; `answer` is what fills it.
    """
    head, tail = lead.split(slot, 1)
    space = " " if head.endswith(" ") else ""
    between = rng.choice(("\n", "\n", " ")) if question and head.strip() else "\n"
    if not question:
        between = ""
    text = rng.choice(("\n", "\n", "\n\n", " ")) + question + between
    return Question(text + head.removesuffix(" "), space + answer + tail, needed)


def ask_value(rng: Random, wording: Wording, fact: Fact, needed: tuple[str, ...]) -> Question:
    question = fact.say(worded(rng, wording, wording.questions))
    lead = replace(fact, value="\0").say(worded(rng, wording, wording.leads))
    if not question and fact.key not in lead:
        question = f"{fact.key}?"
    return put(rng, question, lead, "\0", fact.value, needed)


def ask_key(rng: Random, wording: Wording, fact: Fact, needed: tuple[str, ...]) -> Question:
    question = fact.say(worded(rng, wording, wording.reversed))
    lead = replace(fact, key="\0").say(worded(rng, wording, wording.reversed_leads))
    if not question and fact.value not in lead:
        question = f"Who has {fact.value}?"
    return put(rng, question, lead, "\0", fact.key, needed)


def ask_several(
    rng: Random, wording: Wording, facts: list[Fact], needed: tuple[str, ...]
) -> Question:
    keys = listed(rng, [fact.key for fact in facts])
    question = facts[0].say(worded(rng, wording, wording.several), keys=keys)
    lead, first, each, end = rng.choice(wording.several_leads)
    answer = facts[0].say(first) + "".join(fact.say(each) for fact in facts[1:]) + end
    return put(rng, question, facts[0].say(lead, keys=keys) + "\0", "\0", answer, needed)


def listed(rng: Random, items: list[str]) -> str:
    """The items as in a sentence: "a, b and c"."""
    *others, last = items
    if not others:
        return last
    style = rng.choice((" and ", " and ", ", and ", ", "))
    return ", ".join(others) + style + last
