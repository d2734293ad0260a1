"""Stories, threads and notes: an independent reading finds the same answers; questions about a text
that is read once are answered as in a text that is read anew.
"""

import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from helpers import call
from hypothesis import given
from hypothesis import strategies as st
from material import tiny, word_corpus, word_tokens

from hsa_mini.cli.measure import tasks as command
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.long import run as module
from hsa_mini.evaluation.long.rows import summarise
from hsa_mini.evaluation.long.run import LONG_TASKS, Plan, evaluate, said
from hsa_mini.evaluation.statistics import cluster_interval, wilson_interval
from hsa_mini.inference.prefill import prefill
from hsa_mini.tasks.long.scattered import ENDS, SCATTERED, scatter
from hsa_mini.tasks.long.series import ORDINALS, tell_notes, tell_threads
from hsa_mini.tasks.long.stories import FIRST_NAMES, PLACES, THINGS, tell_story
from hsa_mini.tasks.words import is_reserved

TOKENIZER = load_tokenizer()
TEXT = np.resize(word_tokens(), 6000)
seeds = st.integers(0, 1 << 30)
NAME = re.compile(rf"\b({'|'.join(FIRST_NAMES)})\b")
PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b")
THING = re.compile(rf"the ({'|'.join(THINGS)})\b", re.IGNORECASE)
DOWN = re.compile(r"\b(put down|dropped|left|laid down|set down)\b")


def simulate(sentences):
    """Where everybody and everything has been, each stay once: from the sentences alone."""
    been: dict[str, list[str]] = {}
    carried: dict[str, set[str]] = {}

    def arrive(thing, place):
        stays = been.setdefault(thing, [])
        if stays[-1:] != [place]:
            stays.append(place)

    for sentence in sentences:
        (who,) = NAME.findall(sentence)
        thing = THING.findall(sentence)
        if not thing:
            (place,) = PLACE.findall(sentence)
            for moved in (who, *carried.get(who, ())):
                arrive(moved, place)
        elif DOWN.search(sentence):
            carried[who].remove(thing[0])
        else:
            carried.setdefault(who, set()).add(thing[0])
            arrive(thing[0], been[who][-1])
    return been


def answer_of(sentences, kind, question):
    """The answer to a question of a story, from the simulation."""
    been = simulate(sentences)
    if kind == "qa1":
        return been[NAME.findall(question)[0]][-1]
    stays = been[THING.findall(question)[0]]
    if kind == "qa2":
        return stays[-1]
    return stays[stays.index(PLACE.findall(question)[0]) - 1]


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("kind", ["qa1", "qa2", "qa3"])
@given(seed=seeds)
def test_a_simulation_of_the_story_gives_the_same_answers(kind, held_out, seed):
    told = tell_story(Random(seed), kind, 9, held_out)
    for question in told.questions:
        answer = question.answer.strip().rstrip(ENDS)
        words = question.text if kind != "qa3" else question.text.replace("in the", "")
        assert answer_of(told.sentences, kind, words) == answer
        # A question may stand anywhere behind the sentences that it needs.
        last = max(i for i, text in enumerate(told.sentences) if text in question.needed)
        for end in range(last + 1, len(told.sentences) + 1):
            assert answer_of(told.sentences[:end], kind, words) == answer
    used = set(re.findall(r"\w+", " ".join(told.sentences))) & {*PLACES, *FIRST_NAMES}
    assert used and all(is_reserved(word) == held_out for word in used)


@given(seed=seeds, steps=st.integers(1, 8), held_out=st.booleans())
def test_the_links_lead_from_code_to_code(seed, steps, held_out):
    told = tell_threads(Random(seed), steps, 3, held_out)
    assert len(told.sentences) == 3 * steps
    codes = re.compile(r"\b[A-Z]{4}\b")
    links = [codes.findall(sentence) for sentence in told.sentences]
    following = dict(links)
    assert len(following) == len(links)
    for question in told.questions:
        at = codes.findall(question.text)[0]
        for code in codes.findall(question.answer):
            at = following[at]
            assert code == at
        assert at not in following


@given(seed=seeds, times=st.integers(1, 8), held_out=st.booleans())
def test_the_nth_note_is_the_nth_in_the_text(seed, times, held_out):
    told = tell_notes(Random(seed), times, 4, held_out)
    assert len(told.sentences) == 2 * times
    for question in told.questions:
        answer = question.answer.strip().rstrip(ENDS)
        nth = re.findall(rf"\b({'|'.join(ORDINALS)}|last)\b", question.text)[0]
        (needed,) = question.needed
        topic = next(t for t in sorted(topics(told, answer), key=len) if t in needed)
        same = [text for text in told.sentences if topic in text]
        assert len(same) == times
        assert same[-1 if nth == "last" else ORDINALS.index(nth)] == needed
        assert needed.rstrip().rstrip(ENDS).endswith(answer)


def topics(told, answer):
    """Stretches of words that stand in exactly half of the notes: among them is the topic."""
    words = told.questions[0].text.split()
    half = len(told.sentences) // 2
    spans = {
        " ".join(words[a:b]).strip(" ?.:") for a in range(len(words)) for b in range(a, len(words))
    }
    spans |= {
        " ".join(q[a:b]).strip(" ?.:")
        for q in (question.text.split() for question in told.questions)
        for a in range(len(q))
        for b in range(a + 1, min(a + 5, len(q)) + 1)
    }
    return [s for s in spans if s and sum(s in text for text in told.sentences) == half]


@pytest.mark.parametrize("task", SCATTERED)
def test_a_text_holds_its_sentences_in_order_and_ends_with_the_question(task):
    for seed in range(5):
        problem = SCATTERED[task](Random(seed))
        for absent in (False, True):
            ids = TEXT.astype(np.int64)
            placed = scatter(Random(seed), problem, len(ids), absent=absent)
            for first, patch in placed.patches:
                ids[first : first + len(patch)] = patch
            text = TOKENIZER.decode(ids.tolist())
            assert text.startswith(problem.opening) and text.endswith(problem.question)
            end = 0
            for sentence in problem.sentences:
                if absent and sentence in problem.needed:
                    assert sentence not in text
                else:
                    end = text.index(sentence, end) + len(sentence)
            if not absent:
                first, last = placed.first
                assert TOKENIZER.decode(ids[first : last + 1].tolist()) == problem.needed[0]
    with pytest.raises(ValueError, match=r"^tokens: got 9, accepted are at least \d+$"):
        scatter(Random(0), problem, 9)


def test_every_place_is_as_likely_as_any_other():
    problem = SCATTERED["niah_single_2"](Random(0))
    rng = Random(0)
    tokens = 2000
    starts = [scatter(rng, problem, tokens).first[0] for _ in range(2000)]
    space = tokens - len(TOKENIZER.encode(problem.question)) - min(starts)
    shares = np.histogram(np.array(starts) - min(starts), 8, (0, space))[0] / len(starts)
    assert np.abs(shares[:-1] - 1 / 8).max() < 0.04


def test_an_answer_is_judged_as_generation_gives_it():
    model = tiny().eval()
    ids = torch.from_numpy(TEXT[:300].astype(np.int64))[None]
    with torch.no_grad():
        text = TOKENIZER.decode(model.generate(ids, max_new_tokens=40).ids[0].tolist()).strip()

        def share(*answers: str, exact: bool) -> float:
            return said(model, prefill(model, ids), answers, exact=exact)

        word = re.findall(r"^\S+?(?=\W)", text)[0]
        assert share(word, exact=True) == 1
        assert share(word[:-1], exact=True) == 0  # the answer has to end there
        assert share(f"{word}x", exact=True) == 0
        assert share(word.upper(), "nowhere", exact=False) == 0.5
        assert share(text[3:20], exact=False) == 1


def test_forks_of_one_reading_answer_as_a_text_that_is_read_anew(monkeypatch):
    model = tiny().eval()
    found = {}

    def record(model, output, answers, **_):
        found.setdefault(answers, []).append(output.logits[0, -1])
        return 1.0

    monkeypatch.setattr(module, "said", record)
    (text,) = module.ruler_texts("niah_multikey_2", 2048, samples=1, seed=1, questions=3)
    (other,) = module.ruler_texts("niah_multikey_2", 1024, samples=1, seed=2)
    counts = module.whole(model, text, other.questions[0])
    assert counts == {
        "questions": 3, "right": 3, "found": 3.0, "shuffled": 1, "shuffled_right": 1,
    }  # fmt: skip
    with torch.no_grad():
        for asked in (*text.questions, *other.questions):
            ids = TOKENIZER.encode_ordinary(text.text + asked.question + asked.prefix)
            plain = prefill(model, torch.tensor(ids)[None]).logits[0, -1]
            torch.testing.assert_close(found[asked.answers][0], plain, atol=1e-4, rtol=1e-4)


def test_the_texts_of_a_run_are_shared_and_finished_ones_are_not_measured_again(monkeypatch):
    model = tiny().eval()
    corpus = word_corpus("validation")
    read = []
    monkeypatch.setattr(Haystack, "__init__", counting(read, Haystack.__init__))
    monkeypatch.setattr(module, "said", lambda *_, **__: 1.0)
    plan = Plan(2048, texts=2, questions=2, seed=3)
    names = ["qa1", "thread_2", "fwe", "niah_multikey_3"]
    kept = []
    rows = evaluate(model, corpus, plan, names, report=kept.append)
    assert len(read) == 2 and sorted(map(str, kept)) == sorted(map(str, rows))
    assert [(row.task, row.text) for row in rows] == [(n, i) for n in names for i in range(2)]
    assert {row.haystack for row in rows} == {corpus.name, "made for the task"}
    again = evaluate(model, corpus, plan, names, finished=rows[1:])
    assert again == rows and len(read) == 3
    (shared,) = {row.start for row in rows[:1]} & {row.start for row in rows[2:3]}
    assert shared == plan.starts(len(corpus))[0]
    for wrong, match in (
        ({"tasks": ["x"]}, "^tasks: got 'x', accepted are "),
        ({"plan": Plan(2047, 1, 1, 1)}, "^tokens: got 2047, accepted are at least 2048$"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluate(model, corpus, **{"plan": plan, **wrong})


def counting(calls, function):
    def counted(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    return counted


def test_questions_that_agree_within_a_text_count_less():
    alike = [(5, 5)] * 10 + [(0, 5)] * 10
    mixed = [(3, 5), (2, 5)] * 10
    assert cluster_interval(mixed) == pytest.approx(wilson_interval(50, 100))
    # Five questions that always agree are worth about one.
    low, high = cluster_interval(alike)
    wilson_low, wilson_high = wilson_interval(10, 20)
    assert low == pytest.approx(wilson_low, abs=0.01)
    assert high == pytest.approx(wilson_high, abs=0.01)
    assert cluster_interval([(4, 4)] * 5) == wilson_interval(20, 20)
    assert cluster_interval([]) == (0.0, 1.0)


def test_a_summary_adds_the_texts_of_a_task():
    plan = Plan(4096, texts=2, questions=5, seed=1)
    rows = [
        module._row(plan, "qa1", i, "x", 0, {"questions": 5, "right": i, "found": i + 0.5})
        for i in (1, 4)
    ]
    (found,) = summarise(rows)
    assert (found["texts"], found["questions"], found["right"]) == (2, 10, 5)
    assert (found["accuracy"], found["score"]) == (0.5, 0.6)
    assert found["cluster_low"] < found["low"] < found["high"] < found["cluster_high"]


def test_the_command_refuses_before_it_reads_a_model(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsa_mini.cli.measure.tasks.read_model", None)
    for words, message in (
        (["--tasks", "x"], f"--tasks: got 'x', accepted are {', '.join(LONG_TASKS)}"),
        (["--lengths", "9"], "--lengths: got 9, accepted is 2048 to "),
        (["--out", "."], "--out: "),
    ):
        status, out, err = call(capfd, "tasks", "mini", *words)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err
    assert command.MIN_TOKENS == module.MIN_TOKENS


def test_a_run_that_was_cut_off_goes_on_after_the_finished_texts(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsa_mini.data.corpus.load_corpus", word_corpus)
    tiny().save_pretrained("model")
    words = ["tasks", "model", "--tasks", "qa1,thread_2", "--lengths", "2048", "2100", "--texts",
             "2", "--questions", "1", "--device", "cpu"]  # fmt: skip
    assert call(capfd, *words, "--out", "plain.json")[0] == 0
    measured = []

    def cut_off(*arguments):
        measured.append(arguments[2:])
        if len(measured) == 4:
            raise KeyboardInterrupt
        return scattered(*arguments)

    scattered = module.scattered
    monkeypatch.setattr(module, "scattered", cut_off)
    assert call(capfd, *words, "--out", "cut.json")[0] == 130
    status, out, _ = call(capfd, *words, "--out", "cut.json")
    assert (status, len(measured)) == (0, 9)  # eight, one of them twice
    plain, cut = (json.loads(Path(name).read_text()) for name in ("plain.json", "cut.json"))
    assert plain["rows"] == cut["rows"] and plain["summary"] == cut["summary"]
    assert [(x["task"], x["tokens"]) for x in cut["summary"]] == [
        ("qa1", 2048), ("thread_2", 2048), ("qa1", 2100), ("thread_2", 2100),
    ]  # fmt: skip
    assert out.count("absent") == 4 and "qa1" in out
    assert {"checkpoint", "corpus", "texts", "seed", "hardware"} <= cut.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.json", "model", "plain.json"]
