"""Problems made of facts: sentences in the order of the text, and questions that they answer."""

from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from hsa_mini.tasks import words
from hsa_mini.tasks.facts import (
    Fact,
    ask_key,
    ask_several,
    ask_value,
    draw_noun,
    put,
    sentence,
)
from hsa_mini.tasks.frames import (
    asked_frames,
    chain_frames,
    early_frames,
    ruler_frames,
    told_frames,
)
from hsa_mini.tasks.frames.frame import expand
from hsa_mini.tasks.sentences import Question
from hsa_mini.tasks.wordings import HeldOut, Wording, random_chain, worded


@dataclass(frozen=True)
class Told:
    """Sentences in the order of the text, and questions about them.

    follows: question i stands behind sentence follows[i], or later.
    """

    sentences: tuple[str, ...]
    questions: tuple[Question, ...]


def tell_facts(
    rng: Random, wording: Wording, facts: list[Fact], wanted: int, *, most_keys: int = 5
) -> Told:
    """Every fact in a sentence; questions for a value, for a key, or for several values."""
    told = [sentence(rng, wording, fact) for fact in facts]
    left = rng.sample(range(len(facts)), len(facts))
    questions = []
    while left and len(questions) < wanted:
        kind = rng.random()
        number = rng.randint(2, most_keys) if kind < 0.2 else 1
        chosen = [left.pop() for _ in range(min(number, len(left)))]
        needed = tuple(told[i] for i in chosen)
        asked = [facts[i] for i in chosen]
        if len(asked) > 1:
            questions.append(ask_several(rng, wording, asked, needed))
        elif kind < 0.42:
            questions.append(ask_key(rng, wording, asked[0], needed))
        else:
            questions.append(ask_value(rng, wording, asked[0], needed))
    return Told(tuple(told), tuple(questions))


def with_nouns(choice: tuple[str, ...], usual: str) -> tuple[str, ...]:
    """The frames that name the noun, or `usual`."""
    return tuple(frame for frame in choice if "{noun}" in frame) or (usual,)


def tell_attributes(
    rng: Random, wording: Wording, facts: list[Fact], wanted: int, held_out: HeldOut
) -> Told:
    """Each key with two or three nouns, so that the noun decides too."""
    wording = replace(
        wording,
        told=with_nouns(wording.told, told_frames.SENTENCE),
        questions=with_nouns(wording.questions, asked_frames.ASKED),
        leads=with_nouns(wording.leads, asked_frames.LEAD),
    )
    nouns = list({draw_noun(rng, held_out) for _ in range(3)})
    keys = [fact.key for fact in facts]
    facts = [
        replace(fact, noun=nouns[i % len(nouns)], key=keys[i // len(nouns)])
        for i, fact in enumerate(facts)
    ]
    told = [sentence(rng, wording, fact) for fact in facts]
    asked = rng.sample(range(len(facts)), min(wanted, len(facts)))
    questions = tuple(ask_value(rng, wording, facts[i], (told[i],)) for i in asked)
    order = rng.sample(told, len(told))
    return Told(tuple(order), questions)


def tell_updates(
    rng: Random, wording: Wording, facts: list[Fact], wanted: int, *, times: int = 0
) -> Told:
    """Keys that are told two to four times: the latest value is asked for."""
    changed = rng.random() < 0.3
    groups = []
    while facts:
        number = times or rng.choice((1, 2, 2, 3, 4))
        group = facts[:number]
        facts = facts[number:]
        groups.append([replace(fact, key=group[0].key) for fact in group])
    order = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(order)
    left = [list(reversed(group)) for group in groups]
    told = []
    last: dict[int, tuple[Fact, str]] = {}
    for i in order:
        fact = left[i].pop()
        again = wording.updated if changed and i in last else ()
        text = sentence(rng, wording, fact, again)
        told.append(text)
        last[i] = fact, text
    chosen = sorted(last, key=lambda i: -len(groups[i]) + rng.random())[:wanted]
    questions = tuple(ask_value(rng, wording, last[i][0], (last[i][1],)) for i in chosen)
    return Told(tuple(told), questions)


def tell_all_values(rng: Random, wording: Wording, facts: list[Fact], wanted: int) -> Told:
    """Keys with several values: all of them are asked for, in any order.

    HSA knows no positions, so a model can know which values are left, but not which came first.
    """
    groups: list[list[Fact]] = []
    while facts:
        number = rng.choice((1, 2, 3, 4))
        group = facts[:number]
        facts = facts[number:]
        groups.append([replace(fact, key=group[0].key) for fact in group])
    told = [[sentence(rng, wording, fact) for fact in group] for group in groups]
    order = [i for i, group in enumerate(groups) for _ in group]
    rng.shuffle(order)
    left = [iter(group) for group in told]
    questions = []
    for i in rng.sample(range(len(groups)), min(wanted, len(groups))):
        first = groups[i][0]
        question = first.say(worded(rng, wording, wording.all_values))
        lead = first.say(worded(rng, wording, wording.all_leads), values="\0")
        values = ", ".join(fact.value for fact in rng.sample(groups[i], len(groups[i])))
        questions.append(put(rng, question, lead, "\0", values, tuple(told[i])))
    return Told(tuple(next(left[i]) for i in order), tuple(questions))


def tell_early_questions(
    rng: Random, wording: Wording, facts: list[Fact], wanted: int, held_out: HeldOut
) -> Told:
    """Questions among the sentences, and their answers, in whole sentences, at the end.

    Several questions are numbered.
    """
    order = [sentence(rng, wording, fact) for fact in facts]
    told = dict(zip(facts, order))
    asked = rng.sample(facts, min(wanted, len(facts)))
    questions = []
    for number, fact in enumerate(asked, start=1):
        text = fact.say(worded(rng, wording, wording.questions)) or fact.say(asked_frames.ASKED)
        early = worded(rng, wording, early_frames.EARLY.of(held_out.asked)).format(question=text)
        call = worded(rng, wording, early_frames.CALLS.of(held_out.asked))
        if len(asked) > 1:
            early = rng.choice(early_frames.NUMBERED).format(number=number) + text
            call = rng.choice(early_frames.NUMBERED_CALLS).format(number=number)
        early = f"\n{early}\n"
        order.insert(rng.randint(0, len(order)), early)
        answer = fact.say(f" {asked_frames.LEAD}")
        questions.append(Question(f"\n{call}", answer, (told[fact], early)))
    return Told(tuple(order), tuple(questions))


def tell_chains(
    rng: Random, lengths: list[int], wanted: int, held_out: HeldOut, *, form: int | None = None
) -> Told:
    """A value that passes from name to name: all names are asked for, in order.

    The links of a chain keep their order among each other or not.
    """
    forms = [*chain_frames.CHAINS[held_out.told]]
    if held_out.ruler and not held_out.told:
        forms.append(ruler_frames.CHAIN)
    chosen = forms[form] if form is not None else rng.choice(forms)
    head, link, asked, lead = (expand(rng, frame) for frame in chosen)
    if form is None and not held_out.told and rng.random() < 0.4:
        head, link, asked, lead = random_chain(rng)
    kind = rng.choice((words.code, words.code, words.long_code, words.new_word))
    taken: set[str] = set()
    numbers = rng.choice((5, 8, 8))
    told: list[str] = []
    questions = []
    for length in lengths:
        value = words.digits(rng, numbers)
        names = words.distinct(rng, kind, length, held_out.keys, taken)
        steps = [f" {head.format(value=value, a=names[0])}"]
        steps += [f" {link.format(a=a, b=b)}" for a, b in pairwise(names)]
        told += steps
        text = lead.format(value=value, names="\0", count=length)
        question = asked.format(value=value)
        questions.append(put(rng, question, text, "\0", ", ".join(names), tuple(steps)))
    rng.shuffle(told)
    return Told(tuple(told), tuple(rng.sample(questions, min(wanted, len(questions)))))
