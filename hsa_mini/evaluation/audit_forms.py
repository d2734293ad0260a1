"""The forms of the audit: the trained sentence and question, and everything that differs from them.

Keys and words are always held out. In the forms of HELD_OUT the sentence or the question is too.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random

from hsa_mini.tasks import tellings as t
from hsa_mini.tasks import words
from hsa_mini.tasks.facts import ask_key, ask_several, ask_value, draw_facts, sentence
from hsa_mini.tasks.frames import asked_frames, ruler_frames, told_frames
from hsa_mini.tasks.wordings import HeldOut, draw_wording

FACTS = 6  # in a text; one of them is asked for
KEYS = HeldOut(keys=True)
TOLD = HeldOut(keys=True, told=True)
ASKED = HeldOut(keys=True, asked=True)
ALL = HeldOut(keys=True, nouns=True, told=True, asked=True)
HELD_OUT = ("reworded", "paraphrased", "reversed", "all held out", "in the middle")
OTHER_KEYS = (words.hyphenated, words.person, words.short_number, words.new_word, words.words)


def of_digits(count: int) -> words.Kind:
    """A kind of values: numbers of `count` digits."""

    def kind(rng: Random, held_out: bool) -> str:
        return words.digits(rng, count)

    return kind


SIX = of_digits(6)
SEVEN = of_digits(7)


def one(
    rng: Random,
    *,
    keys: words.Kind | None = words.code,
    values: words.Kind = SIX,
    noun: str = told_frames.FIRST_NOUN,
    held_out: HeldOut = KEYS,
    told: str = "first",
    asked: str = "first",
    count: int = FACTS,
    ask: Callable = ask_value,
    **changes,
) -> t.Told:
    """One of several facts is asked for. told, asked: see SOURCES; changes: of the wording."""
    in_digits = values in words.OF_DIGITS or values.__name__ == "kind"
    wording = draw_wording(rng, held_out, in_digits=in_digits, told=told, asked=asked)
    wording = replace(wording, **changes)
    facts = draw_facts(rng, count, held_out, keys=keys, values=values, noun=noun)
    texts = [sentence(rng, wording, fact) for fact in facts]
    i = rng.randrange(len(facts))
    return t.Told(tuple(texts), (ask(rng, wording, facts[i], (texts[i],)),))


def other_keys(rng: Random) -> t.Told:
    return one(rng, keys=rng.choice(OTHER_KEYS))


def all_held_out(rng: Random) -> t.Told:
    """Key, value, noun, sentence and question of any kind, all held out."""
    values = words.draw_kind(rng, words.VALUES)
    return one(
        rng, keys=None, values=values, noun="", held_out=ALL, told="declared", asked="declared"
    )


def several(rng: Random, count: int, told: str = "first") -> t.Told:
    """`count` keys in one question."""
    ruler = told == "ruler"
    wording = draw_wording(rng, KEYS, in_digits=True, told=told, asked=told)
    if not ruler:
        asked = "What are the {nouns} of {keys}?"
        wording = replace(wording, several=(asked,), several_leads=asked_frames.SEVERAL_LEADS[:1])
    facts = first_facts(rng, FACTS, ruler)
    texts = [sentence(rng, wording, fact) for fact in facts]
    question = ask_several(rng, wording, facts[:count], tuple(texts[:count]))
    return t.Told(tuple(rng.sample(texts, len(texts))), (question,))


def first_facts(rng: Random, count: int, ruler: bool = False):
    """Facts of the first form, or of RULER's."""
    if ruler:
        noun = ruler_frames.NOUN.format(type="number")
        return draw_facts(rng, count, KEYS, keys=words.hyphenated, values=SEVEN, noun=noun)
    return draw_facts(rng, count, KEYS, keys=words.code, values=SIX, noun=told_frames.FIRST_NOUN)


def chain(rng: Random, names: int) -> t.Told:
    """The first wording of a chain; there is another chain of this length."""
    return t.tell_chains(rng, [names, names], 1, KEYS, form=0)


def chain_reworded(rng: Random, names: int) -> t.Told:
    return t.tell_chains(rng, [names, names], 1, TOLD)


def latest(rng: Random, times: int) -> t.Told:
    """Two keys stand there this many times, in the first form."""
    wording = draw_wording(rng, KEYS, in_digits=True, told="first", asked="first")
    wording = replace(wording, updated=(told_frames.SENTENCE,))
    return t.tell_updates(rng, wording, first_facts(rng, 2 * times), 1, times=times)


def in_the_middle(rng: Random) -> t.Told:
    """The question stands anywhere among the sentences."""
    wording = draw_wording(rng, KEYS, in_digits=True, told="first", asked="first")
    return t.tell_early_questions(rng, wording, first_facts(rng, FACTS), 1, ASKED)


def ruler(kind: str, keys: words.Kind, values: words.Kind) -> Callable[[Random], t.Told]:
    noun = ruler_frames.NOUN.format(type=kind)
    return partial(one, keys=keys, values=values, noun=noun, told="ruler", asked="ruler")


FORMS: dict[str, Callable[[Random], t.Told]] = {
    "trained form": one,
    "other keys": other_keys,
    "completion only": partial(one, questions=("",)),
    "lower case": partial(
        one, questions=(asked_frames.ASKED.lower(),), leads=(asked_frames.LEAD.lower(),)
    ),
    "7 digits": partial(one, values=SEVEN),
    "10 digits": partial(one, values=of_digits(10)),
    "20 digits": partial(one, values=of_digits(20)),
    "English words": partial(one, values=words.words),
    "sentence reworded": partial(one, held_out=TOLD, told="declared"),
    "question paraphrased": partial(one, held_out=ASKED, asked="declared"),
    "question reversed": partial(one, held_out=ASKED, asked="declared", ask=ask_key),
    "all held out": all_held_out,
    "RULER numbers": ruler("number", words.hyphenated, SEVEN),
    "RULER words": ruler("word", words.hyphenated, words.hyphenated),
    "RULER uuids": ruler("uuid", words.uuid, words.uuid),
    "RULER 4 keys": partial(several, count=4, told="ruler"),
    "chain of 3": partial(chain, names=3),
    "chain of 4": partial(chain, names=4),
    "chain of 5": partial(chain, names=5),
    "chain of 4 reworded": partial(chain_reworded, names=4),
    "3 keys": partial(several, count=3),
    "4 keys": partial(several, count=4),
    "question in the middle": in_the_middle,
    "latest of 2": partial(latest, times=2),
    "latest of 4": partial(latest, times=4),
    "1,024 further": partial(one, count=FACTS + 1024),
}
