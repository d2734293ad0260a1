"""How a problem is told and asked for: a choice of frames, declared ones or random ones.

A frame of random words teaches that a value stands by its key, whatever the words around them.
"""

import re
from dataclasses import dataclass, replace
from random import Random

from hsa_mini.tasks import words
from hsa_mini.tasks.frames import asked_frames, ruler_frames, told_frames
from hsa_mini.tasks.frames.frame import expand


@dataclass(frozen=True)
class HeldOut:
    """What is taken from the held-out part: keys and words, nouns, sentences, questions.

    ruler: whether RULER's wording is among the training forms.
    """

    keys: bool = False
    nouns: bool = False
    told: bool = False
    asked: bool = False
    ruler: bool = True


@dataclass(frozen=True)
class Wording:
    """The frames that a problem may use. leads with `questions` are for one key's value."""

    told: tuple[str, ...]
    questions: tuple[str, ...]
    leads: tuple[str, ...]
    reversed: tuple[str, ...]
    reversed_leads: tuple[str, ...]
    several: tuple[str, ...]
    several_leads: tuple[tuple[str, str, str, str], ...]
    all_values: tuple[str, ...]
    all_leads: tuple[str, ...]
    updated: tuple[str, ...]
    rough: bool = False  # now and then in lower case, or with other words


SOURCES = ("first", "ruler", "random", "declared")  # of the frames of a wording


def draw_source(rng: Random, held_out: HeldOut) -> str:
    ruler = 0.08 if held_out.ruler else 0.0
    return rng.choices(SOURCES, (0.08, ruler, 0.36, 0.48))[0]


def draw_wording(
    rng: Random, held_out: HeldOut, *, in_digits: bool, told: str, asked: str
) -> Wording:
    """told, asked: where the sentences and the questions come from, one of SOURCES.

    in_digits: the values are of digits, so they are recognised wherever they stand.
    """
    wording = _declared(rng, held_out, in_digits)
    if told == "first":
        wording = replace(wording, told=(told_frames.SENTENCE,))
    elif told == "ruler":
        wording = replace(wording, told=(ruler_frames.TOLD,))
    elif told == "random":
        wording = replace(
            wording, told=tuple(random_sentence(rng, in_digits) for _ in range(rng.choice((1, 2))))
        )
    if asked == "first":
        return replace(wording, questions=(asked_frames.ASKED,), leads=(asked_frames.LEAD,))
    if asked == "ruler":
        return replace(
            wording,
            questions=(ruler_frames.QUESTION,),
            leads=(ruler_frames.LEAD,),
            several=(ruler_frames.SEVERAL,),
            several_leads=(ruler_frames.SEVERAL_LEAD,),
            all_values=(ruler_frames.ALL,),
            all_leads=(ruler_frames.ALL_LEAD,),
        )
    if asked == "random":
        return replace(
            wording,
            questions=tuple(random_question(rng, "{key}") for _ in range(4)),
            leads=random_leads(rng, wording, in_digits, "{key}", "{value}"),
            reversed=tuple(random_question(rng, "{value}") for _ in range(4)),
            reversed_leads=random_leads(rng, wording, in_digits, "{value}", "{key}"),
        )
    return wording


def random_leads(
    rng: Random, wording: Wording, in_digits: bool, asked: str, answer: str
) -> tuple[str, ...]:
    """Leads that end with the slot `answer`: some with the slot `asked` in front, some without."""
    sentences = [random_sentence(rng, in_digits) for _ in range(6)]
    leads = [
        cut_behind(sentence, answer)
        for sentence in (*sentences, *wording.told)
        if -1 < sentence.find(asked) < sentence.find(answer)
    ]
    return (*leads, *(random_lead(rng, answer) for _ in range(1 + len(leads) // 2)))


def cut_behind(sentence: str, slot: str) -> str:
    """The sentence up to this slot. What followed at random could not be predicted."""
    head = sentence.split(slot)[0]
    return head + slot + '"' * head.endswith('"') + "."


def _declared(rng: Random, held_out: HeldOut, in_digits: bool) -> Wording:
    told = told_frames.TOLD.of(held_out.told)
    if in_digits:
        told += told_frames.TOLD_IN_DIGITS.of(held_out.told)
    told = tuple(expand(rng, frame) for frame in rng.choices(told, k=rng.choice((1, 1, 2, 4))))
    if held_out == HeldOut(ruler=held_out.ruler) and rng.random() < 0.2:
        told = tuple(noisy(rng, frame) for frame in told)
    if rng.random() < 0.15:
        told = tuple(opened(rng, frame, held_out.told) for frame in told)
    # In training, a third of the leads consists of random words.
    free = 0 if held_out.asked else 12
    leads = tuple(random_lead(rng, "{value}") for _ in range(free))
    reversed_leads = tuple(random_lead(rng, "{key}") for _ in range(free // 2))
    return Wording(
        told=told,
        questions=asked_frames.QUESTION.of(held_out.asked),
        leads=asked_frames.LEADS.of(held_out.asked) + leads,
        reversed=asked_frames.REVERSED.of(held_out.asked),
        reversed_leads=asked_frames.REVERSED_LEADS.of(held_out.asked) + reversed_leads,
        several=asked_frames.SEVERAL.of(held_out.asked),
        several_leads=asked_frames.SEVERAL_LEADS,
        all_values=asked_frames.ALL_VALUES.of(held_out.asked),
        all_leads=asked_frames.ALL_VALUES_LEADS,
        updated=told_frames.UPDATED.of(held_out.told),
        rough=held_out == HeldOut(ruler=held_out.ruler),
    )


def opened(rng: Random, frame: str, held_out: bool) -> str:
    """The sentence behind an opening, as "Please note: "."""
    if not frame.startswith(("The ", "{key}", "It ", "They ", "We ")):
        return frame
    lowered = frame if frame.startswith("{") else frame[0].lower() + frame[1:]
    return rng.choice(told_frames.OPENINGS.of(held_out)) + lowered


LINKS = (" is", ":", " =", " ->", " was", " is:", "=", " equals", " is called", " has")
ENDS_OF_LEADS = (".", ".", "\n")


def random_sentence(rng: Random, in_digits: bool) -> str:
    """A sentence of random words around key and value. It teaches that a value stands by its key,
    whatever the words.
    """

    def filler(most: int) -> str:
        return "".join(
            f" {word}" for word in rng.choices(words.vocabulary(), k=rng.randint(0, most))
        )

    end = rng.choice(".\n;.\n,")
    if in_digits and rng.random() < 0.6:
        first, second = (" {key}", " {value}") if rng.random() < 0.6 else (" {value}", " {key}")
        body = f"{filler(5)}{first}{filler(4)}{second}{filler(3)}{end}"
    elif rng.random() < 0.25:
        body = f'{filler(4)} "{{value}}"{filler(3)} {{key}}{filler(2)}{end}'
    else:
        quote = '"' * (rng.random() < 0.2)
        body = f"{filler(5)} {{key}}{filler(3)}{rng.choice(LINKS)} {quote}{{value}}{quote}{end}"
    return body.lstrip()


def random_lead(rng: Random, answer: str) -> str:
    """Random words in front of the slot `answer`: what is asked stands in the question alone."""
    some = " ".join(rng.choices(words.vocabulary(), k=rng.choice((1, 1, 2, 3, 5))))
    some = some.capitalize() if rng.random() < 0.5 else some
    link = rng.choice((":", ":", *LINKS))
    return f"{some}{link} {answer}{rng.choice(ENDS_OF_LEADS)}"


def random_question(rng: Random, slot: str) -> str:
    """A question of random words around the slot; sometimes none, so that the lead asks."""
    if rng.random() < 0.25:
        return ""
    some = rng.choices(words.vocabulary(), k=rng.randint(0, 6))
    some.insert(rng.randint(0, len(some)), slot)
    return " ".join(some) + rng.choice(("?", ".", ":", "", " ?"))


def random_chain(rng: Random) -> tuple[str, str, str, str]:
    """Head, link, question and lead of random words."""

    def some(least: int, most: int) -> str:
        return "".join(f" {x}" for x in rng.choices(words.vocabulary(), k=rng.randint(least, most)))

    end = rng.choice((".", ";", "\n", "."))
    first, second = ("{a}", "{b}") if rng.random() < 0.5 else ("{b}", "{a}")
    start, goal = ("{value}", "{a}") if rng.random() < 0.6 else ("{a}", "{value}")
    middle = some(1, 3)
    ends = some(0, 2)
    head = f"{some(0, 3)} {start}{some(0, 3)} {goal}{end}"
    link = f"{some(0, 3)} {first}{middle} {second}{ends}{end}"
    asked = random_question(rng, "{value}") or "{value}?"
    return (
        head.lstrip(),
        link.lstrip(),
        asked,
        f"{some(0, 3)}{rng.choice(LINKS)} {{names}}.".lstrip(),
    )


def pick(rng: Random, choice: tuple[str, ...]) -> str:
    """One of the frames, with one of each of its alternatives."""
    return expand(rng, rng.choice(choice))


def worded(rng: Random, wording: Wording, choice: tuple[str, ...]) -> str:
    """One of the frames of questions; a rough one now and then, if the wording is rough."""
    frame = pick(rng, choice)
    kind = rng.random() if wording.rough else 1.0
    if kind < 0.25:
        return noisy(rng, frame)
    return frame.lower() if kind < 0.32 else frame


NOISE = 0.15  # share of the words that `noisy` replaces


def noisy(rng: Random, frame: str) -> str:
    """The frame with some words replaced by others. So no single word matters to the model."""

    def other(found: re.Match) -> str:
        return rng.choice(words.vocabulary()) if rng.random() < NOISE else found[0]

    return re.sub(r"(?<![{\w])[A-Za-z]{2,}(?![}\w])", other, frame)
