"""Training on one's own text with one's own configuration: from a file to a model, and refusals."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from material import TINY, tiny, words

from hsa_mini import PRESETS, HSAModel
from hsa_mini.data.corpus import Corpus
from hsa_mini.data.encoder import checkpoint_encoder
from hsa_mini.data.own_corpus import load_own_corpus, tokenizer_files
from hsa_mini.data.own_text import OwnText
from hsa_mini.data.tokenizer import load_tokenizer, save_ranks
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.mixture import NONE, TEXT
from hsa_mini.training.own.batches import DocumentBatches
from hsa_mini.training.own.held_out import HeldOut
from hsa_mini.training.own.settings import Settings, load_config, load_settings
from hsa_mini.training.recipes import RECIPES, Recipe, Stage
from hsa_mini.training.step import forward_and_loss

# What a user writes: the smallest model, all of whose sizes are named.
CONFIG = """{
 "model": {
  "vocab_size": 4096, "width": 32, "lower_layers": 2, "groups": 1, "layers_per_group": 2,
  "mlp_width": 64, "window": 8, "heads": 2, "kv_heads": 1, "head_dim": 16,
  "chunk_size": 4, "top_k": 2, "hsa_heads": 2, "hsa_kv_heads": 1, "hsa_head_dim": 16,
  "retrieval_dim": 16
 },
 "train": {
  "stages": [{"steps": 6, "batch": 2, "tokens": 48}],
  "learning_rate": 0.003,
  "warmup": 3
 },
 "data": {
  "files": ["texts/*.txt"],
  "held_out": 0.1
 }
}"""
WORDS = ["train", "--config", "my.json", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder: a configuration, and four texts, one of them shorter than a row."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HSA_MINI_CACHE", str(tmp_path / "cache"))
    Path("texts").mkdir()
    for i, count in enumerate((100, 60, 12, 80)):
        Path(f"texts/{i}.txt").write_text(words(count, seed=str(i)))
    Path("my.json").write_text(CONFIG)
    return tmp_path


def documents(*lengths: int) -> Corpus:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4096, sum(lengths)).astype(np.uint16)
    return Corpus("random", tokens, np.cumsum((0, *lengths))[:-1])


def rows_of(log: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(log.read_text().splitlines()))


# ---- from a configuration and a text to a model


def test_a_configuration_and_a_text_become_a_model(capfd, caplog):
    assert len(CONFIG.splitlines()) <= 20
    status, out, _ = call(capfd, *WORDS, "--eval-every", "3")
    assert (status, out) == (0, "the model is in runs/my/final, the log in runs/my/log.csv\n")
    assert caplog.messages == [
        "data: 3 of 4 documents are longer than a row of 48 tokens and were split"
    ]
    model = HSAModel.from_pretrained("runs/my/final")
    assert model.config == load_config("my.json") and model.config.width == 32
    rows = rows_of(Path("runs/my/log.csv"))
    assert [row["step"] for row in rows] == ["3", "6"]
    losses = [float(row["held_out"]) for row in rows]
    assert losses[1] < losses[0] < 9
    how = json.loads(Path("runs/my/final/training.json").read_text())
    assert how["corpus"]["name"] == "own text" and how["recipe"]["eval_every"] == 3


def test_a_run_on_ones_own_text_is_resumed(capfd, monkeypatch):
    options = ["--accumulate", "2", "--set", "train.dtype=bfloat16", "--run"]
    assert call(capfd, *WORDS, *options, "whole")[0] == 0
    settings = load_settings("my.json", [("train.accumulate", 2), ("train.dtype", "bfloat16")])
    from hsa_mini.training.run import train

    train(settings, run=Path("cut"), device=torch.device("cpu"), stop=lambda step: step == 4)
    assert call(capfd, *WORDS, *options, "cut")[0] == 0
    weights = [Path(run, "final", "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]
    Path("texts/0.txt").write_text("another text")
    before = sorted(Path("cut").rglob("*"))
    status, out, err = call(capfd, *WORDS, *options, "cut")
    assert status == 2 and "run: cut holds a run of other settings" in err and "corpus: got" in err
    assert sorted(Path("cut").rglob("*")) == before


def test_sigterm_saves_the_run_and_ends_with_0(folder):
    words = [sys.executable, "-m", "hsa_mini", *WORDS, "--steps", "100000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not Path("runs/my/log.csv").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.fullmatch(r"stopped after step \d+; the same command goes on from there\n", out)


def test_tensorboard_shows_the_rows_of_the_log(capfd):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert call(capfd, *WORDS, "--tensorboard", "--eval-every", "3")[0] == 0
    events = EventAccumulator("runs/my/tensorboard")
    events.Reload()
    rows = rows_of(Path("runs/my/log.csv"))
    for name in ("loss", "held_out", "learning_rate"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        want = [(int(row["step"]), float(row[name])) for row in rows]
        assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in want]


def test_a_preset_trains_on_ones_own_text_with_its_own_mixture(capfd, monkeypatch):
    stage = Stage(steps=2, batch=2, tokens=96)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setitem(RECIPES, "tiny", Recipe((stage,), warmup=1))
    words = ["train", "tiny", "--data", "texts/*.txt", "--device", "cpu"]
    assert call(capfd, *words, "--set", "stage.mixture.min_copy=16")[0] == 0
    how = json.loads(Path("runs/tiny/final/training.json").read_text())
    assert how["recipe"]["stages"][0]["mixture"]["copy_least"] == 16
    assert how["corpus"]["name"] == "own text"


def test_a_model_of_another_tokenizer_continues_a_text_with_it(capfd):
    ranks = {bytes([i]): i for i in range(256)}
    save_ranks(ranks | {b"ab" * (1 << i): 256 + i for i in range(4)}, Path("ranks"))
    words = [*WORDS, "--tokenizer", "ranks", "--set", "model.vocab_size=262"]
    assert call(capfd, *words)[0] == 0
    final = Path("runs/my/final")
    assert call(capfd, "consolidate", "runs/my", "out")[0] == 0
    for folder in (final, Path("out")):
        assert (folder / "tokenizer.tiktoken").read_bytes() == Path("ranks").read_bytes()
    Path("prompt.txt").write_text("ababababc")
    words = ["generate", str(final), "--prompt-file", "prompt.txt", "--device", "cpu"]
    status, out, _ = call(capfd, *words, "--max-new-tokens", "9")
    ids = torch.tensor([[258, ord("c")]])
    made = HSAModel.from_pretrained(final).generate(ids, max_new_tokens=9).ids[0].tolist()
    made = made[: made.index(260)] if 260 in made else made
    tokenizer = load_tokenizer(final.resolve() / "tokenizer.tiktoken")
    assert (status, out) == (0, tokenizer.decode(made, errors="replace") + "\n")
    status, _, err = call(capfd, "perplexity", str(final))
    assert status == 2 and "has a tokenizer of its own, accepted is a model for" in err


def save_json_tokenizer(path: Path) -> None:
    """A byte-level `tokenizer.json` of 300 tokens; `</s>` is 0, and `<done>` is the last one."""
    tokenizers = pytest.importorskip("tokenizers")
    bytes_ = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = bytes_(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=299, special_tokens=["</s>"], initial_alphabet=bytes_.alphabet()
    )
    tokenizer.train_from_iterator([words(300)], trainer)
    tokenizer.add_special_tokens(["<done>"])
    tokenizer.save(str(path))


@pytest.fixture
def json_model(capfd) -> Path:
    """A model that was trained with a tokenizer.json, whose end token a second file declares."""
    Path("own").mkdir()
    save_json_tokenizer(Path("own/tokenizer.json"))
    Path("own/tokenizer_config.json").write_text('{"eos_token": {"content": "<done>"}}')
    data = OwnText(("texts/*.txt",), tokenizer="own/tokenizer.json")
    size = checkpoint_encoder(Path("own")).vocab_size
    model = tiny(vocab_size=size)
    model.save_pretrained("model", texts=tokenizer_files(data))
    assert load_own_corpus(data, size).tokens[-1] == size - 1  # <done> ends every document
    capfd.readouterr()
    return Path("model")


def test_a_model_of_a_tokenizer_json_continues_a_text_with_it(capfd, json_model):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file("model/tokenizer.json")
    text = "Größe 🙂 </s> and so on"
    Path("prompt.txt").write_text(text)
    words = ["generate", "model", "--prompt-file", "prompt.txt", "--device", "cpu"]
    status, out, _ = call(capfd, *words, "--max-new-tokens", "60")
    model = HSAModel.from_pretrained(json_model)
    ids = model_ids(tokenizer, text)
    made = model.generate(torch.tensor([ids]), max_new_tokens=60).ids[0].tolist()
    end = tokenizer.token_to_id("<done>")
    made = made[: made.index(end)] if end in made else made
    assert 0 not in ids and tokenizer.decode(ids, skip_special_tokens=False) == text
    want = tokenizer.decode(made, skip_special_tokens=False)
    assert (status, out) == (0, want + "\n") and "\ufffd" in want  # unfinished characters too


def model_ids(tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_demo_reads_the_tokenizer_json_of_a_model(capfd, json_model):
    Path("book.txt").write_text(words(400))
    line = ["demo", "--checkpoint", "model", "--tokens", "2000", "--device", "cpu", "--seed", "3"]
    status, out, _ = call(capfd, *line, "--haystack", "book.txt", "--json", "found.json")
    found = json.loads(Path("found.json").read_text())
    key = re.fullmatch(r"What is the secret code of ([A-Z]{4})\?", found["question"])[1]
    needle = "".join(re.findall(">>>(.*?)<<<", out.replace(">>> and <<<", "")))
    assert (status, needle) == (0, f" The secret code of {key} is {found['expected']}")


def test_what_does_not_fit_a_tokenizer_json_is_refused(capfd, json_model):
    line = ["demo", "--checkpoint", "model", "--tokens", "2000", "--device", "cpu"]
    assert "--haystack: got none, accepted is a text for" in refused(capfd, *line)
    said = refused(capfd, "index", "texts", "index", "--checkpoint", "model")
    assert "model has a tokenizer of its own, accepted is a model for" in said
    Path("prompt.txt").write_text("text")
    generate = ["generate", "model", "--prompt-file", "prompt.txt", "--device", "cpu"]
    tiny(vocab_size=299).save_pretrained(
        "model", texts={"tokenizer.json": Path("own/tokenizer.json").read_text()}
    )
    assert "knows 299 tokens, accepted is a model of at least 300" in refused(capfd, *generate)
    tiny().save_pretrained("model", texts={"tokenizer.json": "{}"})
    assert "checkpoint: model/tokenizer.json holds no tokenizer" in refused(capfd, *generate)


def refused(capfd, *words: str) -> str:
    """The one line that refuses a command."""
    status, _, err = call(capfd, *words)
    assert status == 2 and err.count("\n") == 1, err
    return err


def test_a_tokenizer_json_with_the_ids_of_the_default_tokenizer_is_that_one(tmp_path):
    huggingface = pytest.importorskip("hsa_mini.integrations.huggingface")
    huggingface.fast_tokenizer().save_pretrained(tmp_path / "hf")
    assert checkpoint_encoder(tmp_path / "hf").is_default


# ---- batches of whole documents


@pytest.mark.parametrize("lengths", [(40, 3, 17, 9, 2, 100, 1, 5), (7,), (33, 32, 34)])
def test_every_document_is_read_once_in_every_pass(lengths):
    corpus = documents(*lengths)
    batches = DocumentBatches(corpus, batch=1, tokens=32, chunk_size=4, seed=3)
    passes = [[], []]
    for turn, found in enumerate(passes):
        for i in range(len(batches.rows)):
            ids, parts, starts = (x[0] for x in batches[turn * len(batches.rows) + i])
            assert ids.shape == parts.shape == starts.shape == (33,)
            for first in starts.unique().tolist():
                piece = (starts == first).nonzero().flatten()
                predicted = piece[parts[piece] == TEXT]
                assert parts[first] == NONE and first % 4 == 0
                assert predicted.tolist() == list(range(first + 1, first + 1 + len(predicted)))
                found.append(tuple(ids[first : first + 1 + len(predicted)].tolist()))
    ends = [*corpus.starts[1:], len(corpus)]
    want = [
        tuple(corpus.tokens[i : min(i + 33, end)].tolist())
        for start, end in zip(corpus.starts, ends)
        for i in range(start, end, 33)
        if end - start > 1
    ]
    # A rest of one token predicts nothing, like the padding after it.
    assert Counter(passes[0]) == Counter(passes[1]) == Counter(want)
    assert batches.split == sum(length > 33 for length in lengths)


def test_batches_are_a_function_of_seed_and_step():
    corpus = documents(*range(2, 40))
    one, same, other = (
        DocumentBatches(corpus, batch=3, tokens=32, chunk_size=4, seed=seed) for seed in (0, 0, 1)
    )
    steps = range(2 * len(one.rows))
    assert all(torch.equal(one[step][0], same[step][0]) for step in reversed(steps))
    assert any(not torch.equal(one[step][0], other[step][0]) for step in steps)


def test_the_loss_of_packed_documents_is_that_of_documents_alone():
    """Nothing attends or retrieves across a border, and every token counts once."""
    corpus = documents(30, 14, 23, 9, 2, 61)
    model = tiny().train()
    stage = Stage(steps=1, batch=2, tokens=63, mixture=None)
    recipe = Recipe((stage,))
    held_out = HeldOut(corpus, recipe, model.config)
    assert any(len(row) > 1 for row in held_out.batches[stage].rows)
    losses, count = 0.0, 0
    model.eval()
    for start, end in zip(corpus.starts, [*corpus.starts[1:], len(corpus)]):
        ids = torch.from_numpy(corpus.tokens[start:end].astype(np.int64))[None]
        parts = torch.full(ids.shape, TEXT)
        _, (loss, *_) = forward_and_loss(model, recipe, stage, ChunkQueue(0), ids, parts)
        losses += loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    model.train()
    assert held_out.loss(model, stage) == pytest.approx(losses / count, rel=1e-5)
    assert model.training


def test_the_held_out_loss_changes_nothing_in_training(capfd):
    for run, every in (("without", "0"), ("with", "2")):
        text = ["--set", "data.held_out=0", "--run", run]
        assert call(capfd, *WORDS, "--eval-every", every, *text)[0] == 0
    one, other = (HSAModel.from_pretrained(f"{run}/final") for run in ("without", "with"))
    # The last two tokens, which are held out at least, are the only difference of the texts.
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=0.01), name


# ---- settings


def test_the_recipes_of_the_course_are_read_as_they_are():
    for name, recipe in RECIPES.items():
        settings = load_settings(name)
        assert (
            settings == Settings(name, PRESETS[name], recipe)
            and "config" not in settings.identity()
        )


def test_values_are_replaced_by_name():
    changes = [
        ("model.window", 16),
        ("stage.batch", 3),
        ("stage.1.mixture.needles", 0.1),
        ("train.betas", [0.8, 0.9]),
        ("data.files", ["x"]),
    ]
    settings = load_settings("nano", changes)
    assert settings.config == dataclasses.replace(PRESETS["nano"], window=16)
    assert [stage.batch for stage in settings.recipe.stages] == [3] * 4
    assert [s.mixture.needles for s in settings.recipe.stages] == [0.0, 0.1, 0.5, 0.5]
    assert settings.recipe.betas == (0.8, 0.9) and settings.data.files == ("x",)
    assert settings.identity()["config"]["window"] == 16


def test_a_model_differs_from_a_preset_in_the_named_fields():
    Path("my.json").write_text('{"model": {"preset": "mini", "width": 128}}')
    assert load_config("my.json") == dataclasses.replace(PRESETS["mini"], width=128)
    Path("my.json").write_text('{"model": "ul_0_5b"}')
    assert load_config("my.json") == PRESETS["ul_0_5b"]


def test_plan_reads_the_same_file(capfd):
    for given in (["my.json"], ["--config", "my.json"]):
        status, out, _ = call(capfd, "plan", *given, "--tokens", "1000", "--json", "-")
        count = sum(p.numel() for p in HSAModel(load_config("my.json")).parameters())
        assert status == 0 and json.loads(out)["params_total"] == count


FILES = {
    "key.json": '{"model": "mini", "trian": {}}',
    "none.json": '{"model": "mini"}',
    "list.json": "[]",
    "model.json": CONFIG.replace('"width": 32', '"width": 0'),
    "field.json": CONFIG.replace('"width": 32', '"wide": 32'),
    "preset.json": '{"model": "huge", "train": {"stages": []}}',
    "stages.json": CONFIG.replace('[{"steps": 6, "batch": 2, "tokens": 48}]', "[]"),
    "tokens.json": CONFIG.replace('"tokens": 48', '"tokens": 0'),
    "missing.json": CONFIG.replace(', "tokens": 48', ""),
    "rate.json": CONFIG.replace("0.003", "NaN"),
    "small.json": CONFIG.replace('"vocab_size": 4096', '"vocab_size": 512'),
}


@pytest.mark.parametrize(
    "words, reason",
    [
        (["train"], "preset: got none, accepted is one preset or configuration file"),
        (["train", "nano", "--config", "my.json"], "preset: got nano and my.json, accepted is one"),
        (["train", "nowhere.json"], "path: nowhere.json is not readable; accepted is a file with"),
        (["train", "list.json"], "path: list.json is not readable"),
        (
            ["train", "key.json"],
            "key.json: got unknown key 'trian', accepted are model, train, data",
        ),
        (["train", "none.json"], "train: none.json has no such section"),
        (["train", "model.json"], "model.width: got 0, accepted is an integer from 1"),
        (["train", "field.json"], "model.config: got unknown key 'wide'"),
        (["train", "preset.json"], "model: got 'huge', accepted are the fields of HSAConfig"),
        (["train", "stages.json"], r"train.stages: got \(\), accepted is at least one stage"),
        (
            ["train", "tokens.json"],
            r"train.stages\[0\].tokens: got 0, accepted is an integer from 1",
        ),
        (["train", "missing.json"], r"train.stages\[0\]: key 'tokens' is missing"),
        (["train", "rate.json"], "train.learning_rate: got nan, accepted is a number from 0"),
        (
            ["train", "small.json"],
            "tokenizer: the default one has 4096 tokens, accepted are at most",
        ),
        ([*WORDS, "--set", "x"], "--set: got 'x', accepted is NAME=VALUE"),
        (
            [*WORDS, "--set", "stage.1.batch=2"],
            "--set: got 'stage.1.batch', accepted are model.FIELD",
        ),
        ([*WORDS, "--set", "batch=2"], "--set: got 'batch', accepted are model.FIELD"),
        ([*WORDS, "--set", "stage.steps=0"], "steps: got 0 in all stages, accepted is at least 1"),
        (
            [*WORDS, "--set", "stage.window=0"],
            r"train.stages\[0\].window: got 0, accepted is an int",
        ),
        (
            [*WORDS, "--set", "train.dtype=int8"],
            "train.dtype: got 'int8', accepted are float32 and",
        ),
        (
            [*WORDS, "--set", "train.betas=[0.9]"],
            r"train.betas: got \(0.9,\), accepted are two numb",
        ),
        ([*WORDS, "--set", "train.betas=[1, 0]"], r"train.betas\[0\]: got 1, accepted is a number"),
        ([*WORDS, "--set", "data.files=x"], "data.files: got 'x', accepted is a list"),
        ([*WORDS, "--learning-rate", "-1"], "--learning-rate: got -1.0, accepted is 0 to 1000"),
        ([*WORDS, "--accumulate", "0"], "--accumulate: got 0, accepted is 1"),
        ([*WORDS, "--data", "empty"], "data: got 'empty', which names no file"),
        ([*WORDS, "--data", "noise"], "data: got 1 files, all binary"),
        ([*WORDS, "--tokenizer", "nowhere"], "tokenizer: cannot read nowhere"),
        (["train", "nano", "--tokenizer", "x"], "data: key 'files' is missing"),
        (
            ["train", "nano", "--data", "texts", "--tokenizer", "x"],
            "tokenizer: got one of your own with a mixture",
        ),
        (["train", "nano", "--data", "texts/2.txt"], "text: got .* tokens, accepted are at least"),
        (["plan", "field.json"], "model.config: got unknown key 'wide'"),
        (["plan"], "preset: got none, accepted is one preset"),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_the_run_begins(
    capfd, monkeypatch, words, reason
):
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("empty").mkdir()
    Path("noise").write_bytes(os.urandom(4096) + b"\0")
    monkeypatch.setattr("hsa_mini.training.run.HSAModel", None)
    status, out, err = call(capfd, *words)
    (line,) = [line for line in err.splitlines() if "error" in line]
    assert (status, out) == (2, "") and re.match(rf"hsa-mini {words[0]}: error: {reason}", line), (
        err
    )
    assert not Path("runs").exists()
