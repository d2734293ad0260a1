"""Random damage to every kind of file that the project reads.

Damaged input is refused with an error that names the file, or repaired. It never gives other
numbers, another exception or an endless wait.
"""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from material import build, tiny, words

from faults.processes import Outcome, in_child
from faults.report import Progress, Report
from faults.writers import (
    SMALL,
    archives_in,
    index_model,
    load_corpus,
    put_archives,
    tiny_preset,
    train_until,
)
from hsa_mini import ChunkMemory, HSAModel
from hsa_mini.data import tokenizer
from hsa_mini.data.corpus import SPLITS
from hsa_mini.evaluation.results import read_results
from hsa_mini.index.ask import ask, find
from hsa_mini.index.build import build_index
from hsa_mini.index.stored import check_model, read_index
from hsa_mini.lab.records import append_record, read_records
from hsa_mini.paths import data_dir

SECONDS = 15  # for one reading
MANIFEST = "manifest.json"
RESULTS = ("r.json", "r_far.json")
RECORDS = "lab.jsonl"
IDS = torch.arange(24)[None] % 60
NASTY = (
    None, True, False, "x", "", "false", -1, 0, 1, 2, 3, 10**9, 10**30, 1.5, 1e-300, float("nan"),
    float("inf"), [], [1], {}, {"x": 1}, "\x1b[2J", "../x", "x" * 5000,
)  # fmt: skip
TEXTS = (
    "", "text", "[]", "{}", "null", "3", "\0" * 99, "\ufeff{}", "[" * 100_000, '{"a":' * 50_000,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of file.

    make: writes the files into a folder. read: what they say, as a text to compare.
    unchecked: files without a checksum, whose damage cannot always be told.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    unchecked: tuple[str, ...] = ()


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _read_model(folder: Path) -> str:
    return _digest(HSAModel.from_pretrained(folder / "model")(IDS).logits)


def _make_memory(folder: Path) -> None:
    model = build(dtype=torch.float32)
    model.save_pretrained(folder.parent / "of_memory")
    model = HSAModel.from_pretrained(folder.parent / "of_memory")
    memory = ChunkMemory(model.config)
    model(IDS, memory)
    memory.save(folder / "memory")


@torch.no_grad()
def _read_memory(folder: Path) -> str:
    memory = ChunkMemory.load(folder / "memory")
    model = HSAModel.from_pretrained(folder.parent / "of_memory")
    return _digest(model(IDS[:, :5], memory).logits)


def _make_index(folder: Path) -> None:
    (folder.parent / "text.txt").write_text(words(200))
    build_index(index_model(), folder.parent / "text.txt", folder / "index", checkpoint="model")


def _read_index(folder: Path) -> object:
    index = read_index(folder / "index", torch.device("cpu"))
    model = index_model()
    check_model(index, model, folder)
    return [replies(model, index, "Who?") | {"seconds": 0} for replies in (_asked, _found)]


def _asked(*arguments) -> dict:
    return ask(*arguments).to_json()


def _found(*arguments) -> dict:
    return find(*arguments).to_json()


def _make_run(folder: Path) -> None:
    train_until(folder, 1)
    train_until(folder, 2)


def _read_run(folder: Path) -> object:
    model = train_until(folder, 3)
    rows = [row.rpartition(",")[0] for row in (folder / "run" / "log.csv").read_text().splitlines()]
    return _digest(*model.state_dict().values()), rows


def _read_corpus(folder: Path) -> str:
    """The corpus of the archives, or of a small standard library if they are missing."""
    library = folder.parent / "library"
    library.mkdir(exist_ok=True)
    for name in "abcdefgh":
        (library / f"{name}.py").write_text(f"{name} = 1\n" * 99)
    paths = {**sysconfig.get_paths(), "stdlib": str(library)}
    with archives_in(folder), mock.patch.object(sysconfig, "get_paths", lambda: paths):
        texts = [load_corpus(split) for split in SPLITS]
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.tokens.tobytes() + text.starts.tobytes())
    return digest.hexdigest()


def _make_corpus(folder: Path) -> None:
    put_archives(folder)
    _read_corpus(folder)
    shutil.move(folder / "archives", folder.parent / "archives")


def _read_encoded(folder: Path) -> str:
    """The archives are whole, and lie elsewhere until they are read."""
    shutil.copytree(folder.parent / "archives", folder / "archives")
    return _read_corpus(folder)


def _make_ranks(folder: Path) -> None:
    shutil.copy(data_dir() / tokenizer.RANKS_FILE, folder)


def _read_ranks(folder: Path) -> list[int]:
    os.environ["HSA_MINI_DATA"] = str(folder)
    for function in (tokenizer.load_ranks, tokenizer.load_tokenizer):
        getattr(function, "cache_clear", lambda: None)()
    text = Path(tokenizer.__file__).read_text(encoding="utf-8")
    return tokenizer.load_tokenizer().encode_ordinary(text)


def _make_results(folder: Path) -> None:
    row = dict(tokens=300, depth=0.5, samples=1, correct=1, retrieved=1, distinct_tokens=9, seed=1)
    result = {"rows": [row], "control_rows": [row | {"control": "absent"}], "hardware": "x"}
    for name in RESULTS:
        (folder / name).write_text(json.dumps(result, indent=1))


def _make_records(folder: Path) -> None:
    for seed in range(3):
        append_record(folder / RECORDS, {"arm": "hsa", "seed": seed, "settings": {"steps": 1}})


SUBJECTS = [
    Subject("checkpoint", lambda f: tiny(**SMALL).save_pretrained(f / "model"), _read_model),
    Subject(
        "checkpoint in shards",
        lambda f: tiny(**SMALL).save_pretrained(f / "model", shard_bytes=5000),
        _read_model,
    ),
    Subject("memory", _make_memory, _read_memory),
    Subject("index", _make_index, _read_index),
    Subject("training run", _make_run, _read_run),
    Subject("archives", put_archives, _read_corpus),
    Subject("encoded corpus", _make_corpus, _read_encoded),
    Subject("tokenizer ranks", _make_ranks, _read_ranks),
    Subject("results", _make_results, lambda f: str(read_results(f / "r.json")), RESULTS),
    Subject("records", _make_records, lambda f: str(read_records(f / RECORDS)), (RECORDS,)),
]


def attack(count: int, seed: int, progress: Progress, only: Sequence[str] = ()) -> Report:
    """`count` corruptions, equally many of each kind of file."""
    report = Report("corruption")
    chosen = [subject for subject in SUBJECTS if not only or subject.name in only]
    with tiny_preset():
        for i, subject in enumerate(chosen):
            share = count // len(chosen) + (i < count % len(chosen))
            _corrupt_often(
                subject, share, random.Random(f"{seed} {subject.name}"), report, progress
            )
    return report


def _corrupt_often(
    subject: Subject, count: int, rng: random.Random, report: Report, progress: Progress
) -> None:
    with TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        whole.mkdir()
        subject.make(whole)
        folder = Path(scratch, "damaged")
        shutil.copytree(whole, folder)
        pristine = in_child(lambda: subject.read(folder), seconds=10 * SECONDS)
        if pristine.kind != "returned":
            report.fault(subject.name, f"undamaged: {pristine}")
            return
        for _ in range(count):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            damage = corrupt(folder, rng)
            outcome = in_child(lambda: subject.read(folder), seconds=SECONDS)
            report.tried += 1
            progress(1)
            if what := _verdict(outcome, pristine.value, damage, subject.unchecked):
                report.fault(subject.name, f"{damage.what} of {' and '.join(damage.files)}: {what}")


@dataclasses.dataclass(frozen=True)
class Damage:
    """What was done to which files; resealed: the manifest was made right again."""

    what: str
    files: tuple[str, ...]
    resealed: bool = False


def _verdict(outcome: Outcome, want: object, damage: Damage, unchecked) -> str | None:
    """What is wrong with how damaged files were read, or nothing."""
    if outcome.kind == "returned":
        said = "the standard library of this Python serves" in outcome.errors
        untold = damage.resealed or said or set(damage.files) <= set(unchecked)
        return None if untold or outcome.value == want else "read as if nothing were wrong"
    if outcome.kind != "raised" or not isinstance(
        outcome.value, ValueError | OSError | MemoryError
    ):
        return str(outcome)
    message = str(outcome.value)
    if len(message) > 1000 or "\x1b" in message:
        return f"a message of {len(message)} characters: {message[:200]!r}"
    named = any(Path(file).name in message for file in damage.files)
    return None if named or damage.resealed else f"the message does not name the file: {message}"


def corrupt(folder: Path, rng: random.Random) -> Damage:
    """Damage the files of a folder in one way."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    ways = [_flip, _cut, _extend, _zero, _delete, _other_text, _other_kind]
    if len(files) > 1:
        ways.append(_swap)
    if path.suffix in (".json", ".jsonl"):
        ways += [_mutate] * 4
    if path.suffix == ".safetensors":
        ways += [_not_a_number]
    way = rng.choice(ways)
    return way(path, rng)


def _flip(path: Path, rng: random.Random) -> Damage:
    content = bytearray(path.read_bytes() or b"\0")
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return Damage(f"bit {bit} flipped", (path.name,))


def _cut(path: Path, rng: random.Random) -> Damage:
    content = path.read_bytes()
    size = rng.choice((0, 1, len(content) // 2, max(len(content) - 1, 0)))
    path.write_bytes(content[:size])
    return Damage(f"cut to {size} bytes", (path.name,))


def _extend(path: Path, rng: random.Random) -> Damage:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice((1, 2, 1000))))
    return Damage("extension", (path.name,))


def _zero(path: Path, rng: random.Random) -> Damage:
    content = bytearray(path.read_bytes())
    first = rng.randrange(max(len(content), 1))
    last = min(first + 512, len(content))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)
    return Damage(f"bytes {first} to {last} zeroed", (path.name,))


def _delete(path: Path, rng: random.Random) -> Damage:
    path.unlink()
    return Damage("deletion", (path.name,))


def _other_text(path: Path, rng: random.Random) -> Damage:
    text = rng.choice(TEXTS)
    path.write_text(text)
    return Damage(f"the text {text[:9]!r}", (path.name,))


def _other_kind(path: Path, rng: random.Random) -> Damage:
    kind = rng.choice(("folder", "FIFO", "loop of links", "link to nothing", "link to zeros"))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        targets = {"loop of links": path.name, "link to nothing": "nothing"}
        path.symlink_to(targets.get(kind, "/dev/zero"))
    return Damage(f"a {kind} in the place", (path.name,))


def _swap(path: Path, rng: random.Random) -> Damage:
    files = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if not files:
        return _delete(path, rng)
    other = rng.choice(files)
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return Damage("swap", (path.name, other.name))


def _mutate(path: Path, rng: random.Random) -> Damage:
    """Another value somewhere in a JSON file, and a manifest that fits it."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    line = rng.randrange(len(lines))
    value = json.loads(lines[line])
    key = _mutated(value, rng)
    lines[line] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    _reseal(path)
    return Damage(f"{key} mutated", (path.name,), resealed=path.name != MANIFEST)


def _mutated(value, rng: random.Random) -> str:
    """Change one entry of nested lists and objects in place; returns its name."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        if isinstance(value, dict) and rng.random() < 0.1:
            del value[key]
        else:
            value[key] = rng.choice(NASTY)
        return f"{key!r}"


def _not_a_number(path: Path, rng: random.Random) -> Damage:
    """NaN in one tensor, and a manifest that fits it."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    names = [name for name, x in tensors.items() if x.is_floating_point() and x.numel()]
    if not names:
        return _delete(path, rng)
    name = rng.choice(names)
    tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = float("nan")
    save_file(tensors, path)
    _reseal(path)
    return Damage(f"NaN in {name}", (path.name,), resealed=True)


def _reseal(path: Path) -> None:
    manifest = path.parent / MANIFEST
    if not manifest.is_file() or path == manifest:
        return
    entries = json.loads(manifest.read_text())
    if isinstance(entries.get(path.name), dict):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries[path.name] |= {"sha256": digest, "bytes": len(content)}
        manifest.write_text(json.dumps(entries))
