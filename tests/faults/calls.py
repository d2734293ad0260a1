"""Random command lines and calls of the package, from a grammar of nasty values."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hsa_mini import PRESETS, ChunkMemory, HSAConfig, HSAModel, cli
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.data import tokenizer
from hsa_mini.data.corpus import load_text
from hsa_mini.evaluation.results import read_results
from hsa_mini.index.stored import read_index
from hsa_mini.index.texts import find_files
from hsa_mini.lab.records import append_record, read_records
from hsa_mini.model.cost_estimate import estimate_cost
from hsa_mini.provenance import write_results
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import place

MANY = 1000  # tokens or steps that may take long
COMMANDS_PERCENT = 70
GOOD_PERCENT = 80  # of the values
INTEGERS = (-(1 << 70), -1, 0, 1, 2, 3, 63, 64, 65, 4096, 10**6, 10**9, (1 << 32), 10**30)
NUMBERS = (-1.0, -0.0, 0.0, 1e-300, 0.5, 1.0, 1.0000001, 1e300, float("inf"), float("nan"))
WORDS = (
    "", " ", "-", "--", "-1", "0", "1", "x", "nan", "inf", "-inf", "1e9", "0x10", "1_000",
    "9" * 5000, "٣", "\N{GRINNING FACE}", "\x1b[31mred", "\x1b]0;title\x07", "a\nb", "\u202e",
    "x" * 300, "%s", "auto", "cpu", "cuda", "cuda:99", "meta", "../..", "~", "~nobody/x", "\udcff",
)  # fmt: skip
PATHS = (
    "new.json", "new/deep/x.json", "out.json", "good.txt", "short.txt", "empty.txt", "latin.txt",
    "link", "loop", "nowhere", "models", "model", "few", "memory", "index", "proj", "empty", "fifo",
    "mounted", "mounted/x", "mounted.json", "full", "full/x.json", "readonly", "readonly/x.json",
    "readonly/thesis.tex", "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/stdin",
    "/dev/stdout", "/dev/fd/2", "/dev/new", "/proc/self/x", "/proc/self/status", "/", ".", "..", "",
    "-", "good.txt/x", "model/config.json", "model/../model", "\x1b[31mred", "x" * 300, "a\0b",
    "missing", "lab.jsonl", "own", "pretrained", "my.json", "lines.jsonl", "ids.bin",
)  # fmt: skip
ENDLESS = ("fifo", "-", "/dev/stdin")  # who reads them may wait
FOLDERS_OF_MUCH = ("/", "..", ".", "../..", "~")  # to read all their files takes long
TRAINING: dict[str, tuple[str, ...]] = {
    "--steps": ("1", "2"),
    "--seed": ("0", "7"),
    "--data": ("good.txt", "proj", "*.txt", "lines.jsonl", "ids.bin"),
    "--tokenizer": ("own/tokenizer.json", "ranks"),
    "--learning-rate": ("0", "0.01"),
    "--batch": ("1", "3"),
    "--accumulate": ("1", "2"),
    "--eval-every": ("0", "1"),
    "--set": ("stage.tokens=48", "train.dtype=bfloat16", "model.window=4", "data.held_out=0.1"),
    "--tensorboard": (),
    "--restart": (),
    "--device": ("cpu", "auto"),
}
# Arguments of each command: the good values. One in ALWAYS is never left out, because its default
# takes long.
GRAMMAR: dict[str, dict[str, tuple[str, ...]]] = {
    "plan": {
        "": ("nano", "mini", "ul_0_5b", "my.json"),
        "--tokens": ("1", "70000"),
        "--json": PATHS[:3],
    },
    "demo": {
        "--tokens": ("1024", "1500"),
        "--haystack": ("good.txt", "link", "-"),
        "--checkpoint": ("model", "models", "own", "mounted/model"),
        "--depth": ("0", "0.3", "1"),
        "--seed": ("0", "7"),
        "--out": ("out", "empty", "mounted"),
        "--json": ("new.json", "out.json", "-"),
        "--device": ("cpu", "auto"),
    },
    "generate": {
        "": ("model", "models", "own"),
        "--prompt-file": ("good.txt", "short.txt", "-"),
        "--max-new-tokens": ("1", "4"),
        "--temperature": ("0", "0.7"),
        "--top-k": ("0", "5"),
        "--top-p": ("0.5", "1"),
        "--seed": ("0", "7"),
        "--device": ("cpu", "auto"),
    },
    "index": {
        "TEXT": ("good.txt", "link", "proj", "short.txt"),
        "DIR": ("index", "new", "empty", "mounted"),
        "--checkpoint": ("model", "models"),
        "--restart": (),
        "--device": ("cpu", "auto"),
    },
    "ask": {
        "DIR": ("index",),
        "QUESTION": ("What is the secret code of QXZB?", "a phrase"),
        "--retrieve-only": (),
        "--chunks": ("0", "3"),
        "--checkpoint": ("model", "models"),
        "--json": ("new.json", "out.json", "-"),
        "--device": ("cpu", "auto"),
    },
    "consolidate": {
        "RUN": ("trained", "trained/step-3"),
        "OUT": ("new", "empty", "mounted", "model"),
    },
    "convert": {
        "FOLDER": ("pretrained",),
        "OUT": ("new", "empty", "mounted", "model"),
        "--window": ("1", "8"),
        "--chunk-size": ("4",),
        "--top-k": ("2",),
        "--groups": ("1", "2"),
        "--lower-layers": ("1", "2"),
        "--seed": ("0", "7"),
    },
    "train": {"": ("tiny", "my.json"), "--run": ("run", "empty", "mounted"), **TRAINING},
    "train --config": {"": ("my.json",), **TRAINING},
    "eval": {
        "": ("model", "models"),
        "--lengths": ("300", "400"),
        "--texts": ("1",),
        "--samples": ("1",),
        "--task": ("s_niah", "vt", "mq_niah"),
        "--distractors": ("0", "2"),
        "--border": (),
        "--seed": ("0", "7"),
        "--out": ("new.json", "out.json", "mounted.json"),
        "--device": ("cpu", "auto"),
    },
    "perplexity": {
        "": ("model", "models"),
        "--lengths": ("600",),
        "--stretches": ("1",),
        "--seed": ("0", "7"),
        "--out": ("new.json", "out.json", "mounted.json"),
        "--device": ("cpu", "auto"),
    },
    "tasks": {
        "": ("model", "models"),
        "--tasks": ("qa1", "thread_2,fwe"),
        "--lengths": ("2048", "2100"),
        "--texts": ("1",),
        "--questions": ("1",),
        "--seed": ("0", "7"),
        "--out": ("new.json", "out.json", "mounted.json"),
        "--device": ("cpu", "auto"),
    },
    "lm-eval": {
        "": ("model", "models"),
        "--tasks": ("ruler_fwe", "niah_single_1,ruler_fwe"),
        "--lengths": ("1024", "1100"),
        "--samples": ("1",),
        "--seed": ("0", "7"),
        "--out": ("new.json", "out.json", "mounted.json"),
        "--device": ("cpu", "auto"),
    },
    "lab": {
        "--scale": ("tiny",),
        "--arms": ("no_noise",),
        "--seeds": ("0",),
        "--steps": ("1", "2"),
        "--out": ("new.jsonl", "lab.jsonl"),
        "--device": ("cpu", "auto"),
    },
    "fetch": {},
}
ALWAYS = {"", "--tokens", "--haystack", "--prompt-file", "--max-new-tokens", "--steps", "--lengths"}
ALWAYS |= {"--samples", "--stretches", "--scale", "--arms", "--seeds", "--checkpoint", "--out"}
ALWAYS |= {"--tasks", "--texts", "TEXT", "DIR", "FOLDER", "OUT"}


@dataclasses.dataclass(frozen=True)
class Call:
    """A call: what is called, with which words, and whether it may take long.

    paths: what it may read and write. command: whether it is a command line.
    """

    subject: str
    words: tuple
    work: Callable[[], object]
    paths: tuple[str, ...]
    command: bool = False
    long: bool = False

    def __str__(self) -> str:
        return f"{self.subject} {' '.join(ascii(word)[:60] for word in self.words)}"


def random_call(rng: random.Random) -> Call:
    """A command line or a call."""
    return _command(rng) if rng.randrange(100) < COMMANDS_PERCENT else _api(rng)


def _command(rng: random.Random) -> Call:
    name = rng.choice(list(GRAMMAR))
    # A run of the laboratory takes seconds, so there are few.
    if name in ("lab", "fetch") and rng.random() < 0.7:
        name = "plan"
    words = name.split()
    for option, good in GRAMMAR[name].items():
        if option not in ALWAYS and rng.random() < 0.5:
            continue
        words += [option] * option.startswith("-")
        if good:
            words.append(rng.choice(good) if rng.randrange(100) < GOOD_PERCENT else _nasty(rng))
    if rng.random() < 0.1:
        words.insert(rng.randrange(len(words) + 1), _nasty(rng))
    if rng.random() < 0.05:
        del words[rng.randrange(len(words))]
    numbers = (word.replace("_", "")[:12] for word in words)
    long = any(number.isdecimal() and int(number) >= MANY for number in numbers)
    long = long or any(word in ENDLESS for word in words) or not _complete(words)
    reads_folders = words[:1] in (["index"], ["train"])
    long = long or (reads_folders and any(word in FOLDERS_OF_MUCH for word in words))
    return Call(name, tuple(words), lambda: cli.main(words), tuple(words[1:]), True, long)


def _complete(words: list[str]) -> bool:
    """Whether every option is there whose default takes long."""
    wanted = ALWAYS & set(GRAMMAR.get(words[0] if words else "", {}))
    options = {word for word in wanted if word.startswith("-")}
    return options <= set(words) and "1e9" not in words


def _nasty(rng: random.Random) -> str:
    kinds = (WORDS, PATHS, tuple(map(str, INTEGERS)), tuple(map(str, NUMBERS)))
    return rng.choice(rng.choice(kinds))


def _integer(rng: random.Random) -> int:
    return rng.choice(INTEGERS)


def _path(rng: random.Random) -> str:
    return rng.choice(PATHS)


def _api(rng: random.Random) -> Call:
    """A call of the package with values of the right type."""
    path = _path(rng)
    records = f"{path}l" if path.endswith(".json") else path  # no line belongs behind a JSON object
    integer = _integer(rng)
    number = rng.choice(NUMBERS)
    field = rng.choice(dataclasses.fields(HSAConfig)).name
    value = rng.choice([integer, number, True, None, "x", [], {}, [1]])
    fields = dataclasses.asdict(PRESETS["debug"]) | {field: value}
    task = rng.choice(list(TASKS))
    option = rng.choice(("max_new_tokens", "temperature", "top_k", "top_p", "seed", "segment"))
    setting = number if option in ("temperature", "top_p") else integer
    settings = {"max_new_tokens": 2, option: setting}
    sizes = dict(tokens=400, depth=0.5, chunk_size=4, window=8)
    changed = rng.choice(list(sizes))
    sizes[changed] = number if changed == "depth" else integer
    border = rng.random() < 0.5
    shard = _integer(rng)
    calls: dict[str, tuple[tuple, Callable[[], object]]] = {
        "HSAConfig.from_dict": ((field, value), lambda: _config(fields)),
        "from_pretrained": ((path,), lambda: HSAModel.from_pretrained(path) and None),
        "save_pretrained": (
            (path, shard),
            lambda: HSAModel.from_pretrained("few").save_pretrained(path, shard_bytes=shard),
        ),
        "ChunkMemory.load": ((path,), lambda: ChunkMemory.load(path) and None),
        "ChunkMemory.save": ((path,), lambda: ChunkMemory.load("memory").save(path)),
        "load_progress": ((path,), lambda: load_progress(Path(path)) and None),
        "save_progress": ((path,), lambda: save_progress(Path(path), 3, {}, {"step": 3})),
        "read_records": ((path,), lambda: read_records(Path(path)) and None),
        "append_record": ((path,), lambda: append_record(Path(records), {"arm": "a"})),
        "read_results": ((path,), lambda: read_results(Path(path)) and None),
        "write_results": ((path,), lambda: write_results(Path(path), torch.device("cpu"), x=1)),
        "read_index": ((path,), lambda: read_index(Path(path), torch.device("cpu")) and None),
        "find_files": ((path,), lambda: find_files(Path(path), without=Path("x")) and None),
        "load_text": ((path,), lambda: load_text(path, max_tokens=1000) and None),
        "load_ranks": ((path,), lambda: tokenizer.load_ranks.__wrapped__(Path(path)) and None),
        "save_ranks": ((path,), lambda: tokenizer.save_ranks({b"a": 0}, Path(path))),
        "estimate_cost": ((integer,), lambda: estimate_cost("nano", integer) and None),
        "generate": ((settings,), lambda: _generate(settings)),
        "place": ((task, sizes, border), lambda: _place(task, sizes, border)),
    }
    name = rng.choice(list(calls))
    words, work = calls[name]
    reads_pipe = path in ENDLESS and name == "load_text"
    numbers = {"generate": settings, "place": sizes}.get(name, {}).values()
    long = reads_pipe or any(value >= MANY for value in numbers) or path in FOLDERS_OF_MUCH
    return Call(name, words, work, (path,), long=long)


def _config(fields: dict) -> None:
    """Check a configuration and count its model, which is not made."""
    estimate_cost(HSAConfig.from_dict(fields), 100)


def _generate(options: dict) -> None:
    model = HSAModel.from_pretrained("few")
    model.generate(torch.arange(20)[None], **options)


def _place(task: str, sizes: dict, border: bool) -> None:
    rng = np.random.default_rng(0)
    place(rng, TASKS[task](rng), border=border, **sizes)
