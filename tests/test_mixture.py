"""Training sequences: the text before a question holds its answer; every token has the right part.

Dimensions: B batch, T tokens; a sequence has T+1.
"""

import itertools
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from material import read, word_corpus, word_tokens
from torch.utils.data import DataLoader

from hsa_mini.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hsa_mini.tasks.sentences import LETTERS, encode, is_held_out
from hsa_mini.tasks.words import is_reserved
from hsa_mini.training import mixture as module
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.mixture import (
    ANSWER,
    COPY,
    LONG,
    NONE,
    SHARES,
    TEXT,
    Mixture,
    TrainingBatches,
)
from hsa_mini.training.recipes import Recipe, Stage

TOKENIZER = load_tokenizer()
ORDINARY = TOKENIZER.n_vocab - len(SPECIAL_TOKENS)
RECIPES = {"nano": (256, Mixture(min_copy=64)), "mini": (1024, Mixture())}
NEEDLE = rf" The secret code of [{LETTERS}]{{4}} is [0-9]{{6}}\."
LINK = rf" The number (?:of )?\w+ is given to [{LETTERS}]{{4}}\."
SENTENCE = f"{NEEDLE}|{LINK}"
QUESTION = re.compile(r"\n[^\n]*\?\n[^\n]* $")
every_recipe = pytest.mark.parametrize("name", RECIPES)
MIN_AND_MAX_SENTENCES = {
    ("nano", "needle_questions"): (1, 6), ("mini", "needle_questions"): (1, 20),
    ("nano", "chain_questions"): (2, 7), ("mini", "chain_questions"): (2, 12),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", ["needle_questions", "chain_questions"])


def batches(name: str, *, seed=0, batch=4, **changes) -> TrainingBatches:
    tokens, mixture = RECIPES[name]
    mixture = type(mixture)(**{**vars(mixture), **changes})
    return TrainingBatches(
        mixture, batch=batch, tokens=tokens, steps=50, seed=seed, text=word_tokens()
    )


def sequences(name: str, kind: str, count: int = 60, **changes):
    source = batches(name, **changes)
    rng = np.random.default_rng(0)
    return [getattr(source, kind)(rng) for _ in range(count)]


def runs(parts: np.ndarray) -> list[tuple[int, int, int]]:
    """(part, first, end) of every stretch of tokens with the same part."""
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
    return [(int(parts[a]), a, b) for a, b in itertools.pairwise(edges)]


def is_real_text(ids: np.ndarray) -> bool:
    text = word_tokens().tobytes()
    wanted = ids.astype(np.uint16).tobytes()
    place = text.find(wanted)
    while place % 2 and place > 0:
        place = text.find(wanted, place + 1)
    return place >= 0


@every_recipe
def test_a_batch_has_the_stated_shape_and_ordinary_tokens(name):
    for step in range(5):
        ids, parts = batches(name)[step]
        assert ids.shape == parts.shape == (4, RECIPES[name][0] + 1)
        assert (ids.dtype, parts.dtype) == (torch.int64, torch.int8)
        assert ids.min() >= 0 and ids.max() < ORDINARY
        assert set(parts.unique().tolist()) <= {NONE, TEXT, COPY, ANSWER}


@every_recipe
def test_a_batch_is_a_function_of_seed_and_step_alone(name):
    source = batches(name)
    later = source[3]
    sooner = source[1]
    for step, want in ((1, sooner), (3, later)):
        for twin in (batches(name), pickle.loads(pickle.dumps(source))):
            assert all(torch.equal(x, y) for x, y in zip(twin[step], want))
    assert not torch.equal(later[0], sooner[0])
    assert not torch.equal(batches(name, seed=1)[1][0], sooner[0])


def test_worker_processes_draw_the_same_batches():
    source = batches("nano")
    for step, batch in zip(
        (2, 3), DataLoader(source, batch_size=None, sampler=[2, 3], num_workers=1)
    ):
        assert all(torch.equal(x, y) for x, y in zip(batch, source[step]))


def test_without_a_text_the_training_corpus_is_drawn_from(monkeypatch):
    monkeypatch.setattr(module, "load_corpus", word_corpus)
    tokens, mixture = RECIPES["nano"]
    source = TrainingBatches(mixture, batch=1, tokens=tokens, steps=7, seed=0)
    assert np.array_equal(source.text, word_tokens(seed="train")) and len(source) == 7


def asked(ids: np.ndarray, parts: np.ndarray) -> list[tuple[str, str, str]]:
    """(text before the question, question, answer) for every question of a sequence."""
    found = []
    for part, first, last in runs(parts):
        if part == ANSWER:
            text = TOKENIZER.decode(ids[:first].tolist())
            question = QUESTION.search(text)[0]
            found.append(
                (text.removesuffix(question), question, TOKENIZER.decode(ids[first:last].tolist()))
            )
    return found


@every_kind
@every_recipe
def test_an_answer_can_be_read_in_what_stood_before(name, kind):
    counts = []
    total = RECIPES[name][0] + 1
    for ids, parts in sequences(name, kind, 300):
        assert len(ids) == len(parts) == total and parts[-1] == ANSWER
        questions = asked(ids, parts)
        for before, question, answer in questions:
            assert read(before, question) == answer
            keys = re.findall(rf"[{LETTERS}]{{4}}", before + question + answer)
            assert keys and not any(map(is_held_out, keys))
        assert len({question for _, question, _ in questions}) == len(questions) <= 4
        counts.append(len(questions))
    assert min(counts) == 1 and len(set(counts)) > 1


@every_kind
@every_recipe
def test_mostly_few_sentences_are_hidden_and_half_of_a_sequence_is_text(name, kind):
    hidden = []
    total = RECIPES[name][0] + 1
    for ids, parts in sequences(name, kind, 300, made_up=0.0):
        questions = asked(ids, parts)
        told = questions[-1][0]
        # the answer to a question about two needles repeats a sentence, which must not count twice
        for _, question, answer in questions[:-1]:
            told = told.replace(question + answer, "")
        hidden.append(re.findall(SENTENCE, told))
        assert sum(len(encode(sentence)) for sentence in hidden[-1]) <= total // 2
    numbers = sorted(map(len, hidden))
    assert (numbers[0], numbers[-1]) == MIN_AND_MAX_SENTENCES[name, kind]
    assert kind == "chain_questions" or numbers[150] < 6  # mostly few


def test_a_quarter_of_the_questions_asks_for_two_codes():
    questions = [
        q
        for ids, parts in sequences("mini", "needle_questions", 200)
        for _, q, _ in asked(ids, parts)
    ]
    pairs = sum(" and " in question for question in questions)
    # a quarter of the questions for which two needles are left
    assert 0.12 * len(questions) < pairs < 0.3 * len(questions)
    for share, accepted in ((0.0, {False}), (1.0, {False, True})):
        drawn = [asked(*row) for row in sequences("mini", "needle_questions", two_codes=share)]
        assert {
            " and " in question for questions in drawn for _, question, _ in questions
        } == accepted
    # the last questions were drawn with two_codes=1: one code only if there is no second needle
    for questions in drawn:
        needles = len(re.findall(SENTENCE, questions[0][0]))
        assert " and " in questions[0][1] or len(questions) > 1 or needles == 1


def test_links_of_a_chain_come_in_any_order():
    orders = set()
    for ids, parts in sequences("mini", "chain_questions"):
        for before, _, answer in asked(ids, parts):
            places = [
                before.index(f" is given to {name}.")
                for name in answer.removesuffix(".").split(", ")
            ]
            orders.add(tuple(np.argsort(places).tolist()))
    assert orders == {(0, 1), (1, 0), *itertools.permutations(range(3))}


@every_kind
@every_recipe
def test_neither_sentences_nor_questions_count_as_text(name, kind):
    for ids, parts in sequences(name, kind, made_up=0.0):
        stretches = runs(parts)
        for part, first, last in stretches:
            if part == TEXT:
                assert is_real_text(ids[first:last])
            elif part == NONE:
                # adjacent sentences, perhaps followed by a question
                text = TOKENIZER.decode(ids[first:last].tolist())
                assert re.fullmatch(rf"(?:{SENTENCE})*(?:\n.*\?\n.* )?", text), text
        assert (parts == TEXT).sum() >= 0.2 * len(parts)


@every_kind
def test_made_up_text_is_never_a_target(kind):
    for _, parts in sequences("nano", kind, made_up=1.0):
        assert set(parts.tolist()) == {NONE, ANSWER}


def test_keys_that_differ_in_one_letter_are_among_the_needles():
    def distance(a, b):
        return sum(x != y for x, y in zip(a, b))

    near = 0
    # an answer about two needles would repeat a key
    for ids, _ in sequences("mini", "needle_questions", two_codes=0.0):
        keys = re.findall(
            rf" The secret code of ([{LETTERS}]{{4}}) is", TOKENIZER.decode(ids.tolist())
        )
        assert len(set(keys)) == len(keys)
        near += any(distance(a, b) == 1 for i, a in enumerate(keys) for b in keys[:i])
    assert 6 <= near <= 36  # about 0.3 * 60


@every_recipe
def test_a_self_copy_is_the_passage_again(name):
    tokens, mixture = RECIPES[name]
    lengths = []
    for ids, parts in sequences(name, "self_copy"):
        assert len(ids) == len(parts) == tokens + 1
        length = int((parts == COPY).sum())
        assert mixture.min_copy <= length <= (tokens + 1) // 2
        assert np.array_equal(ids[-length:], ids[-2 * length : -length])
        assert (parts[-length:] == COPY).all()
        passage = parts[-2 * length : -length]
        assert (passage == TEXT).all() or (passage == NONE).all()
        assert passage[0] == NONE or is_real_text(ids[-2 * length : -length])
        before = parts[: -2 * length]
        assert (before == TEXT).all() and is_real_text(ids[: len(before)])
        lengths.append(length)
    assert max(lengths) - min(lengths) > 0.5 * ((tokens + 1) // 2 - mixture.min_copy)


def test_the_kinds_come_in_the_stated_shares():
    source = batches("nano", self_copy=0.3, needles=0.4, chains=0.2)
    rng = np.random.default_rng(0)
    kinds = []
    for _ in range(600):
        ids, parts = source.sequence(rng)
        about = "chains" if " is given to " in TOKENIZER.decode(ids.tolist()) else "needles"
        kinds.append(
            "copy" if (parts == COPY).any() else about if (parts == ANSWER).any() else "text"
        )
    shares = [kinds.count(kind) / 600 for kind in ("copy", "needles", "chains", "text")]
    assert np.allclose(shares, (0.3, 0.4, 0.2, 0.1), atol=0.06)


@every_recipe
def test_made_up_text_is_of_several_kinds(name):
    source = batches(name)
    rng = np.random.default_rng(0)
    distinct = []
    for _ in range(80):
        ids = source.made_up(rng, 500)
        assert len(ids) == 500 and ids.min() >= 0 and ids.max() < ORDINARY
        distinct.append(len(np.unique(ids)))
    assert min(distinct) <= 5 and max(distinct) >= 400


def test_a_fifth_of_made_up_haystacks_are_nothing_but_needles():
    full = 0
    for ids, parts in sequences("mini", "needle_questions", 200, made_up=1.0, max_needles=1):
        before, _, _ = asked(ids, parts)[-1]
        needles = re.findall(r" The secret code of (\w{4}) is (\d{6})\.", before)
        full += len(needles) > 30
        assert not any(is_held_out(key) for key, _ in needles)
    assert 20 < full < 60


@every_recipe
def test_facts_fill_a_sequence_and_its_answers_follow_from_the_text(name):
    """Nine of ten words of the answers stood in the text before them."""
    known = []
    for ids, parts in sequences(name, "fact_questions", 60, made_up=0.0):
        assert len(ids) == len(parts) == RECIPES[name][0] + 1 and parts[-1] == ANSWER
        assert set(parts.tolist()) <= {NONE, TEXT, ANSWER}
        for part, first, last in runs(parts):
            if part == ANSWER:
                before = TOKENIZER.decode(ids[:first].tolist())
                found = re.findall(r"\w+", TOKENIZER.decode(ids[first:last].tolist()))
                known += [word in before for word in found]
    assert len(known) > 200 and np.mean(known) > 0.9


@every_recipe
def test_the_answer_to_a_span_stood_in_the_text_behind_it(name):
    for ids, parts in sequences(name, "span_questions", 40):
        assert len(ids) == len(parts) == RECIPES[name][0] + 1
        text = ids[parts == TEXT].tobytes()
        answers = [ids[a:b] for part, a, b in runs(parts) if part == ANSWER]
        assert answers and all(answer.tobytes() in text for answer in answers)
        assert is_real_text(ids[parts == TEXT])


def test_shares_decide_how_often_each_kind_is_drawn():
    source = batches("nano", self_copy=0.0, needles=0.0, chains=0.0, facts=0.5, spans=0.3)
    drawn = {}
    for kind in ("fact_questions", "span_questions", "real_text"):
        method = getattr(source, kind)

        def counted(*args, kind=kind, method=method):
            drawn[kind] = drawn.get(kind, 0) + (len(args) == 1 or args[1] == source.tokens + 1)
            return method(*args)

        setattr(source, kind, counted)
    rng = np.random.default_rng(0)
    for _ in range(300):
        source.sequence(rng)
    assert drawn["fact_questions"] == pytest.approx(150, abs=30)
    assert drawn["span_questions"] == pytest.approx(90, abs=25)


@pytest.mark.parametrize("kind", LONG)
def test_rows_for_long_tasks_hold_what_their_answers_say(kind):
    source = batches("mini", **{**ALONE, kind: 1.0}, made_up=0.0)
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(60):
        ids, parts = source.sequence(rng)
        assert ids.shape == parts.shape == (1025,)
        answers = [(first, end) for part, first, end in runs(parts) if part == ANSWER]
        lengths.append(len(answers))
        assert set(parts) <= {NONE, TEXT, ANSWER}
        for part, first, end in runs(parts):
            if part == TEXT:
                assert is_real_text(ids[first:end])
        for first, end in answers:
            before = TOKENIZER.decode(ids[:first].tolist())
            said = TOKENIZER.decode(ids[first:end].tolist())
            for word in re.findall(r"[\w-]{2,}", said.replace(" and ", " ")):
                assert word in before
    assert min(lengths) >= 1 and max(lengths) > 1


def test_rows_of_ruler_hold_every_form_and_no_word_of_its_evaluation():
    source = batches("mini", **{**ALONE, "ruler": 1.0})
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(150):
        ids, parts = source.sequence(rng)
        text = TOKENIZER.decode(ids.tolist())
        (first, end), *_ = [(a, b) for part, a, b in runs(parts) if part == ANSWER]
        question = TOKENIZER.decode(ids[:first].tolist()).rsplit("\n", 1)[1]
        found.add(re.sub(r" for .* mentioned| value \d+| words? in the list.*", "", question)[:40])
        keys = re.findall(r"special magic \w+ for ([a-z]+)-([a-z]+) ", text)
        assert not any(is_reserved(word) for pair in keys for word in pair)
        if "VAR " in text:
            value = re.findall(r"assigned the value (\d{5}) in", text)[0]
            names = TOKENIZER.decode(ids[first:end].tolist()).split()
            links = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w{5})", text))
            assert links[names[0]] == value and len(names) == 5
            assert all(links[b] == a for a, b in itertools.pairwise(names))
        if "coded word" in question:
            body = text.split("coded words. ")[1].split("\nQuestion")[0]
            counts = Counter(word for word in body.split() if word != "...")
            answers = re.findall(r"[a-z]{6}", TOKENIZER.decode(ids[first:end].tolist()))
            assert [word for word, _ in counts.most_common(1)] == answers[:1]
    assert len(found) >= 6


def test_a_loop_over_batches_ends():
    source = batches("nano", batch=1)
    source.steps = 3
    assert len(list(source)) == len(source) == 3
    for step in (-1, 3):
        with pytest.raises(IndexError, match=f"^step: got {step}, accepted is 0 to 2$"):
            source[step]


def test_a_loop_over_the_batches_of_a_recipe_ends(monkeypatch):
    monkeypatch.setattr(module, "load_corpus", word_corpus)
    stages = (Stage(2, 1, 64, mixture=Mixture()), Stage(1, 2, 80, mixture=Mixture()))
    source = StagedBatches(Recipe(stages), seed=0)
    assert [tuple(ids.shape) for ids, _ in source] == [(1, 65), (1, 65), (2, 81)]
    assert len(source) == 3


ALONE = dict.fromkeys(SHARES, 0.0)
KINDS = {
    "self_copy": 1,
    "needles": 51,
    "chains": 102,
    "facts": 160,
    "spans": 160,
    "ruler": 512,
    **dict.fromkeys(("stories", "threads", "notes"), 160),
}  # the fewest tokens that the kind takes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made_up", [0.0, 1.0])
def test_sequences_of_every_length_can_be_drawn_from_a_text_of_their_length(kind, made_up):
    mixture = Mixture(**ALONE | {kind: 1.0}, made_up=made_up, two_codes=1.0)
    for tokens in (*range(KINDS[kind], KINDS[kind] + 90), 600):
        text = word_tokens()[: tokens + 1]
        source = TrainingBatches(mixture, batch=6, tokens=tokens, steps=1, seed=tokens, text=text)
        ids, parts = source[0]
        assert ids.shape == parts.shape == (6, tokens + 1)
        assert (parts == (COPY if kind == "self_copy" else ANSWER)).any(dim=1).all()


def test_plain_text_may_be_exactly_one_sequence():
    text = word_tokens()[:33]
    source = TrainingBatches(Mixture(**ALONE), batch=2, tokens=32, steps=1, seed=0, text=text)
    assert (source[0][0].numpy() == text).all()


@pytest.mark.parametrize(
    "name, changes",
    [
        *(("tokens", dict(mixture=Mixture(**ALONE | {kind: 0.5}), tokens=fewest - 1))
          for kind, fewest in KINDS.items()),
        ("text", dict(text=word_tokens()[:256])),
        ("text", dict(text=word_tokens()[:0])),
        ("batch", dict(batch=0)),
        ("batch", dict(batch=2.0)),
        ("tokens", dict(tokens=-5)),
        ("steps", dict(steps=-1)),
        ("seed", dict(seed=-1)),
        ("seed", dict(seed="0")),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_drawn_are_refused_by_name(name, changes):
    right = dict(mixture=Mixture(), batch=1, tokens=256, steps=1, seed=0, text=word_tokens()[:1000])
    with pytest.raises(ValueError, match=f"^{name}: got .*, accepted (is|are) "):
        TrainingBatches(**right | changes)


@pytest.mark.parametrize(
    "changes",
    [
        *({name: value} for name in (*SHARES, "two_codes", "made_up")
          for value in (-0.1, 1.1, float("nan"), "1", True)),
        *({name: value} for name in ("max_needles", "max_chains", "max_questions", "min_copy")
          for value in (0, -1, 1.5, True)),
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_a_mixture_has_bounds(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name}: got "):
        Mixture(**changes)


def test_shares_above_one_are_refused():
    with pytest.raises(ValueError, match=r"^self_copy \+ .* \+ notes: got 1.1"):
        Mixture(self_copy=0.5, needles=0.4, chains=0.2)
