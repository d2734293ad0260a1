"""A haystack that is encoded once gives the answers of encoding every sample anew; counts are true.

Dimensions: T tokens, S=4 chunk size, W=8 window: TINY, whose lower decoder reaches 14 tokens back.
"""

import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from material import TINY, tiny, word_corpus, word_tokens

from hsa_mini import HSAModel
from hsa_mini.evaluation import haystack as haystack_module
from hsa_mini.evaluation import runner
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.results import CONTROLS, ControlRow, RetrievalRow, read_results
from hsa_mini.evaluation.retrievals import chunks_retrieved
from hsa_mini.evaluation.runner import ask_one
from hsa_mini.evaluation.statistics import by_length, cluster_interval, wilson_interval
from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.generate import generate
from hsa_mini.memory.chunk_store import ChunkStore
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.provenance import write_results
from hsa_mini.tasks.forms import MAX_DISTRACTORS, TASKS, Problem
from hsa_mini.tasks.needles import ask, draw_needles
from hsa_mini.tasks.placement import Sample, place, tile
from hsa_mini.tasks.sentences import encode
from hsa_mini.training.mixture import Mixture, TrainingBatches

S = TINY.chunk_size
PROBLEMS = {task: draw(np.random.default_rng(0)) for task, draw in TASKS.items()}
MIN_TOKENS = max(problem.min_tokens(TINY.chunk_size, TINY.window) for problem in PROBLEMS.values())
SENTENCE = len(encode(PROBLEMS["s_niah"].sentences[0]))
QUESTION = len(encode(PROBLEMS["s_niah"].question.text))
every_task = pytest.mark.parametrize("task", TASKS)
MODEL = tiny(torch.float64)


def haystack(model, tokens: int) -> Haystack:
    return Haystack(model, torch.from_numpy(tile(word_tokens(), tokens).astype(np.int64)))


def draw(seed: int, tokens: int, depth: float, task="s_niah", distractors=0, **options) -> Sample:
    rng = np.random.default_rng(seed)
    problem = TASKS[task](rng, distractors=distractors)
    return place(
        rng, problem, tokens=tokens, depth=depth, chunk_size=S, window=TINY.window, **options
    )


def placed(tokens: int, places: list[int]) -> Sample:
    """Needles at `places`, then the question."""
    needles = draw_needles(np.random.default_rng(0), len(places), held_out=True)
    problem = Problem(tuple(needle.sentence for needle in needles), ask(needles[:1]))
    patches = [(place, encode(sentence)) for place, sentence in zip(places, problem.sentences)]
    patches.append((tokens - QUESTION, encode(problem.question.text)))
    return Sample(problem, tokens, 0.0, places[0], tuple(patches), encode(problem.question.answer))


def contents(asked: Haystack) -> list[torch.Tensor]:
    chunks = asked.memory.chunks
    tensors = (chunks.k, chunks.v, chunks.landmarks, asked.text)
    return [x.clone() for x in tensors] + [torch.tensor(asked.memory.position)]


def assert_as_from_scratch(asked: Haystack, sample: Sample) -> None:
    """The answer is the same, and in every HSA layer the queries, choices and weights of the whole
    tail.

    Afterwards the haystack is unchanged.
    """
    before = contents(asked)
    got = asked.ask(sample, answer_tokens=9)
    assert all(torch.equal(x, y) for x, y in zip(contents(asked), before))
    ids = torch.from_numpy(sample.apply(asked.text.numpy()))[None]
    want = generate(asked.model, ids, max_new_tokens=9)
    assert torch.equal(got.ids, want.ids)
    assert got.memory.position == want.memory.position
    assert len(got.memory.chunks) == len(want.memory.chunks)
    for a, b in zip(got.first.retrievals, want.first.retrievals, strict=True):
        assert a.queries.shape == b.queries.shape
        assert torch.allclose(a.queries, b.queries, rtol=0, atol=1e-9)
        order = a.indices.argsort(-1)
        twin = b.indices.argsort(-1)
        assert torch.equal(a.indices.gather(-1, order), b.indices.gather(-1, twin))
        assert torch.allclose(
            a.weights.gather(-1, order), b.weights.gather(-1, twin), rtol=0, atol=1e-9
        )
    assert chunks_retrieved(got.first) == chunks_retrieved(want.first)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(top_k=300),  # reads every chunk, so a chunk that was not encoded again would show
        dict(query_block=4, top_k=300),
        dict(exclude_window=True, query_block=2),
        dict(residual="bypass", lower_layers=3, groups=1),
        dict(window=3),
    ],
    ids=str,
)
def test_asking_equals_encoding_from_scratch(changes):
    model = tiny(torch.float64, **changes)
    for tokens in (MIN_TOKENS + 300, MIN_TOKENS + 303):
        asked = haystack(model, tokens)
        for seed, (task, depth) in enumerate(itertools.product(TASKS, (0.0, 0.37, 1.0))):
            assert_as_from_scratch(asked, draw(seed, tokens, depth, task, absent=depth == 0.37))


ALL = tiny(torch.float64, top_k=300)


@pytest.mark.parametrize("tokens", [400, 402])
def test_needles_near_each_other_and_at_the_borders(tokens):
    n = SENTENCE
    body = tokens - QUESTION
    asked = haystack(ALL, tokens)
    for places in (
        [0, n, 2 * n],  # one after another from the first token on
        [S * 10, S * 10 + n],  # at the start of a chunk
        [S * 10 - 1, S * 10 + n + 1],  # across chunks, a token apart
        [S * 10 - n, S * 20],  # at the end of a chunk
        # as far apart as the lower decoder reaches
        [100, 100 + n + TINY.lower_reach, 100 + 2 * (n + TINY.lower_reach) + 1],
        [body - n],  # in front of the question
        [body - 2 * n, body - n],
        [200, 40],  # in no particular order
    ):
        assert_as_from_scratch(asked, placed(tokens, places))


SHARED = haystack(ALL, 333)


@settings(max_examples=12)
@given(st.lists(st.integers(0, 333 - QUESTION - SENTENCE), min_size=1, max_size=5, unique=True))
def test_needles_anywhere(places):
    apart = [p for i, p in enumerate(places) if all(abs(p - q) >= SENTENCE for q in places[:i])]
    assert_as_from_scratch(SHARED, placed(333, apart))


def test_one_haystack_answers_many_questions_as_if_each_were_the_first():
    tokens = MIN_TOKENS + 200
    asked = haystack(MODEL, tokens)
    samples = [draw(seed, tokens, depth) for seed, depth in enumerate((0.0, 0.5, 1.0, 0.25))]
    first = [asked.ask(sample, answer_tokens=7).ids for sample in samples]
    for sample, ids in reversed(list(zip(samples, first))):
        assert torch.equal(asked.ask(sample, answer_tokens=7).ids, ids)
        assert torch.equal(haystack(MODEL, tokens).ask(sample, answer_tokens=7).ids, ids)


def test_the_needle_is_what_the_model_reads():
    """Without the needle the weights differ, so the comparison above is not one of two blind
    readers.
    """
    tokens = MIN_TOKENS + 200
    asked = haystack(MODEL, tokens)
    sample = draw(0, tokens, 0.5)
    with_needle = asked.ask(sample, answer_tokens=1).first
    without = asked.ask(draw(0, tokens, 0.5, absent=True), answer_tokens=1).first
    assert torch.equal(
        with_needle.retrievals[0].queries[:, -1], without.retrievals[0].queries[:, -1]
    )
    assert not torch.equal(with_needle.retrievals[0].weights, without.retrievals[0].weights)


@every_task
@pytest.mark.parametrize("options", [dict(distractors=64), dict(border=True)], ids=str)
def test_harder_samples_equal_encoding_from_scratch(task, options):
    tokens = MIN_TOKENS + 64 * 2 * 22
    asked = haystack(ALL, tokens)
    sample = draw(0, tokens, 0.6, task, **options)
    assert len(sample.patches) == 7 + options.get("distractors", 0)
    assert_as_from_scratch(asked, sample)


@pytest.mark.parametrize("segment", [4, 20])
def test_long_stretches_are_encoded_again_in_parts(monkeypatch, segment):
    asked = haystack(ALL, MIN_TOKENS)
    sample = draw(0, MIN_TOKENS, 0.5)
    whole = asked._touched(sample)
    monkeypatch.setattr(haystack_module, "SEGMENT", segment)
    parts = asked._touched(sample)
    assert [i for part in parts for i in range(*part)] == [
        i for part in whole for i in range(*part)
    ]
    assert len(parts) > len(whole) and all((last - first) * S <= segment for first, last in parts)
    assert_as_from_scratch(asked, sample)


@every_task
def test_a_shuffled_memory_is_that_of_the_other_sample(task):
    """The chunks are those of the other sample's text. The answer starts from the sample's own last
    tokens.
    """
    tokens = MIN_TOKENS + 200
    asked = haystack(ALL, tokens)
    sample = draw(0, tokens, 0.5, task)
    other = draw(1, tokens, 0.5, task)
    before = contents(asked)
    got = asked.ask(sample, answer_tokens=1, remembered=other)
    assert all(torch.equal(x, y) for x, y in zip(contents(asked), before))
    with torch.no_grad():
        chunks = ALL(torch.from_numpy(other.apply(asked.text.numpy()))[None]).memory.chunks
        want = Haystack(ALL, asked.text.clone())
        want.memory.chunks.replace(0, chunks.k, chunks.v, chunks.landmarks)
        with want._written(sample):
            tail = want._read_tail()
    for a, b in zip(got.first.retrievals, tail.aux.retrievals, strict=True):
        assert torch.allclose(a.queries, b.queries, rtol=0, atol=1e-9)
        assert torch.allclose(
            a.weights.sort(-1).values, b.weights.sort(-1).values, rtol=0, atol=1e-9
        )
    own = asked.ask(sample, answer_tokens=1).first
    assert torch.equal(own.retrievals[0].queries[:, -1], got.first.retrievals[0].queries[:, -1])
    assert not torch.equal(own.retrievals[0].weights[:, -1], got.first.retrievals[0].weights[:, -1])


INTERRUPTIBLE = (
    (HSAModel, "lower_decoder"),
    (HSAModel, "upper_decoder"),
    (HSAModel, "logits"),
    (ChunkEncoder, "forward"),
    (ChunkStore, "copy"),
    (ChunkStore, "replace"),
    (DecodeStep, "__call__"),
)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_question_interrupted_at_any_call_leaves_text_and_memory_as_they_were(monkeypatch, when):
    """Ctrl-C arrives before or after the n-th call of the functions above, for every n: also while
    the memory is restored.
    """
    tokens = MIN_TOKENS + 200
    asked = haystack(ALL, tokens)
    question = dict(answer_tokens=3, remembered=draw(1, tokens, 0.5))
    sample = draw(0, tokens, 0.5)
    want = asked.ask(sample, **question).ids
    before = contents(asked)
    calls: list[str] = []
    interrupted = 0  # the number of the call that Ctrl-C interrupts

    def interruptible(name, function):
        def call(*arguments, **options):
            calls.append(name)
            number = len(calls)
            if number == interrupted and when == "before":
                raise KeyboardInterrupt
            result = function(*arguments, **options)
            if number == interrupted:
                raise KeyboardInterrupt
            return result

        return call

    for owner, name in INTERRUPTIBLE:
        monkeypatch.setattr(owner, name, interruptible(name, getattr(owner, name)))
    asked.ask(sample, **question)
    assert set(calls) == {name for _, name in INTERRUPTIBLE}
    for interrupted in range(1, len(calls) + 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            asked.ask(sample, **question)
        assert len(calls) >= interrupted
        assert all(torch.equal(x, y) for x, y in zip(contents(asked), before))
    interrupted = 0
    assert torch.equal(asked.ask(sample, **question).ids, want)


class Oracle:
    """Stands in for a haystack: answers right if told to and if the remembered text has the needed
    sentences, and retrieves the chunk that it is told to.
    """

    def __init__(self, *, right: bool, retrieved: int) -> None:
        self.right = right
        self.retrieved = retrieved
        self.text = torch.zeros(MIN_TOKENS + 100, dtype=torch.int64)
        self.model = MODEL

    def ask(self, sample, *, answer_tokens, remembered):
        ids = torch.from_numpy(sample.answer.astype(np.int64))[None]
        assert answer_tokens == ids.shape[1] and remembered.start == sample.start
        hidden = [patch.tolist() for _, patch in remembered.patches]
        there = all(
            encode(sentence).tolist() in hidden for sentence in sample.problem.question.needed
        )
        chunk = sample.first_chunks(S)[-1] + self.retrieved
        layers = [
            type("R", (), {"indices": torch.tensor(rows)[None, None]})
            for rows in ([[-1, 0]], [[chunk, -1]])
        ]
        ids = ids if self.right and there else torch.cat((ids[:, :-2], ids[:, -2:] + 1), dim=1)
        return type("G", (), {"ids": ids, "first": type("A", (), {"retrievals": layers})})


@every_task
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("away", [0, 1])
@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_only_a_wholly_right_answer_and_a_chunk_of_the_first_sentence_count(
    task, right, away, control
):
    got = ask_one(Oracle(right=right, retrieved=away), np.random.default_rng(0), task, 0.9, control)
    wanted = right and control is None
    assert (got.correct, got.retrieved) == (wanted, away == 0)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(runner, "load_corpus", word_corpus)
    model = tiny()
    encoded = []
    monkeypatch.setattr(
        runner, "Haystack", lambda m, text: encoded.append(len(text)) or Haystack(m, text)
    )
    return model, encoded


@every_task
def test_every_length_and_band_of_depth_is_asked_and_the_controls_apart(short, monkeypatch, task):
    model, encoded = short
    monkeypatch.setattr(runner, "BANDS", 2)
    seen = []
    options = dict(lengths=(MIN_TOKENS, MIN_TOKENS + 300), texts=2, samples=2)
    rows, controls = runner.evaluate(model, task, **options, report=lambda *x: seen.append(x))
    assert [(row.tokens, row.depth, row.samples) for row in rows] == [
        (MIN_TOKENS, 0.25, 4), (MIN_TOKENS, 0.75, 4),
        (MIN_TOKENS + 300, 0.25, 4), (MIN_TOKENS + 300, 0.75, 4),
    ]  # fmt: skip
    assert [(row.tokens, row.control, row.samples) for row in controls] == [
        (MIN_TOKENS, "absent", 4), (MIN_TOKENS, "shuffled", 4),
        (MIN_TOKENS + 300, "absent", 4), (MIN_TOKENS + 300, "shuffled", 4),
    ]  # fmt: skip
    assert [tokens for tokens, _, _ in seen] == [MIN_TOKENS, MIN_TOKENS + 300]
    assert [row for _, some, _ in seen for row in some] == rows
    assert [row for _, _, some in seen for row in some] == controls
    # All questions about a text share its encoding.
    assert encoded == [MIN_TOKENS] * 2 + [MIN_TOKENS + 300] * 2
    assert all(row.distinct_tokens == row.tokens and row.seed == 1 for row in rows)
    assert all(
        sum(row.correct_by_text) == row.correct <= row.samples
        and len(row.correct_by_text) == 2
        and 0 <= row.retrieved <= row.samples
        and row.whole_correct <= row.whole <= row.samples
        for row in rows + controls
    )
    assert (rows, controls) == runner.evaluate(model, task, **options)


def tiny_of_its_own() -> HSAModel:
    """Loads the model in another process, where words replace the corpus too."""
    runner.load_corpus = word_corpus
    return tiny()


def test_lengths_side_by_side_are_those_one_after_the_other(short):
    options = dict(lengths=(MIN_TOKENS + 300, MIN_TOKENS), texts=1)
    seen = []
    together = runner.evaluate_side_by_side(
        tiny_of_its_own, "s_niah", jobs=2, report=lambda *x: seen.append(x), **options
    )
    assert together == runner.evaluate(short[0], "s_niah", **options)
    assert {tokens for tokens, _, _ in seen} == set(options["lengths"])
    assert sorted(row.tokens for _, rows, _ in seen for row in rows) == sorted(
        row.tokens for row in together[0]
    )


def killed() -> HSAModel:
    """Stands in for a process that the system kills for its memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_process_that_is_killed_is_an_error_and_no_fault(short):
    with pytest.raises(ChildProcessError, match="^jobs: a process that evaluates was killed$"):
        runner.evaluate_side_by_side(killed, "s_niah", jobs=1, lengths=(MIN_TOKENS,))


def test_a_length_that_is_named_twice_counts_once(short):
    options = dict(texts=1)
    twice = runner.evaluate(short[0], "s_niah", lengths=(MIN_TOKENS, MIN_TOKENS), **options)
    assert twice == runner.evaluate(short[0], "s_niah", lengths=(MIN_TOKENS,), **options)


@every_task
def test_what_is_asked_for_reaches_the_samples(short, monkeypatch, task):
    model = short[0]
    seen = []
    monkeypatch.setattr(
        runner, "place", lambda *args, **options: seen.append(options) or place(*args, **options)
    )
    tokens = MIN_TOKENS + 70 * 2 * 22
    runner.evaluate(model, task, lengths=(tokens,), texts=1, distractors=64, border=True)
    *asked, absent, shuffled, remembered = seen
    for band, options in enumerate(asked):
        assert band / 10 <= options["depth"] <= (band + 1) / 10 and not options["absent"]
    assert len(asked) == 10 and absent["absent"]
    assert not shuffled["absent"] and not remembered["absent"]
    assert all(options["border"] and options["tokens"] == tokens for options in seen)


def test_training_evaluation_and_demo_never_share_a_seed(short, monkeypatch):
    seeds = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(
        np.random, "default_rng", lambda seed: seeds.append(seed) or default_rng(seed)
    )
    TrainingBatches(Mixture(min_copy=64), batch=1, tokens=256, steps=1, seed=1, text=word_tokens())[
        0
    ]
    runner.evaluate(short[0], "s_niah", lengths=(MIN_TOKENS,), texts=1, seed=1)
    find_needle(short[0], word_tokens(), tokens=1024, seed=1)
    assert len({seed[0] for seed in seeds}) == len(seeds) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(task="poetry"), "task: got 'poetry', accepted are s_niah, mq_niah, vt"),
        (dict(distractors=-1), f"distractors: got -1, accepted is 0 to {MAX_DISTRACTORS}"),
        (
            dict(distractors=MAX_DISTRACTORS + 1),
            f"distractors: got {MAX_DISTRACTORS + 1}, accepted is 0",
        ),
        (dict(lengths=(100,)), "tokens: got 100, accepted are at least"),
        (dict(texts=0), "texts: got 0, accepted is"),
        (dict(samples=0), "samples: got 0, accepted is"),
    ],
)
def test_wrong_arguments(short, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        runner.evaluate(short[0], **{"task": "vt", "lengths": (MIN_TOKENS,), **options})


def test_text_that_is_repeated_is_said_to_be(short):
    model, _ = short
    tokens = len(word_tokens(seed="validation")) + 500
    rows, _ = runner.evaluate(model, "s_niah", lengths=(tokens,), texts=1)
    assert {(row.tokens, row.distinct_tokens) for row in rows} == {(tokens, tokens - 500)}


def test_by_length_adds_up():
    rows = [
        RetrievalRow(4096, depth, 10, right, found, 4096, 1)
        for depth, right, found in ((0.0, 10, 9), (0.5, 7, 8), (1.0, 3, 10))
    ]
    rows += [RetrievalRow(8192, 0.5, 5, 5, 4, 8192, 1)]
    first, second = by_length(rows)
    assert {name: first[name] for name in ("tokens", "samples", "correct", "retrieved")} == dict(
        tokens=4096, samples=30, correct=20, retrieved=27
    )
    assert first["accuracy"] == pytest.approx(2 / 3) and (
        first["low"],
        first["high"],
    ) == wilson_interval(20, 30)
    assert (second["samples"], second["correct"], second["accuracy"]) == (5, 5, 1.0)
    assert by_length([]) == []


def test_by_length_counts_by_text():
    rows = [
        RetrievalRow(4096, depth, 4, sum(right), 4, 4096, 1, 2, 1, right)
        for depth, right in ((0.25, (2, 0)), (0.75, (2, 1)))
    ]
    (entry,) = by_length(rows)
    assert (entry["texts"], entry["whole"], entry["whole_correct"]) == (2, 4, 2)
    assert (entry["low"], entry["high"]) == cluster_interval([(4, 4), (1, 4)])
    assert entry["high"] - entry["low"] > np.diff(wilson_interval(5, 8))


def test_places_in_a_band_cut_sentences_as_often_as_any_places_do(short, monkeypatch):
    """Fixed places did not: a border cut all sentences of one length and none of another."""
    size = 2 * SENTENCE
    model = tiny(chunk_size=size)

    class Deaf(Oracle):
        """Answers nothing right, so that no model has to read."""

        def __init__(self, model, text):
            super().__init__(right=False, retrieved=0)
            self.model = model
            self.text = text

        def ask(self, sample, *, answer_tokens, remembered):
            return super().ask(sample, answer_tokens=answer_tokens, remembered=sample)

    monkeypatch.setattr(runner, "Haystack", Deaf)
    for tokens in (30 * size, 30 * size + SENTENCE):
        rows, _ = runner.evaluate(model, "s_niah", lengths=(tokens,), texts=2, samples=20)
        whole = sum(row.whole for row in rows) / sum(row.samples for row in rows)
        assert whole == pytest.approx((size - SENTENCE + 1) / size, abs=0.1)


@pytest.mark.parametrize(
    "correct, samples, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, Table I, method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson_interval_has_the_published_values(correct, samples, low, high):
    assert wilson_interval(correct, samples) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_interval_solves_its_equation(samples, data):
    correct = data.draw(st.integers(0, samples))
    share = correct / samples
    for bound in wilson_interval(correct, samples):
        assert 0 <= bound <= 1
        assert (share - bound) ** 2 == pytest.approx(
            1.96**2 * bound * (1 - bound) / samples, abs=1e-12
        )


TABLES = {
    "rows": [RetrievalRow(4096, 0.5, 10, 9, 10, 4096, 1)],
    "control_rows": [ControlRow(4096, 0.5, 10, 0, 2, 4096, 1, "absent")],
}


def test_results_say_where_they_come_from(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results(path, torch.device("cpu"), **TABLES)
    result = json.loads(path.read_text())
    assert {"hardware", "versions", "commit", "command", "rows", "control_rows"} == result.keys()
    assert read_results(path)[:2] == (TABLES["rows"], TABLES["control_rows"])


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, torch.device("cpu"), **TABLES)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]
