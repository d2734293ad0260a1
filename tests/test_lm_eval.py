"""lm-eval's model `hsa` gives the numbers of a plain forward pass, and reads what texts share once.

The tasks come without a download: RULER's texts are lm-eval's own, and a folder holds other tasks.
"""

import importlib
import io
import json
import os
import random
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import call
from hypothesis import given
from hypothesis import strategies as st
from material import tiny, words

from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.files.whole_folder import fingerprint
from hsa_mini.tasks.long import ruler as ruler_module
from hsa_mini.tasks.long import ruler_lists as lists_module
from hsa_mini.tasks.long import ruler_words
from hsa_mini.tasks.long.ruler import (
    IN_TEXT,
    NEEDLES_ONLY,
    WHOLE,
    ask_some,
    draw_needles,
    opening,
)
from hsa_mini.tasks.long.ruler_lists import ruler_texts

lm_eval = pytest.importorskip("lm_eval")
from hsa_mini.integrations import lm_eval as integration  # noqa: E402
from hsa_mini.integrations import tasks  # noqa: E402
from hsa_mini.integrations.lm_eval import HSALM, shared_beginnings  # noqa: E402

TOKENIZER = load_tokenizer()
TEXT = words(500)
BOOK = TEXT[:900]


@pytest.fixture(scope="module")
def lm() -> HSALM:
    return HSALM(tiny(torch.float64))


@pytest.fixture(scope="module")
def ruler():
    """lm-eval's own functions, whose import would download a sentence splitter."""
    with patch("nltk.download"), redirect_stdout(io.StringIO()):
        return importlib.import_module("lm_eval.tasks.ruler.niah_utils")


def asked(*arguments) -> SimpleNamespace:
    """Stands in for an `Instance` of lm-eval."""
    return SimpleNamespace(args=arguments)


def plain(lm: HSALM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood by one forward pass over everything, and whether it is greedy."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        chances = lm.model(ids).logits[0, len(context) - 1 : -1].log_softmax(-1)
    wanted = torch.tensor(continuation)
    likelihood = chances.gather(-1, wanted[:, None]).sum().item()
    return likelihood, bool((chances.argmax(-1) == wanted).all())


def native(model, text: str, tokens: int) -> str:
    """What the model itself generates after a text."""
    ids = torch.tensor([TOKENIZER.encode_ordinary(text)])
    return TOKENIZER.decode(model.generate(ids, max_new_tokens=tokens).ids[0].tolist())


@pytest.mark.parametrize("most", [1024, 3])  # logits held at once
def test_log_likelihoods_are_those_of_a_plain_forward_pass(lm, monkeypatch, most):
    monkeypatch.setattr(integration, "MAX_SCORED", most)
    greedy = native(lm.model, BOOK, 1)
    pairs = [
        (BOOK, greedy), (BOOK, " yes"), (BOOK, " no, and that at some length"), ("", TEXT[:60]),
        (BOOK[:500], BOOK[500:]), (BOOK + TEXT[900:950], " no"), ("a", " b"), (BOOK, greedy),
        (BOOK, ""), (BOOK + " ", "yes"),
    ]  # fmt: skip
    results = lm.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (likelihood, is_greedy) in zip(pairs, results, strict=True):
        if not continuation:
            assert (likelihood, is_greedy) == (0.0, True)
            continue
        before = TOKENIZER.encode_ordinary(context.rstrip()) or [end_of_text(TOKENIZER)]
        both = TOKENIZER.encode_ordinary(context + continuation)
        rest = both[len(before) :] if context else both
        expected, expected_greedy = plain(lm, before, rest)
        assert likelihood == pytest.approx(expected, abs=1e-6)
        assert is_greedy == expected_greedy
    assert results[0][1] and not results[1][1]


def test_rolling_log_likelihoods_are_those_of_a_plain_forward_pass(lm, monkeypatch):
    monkeypatch.setattr(integration, "MAX_SCORED", 50)
    texts = [BOOK, "", TEXT[:300], TEXT[:310]]
    results = lm.loglikelihood_rolling([asked(text) for text in texts], disable_tqdm=True)
    for text, likelihood in zip(texts, results, strict=True):
        ids = TOKENIZER.encode_ordinary(text)
        expected = plain(lm, [end_of_text(TOKENIZER)], ids)[0] if ids else 0.0
        assert likelihood == pytest.approx(expected, abs=1e-6)


def test_a_generation_is_the_native_one_cut_at_the_first_stop_string(lm):
    contexts = [BOOK, BOOK + TEXT[900:990], TEXT[100:200]]
    whole = [native(lm.model, context, 20) for context in contexts]
    for until in ([], whole[0][9:11], [whole[1][4:6], whole[2][8:9]]):
        requests = [asked(text, {"until": until, "max_gen_toks": 20}) for text in contexts]
        got = lm.generate_until(requests, disable_tqdm=True)
        stops = [until] if isinstance(until, str) else until
        ends = [min((t.find(s) for s in stops if s in t), default=len(t)) for t in whole]
        assert got == [text[:end] for text, end in zip(whole, ends)]
        assert not until or got != whole


def test_a_draw_has_its_own_seed_and_an_unknown_option_is_refused(lm):
    options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 8}
    requests = [asked(BOOK, options)] * 2
    one, other = lm.generate_until(requests, disable_tqdm=True)
    assert one != other and lm.generate_until(requests, disable_tqdm=True) == [one, other]
    with pytest.raises(ValueError, match=r"^generation_kwargs: got 'num_beams', accepted are do_"):
        lm.generate_until([asked(BOOK, {"num_beams": 4})], disable_tqdm=True)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
def test_what_texts_share_is_read_once_into_buffers_that_never_move(lm, monkeypatch, kind):
    """Six questions about one book, and one about its first half."""
    questions = [f" Who is {name}?" for name in ("he", "she", "it", "one", "you", "we")]
    texts = [*(BOOK + question for question in questions), BOOK[: len(BOOK) // 2]]
    second = " a" if kind == "loglikelihood" else {"max_gen_toks": 1}
    read = []
    buffers = set()
    original = lm.model.lower_decoder

    def counted(ids, memory):
        read.append(ids.shape[1])
        buffers.add(memory.chunks.buffers[0].data_ptr())
        return original(ids, memory)

    monkeypatch.setattr(lm.model, "lower_decoder", counted)
    getattr(lm, kind)([asked(text, second) for text in texts], disable_tqdm=True)
    book = len(TOKENIZER.encode_ordinary(BOOK))
    rest = sum(len(TOKENIZER.encode_ordinary(question)) for question in questions)
    assert book < sum(read) <= book + rest + 10
    assert len(buffers) == 1
    assert lm.longest == max(len(TOKENIZER.encode_ordinary(text)) for text in texts)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1), st.integers(1, 3))))
def test_shared_beginnings_are_those_that_a_comparison_finds(given_texts):
    texts = [np.array(text) for text, _ in given_texts]
    own = [min(n, len(text)) for text, n in given_texts]
    found = list(shared_beginnings(texts, own))
    order = [i for i, _ in found]
    assert [list(texts[i]) for i in order] == sorted(list(text) for text in texts)
    assert sorted(order) == list(range(len(texts)))
    for (i, shared), following in zip(found, [*order[1:], None]):
        if following is None:
            assert shared == 0
            continue
        one, other = (list(texts[j][: len(texts[j]) - own[j]]) for j in (i, following))
        assert one[:shared] == other[:shared]
        assert shared == min(len(one), len(other)) or one[shared] != other[shared]


# Tasks


GENERATION = """
task: recall
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/documents.jsonl}, cache_dir: cache}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/documents.jsonl}, cache_dir: cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["yes", "no"]
doc_to_target: label
"""


def write_tasks(folder: Path, model) -> None:
    """Two tasks over one file of five texts. The right answers are those of the model, but for one
    text.
    """
    documents = []
    for i in range(5):
        text = TEXT[i * 40 : 400 + i * 40].rstrip()
        answer = native(model, text, 6).split(".")[0]
        before = TOKENIZER.encode_ordinary(text)
        scores = [plain(HSALM(model), before, ending)[0] for ending in endings(text)]
        label = int(scores[1] > scores[0])
        documents.append({"text": text, "answer": answer, "label": label})
    documents[3] |= {"answer": "something else", "label": 1 - documents[3]["label"]}
    folder.mkdir()
    lines = "".join(f"{json.dumps(document)}\n" for document in documents)
    (folder / "documents.jsonl").write_text(lines)
    for name, yaml in (("recall", GENERATION), ("choice", CHOICE)):
        (folder / f"{name}.yaml").write_text(yaml)


def endings(text: str) -> list[list[int]]:
    before = len(TOKENIZER.encode_ordinary(text))
    return [TOKENIZER.encode_ordinary(f"{text} {word}")[before:] for word in ("yes", "no")]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model and the two tasks."""
    path = tmp_path_factory.mktemp("made")
    model = tiny()
    model.save_pretrained(path / "model")
    write_tasks(path / "tasks", model)
    return path


@pytest.fixture
def folder(made, tmp_path, monkeypatch) -> Path:
    """The current folder, with a model and the two tasks; the environment stays as it is."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "0")
    return tmp_path


def test_simple_evaluate_runs_own_tasks_from_a_local_file(folder):
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path="tasks")
    results = lm_eval.simple_evaluate(
        model="hsa",
        model_args={"pretrained": "model"},
        tasks=["recall", "choice"],
        device="cpu",
        task_manager=manager,
        bootstrap_iters=0,
    )["results"]
    assert results["recall"]["exact_match,none"] == 0.8
    assert results["choice"]["acc,none"] == 0.8


def our_tokens(text: str) -> SimpleNamespace:
    """All that lm-eval's functions use of a Hugging Face tokenizer."""
    return SimpleNamespace(input_ids=TOKENIZER.encode_ordinary(text))


def plainly(ruler, task: str, tokens: int, samples: int) -> list[dict]:
    """The first documents that lm-eval's own function makes, with our tokenizer."""
    random.seed(f"7 {task} {tokens}")
    np.random.seed(7)
    if task == "cwe":
        # Our texts are fitted without an example that lm-eval counts but does not show. With it, no
        # list fits into 4,096 of our tokens.
        lists = importlib.import_module("lm_eval.tasks.ruler.cwe_utils")
        lists.RNG.seed(7)
        start = lists.TEMPLATE[:40]
        made = lists.sys_word_pair_random(
            samples, tokens, lambda text: our_tokens(text[text.rindex(start) :])
        )
    else:
        modules = {"vt": ("vt_utils", "get_vt_dataset"), "fwe": ("fwe_utils", "fwe_download")}
        module, name = modules.get(task, ("niah_utils", task))
        make = getattr(importlib.import_module(f"lm_eval.tasks.ruler.{module}"), name)
        with patch.dict(make.__globals__, {"get_tokenizer": lambda _: our_tokens}):
            made = make(max_seq_lengths=[tokens], tokenizer="ours")["test"]
    keys = ("input", "outputs", "gen_prefix", "max_length")
    return [{key: made[i][key] for key in keys} for i in range(samples)]


@pytest.mark.parametrize("task", WHOLE)
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_ruler_texts_are_those_of_lm_eval(ruler, task, tokens):
    made = ruler_texts(task, tokens, samples=3, seed=7)
    assert [tasks._document(text, tokens) for text in made] == plainly(ruler, task, tokens, 3)


@pytest.mark.parametrize("task", IN_TEXT)
def test_needles_in_real_text_are_those_of_lm_eval(ruler, task):
    """lm-eval would download essays, and a splitter of sentences."""
    niah = IN_TEXT[task]
    words = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    with patch.object(words, "cached_sent_tokenize", lambda text: text.split(".")):
        random.seed(3)
        text, answers, query = words.generate_input_output(
            900, ["word."] * 900, type_haystack="essay", num_needle_k=niah.key_count,
            type_needle_k=niah.keys, num_needle_v=niah.value_count, type_needle_v=niah.values,
            num_needle_q=niah.asked, template=ruler.TEMPLATE,
        )  # fmt: skip
    rng = random.Random(3)
    needles, values = draw_needles(rng, niah)
    rng.sample(words.DEPTHS, len(needles))  # lm-eval draws its places from the same generator
    asked = ask_some(rng, niah, values)
    assert (list(asked.answers), text.startswith(opening(niah))) == (answers, True)
    assert text.endswith(asked.question) and f" for {query} mentioned" in asked.prefix
    places = [text.index(needle) for needle in needles]
    assert places == sorted(places)


@pytest.mark.parametrize("task", WHOLE)
def test_longer_texts_fit_and_hold_their_answers(monkeypatch, task):
    """Above a limit the number of sentences is estimated."""
    monkeypatch.setattr(ruler_module, "MAX_TRIED", 5000)
    monkeypatch.setattr(lists_module, "MAX_TRIED", 5000)
    first, second = ruler_texts(task, 30_000, samples=2, seed=7, questions=3)
    assert [first, second] == list(ruler_texts(task, 30_000, samples=2, seed=7, questions=3))
    assert first != second != next(ruler_texts(task, 30_000, samples=1, seed=8))
    for text in (first, second):
        assert len(text.questions) == (3 if task in NEEDLES_ONLY else 1)
        for asked in text.questions:
            length = len(TOKENIZER.encode_ordinary(text.text + asked.question + asked.prefix))
            assert 0.9 * 30_000 < length <= 30_000
            assert all(answer in text.text for answer in asked.answers)
        for asked in text.questions[1:]:
            (answer,) = asked.answers
            key = asked.question.split(" for ")[1].split()[0]
            assert text.text.count(f" {key} is: {answer}.") == text.text.count(f" {key} ") == 1


# The command


COMMAND = ["lm-eval", "model", "--device", "cpu", "--samples", "2", "--out", "r.json"]
OWN = ["--tasks", "recall,choice", "--include-path", "tasks"]
ALL = ["--tasks", "ruler_fwe,recall", "--include-path", "tasks", "--lengths", "1100", "1024"]


def test_the_command_writes_what_it_measured_and_where_it_comes_from(ruler, folder, capfd):
    status, out, _ = call(capfd, *COMMAND, *ALL)
    assert status == 0 and out.splitlines()[-1] == "written to r.json"
    found = json.loads(Path("r.json").read_text())
    assert [(row["task"], row["tokens"], row["metric"]) for row in found["rows"]] == [
        ("recall", 0, "exact_match"),
        ("ruler_fwe", 1100, "string_match"),
        ("ruler_fwe", 1024, "string_match"),
    ]
    assert found["rows"][0]["value"] == 1.0  # of the first two texts
    assert 500 < found["rows"][2]["longest"] <= 1024
    assert {(row["samples"], row["seed"]) for row in found["rows"]} == {(2, 1)}
    assert found["checkpoint"] == fingerprint(Path("model"))
    assert found.keys() == {
        *("hardware", "versions", "commit", "command", "checkpoint", "libraries", "texts", "rows"),
    }  # fmt: skip
    assert not Path("r.json.unfinished").exists()


def test_a_run_that_was_cut_off_goes_on_after_the_finished_tasks(ruler, folder, capfd, monkeypatch):
    words = [*COMMAND[:-1], "whole.json", *ALL]
    assert call(capfd, *words)[0] == 0
    original = tasks.measure
    done = []

    def interrupted(lm, task, *, tokens, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(tokens)
        return original(lm, task, tokens=tokens, **options)

    monkeypatch.setattr(tasks, "measure", interrupted)
    assert call(capfd, *COMMAND, *ALL)[0] == 130
    assert Path("r.json.unfinished").is_file() and not Path("r.json").exists()
    assert call(capfd, *COMMAND, *ALL, "--seed", "2")[0] == 2  # another run
    documents = Path("tasks/documents.jsonl")
    before = documents.read_text()
    documents.write_text(before.replace("something else", "another thing"))
    status, _, err = call(capfd, *COMMAND, *ALL)
    assert status == 2 and "(other texts)" in err
    documents.write_text(before)
    done[:] = [None]
    assert call(capfd, *COMMAND, *ALL)[0] == 0
    assert done == [None, 1024]
    whole, got = (json.loads(Path(path).read_text()) for path in ("whole.json", "r.json"))
    assert {**got, "command": ""} == {**whole, "command": ""}


def test_a_failing_standard_output_does_not_stop_the_result_file(folder, capfd, monkeypatch):
    with Path("model/config.json").open() as unwritable, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", os.fdopen(os.dup(unwritable.fileno()), "w"))
        status, _, err = call(capfd, *COMMAND, *OWN)
    assert status == 2 and err.endswith("error: standard output: Bad file descriptor\n")
    assert len(json.loads(Path("r.json").read_text())["rows"]) == 3  # acc, acc_norm, exact_match


HUB = GENERATION.replace("dataset_path: json", "dataset_path: someone/dataset")
URL = GENERATION.replace("test: tasks/documents.jsonl", "test: 'https://example.org/x.jsonl'")
METRIC = GENERATION.replace("exact_match", "bertscore")
WRONG = GENERATION.replace("doc_to_text:", "doc_to_text: !function nothing.here\nother:")
REFUSED = {
    "unknown task": (["--tasks", "nonesuch"], "--tasks: got 'nonesuch', accepted are tasks that"),
    "a task of lm-eval with a download": (["--tasks", "niah_single_2"], "need no download: niah_"),
    "no task": (["--tasks", ""], "--tasks: got '', accepted are tasks that need no download"),
    "from the hub": (["--tasks", "hub", "--include-path", "tasks"], "download 'someone/dataset'"),
    "from a URL": (["--tasks", "url", "--include-path", "tasks"], "example.org/x.jsonl"),
    "another metric": (["--tasks", "metric", "--include-path", "tasks"], "metric 'bertscore'"),
    "broken task": (["--tasks", "wrong", "--include-path", "tasks"], "wrong cannot be loaded: "),
    "no folder": (["--tasks", "recall", "--include-path", "nowhere"], "'nowhere', accepted is a f"),
    "too short": (["--tasks", "ruler_vt", "--lengths", "1023"], "got 1023, accepted is 1024 to "),
    "too long": (["--tasks", "ruler_vt", "--lengths", "4194305"], "4194305, accepted is 1024 to 4"),
    "no length": (["--tasks", "ruler_vt", "--lengths", "x"], "got 'x', accepted is an integer"),
    "lengths of own texts": ([*OWN, "--lengths", "2000"], "--lengths: got 2000, accepted are"),
    "no samples": (["--tasks", "ruler_vt", "--samples", "0"], "--samples: got 0, accepted is 1"),
    "results in no folder": ([*OWN, "--out", "model"], "--out: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_refused_in_one_line_before_the_model_is_read(
    folder, capfd, monkeypatch, name
):
    for task, yaml in {"hub": HUB, "url": URL, "metric": METRIC, "wrong": WRONG}.items():
        Path("tasks", f"{task}.yaml").write_text(yaml.replace("task: recall", f"task: {task}"))
    monkeypatch.setattr("hsa_mini.cli.reuse.lm_eval.read_model", None)
    given_words, message = REFUSED[name]
    before = sorted(folder.rglob("*"))
    status, out, err = call(capfd, *COMMAND, *given_words)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hsa-mini lm-eval: error: ") and message in err
    assert [path for path in sorted(folder.rglob("*")) if "cache" not in path.parts] == before


@pytest.mark.parametrize("module", ["lm_eval.api.model", "wonderwords"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(folder, capfd, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(ruler_words, "_of_kind", ruler_words._of_kind.__wrapped__)
    ruler_words.listed.cache_clear()
    if module != "wonderwords":
        for name in ("lm_eval", "tasks"):
            monkeypatch.delitem(sys.modules, f"hsa_mini.integrations.{name}", raising=False)
    status, out, err = call(capfd, *COMMAND, "--tasks", "ruler_vt")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("hsa-mini lm-eval: error: ")
    assert err.endswith("accepted is an environment with `pip install 'hsa-mini[eval]'`\n")
    assert module.partition(".")[0] in err
