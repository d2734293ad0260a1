"""Everything that the project writes, as writers of numbered versions, and how each is read.

`write(folder, version)` writes the version into `folder`; `read(folder)` returns the version that
it finds, or None if there is none. What it raises, and what is no version, is a fault.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from material import TINY, pinned, small_archives, tiny, word_corpus, words

from hsa_mini import PRESETS, ChunkMemory, HSAModel
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.cli.report import write_json
from hsa_mini.data import tokenizer
from hsa_mini.data.corpus import SPLITS, load_corpus
from hsa_mini.files import whole_folder
from hsa_mini.files.whole_folder import MANIFEST, fingerprint, read_folder, write_folder
from hsa_mini.index.build import build_index
from hsa_mini.index.stored import read_index
from hsa_mini.lab.records import append_record, read_records
from hsa_mini.provenance import write_results
from hsa_mini.training.mixture import Mixture
from hsa_mini.training.recipes import RECIPES, Recipe, Stage
from hsa_mini.training.run import train

SMALL = dict(vocab_size=64, width=8, mlp_width=8, head_dim=4, hsa_head_dim=4, retrieval_dim=4)
STEPS = 6  # of the run that is trained
SHARD_BYTES = 5000
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Writer:
    """A writer and its reader.

    replaces: whether version 2 takes the place of version 1; otherwise there is only version 1.
    heavy: a call takes long, so that the quick form leaves it out. prepare: makes what is read.
    """

    name: str
    write: Callable[[Path, int], object]
    read: Callable[[Path], int | None]
    replaces: bool = True
    heavy: bool = False
    prepare: Callable[[Path], object] = lambda folder: None

    def names(self, version: int) -> list[str]:
        """The names that the writes of versions 1 to `version` leave in a folder."""
        with TemporaryDirectory() as folder:
            self.prepare(Path(folder))
            for i in range(1, version + 1):
                self.write(Path(folder), i)
            return names_in(Path(folder))


def names_in(folder: Path) -> list[str]:
    """The paths of all files and folders in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _model(version: int) -> HSAModel:
    model = tiny(**SMALL)
    torch.nn.init.constant_(model.embedding.weight, version)
    return model


def _save_model(folder: Path, version: int, **options) -> None:
    _model(version).save_pretrained(folder / "model", **options)


def _save_shards(folder: Path, version: int) -> None:
    _save_model(folder, version, shard_bytes=SHARD_BYTES)


def _read_model(folder: Path) -> int | None:
    if not (folder / "model").exists():
        return None
    model = HSAModel.from_pretrained(folder / "model")
    assert len(fingerprint(folder / "model")) == 64
    version = int(model.embedding.weight[0, 0])
    want = _model(version).state_dict()
    assert all(torch.equal(x, want[name]) for name, x in model.state_dict().items()), "mixed"
    return version


@functools.cache
def _memory(version: int) -> ChunkMemory:
    model = _model(1)
    memory = ChunkMemory(model.config)
    model(torch.full((1, 9 + 4 * version), version % 64), memory)
    return memory


def _save_memory(folder: Path, version: int) -> None:
    _memory(version).save(folder / "memory")


def _read_memory(folder: Path) -> int | None:
    if not (folder / "memory").exists():
        return None
    memory = ChunkMemory.load(folder / "memory")
    version = (memory.position - 9) // 4
    want = _memory(version).chunks
    assert torch.equal(memory.chunks.k, want.k) and torch.equal(memory.chunks.v, want.v), "mixed"
    return version


def _save_state(folder: Path, version: int) -> None:
    tensors = {"x": torch.full((1000,), float(version))}
    save_progress(folder / "run", version, tensors, {"step": version})


def _read_state(folder: Path) -> int | None:
    found = load_progress(folder / "run")
    if found is None:
        return None
    tensors, progress = found
    assert (tensors["x"] == progress["step"]).all(), "mixed"
    return progress["step"]


FILES = ("a.bin", "b.txt")


def _save_folder(folder: Path, version: int) -> None:
    """Two files, and one that only this version has."""
    files = {name: f"{version}".encode() * 300 for name in (*FILES, f"{version}.txt")}
    write_folder(folder / "any", files, kind={FILES[0]})


def _save_folder_in_place(folder: Path, version: int) -> None:
    """As on a mount point, whose name cannot be exchanged."""
    with mock.patch.object(whole_folder, "may_rename", lambda path: False):
        _save_folder(folder, version)


def _read_folder(folder: Path) -> int | None:
    if not (folder / "any" / MANIFEST).exists():
        return None

    def read(files: dict[str, Path]) -> int:
        (version,) = {file.read_text()[0] for file in files.values()}
        assert files.keys() == {*FILES, f"{version}.txt"}, "mixed"
        return int(version)

    return read_folder(folder / "any", FILES, read)


def _read_json(path: Path, key: str = "version") -> int | None:
    return json.loads(path.read_text())[key] if path.exists() else None


def _append(folder: Path, version: int) -> None:
    append_record(folder / "lab.jsonl", {"arm": "a", "seed": version, "settings": {"x": "y" * 99}})


def _read_lines(folder: Path) -> int | None:
    records = read_records(folder / "lab.jsonl")
    assert [record["seed"] for record in records] == list(range(1, len(records) + 1)), "lost"
    return len(records) or None


def _save_picture(folder: Path, version: int) -> None:
    from matplotlib.figure import Figure

    from hsa_mini.viz.style import save_figure

    save_figure(folder / "picture.png", Figure(figsize=(version / 10, 0.1), dpi=100))


def _read_picture(folder: Path) -> int | None:
    if not (folder / "picture.png").exists():
        return None
    content = (folder / "picture.png").read_bytes()
    assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82"), "cut off"
    return int.from_bytes(content[16:20], "big") // 10


def _save_ranks(folder: Path, version: int) -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"a" * (i + 2): 256 + i for i in range(version)}
    tokenizer.save_ranks(ranks, folder / "ranks.tiktoken")


def _read_ranks(folder: Path) -> int | None:
    if not (folder / "ranks.tiktoken").exists():
        return None
    return len(tokenizer.load_ranks.__wrapped__(folder / "ranks.tiktoken")) - 256


def train_until(folder: Path, version: int) -> HSAModel:
    """Train the run in `folder` until `version` steps are done and saved."""
    return train(
        "tiny",
        run=folder / "run",
        device=CPU,
        steps=STEPS,
        log_every=1,
        stop=lambda step: step == version,
    )


def read_run(folder: Path) -> int | None:
    """The steps of the newest state, whose log has a row for every one of them."""
    found = load_progress(folder / "run")
    if found is None:
        return None
    step = found[1]["step"]
    rows = (folder / "run" / "log.csv").read_text().split("\n")[1:-1]
    logged = [int(row.split(",")[0]) for row in rows]
    assert logged[:step] == list(range(1, step + 1)), f"log of {logged} for a state of {step}"
    return step


def _encode(folder: Path, version: int) -> None:
    with archives_in(folder):
        load_corpus("train")


def _read_corpus(folder: Path) -> int | None:
    """Version 1 if the tokens are right, whether they were there or are encoded again."""
    with archives_in(folder):
        found = [load_corpus(split).tokens.tolist() for split in SPLITS]
    assert found == _tokens(), "other tokens"
    return 1


@functools.cache
def _tokens() -> list[list[int]]:
    with TemporaryDirectory() as folder, archives_in(Path(folder)):
        return [load_corpus(split).tokens.tolist() for split in SPLITS]


@functools.cache
def _archives() -> dict[str, bytes]:
    """Small archives by name: their bytes, which hold the time at which they are made."""
    with TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in small_archives(Path(folder))}


def put_archives(folder: Path) -> None:
    """Write the small archives into the cache `folder`."""
    (folder / "archives").mkdir(exist_ok=True)
    for name, content in _archives().items():
        (folder / "archives" / name).write_bytes(content)


@contextmanager
def archives_in(folder: Path) -> Iterator[None]:
    """The small archives in the cache `folder` pass for the real ones."""
    if not (folder / "archives").exists():
        put_archives(folder)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, HSA_MINI_CACHE=str(folder)))
        for module in ("hsa_mini.data.archives", "hsa_mini.data.documents"):
            stack.enter_context(mock.patch(f"{module}.ARCHIVES", pinned(_archives().values())))
        yield


INDEXED = {name: size for name, size in SMALL.items() if name != "vocab_size"}


def index_model() -> HSAModel:
    """The model whose index is written: it reads the tokens of texts."""
    return tiny(**INDEXED)


def _save_index(folder: Path, version: int) -> None:
    """Of a text that grows with every version."""
    (folder / "text.txt").write_text(words(60 * version))
    build_index(index_model(), folder / "text.txt", folder / "index", checkpoint="model")


def _read_index(folder: Path) -> int | None:
    if not (folder / "index" / "index").exists():
        return None
    index = read_index(folder / "index", CPU)
    text = tokenizer.load_tokenizer().decode(index.text.tokens.tolist())
    version = len(text.split()) // 60
    assert text == words(60 * version) and index.complete, "mixed"
    return version


READ_CORPUS = (
    "data.corpus", "evaluation.perplexity", "evaluation.runner", "lab.measure",
    "lab.run", "training.mixture", "training.run",
)  # fmt: skip
TRAINED = Recipe((Stage(steps=STEPS, batch=1, tokens=64, mixture=Mixture(min_copy=8)),))


@contextmanager
def tiny_preset() -> Iterator[None]:
    """A preset and a recipe `tiny`, and made-up texts in the place of the corpora."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(PRESETS, tiny=TINY))
        stack.enter_context(mock.patch.dict(RECIPES, tiny=TRAINED))
        for module in READ_CORPUS:
            name = f"hsa_mini.{module}.load_corpus"
            stack.enter_context(mock.patch(name, functools.cache(word_corpus)))
        yield


WRITERS = [
    Writer("folder", _save_folder, _read_folder),
    Writer("folder in place", _save_folder_in_place, _read_folder),
    Writer("weights", _save_model, _read_model),
    Writer("weights in shards", _save_shards, _read_model),
    Writer("memory", _save_memory, _read_memory),
    Writer("index", _save_index, _read_index),
    Writer("training state", _save_state, _read_state),
    Writer(
        "results",
        lambda folder, version: write_results(folder / "r.json", CPU, version=version),
        lambda folder: _read_json(folder / "r.json"),
    ),
    Writer(
        "JSON of a command",
        lambda folder, version: write_json(str(folder / "c.json"), {"version": version}),
        lambda folder: _read_json(folder / "c.json"),
    ),
    Writer("records", _append, _read_lines),
    Writer("picture", _save_picture, _read_picture),
    Writer("tokenizer ranks", _save_ranks, _read_ranks),
    Writer("log and state of a run", train_until, read_run, heavy=True),
    Writer("encoded corpus", _encode, _read_corpus, False, True, put_archives),
]
BY_NAME = {writer.name: writer for writer in WRITERS}
