"""Training sequences: every answer can be read in what stands before it, and every token has the right part in the loss.

Dimensions: B batch, T tokens; a sequence has T+1.
"""

import pickle
import re

import numpy as np
import pytest
import torch
from material import word_corpus, word_tokens
from torch.utils.data import DataLoader

from hsa_mini.data import mixture as module
from hsa_mini.data.mixture import ANSWER, COPY, NONE, TEXT, Mixture, TrainingBatches
from hsa_mini.data.tasks import LETTERS, NeedleTask
from hsa_mini.data.tokenizer import SPECIAL_TOKENS, load_tokenizer

TOKENIZER = load_tokenizer()
TASK = NeedleTask(TOKENIZER)
ORDINARY = TOKENIZER.n_vocab - len(SPECIAL_TOKENS)
ANSWER_TOKENS = 7
RECIPES = {"nano": (256, Mixture(copy_least=64)), "mini": (1024, Mixture())}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def batches(name: str, *, seed=0, batch=4, **changes) -> TrainingBatches:
    tokens, mixture = RECIPES[name]
    mixture = type(mixture)(**{**vars(mixture), **changes})
    return TrainingBatches(mixture, batch=batch, tokens=tokens, steps=50, seed=seed, text=word_tokens())


def sequences(name: str, kind: str, count: int = 60, **changes):
    source, rng = batches(name, **changes), np.random.default_rng(0)
    return [getattr(source, kind)(rng) for _ in range(count)]


def runs(parts: np.ndarray) -> list[tuple[int, int, int]]:
    """(part, first, last) of every stretch of one part."""
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(parts)]
    return [(int(parts[a]), a, b) for a, b in zip(edges, edges[1:])]


def is_real_text(ids: np.ndarray) -> bool:
    text, wanted = word_tokens().tobytes(), ids.astype(np.uint16).tobytes()
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
        assert 0 <= ids.min() and ids.max() < ORDINARY
        assert set(parts.unique().tolist()) <= {NONE, TEXT, COPY, ANSWER}


@every_recipe
def test_a_batch_is_a_function_of_seed_and_step_alone(name):
    source = batches(name)
    later, sooner = source[3], source[1]
    for step, want in ((1, sooner), (3, later)):
        for twin in (batches(name), pickle.loads(pickle.dumps(source))):
            assert all(torch.equal(x, y) for x, y in zip(twin[step], want))
    assert not torch.equal(later[0], sooner[0])
    assert not torch.equal(batches(name, seed=1)[1][0], sooner[0])


def test_worker_processes_draw_the_same_batches():
    source = batches("nano")
    for step, batch in zip((2, 3), DataLoader(source, batch_size=None, sampler=[2, 3], num_workers=1)):
        assert all(torch.equal(x, y) for x, y in zip(batch, source[step]))


def test_without_a_text_the_training_corpus_is_drawn_from(monkeypatch):
    monkeypatch.setattr(module, "load_corpus", word_corpus)
    tokens, mixture = RECIPES["nano"]
    source = TrainingBatches(mixture, batch=1, tokens=tokens, steps=7, seed=0)
    assert np.array_equal(source.text, word_tokens(seed="train")) and len(source) == 7


@every_recipe
def test_an_answer_is_the_value_of_the_key_asked_and_stood_before(name):
    form = re.compile(rf" The secret code of ([{LETTERS}]{{4}}) is ([0-9]{{6}})\.")
    asked = re.compile(rf"\nWhat is the secret code of ([{LETTERS}]{{4}})\?\nThe secret code of \1 is $")
    questions, needles = [], []
    for ids, parts in sequences(name, "needle_questions"):
        total = RECIPES[name][0] + 1
        assert len(ids) == len(parts) == total
        answers = [(first, last) for part, first, last in runs(parts) if part == ANSWER]
        assert answers[-1][1] == total and 1 <= len(answers) <= 4
        for first, last in answers:
            assert last - first == ANSWER_TOKENS
            question = TOKENIZER.decode(ids[first - TASK.question_tokens : first].tolist())
            key = asked.search(question).group(1)
            told = form.findall(TOKENIZER.decode(ids[: first - TASK.question_tokens].tolist()))
            assert [value for k, value in told if k == key] == [TOKENIZER.decode(ids[first : last - 1].tolist())]
            assert TOKENIZER.decode(ids[last - 1 : last].tolist()) == "."
        questions.append(len(answers))
        needles.append(len(form.findall(TOKENIZER.decode(ids.tolist()))))
    most = min(20, (RECIPES[name][0] + 1) // 2 // TASK.sentence_tokens)
    assert min(needles) == 1 and 0.9 * most < max(needles) <= most and sorted(needles)[len(needles) // 2] < 6  # mostly few
    assert len(set(questions)) > 1


@every_recipe
def test_neither_needles_nor_questions_count_as_text(name):
    for ids, parts in sequences(name, "needle_questions", made_up=0.0):
        spent = 0
        for part, first, last in runs(parts):
            if part == TEXT:
                assert is_real_text(ids[first:last])
            elif part == NONE:
                spent += last - first
        answers = (parts == ANSWER).sum() // ANSWER_TOKENS
        needles = TOKENIZER.decode(ids.tolist()).count(" The secret code of ")
        assert spent == needles * TASK.sentence_tokens + answers * TASK.question_tokens
        assert (parts == TEXT).sum() >= 0.25 * len(parts)


def test_made_up_text_is_never_a_target():
    for ids, parts in sequences("nano", "needle_questions", made_up=1.0):
        assert set(parts.tolist()) == {NONE, ANSWER}


def test_keys_that_differ_in_one_letter_are_among_the_needles():
    def distance(a, b):
        return sum(x != y for x, y in zip(a, b))

    near = 0
    for ids, _ in sequences("mini", "needle_questions"):
        keys = re.findall(rf" The secret code of ([{LETTERS}]{{4}}) is", TOKENIZER.decode(ids.tolist()))
        assert len(set(keys)) == len(keys)
        near += any(distance(a, b) == 1 for i, a in enumerate(keys) for b in keys[:i])
    assert 6 <= near <= 36  # about three in ten of sixty


@every_recipe
def test_a_self_copy_is_the_passage_again(name):
    tokens, mixture = RECIPES[name]
    lengths = []
    for ids, parts in sequences(name, "self_copy"):
        assert len(ids) == len(parts) == tokens + 1
        length = int((parts == COPY).sum())
        assert mixture.copy_least <= length <= (tokens + 1) // 2
        assert np.array_equal(ids[-length:], ids[-2 * length : -length])
        assert (parts[-length:] == COPY).all()
        passage = parts[-2 * length : -length]
        assert (passage == TEXT).all() or (passage == NONE).all()
        assert passage[0] == NONE or is_real_text(ids[-2 * length : -length])
        before = parts[: -2 * length]
        assert (before == TEXT).all() and is_real_text(ids[: len(before)])
        lengths.append(length)
    assert max(lengths) - min(lengths) > 0.5 * ((tokens + 1) // 2 - mixture.copy_least)


def test_the_three_kinds_come_in_the_stated_shares():
    source, rng = batches("nano", self_copy=0.3, needles=0.5), np.random.default_rng(0)
    kinds = []
    for _ in range(600):
        _, parts = source.sequence(rng)
        kinds.append("copy" if (parts == COPY).any() else "needles" if (parts == ANSWER).any() else "text")
    shares = [kinds.count(kind) / 600 for kind in ("copy", "needles", "text")]
    assert np.allclose(shares, (0.3, 0.5, 0.2), atol=0.06)


@every_recipe
def test_made_up_text_is_of_several_kinds(name):
    source, rng = batches(name), np.random.default_rng(0)
    distinct = []
    for _ in range(80):
        ids = source.made_up(rng, 500)
        assert len(ids) == 500 and 0 <= ids.min() and ids.max() < ORDINARY
        distinct.append(len(np.unique(ids)))
    assert min(distinct) <= 5 and max(distinct) >= 400
