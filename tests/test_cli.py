"""The command line: what it writes, and how it refuses wrong input.

A wrong input makes one line on standard error and exit status 2. Most are refused before a model is
loaded or a text is read.
"""

import json
import logging
import lzma
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import call
from material import KEYS, TINY, tiny, word_corpus, words
from safetensors import SafetensorError

from hsa_mini import HSAModel
from hsa_mini.cli import Stop, arguments, entry, main
from hsa_mini.cli import report as reporting
from hsa_mini.cli.report import printable
from hsa_mini.data import archives
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.evaluation.demo import MIN_HAYSTACK, MIN_TOKENS
from hsa_mini.evaluation.perplexity import TARGETS
from hsa_mini.files.whole_folder import fingerprint
from hsa_mini.paths import data_dir
from hsa_mini.tasks.forms import MAX_DISTRACTORS, TASKS

ROOT = Path(__file__).resolve().parent.parent
CORRUPTED = "corrupted"
TOKENIZER = load_tokenizer()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the files that the wrong inputs below name.

    A command may leave nothing in it but its results.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hsa_mini.training.run.load_corpus", word_corpus)
    monkeypatch.setattr("hsa_mini.data.corpus.load_corpus", word_corpus)
    monkeypatch.setattr("hsa_mini.evaluation.runner.load_corpus", word_corpus)
    monkeypatch.setattr("hsa_mini.evaluation.perplexity.load_corpus", word_corpus)
    Path("good.txt").write_text(words(3000), encoding="utf-8")
    Path("short.txt").write_text("a few words", encoding="utf-8")
    Path("empty.txt").write_text("", encoding="utf-8")
    Path("latin.txt").write_bytes(words(300).encode() + b"\xe9")
    Path("file").write_text("in the way")
    Path("dir").mkdir()
    tiny().save_pretrained("model")
    tiny(vocab_size=512).save_pretrained("few")
    tiny(window=2000).save_pretrained("wide")
    shutil.copytree("model", CORRUPTED)
    weights = Path(CORRUPTED, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    return tmp_path


def listing(folder: Path) -> set[tuple[str, int]]:
    return {(str(path.relative_to(folder)), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def refuse(*_, **__):
    raise AssertionError("a cheap check comes too late")


DEMO = ["demo", "--tokens", "2048", "--checkpoint", "model", "--haystack", "good.txt"]
GENERATE = ["generate", "model", "--prompt-file", "good.txt"]
CHEAP = [  # refused before a model is loaded or a text is read
    (["demo", "--tokens", "1023"], "--tokens: got 1023, accepted is 1024 to 1073741824"),
    (["demo", "--tokens", "0"], "--tokens: got 0, accepted is 1024"),
    (["demo", "--tokens", "-5"], "--tokens: got -5, accepted is 1024"),
    (
        ["demo", "--tokens", "1073741825"],
        "--tokens: got 1073741825, accepted is 1024 to 1073741824",
    ),
    (["demo", "--tokens", "4096.5"], "--tokens: got '4096.5', accepted is an integer"),
    (["demo", "--tokens", "many"], "--tokens: got 'many', accepted is an integer"),
    (["demo", "--tokens", ""], "--tokens: got '', accepted is an integer"),
    (["demo", "--tokens", "9" * 5000], "--tokens: got '999.*', accepted is an integer"),
    (["demo", "--tokens"], "--tokens: expected one argument"),
    (["demo", "--depth", "1.5"], "--depth: got 1.5, accepted is 0 to 1"),
    (["demo", "--depth", "-0.1"], "--depth: got -0.1, accepted is 0 to 1"),
    (["demo", "--depth", "nan"], "--depth: got nan, accepted is 0 to 1"),
    (["demo", "--depth", "inf"], "--depth: got inf, accepted is 0 to 1"),
    (["demo", "--depth", "deep"], "--depth: got 'deep', accepted is a number"),
    (["demo", "--seed", "-1"], "--seed: got -1, accepted is 0 to 4294967295"),
    (["demo", "--seed", "4294967296"], "--seed: got 4294967296, accepted is 0 to 4294967295"),
    (["demo", "--seed", "1.0"], "--seed: got '1.0', accepted is an integer"),
    (["demo", "--device", "tpu"], "--device: got 'tpu', accepted here are auto, cpu"),
    (
        ["demo", "--device", "mps"],
        "--device: got 'mps', accepted here are auto, cpu.*; Apple's GPUs are not supported",
    ),
    (["demo", "--device", "cuda:99"], "--device: got 'cuda:99', accepted here are auto, cpu"),
    (
        ["demo", "--out", "file"],
        r"--out: got file \(it is a file\), accepted is a folder to write into",
    ),
    (
        ["demo", "--out", "file/deeper"],
        r"--out: got file/deeper \(\S+/file is a file\), accepted is a folder",
    ),
    (["demo", "--out", "/proc/nowhere"], r"--out: got /proc/nowhere \(.*\), accepted is a folder"),
    (
        ["demo", "--json", "dir"],
        r"--json: got dir \(it is a folder\), accepted is a file that can be written",
    ),
    (["demo", "--json", ""], r"--json: got . \(it is a folder\), accepted is a file"),
    (
        ["demo", "--json", "file/result.json"],
        r"--json: got file/result.json \(Not a directory\), accepted is a file",
    ),
    (
        ["demo", "--json", "/proc/nowhere/x"],
        r"--json: got /proc/nowhere/x \(.*\), accepted is a file",
    ),
    (["demo", "--json", "x" * 300], r"--json: got x+ \(File name too long\), accepted is a file"),
    (["demo", "--colour", "red"], "unrecognized arguments: --colour red"),
    (["demo", "--token", "2048"], "unrecognized arguments: --token 2048"),
    (["eval", "model", "--dist", "3"], "unrecognized arguments: --dist 3"),
    (["--vers"], "the following arguments are required: demo"),
    (["generate"], "the following arguments are required: --prompt-file"),
    ([*GENERATE, "--max-new-tokens", "0"], "--max-new-tokens: got 0, accepted is 1 to 1000000000"),
    (
        [*GENERATE, "--max-new-tokens", "some"],
        "--max-new-tokens: got 'some', accepted is an integer",
    ),
    ([*GENERATE, "--temperature", "-1"], "--temperature: got -1.0, accepted is 0 to 1000000"),
    ([*GENERATE, "--temperature", "nan"], "--temperature: got nan, accepted is 0 to 1000000"),
    ([*GENERATE, "--temperature", "hot"], "--temperature: got 'hot', accepted is a number"),
    ([*GENERATE, "--top-k", "-1"], "--top-k: got -1, accepted is 0 to 1000000000"),
    ([*GENERATE, "--top-p", "1.01"], "--top-p: got 1.01, accepted is 0 to 1"),
    ([*GENERATE, "--top-p", "-0.1"], "--top-p: got -0.1, accepted is 0 to 1"),
    ([*GENERATE, "--seed", "-1"], "--seed: got -1, accepted is 0 to 4294967295"),
    ([*GENERATE, "--device", "tpu"], "--device: got 'tpu', accepted here are auto, cpu"),
    (["train", "huge"], "preset: got 'huge', accepted are nano, mini"),
    (["train"], "preset: got none, accepted is one preset or configuration file"),
    (["train", "nano", "--steps", "0"], "--steps: got 0, accepted is 1"),
    (["train", "nano", "--steps", "x"], "--steps: got 'x', accepted is an integer"),
    (["train", "nano", "--seed", "-1"], "--seed: got -1, accepted is 0"),
    (["train", "nano", "--seed", str(1 << 64)], "--seed: got 18446744073709551616, accepted is 0"),
    (["train", "nano", "--run", "file"], r"--run: got file \(it is a file\), accepted is a folder"),
    (["train", "nano", "--device", "gpu"], "--device: got 'gpu', accepted here are auto, cpu"),
    (["eval", "model", "--lengths", "4096", "0"], "--lengths: got 0, accepted is 1 to 1073741824"),
    (["eval", "model", "--lengths", "4k"], "--lengths: got '4k', accepted is an integer"),
    (["eval", "model", "--samples", "0"], "--samples: got 0, accepted is 1"),
    (["eval", "model", "--texts", "0"], "--texts: got 0, accepted is 1"),
    (["eval", "model", "--jobs", "0"], "--jobs: got 0, accepted is 1 to 64"),
    (["eval", "model", "--seed", "-2"], "--seed: got -2, accepted is 0"),
    (
        ["eval", "model", "--task", "poetry"],
        "--task: invalid choice: 'poetry' .choose from '?s_niah'?, '?mq_niah'?, '?vt",
    ),
    (["eval", "model", "--distractors", "-1"], "--distractors: got -1, accepted is 0 to 10000"),
    (
        ["eval", "model", "--distractors", "10001"],
        "--distractors: got 10001, accepted is 0 to 10000",
    ),
    (["eval", "model", "--distractors", "few"], "--distractors: got 'few', accepted is an integer"),
    (["eval", "model", "--border", "4"], "unrecognized arguments: 4"),
    (["eval", "model", "--out", "dir"], r"--out: got dir \(it is a folder\), accepted is a file"),
    (["eval"], "the following arguments are required: checkpoint"),
    (
        ["perplexity", "model", "--lengths", "1024", "511"],
        "--lengths: got 511, accepted is 512 to 1073741824",
    ),
    (["perplexity", "model", "--stretches", "0"], "--stretches: got 0, accepted is 1"),
    (["perplexity", "model", "--seed", "-2"], "--seed: got -2, accepted is 0"),
    (
        ["perplexity", "model", "--out", "dir"],
        r"--out: got dir \(it is a folder\), accepted is a file",
    ),
    (["perplexity"], "the following arguments are required: checkpoint"),
    (
        ["plan", "huge"],
        "preset: got 'huge', accepted are "
        "debug, nano, mini, mini_moe, mini_any, mini_any_moe, small_moe, ul_0_5b, ul_8b_a1b",
    ),
    (["plan"], "preset: got none, accepted is one preset or configuration file"),
    (["plan", "nano", "--tokens", "0"], "--tokens: got 0, accepted is 1 to 1073741824"),
    (["plan", "nano", "--tokens", "-1"], "--tokens: got -1, accepted is 1 to 1073741824"),
    (
        ["plan", "nano", "--tokens", "1073741825"],
        "--tokens: got 1073741825, accepted is 1 to 1073741824",
    ),
    (["plan", "nano", "--tokens", "1M"], "--tokens: got '1M', accepted is an integer"),
    (
        ["plan", "nano", "--json", "dir"],
        r"--json: got dir \(it is a folder\), accepted is a file that can be written",
    ),
    (
        ["plan", "nano", "--json", "file/x.json"],
        r"--json: got file/x.json \(Not a directory\), accepted is a file",
    ),
    (["sing"], "invalid choice: 'sing'"),
    (["sing" * 1000], "invalid choice: 'singsing.* ... .*'?plan'?, '?fetch"),
    (["plan", "nano", "--\x1b[2J" + "\n\x9b" * 999], "unrecognized arguments: --·.2J"),
    (
        ["plan", "nano", "--json", "\x1b[2J/" * 2000],
        r"--json: got (·.2J/)+.* ... .* accepted is a file",
    ),
    ([], "the following arguments are required: demo"),
]
DEARER = [  # refused after a model or a text was opened
    (
        ["generate", "\x1b[2J\rx", *GENERATE[2:]],
        "checkpoint: got ·.2J x without a manifest.json; accepted is",
    ),
    (
        [*DEMO, "--checkpoint", "nosuch"],
        r"--checkpoint: got nosuch without a manifest.json; accepted is the folder .* \(.*: .*mini",
    ),
    (
        [*DEMO, "--checkpoint", "dir"],
        "--checkpoint: got dir without a manifest.json; accepted is",
    ),
    (
        [*DEMO, "--checkpoint", "good.txt"],
        "--checkpoint: got good.txt without a manifest.json; accepted is the folder",
    ),
    (
        [*DEMO, "--checkpoint", CORRUPTED],
        f"--checkpoint: {CORRUPTED}/model.safetensors does not match its manifest",
    ),
    (
        [*DEMO, "--checkpoint", "few"],
        "--checkpoint: few knows 512 tokens, accepted is a model of at least 4096",
    ),
    ([*DEMO, "--checkpoint", "wide"], "--tokens: got 2048, accepted is 2258 to 1073741824"),
    (
        [*DEMO, "--haystack", "nosuch"],
        r"--haystack: cannot read nosuch \(No such file or directory\); accepted is any UTF-8",
    ),
    (
        [*DEMO, "--haystack", "dir"],
        r"--haystack: cannot read dir \(Is a directory\); accepted is any UTF-8 text file",
    ),
    (
        [*DEMO, "--haystack", "latin.txt"],
        r"--haystack: latin.txt is not UTF-8 text \(byte \d+\); accepted is any UTF-8",
    ),
    (
        [*DEMO, "--haystack", "short.txt"],
        r"--haystack: got \d+ tokens of text, accepted are at least 64",
    ),
    (
        [*DEMO, "--haystack", "empty.txt"],
        "--haystack: got 0 tokens of text, accepted are at least 64",
    ),
    (
        ["generate", "nosuch", *GENERATE[2:]],
        r"checkpoint: got nosuch without a manifest.json; accepted is the folder .* \(.*mini",
    ),
    (
        ["generate", CORRUPTED, *GENERATE[2:]],
        f"checkpoint: {CORRUPTED}/model.safetensors does not match its manifest",
    ),
    (
        ["generate", "few", *GENERATE[2:]],
        "checkpoint: few knows 512 tokens, accepted is a model of at least 4096",
    ),
    (
        [*GENERATE[:3], "nosuch"],
        r"--prompt-file: cannot read nosuch \(No such file or directory\); accepted is any UTF-8",
    ),
    (
        [*GENERATE[:3], "dir"],
        r"--prompt-file: cannot read dir \(Is a directory\); accepted is any UTF-8 text file",
    ),
    (
        [*GENERATE[:3], "latin.txt"],
        r"--prompt-file: latin.txt is not UTF-8 text \(byte \d+\); accepted is any UTF-8",
    ),
    ([*GENERATE[:3], "empty.txt"], "--prompt-file: got 0 tokens of text, accepted is 1 to"),
    (
        ["eval", "nosuch"],
        "checkpoint: got nosuch without a manifest.json; accepted is the folder of a checkpoint",
    ),
    (["eval", CORRUPTED], f"checkpoint: {CORRUPTED}/model.safetensors does not match"),
    (["eval", "model", "--lengths", "100"], "--lengths: got 100, accepted is 266 to 1073741824"),
    (
        ["perplexity", "nosuch"],
        "checkpoint: got nosuch without a manifest.json; accepted is the folder of a checkpoint",
    ),
    (
        ["perplexity", "model", "--lengths", "900000"],
        r"lengths: got 900000, accepted is 512 to \d+ \(of the validation split\)",
    ),
]


@pytest.mark.parametrize(
    "words, message",
    [*CHEAP, *DEARER],
    ids=lambda x: " ".join(x)[:60] if isinstance(x, list) else "",
)
def test_wrong_input_is_one_line_and_status_2_and_leaves_nothing(
    folder, capfd, monkeypatch, words, message
):
    if (words, message) in CHEAP:
        monkeypatch.setattr("hsa_mini.hsa_model.HSAModel.from_pretrained", refuse)
        monkeypatch.setattr("hsa_mini.data.corpus.load_text", refuse)
        monkeypatch.setattr("hsa_mini.data.corpus.load_corpus", refuse)
    before = listing(folder)
    status, out, err = call(capfd, *words)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1 and err.endswith("\n") and len(err) < 500, err
    assert re.match(
        rf"hsa-mini( {words[0] if words else ''})?: error: (argument )?(demo\|.*: )?{message}", err
    ), err
    assert err[:-1].isprintable()
    assert listing(folder) == before


@pytest.mark.parametrize(
    "option", ["--haystack good.txt", "--out dir", "--json dir/x", "--checkpoint model"]
)
def test_files_without_permission(folder, capfd, option):
    option, path = option.split()
    target = folder / path if (folder / path).exists() else (folder / path).parent
    mode = target.stat().st_mode
    target.chmod(0)
    try:
        if os.access(target, os.R_OK):
            pytest.skip("root may read and write everything")
        status, out, err = call(capfd, *DEMO, option, path)
    finally:
        target.chmod(mode)
    assert (status, out, err.count("\n")) == (2, "", 1) and option in err


def test_a_run_of_other_settings(folder, capfd):
    from hsa_mini.checkpoint.training_state import save_progress

    save_progress(folder / "run", 3, {}, {"step": 3, "seconds": 1.0, "settings": {}})
    before = listing(folder / "run")
    status, out, err = call(capfd, "train", "nano", "--run", "run", "--device", "cpu")
    assert (status, out) == (2, "") and listing(folder / "run") == before
    assert re.fullmatch(
        "hsa-mini train: error: run: run holds a run of other settings; accepted is .*\n", err
    )


def raising(error: BaseException):
    """A function that raises `error` whatever it is called with."""

    def function(*_, **__):
        raise error

    return function


def test_running_out_of_memory_is_one_line(folder, capfd, monkeypatch):
    for error in (RuntimeError("CUDA out of memory.\nTried to allocate"), MemoryError()):
        monkeypatch.setattr("hsa_mini.evaluation.demo.prefill", raising(error))
        before = listing(folder)
        status, _, err = call(capfd, *DEMO)
        assert (
            status == 2 and "memory" in err.lower().splitlines()[-1] and listing(folder) == before
        )


def test_our_own_mistakes_are_not_hidden(monkeypatch):
    error = RuntimeError("shapes do not match")
    monkeypatch.setattr("hsa_mini.evaluation.demo.prefill", raising(error))
    with pytest.raises(RuntimeError, match="shapes"):
        main(DEMO)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("No space left on device"),
        EOFError(),
        tarfile.ReadError("unexpected end of data"),
        zlib.error("invalid block type"),
        lzma.LZMAError("corrupt input data"),
    ],
    ids=repr,
)
def test_what_a_full_disk_or_a_damaged_archive_raises_is_one_line(capfd, monkeypatch, error):
    monkeypatch.setattr("hsa_mini.data.archives.fetch_archives", raising(error))
    message = str(error) or "EOFError"
    assert call(capfd, "fetch") == (2, "", f"hsa-mini fetch: error: {message}\n")


def test_json_on_standard_output_is_json_alone_and_the_picture_is_a_picture(folder, capfd):
    status, out, err = call(
        capfd, *DEMO, "--json", "-", "--seed", "7", "--depth", "0.25", "--out", "pictures/new"
    )
    assert status == 0
    result = json.loads(out)
    assert tuple(result) == KEYS
    assert (result["tokens"], result["depth"], result["seed"]) == (2048, 0.25, 7)
    assert result["question"] in err  # the report for people goes elsewhere
    picture = folder / "pictures" / "new" / "needle_2048_7.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and picture.read_bytes().endswith(
        b"IEND\xaeB`\x82"
    )
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]


def test_json_in_a_file_and_the_report_for_people(folder, capfd):
    status, out, _ = call(capfd, *DEMO, "--json", "new/result.json", "--device", "cpu")
    result = json.loads(Path("new/result.json").read_text())
    assert status == 0 and tuple(result) == KEYS and Path("out/needle_2048_0.png").is_file()
    assert (
        re.search(r"(?s)answer +.* \((right|wrong: it is \d{6}\.)\)", out)
        and result["question"] in out
    )
    assert "needle in  chunk" in out and ">>>" in out and "<<<" in out and "GB" in out
    assert {path.name for path in Path("new").iterdir()} == {"result.json"}


def test_of_an_endless_text_only_what_is_needed_is_read(folder, capfd, monkeypatch):
    status, out, err = call(capfd, *DEMO, "--haystack", "/dev/zero")
    assert status == 0 and "reading 2,048 tokens of /dev/zero" in out
    assert "--haystack: the text is longer, and the rest of it is not read" in err
    assert "longer" not in call(capfd, *DEMO, "--haystack", "good.txt", "--tokens", "12000")[2]
    monkeypatch.setattr("hsa_mini.cli.generate.MAX_PROMPT_TOKENS", 1000)
    status, out, err = call(capfd, *GENERATE[:3], "/dev/zero")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--prompt-file: got more than 1000 tokens of text, accepted is 1 to 1000" in err


def test_the_haystack_is_held_out_text_if_none_is_given(folder, capfd):
    first = ("demo", "--tokens", "1024", "--checkpoint", "model", "--json", "a")
    second = ("--seed", "1")
    assert call(capfd, *first)[0] == call(capfd, *first, *second)[0] == 0


def test_the_picture_needs_matplotlib_alone_and_the_answer_not_even_that(capfd, monkeypatch):
    for module in ("anywidget", "ipywidgets", "IPython", "hsa_mini.viz.widgets"):
        monkeypatch.setitem(sys.modules, module, None)
    assert call(capfd, *DEMO)[0] == 0 and Path("out/needle_2048_0.png").is_file()
    shutil.rmtree("out")
    monkeypatch.setitem(sys.modules, "hsa_mini.viz.plots", None)
    status, out, _ = call(capfd, *DEMO)
    assert status == 0 and "picture    none: matplotlib is not installed" in out
    assert "answer" in out and not Path("out").exists()


def test_a_text_that_would_upset_a_terminal_or_a_picture(folder, capfd, monkeypatch):
    Path("evil.txt").write_text("\x1b[2J\x9b\x07\0\r\u202e$x$\\frac{" * 200, encoding="utf-8")
    monkeypatch.setattr("hsa_mini.evaluation.demo.continue_from", answering("\x1b$\\frac$"))
    status, out, _ = call(capfd, *DEMO, "--haystack", "evil.txt")
    assert status == 0 and Path("out/needle_2048_0.png").stat().st_size > 5000
    assert not set("\x1b\x9b\x07\0\u202e") & set(out) and "\N{MIDDLE DOT}$\\frac$" in out


def answering(text: str):
    """`continue_from` with another answer."""
    import torch

    from hsa_mini.data.tokenizer import load_tokenizer
    from hsa_mini.inference.generate import Generation, continue_from

    ids = torch.tensor([load_tokenizer().encode_ordinary(text)])
    return lambda *a, **o: Generation(ids, *list(vars(continue_from(*a, **o)).values())[1:])


def test_train_and_eval_from_nothing_to_a_table(folder, capfd, monkeypatch):
    from hsa_mini import PRESETS
    from hsa_mini.training.mixture import Mixture
    from hsa_mini.training.recipes import RECIPES, Recipe, Stage

    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(
        RECIPES,
        "tiny",
        Recipe((Stage(steps=9, batch=2, tokens=96, mixture=Mixture(min_copy=16)),)),
    )
    status, out, _ = call(capfd, "train", "tiny", "--steps", "2", "--device", "cpu")
    assert status == 0 and "runs/tiny/final" in out and "runs/tiny/log.csv" in out
    status, out, _ = call(
        capfd,
        "eval",
        "runs/tiny/final",
        "--lengths",
        "300",
        "400",
        "--texts",
        "1",
        "--out",
        "r.json",
    )
    assert status == 0 and out.count("control:") == 2 and "written to r.json" in out
    rows = json.loads(Path("r.json").read_text())["rows"]
    assert len(rows) == 20 and {row["tokens"] for row in rows} == {300, 400}
    assert re.search(r"^ +300 +\d+/10 ", out, re.MULTILINE) and re.search(
        r"^ +400 +\d+/10 ", out, re.MULTILINE
    )


def test_results_go_beside_the_shipped_ones_unless_told_otherwise(folder, capfd, monkeypatch):
    data = folder / "data"
    data.mkdir()
    shutil.copy(data_dir() / "tokenizer.tiktoken", data)
    shutil.copytree("model", data / "checkpoints" / "own")
    monkeypatch.setenv("HSA_MINI_DATA", str(data))
    status, out, _ = call(capfd, "eval", "own", "--lengths", "300", "--texts", "1")
    assert status == 0 and (data / "results" / "own_s_niah.json").is_file()
    for task in arguments.TASKS:
        options = (
            "--task",
            task,
            "--distractors",
            "3",
            "--border",
            "--lengths",
            "500",
            "--texts",
            "1",
        )
        status, out, _ = call(capfd, "eval", "own", *options)
        result = json.loads(
            (data / "results" / f"own_{task}_3_distractors_border.json").read_text()
        )
        assert status == 0 and [row["control"] for row in result["control_rows"]] == [
            "absent",
            "shuffled",
        ]
        assert result["checkpoint"] == fingerprint(data / "checkpoints" / "own")
        assert result["corpus"] == word_corpus("validation").identity
    status, out, _ = call(capfd, "perplexity", "own", "--lengths", "700", "600", "--stretches", "2")
    result = json.loads((data / "results" / "own_perplexity.json").read_text())
    rows = result["rows"]
    assert result["checkpoint"] == fingerprint(data / "checkpoints" / "own")
    assert result["corpus"] == word_corpus("validation").identity
    assert status == 0 and [row["tokens"] for row in rows] == [600, 700]
    assert all(
        f"perplexity {row['perplexity']:.2f}" in out and len(row["losses"]) == 2 for row in rows
    )
    monkeypatch.setenv("HSA_MINI_DATA", str(folder / "nowhere"))
    status, out, err = call(capfd, "eval", "own")
    assert (status, out, err.count("\n")) == (2, "", 1) and "HSA_MINI_DATA" in err


@pytest.mark.parametrize(
    "checkpoint, out, want",
    [
        ("mini", None, "DATA/results/mini_vt.json"),
        ("./mini", None, "mini_vt.json"),
        ("data/checkpoints/mini", None, "mini_vt.json"),
        ("runs/a/final", None, "a_vt.json"),
        ("runs/b/final/", None, "b_vt.json"),
        (".", None, "here_vt.json"),
        ("..", None, "above_vt.json"),
        ("mini", Path("r.json"), "r.json"),
    ],
)
def test_only_a_shipped_model_named_by_its_name_writes_to_the_shipped_results(
    folder, monkeypatch, checkpoint, out, want
):
    Path("above/here").mkdir(parents=True)
    monkeypatch.chdir("above/here")
    Path("mini").mkdir()
    path = arguments.results_path(out, checkpoint, "vt")
    assert str(path) == want.replace("DATA", str(data_dir()))


def test_two_runs_do_not_share_results_and_none_is_replaced_by_another(folder, capfd):
    shutil.copytree("model", "runs/a/final")
    tiny(tied=False).save_pretrained("else/a/final")
    options = ("--lengths", "600", "--stretches", "1")
    assert call(capfd, "perplexity", "runs/a/final", *options)[0] == 0
    before = Path("a_perplexity.json").read_bytes()
    status, out, err = call(capfd, "perplexity", "else/a/final", *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "--out: a_perplexity.json holds something else than results of this checkpoint" in err
    assert Path("a_perplexity.json").read_bytes() == before
    assert call(capfd, "perplexity", "runs/a/final", *options)[0] == 0  # the same checkpoint


def test_a_length_that_is_named_twice_counts_once(capfd):
    status, out, _ = call(capfd, *EVALUATE, "--lengths", "300", "300")
    rows = json.loads(Path("new/r.json").read_text())["rows"]
    assert status == 0 and len(rows) == 10 and sum(row["samples"] for row in rows) == 10


def test_a_seed_and_an_arm_that_are_named_twice_run_once(capfd, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hsa_mini.lab.harness.run_missing", lambda *x, **_: seen.extend(map(list, x)) or (0, 0)
    )
    words = ("--arms", "hsa", "window", "hsa", "--seeds", "1", "1", "0", "--out", "lab.jsonl")
    assert call(capfd, "lab", *words, "--steps", "1")[0] == 0
    assert seen == [["hsa", "window"], [1, 0]]


@pytest.mark.parametrize("name", ["eval", "perplexity"])
def test_a_command_that_was_cut_off_goes_on_after_the_finished_lengths(capfd, monkeypatch, name):
    words = [name, "model", "--lengths", "600", "700"]
    words += ["--texts", "1"] if name == "eval" else ["--stretches", "2"]
    measure = {
        "eval": "hsa_mini.evaluation.runner._ask_all",
        "perplexity": "hsa_mini.evaluation.perplexity._losses",
    }[name]
    assert call(capfd, *words, "--out", "whole.json")[0] == 0
    original = pkgutil.resolve_name(measure.replace("._", ":_"))
    done = []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(measure, interrupted)
        assert call(capfd, *words, "--out", "r.json")[0] == 130
        assert Path("r.json.unfinished").is_file() and not Path("r.json").exists()
        assert call(capfd, *words, "--out", "r.json", "--seed", "2")[0] == 2  # another run
        assert call(capfd, *words, "--out", "r.json")[0] == 130  # at the next length
    rest = []
    monkeypatch.setattr(measure, lambda *x: rest.append(x) or original(*x))
    status, out, _ = call(capfd, *words, "--out", "r.json")
    assert status == 0 and out.startswith("1 of 2 lengths were finished before\n")
    assert len(rest) == 1 and not Path("r.json.unfinished").exists()
    whole, got = (json.loads(Path(path).read_text()) for path in ("whole.json", "r.json"))
    assert {**got, "command": ""} == {**whole, "command": ""}


def test_fetch_says_what_is_there_and_does_without_a_network(capfd, monkeypatch):
    monkeypatch.setattr(archives, "fetch_archives", lambda: None)
    status, out, err = call(capfd, "fetch")
    assert (status, err) == (0, "") and re.search(
        r"train: [\d,]+ tokens\n *validation: [\d,]+ tokens", out
    )
    monkeypatch.setattr(archives, "fetch_archives", raising(OSError("no network")))
    status, out, err = call(capfd, "fetch")
    assert status == 0 and "train" in out
    assert err == "no network\n"


def generated(**options) -> list[int]:
    """The tokens that `generate` makes of good.txt."""
    import torch

    ids = torch.tensor([TOKENIZER.encode_ordinary(words(3000))])
    return HSAModel.from_pretrained("model").generate(ids, **options).ids[0].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.5, "top_k": 900, "top_p": 0.9, "seed": 3}], ids=str
)
def test_generate_writes_the_text_of_the_tokens_that_the_model_makes(capfd, options):
    arguments = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    got = call(capfd, *GENERATE, "--max-new-tokens", "60", "--device", "cpu", *arguments)
    assert got == (0, TOKENIZER.decode(generated(max_new_tokens=60, **options)) + "\n", "")


@pytest.mark.parametrize(
    "made", [[], [65, 66], TOKENIZER.encode_ordinary("é 中 😀 \x1b[2J\r")], ids=str
)
def test_generate_ends_at_the_end_of_the_text(capfd, monkeypatch, made):
    import torch

    later = iter([*made, end_of_text(TOKENIZER)])  # a further token would raise StopIteration
    monkeypatch.setattr(
        "hsa_mini.inference.generate.stream",
        lambda *_, **__: (torch.tensor([[next(later)]]) for _ in range(99)),
    )
    assert call(capfd, *GENERATE) == (0, TOKENIZER.decode(made) + "\n", "")


def test_generate_reads_standard_input_and_writes_characters_whole_as_they_are_made(folder):
    """The weights make the model repeat the bytes of a text; each token is one byte."""
    import torch

    text = "é中😀"
    model = tiny(tied=False, lower_layers=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                parameter.zero_()  # so a token is predicted from the last one alone
        said = list(text.encode())
        tokens = [TOKENIZER.encode_single_token(bytes([byte])) for byte in dict.fromkeys(said)]
        assert len(tokens) == len(said)  # no byte occurs twice: each decides the next
        for token, following in zip(tokens, [*tokens[1:], tokens[0]]):
            model.head.weight[following] = 100 * model.embedding.weight[token]
    model.save_pretrained("parrot")
    process = start(
        "generate",
        "parrot",
        "--prompt-file",
        "-",
        "--max-new-tokens",
        "100000",
        PYTHONIOENCODING="utf-8",
    )
    process.stdin.write("😀")
    process.stdin.close()
    assert process.stdout.read(len(text) * 5) == text * 5
    os.killpg(process.pid, signal.SIGINT)  # while it writes
    out = process.stdout.read()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 130 and "Traceback" not in err and "interrupted" in err
    assert (text * 40_000).startswith(out)


def test_control_c_while_generate_reads_ends_with_130_and_shows_how_far_it_came(folder):
    Path("long.txt").write_text(words(3000) * 300, encoding="utf-8")
    process = start("generate", "model", "--prompt-file", "long.txt")
    shown = ""
    while "prefill" not in shown and process.poll() is None:
        shown += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (
        (process.returncode, out) == (130, "") and "Traceback" not in err and "interrupted" in err
    )


def start(*words: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hsa_mini", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # background jobs of a shell ignore Ctrl-C, and so would the tests started from one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


every_stop = pytest.mark.parametrize(
    "number, status, said",
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    ids=["Ctrl-C", "SIGTERM"],
)


@every_stop
def test_a_demo_that_is_stopped_says_so_and_leaves_nothing_half_written(
    folder, number, status, said
):
    before = listing(folder)
    words = ("--tokens", "50000000", "--checkpoint", "model", "--haystack", "good.txt")
    process = start("demo", *words, "--json", "r.json")
    assert process.stdout.readline().startswith("reading 50,000,000 tokens")
    time.sleep(0.3)
    os.killpg(process.pid, number)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err
    assert err.endswith(f"\n{said}; nothing half-written was left behind\n")
    assert listing(folder) == before


MODULE = "import runpy; runpy.run_module('hsa_mini', run_name='__main__', alter_sys=True)"
SCRIPT = "from hsa_mini.cli import main; sys.exit(main())"


@every_stop
@pytest.mark.parametrize(
    "begin, module",
    [
        (MODULE, "hsa_mini.cli.entry"),
        (SCRIPT, "hsa_mini.cli.entry"),
        (MODULE, "numpy"),
        (MODULE, "torch.nn"),
    ],
)
def test_a_command_can_be_stopped_at_any_import(begin, module, number, status, said):
    """The signal comes in the middle of an import, which could change or lose KeyboardInterrupt."""
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def hook(event, arguments):
    if event == "import" and arguments[0] == {module!r}:
        os.kill(os.getpid(), {int(number)})
sys.addaudithook(hook)
{begin}
"""
    run = subprocess.run(
        [sys.executable, "-c", code, "plan", "nano"], capture_output=True, text=True
    )
    message = f"\n{said}; nothing half-written was left behind\n"
    assert (run.returncode, run.stdout, run.stderr) == (status, "", message)


def test_an_error_that_an_interrupted_import_makes_of_it_is_still_an_interruption(
    capfd, monkeypatch
):
    def run(*_):
        signal.raise_signal(signal.SIGTERM)

    def interrupted(*_):
        try:
            run()
        except KeyboardInterrupt:
            raise ImportError("cannot load module more than once per process") from None

    monkeypatch.setattr("hsa_mini.cli.plan.run", interrupted)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(sys, "argv", ["hsa-mini", "plan", "nano"])
    try:
        assert main() == 143
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert capfd.readouterr() == ("", "\nterminated; nothing half-written was left behind\n")


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        Stop().take_over_signals()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def test_control_c_during_training_saves_the_state_and_ends_with_130(folder):
    from material import small_corpus

    small_corpus(folder / "cache")
    process = start("train", "nano", "--device", "cpu", HSA_MINI_CACHE=str(folder / "cache"))
    deadline = time.monotonic() + 60
    shown = ""
    while not re.search("[1-9][0-9]*/1400", shown) and time.monotonic() < deadline:
        shown += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    step = re.match("stopped after step ([0-9]+); the same command goes on", out)[1]
    assert {path.name for path in Path("runs/nano").iterdir()} == {"log.csv", f"step-{step}"}


def test_the_module_is_the_command_and_errors_have_no_traceback(folder):
    process = start("demo", "--tokens", "12")
    out, err = process.communicate(timeout=60)
    assert (
        (process.returncode, out) == (2, "") and err.count("\n") == 1 and "--tokens: got 12" in err
    )


@pytest.mark.parametrize(
    "command", ["demo", "generate", "train", "eval", "perplexity", "plan", "fetch"]
)
def test_help_explains_every_option(capfd, command):
    status, out, err = call(capfd, command, "--help")
    assert (status, err) == (0, "")
    parser = next(
        a for a in entry.build_parser()._actions if a.choices and "demo" in a.choices
    ).choices[command]
    for action in parser._actions:
        assert all(name in out for name in action.option_strings)


EVALUATE = ["eval", "model", "--lengths", "300", "--texts", "1", "--out", "new/r.json"]
WRITERS = {  # commands that write the file new/r.json
    "demo": [*DEMO, "--json", "new/r.json"],
    "eval": EVALUATE,
    "perplexity": ["perplexity", "model", "--lengths", "600", "700", "--out", "new/r.json"],
    "plan": ["plan", "nano", "--json", "new/r.json"],
}


def unwritable(how: str):
    """A standard output of which nothing arrives: closed, or a pipe whose reader has gone."""
    if how == "closed":
        return os.fdopen(os.open("good.txt", os.O_RDONLY), "w")
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("how", ["closed", "pipe"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_failing_standard_output_does_not_stop_the_result_file(capfd, monkeypatch, name, how):
    with unwritable(how) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        status, _, err = call(capfd, *WRITERS[name])
    assert json.loads(Path("new/r.json").read_text())
    assert [path.name for path in Path("new").iterdir()] == ["r.json"]
    if how == "pipe":
        assert status == 141 and "error" not in err
    else:
        message = f"hsa-mini {name}: error: standard output: Bad file descriptor\n"
        assert status == 2 and err.endswith(message)


@pytest.mark.parametrize("words", [["plan", "nano", "--json", "-"], ["--help"], GENERATE])
@pytest.mark.parametrize("how, status", [("closed", 2), ("pipe", 141)])
def test_a_result_that_standard_output_does_not_take_is_a_failure(
    capfd, monkeypatch, words, how, status
):
    with unwritable(how) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        got, _, err = call(capfd, *words)
    assert got == status and ("standard output: Bad file descriptor" in err) == (how == "closed")


def test_a_command_runs_without_standard_streams(folder):
    """What it prints goes nowhere, and not into the files that get the numbers 0 to 2."""
    words = [sys.executable, "-m", "hsa_mini", "plan", "nano", "--json", "r.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        words, env=environment, preexec_fn=lambda: os.closerange(0, 3), cwd=folder, check=False
    )
    assert run.returncode == 2 and json.loads(Path("r.json").read_text())["preset"] == "nano"


def test_generate_ends_quietly_when_its_reader_has_gone(folder):
    process = start(*GENERATE, "--max-new-tokens", "1000000")
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_what_a_user_has_named_and_what_the_library_says_do_not_reach_the_terminal_raw(capfd):
    evil = "\x1b[2J\x9b\u202e"
    status, out, _ = call(capfd, "plan", "nano", "--json", f"{evil}.json")
    assert status == 0 and Path(f"{evil}.json").is_file()
    status, out, _ = call(capfd, *EVALUATE[:-1], f"{evil}r.json")
    assert status == 0 and out.endswith("written to ·[2J··r.json\n") and "\x1b" not in out
    record = logging.LogRecord("hsa_mini", logging.WARNING, "", 0, "no %s", (f"{evil}\n\r",), None)
    with reporting.standard_streams():
        reporting.LineHandler().emit(record)
        assert capfd.readouterr() == ("", "no ·[2J··\n")  # at once


def test_the_versions_are_one_line(capfd):
    status, out, err = call(capfd, "--version")
    number = r"(\d+\.\d+[\w.+]*|\(not installed\))"
    assert (status, err) == (0, "") and re.fullmatch(
        rf"hsa-mini {number}, torch {number}, triton {number}\n", out
    )


def test_printable_keeps_every_script_and_drops_what_moves_the_cursor():
    assert printable("中文 é\n\tx") == "中文 é\n\tx"
    assert printable("a\0\x1b\r\x7f\x9b\u202e") == "a" + "·" * 6
    assert np.all([len(printable(chr(i))) == 1 for i in range(0x3000)])


def test_the_tasks_are_those_of_the_package():
    assert tuple(TASKS) == arguments.TASKS


def test_the_limits_are_those_of_the_package():
    assert (arguments.MIN_DEMO_TOKENS, arguments.MIN_HAYSTACK) == (MIN_TOKENS, MIN_HAYSTACK)
    assert (arguments.PERPLEXITY_TARGETS, arguments.MAX_DISTRACTORS) == (TARGETS, MAX_DISTRACTORS)


@pytest.mark.parametrize(
    "words", [["demo", "--tokens", "12"], ["demo", "--help"], ["sing"], ["--version"]]
)
def test_a_command_line_is_refused_or_explained_without_loading_torch(words):
    code = f"""
import sys
from hsa_mini.cli import main
main({words})
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert run.stdout.endswith("False False\n")
