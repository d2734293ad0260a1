"""Facts in many forms: an answer follows from the text, held-out forms and words stay held out.

A frame's slots are {noun}, {key} and {value}; `expand` chooses among its alternatives.
"""

import itertools
import re
from random import Random

import pytest

from hsa_mini.tasks import tellings as t
from hsa_mini.tasks import words
from hsa_mini.tasks.facts import draw_facts, plural
from hsa_mini.tasks.frames import asked_frames, early_frames, told_frames
from hsa_mini.tasks.frames.frame import expand
from hsa_mini.tasks.rows import draw_told
from hsa_mini.tasks.sentences import encode, is_held_out
from hsa_mini.tasks.wordings import SOURCES, HeldOut, draw_wording, random_chain, random_sentence

ALL = HeldOut(keys=True, nouns=True, told=True, asked=True)
SPLITS = (
    told_frames.NOUN, told_frames.TOLD, told_frames.TOLD_IN_DIGITS, told_frames.UPDATED,
    told_frames.OPENINGS, asked_frames.QUESTION, asked_frames.LEADS, asked_frames.REVERSED,
    asked_frames.REVERSED_LEADS, asked_frames.SEVERAL, asked_frames.ALL_VALUES,
    early_frames.EARLY, early_frames.CALLS,
)  # fmt: skip


def problem(rng: Random, held_out: HeldOut, tell: str = "tell_facts", told="declared", **options):
    """Eight facts, and what `tell` makes of them."""
    values = words.draw_kind(rng, words.VALUES)
    in_digits = values in words.OF_DIGITS
    wording = draw_wording(rng, held_out, in_digits=in_digits, told=told, asked=told)
    facts = draw_facts(rng, 8, held_out, values=values)
    if tell in ("tell_attributes", "tell_early_questions"):
        options["held_out"] = held_out
    return facts, getattr(t, tell)(rng, wording, facts, 3, **options)


def test_every_question_continues_into_its_answer_token_by_token():
    for seed in range(300):
        for question in draw_told(Random(seed), 12).questions:
            whole = encode(question.text + question.answer).tolist()
            assert whole == encode(question.text).tolist() + encode(question.answer).tolist()


@pytest.mark.parametrize("told", SOURCES)
@pytest.mark.parametrize("held_out", [HeldOut(), HeldOut(keys=True)], ids=["training", "keys"])
def test_an_answer_stands_in_the_sentences_that_it_needs(told, held_out):
    for seed in range(60):
        facts, found = problem(Random(seed), held_out, told=told)
        assert len(found.sentences) == len(facts) and 1 <= len(found.questions) <= 3
        for question in found.questions:
            asked = [f for f in facts if any(f.value in s and f.key in s for s in question.needed)]
            assert len(asked) >= len(question.needed) >= 1
            assert set(question.needed) <= set(found.sentences)
            for sentence in question.needed:
                (fact,) = [f for f in asked if f.key in sentence and f.value in sentence][:1]
                assert fact.value in question.answer or fact.key in question.answer


def test_a_key_and_a_value_stand_in_one_sentence_only():
    for seed in range(60):
        facts, found = problem(Random(seed), HeldOut())
        assert len({fact.key for fact in facts} | {fact.value for fact in facts}) == 2 * len(facts)
        assert len(set(found.sentences)) == len(facts)


@pytest.mark.parametrize("times", [2, 4])
def test_the_latest_value_of_a_key_is_asked_for(times):
    for seed in range(60):
        facts, found = problem(Random(seed), HeldOut(), "tell_updates", times=times)
        for question in found.questions:
            (needed,) = question.needed
            key = next(f.key for f in facts[::times] if f.key in needed)
            about = [s for s in found.sentences if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", s)]
            assert len(about) == times and about[-1] == needed
            (value,) = [f.value for f in facts if f.value in needed and f.value in question.answer][
                :1
            ]
            assert not any(value in s for s in about[:-1] if len(value) > 3)


def test_all_values_of_a_key_are_named_in_any_order():
    in_order = 0
    several = 0
    for seed in range(120):
        facts, found = problem(Random(seed), HeldOut(), "tell_all_values")
        for question in found.questions:
            needed = [
                f.value for s in question.needed for f in facts if f.value in s and len(f.value) > 3
            ]
            if len(needed) != len(question.needed) or len(needed) < 2:
                continue
            places = [question.answer.find(value) for value in needed]
            assert min(places) >= 0
            several += 1
            in_order += places == sorted(places)
    assert 0 < in_order < several


def test_the_noun_decides_between_the_values_of_one_key():
    for seed in range(60):
        _, found = problem(Random(seed), HeldOut(), "tell_attributes")
        assert len(set(found.sentences)) == len(found.sentences)
        assert all(len(question.needed) == 1 for question in found.questions)


def test_an_early_question_stands_in_the_text_and_its_answer_repeats_the_sentence():
    for seed in range(60):
        facts, found = problem(Random(seed), HeldOut(), "tell_early_questions")
        for question in found.questions:
            sentence, early = question.needed
            assert {sentence, early} <= set(found.sentences)
            fact = next(f for f in facts if f.say(f" {asked_frames.LEAD}") == question.answer)
            assert fact.key in early and fact.key not in question.text


def test_a_chain_names_its_links_in_order():
    for seed in range(120):
        found = t.tell_chains(Random(seed), [4, 3, 5], 3, HeldOut())
        for question in found.questions:
            names = re.split(", ", question.answer.strip(' .\n"'))
            assert len(names) == len(question.needed)
            assert names[0] in question.needed[0]
            for (a, b), link in zip(itertools.pairwise(names), question.needed[1:]):
                assert a in link and b in link and link in found.sentences


def test_held_out_frames_and_nouns_never_occur_in_training():
    for split in SPLITS:
        assert split.held_out and set(split.training).isdisjoint(split.held_out)
    # A frame without its slots would betray itself in training text.
    skeletons = [
        re.compile(".+".join(map(re.escape, re.split(r"\{\w+\}", frame.strip()))))
        for split in (
            told_frames.TOLD,
            told_frames.TOLD_IN_DIGITS,
            asked_frames.QUESTION,
            asked_frames.REVERSED,
            early_frames.CALLS,
        )
        for frame in split.held_out
        if len(re.sub(r"\{\w+\}", "", frame)) > 12
    ]
    for seed in range(300):
        told = draw_told(Random(seed), 12)
        for text in (*told.sentences, *(question.text for question in told.questions)):
            assert not any(skeleton.fullmatch(text.strip()) for skeleton in skeletons), text


def test_keys_and_words_of_training_and_evaluation_have_nothing_in_common():
    drawn_at_random = {words.number, words.date, words.amount, words.uuid, words.phrase}
    for kind in (words.KEYS | words.VALUES).keys() - drawn_at_random:
        rng = Random(0)
        training = {kind(rng, False) for _ in range(400)}
        held_out = {kind(rng, True) for _ in range(400)}
        assert training.isdisjoint(held_out), kind.__name__
    assert not any(map(words.is_reserved, words.split(words.NOUNS, False)))
    assert all(is_held_out(words.code(Random(i), True)) for i in range(20))


def test_held_out_problems_use_held_out_frames_keys_and_nouns_alone():
    nouns = set(told_frames.NOUN.held_out)
    for seed in range(60):
        facts, found = problem(Random(seed), ALL)
        assert {fact.noun for fact in facts} <= nouns
        leads = [
            ".+".join(
                map(re.escape, re.split(r"\{noun\}|\{key\}", lead.split("{value}")[0].strip()))
            )
            for lead in (*asked_frames.LEADS.held_out, "That {noun} was stated for", "Reply:")
        ]
        for question in found.questions:
            if len(question.needed) == 1:
                assert any(re.search(lead, question.text) for lead in leads), question.text


def test_the_same_seed_draws_the_same_problem():
    assert draw_told(Random(5), 20) == draw_told(Random(5), 20) != draw_told(Random(6), 20)


def test_random_frames_hold_every_slot_once():
    for seed in range(100):
        rng = Random(seed)
        sentence = random_sentence(rng, seed % 2 == 0)
        assert sentence.count("{key}") == sentence.count("{value}") == 1
        head, link, asked, lead = random_chain(rng)
        assert head.count("{value}") == head.count("{a}") == 1
        assert link.count("{a}") == link.count("{b}") == 1
        assert "{value}" in asked and lead.count("{names}") == 1


def test_every_alternative_of_a_frame_can_be_drawn():
    drawn = {expand(Random(i), "a «b|c«d|e»» f") for i in range(60)}
    assert drawn == {"a b f", "a cd f", "a ce f"}


@pytest.mark.parametrize(
    "noun, many", [("code", "codes"), ("address", "addresses"), ("salary", "salaries"),
    ("birthday", "birthdays")],
)  # fmt: skip
def test_plurals(noun, many):
    assert plural(noun) == many
