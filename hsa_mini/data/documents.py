"""Documents: the text files of the archives, each of one kind and in one split.

Whole works and whole packages go to one split, so that no validation text has a close relative in
training. If the archives are missing, the standard library of the running Python serves as text,
with a warning. No shipped figure depends on it.
"""

import hashlib
import io
import logging
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hsa_mini.data.archives import ARCHIVES, archives_dir
from hsa_mini.data.longer_archives import LONGER

log = logging.getLogger(__name__)

# Works held out in every edition: an old-spelling Hamlet in training would reveal the modern one.
HELD_OUT_WORKS = (
    "hamlet", "macbeth", "othello", "/lear", "tempest", "romeo", "caesar", "twel", "winters",
    "sonnets", "paradise", "richard_iii", "henry_iv_part_1", "coriolanus", "measure", "as_you_like",
)  # fmt: skip
HELD_OUT_PERCENT = 26  # of the packages of code and documentation
MIN_BYTES = 200  # shorter files are left out
MAX_BYTES = 1 << 20  # of the longer corpus: longer files are tables and generated code
LONGER_ENDS = (".py", ".pyx", ".rst", ".md", ".txt", ".c", ".h", ".cc", ".cpp", ".hpp")
OTHERS = ("third_party", "vendor", "subprojects", "extern", "/node_modules/", "/static/")


@dataclass(frozen=True)
class Document:
    """One text file: its path in the archive, its kind, and the split it belongs to."""

    path: str
    kind: str  # english, code, documentation, translation
    split: str  # train, validation
    text: str


def load_documents() -> tuple[str, Iterator[Document]]:
    """The name of the available text and its documents, from the archives or from the standard
    library.

    Reading the documents raises ValueError for an archive that is not the pinned one.
    """
    if all(archive.path.is_file() for archive in ARCHIVES):
        return "archives", read_documents(archive.read() for archive in ARCHIVES)
    log.warning(
        "no corpus archives in %s: the standard library of this Python serves as text"
        " (`make setup` fetches the archives)",
        archives_dir(),
    )
    name = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    return name, _standard_library()


def read_documents(archives: Iterable[bytes]) -> Iterator[Document]:
    """The text files of archives, given by their content, in archive order. If several files have
    equal content, only the first one is used.
    """
    seen = set()
    for path, kind, content in _files(archives):
        if len(content) < MIN_BYTES:
            continue
        digest = hashlib.sha256(content).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(path, kind, _split(path, kind), text)


def longer_documents() -> Iterator[Document]:
    """The code and documentation of the archives `LONGER`, those of the training split first.

    Files that differ only in white space count once, and not at all if they are in `ARCHIVES`.
    Raises ValueError if an archive is missing or not the pinned one.
    """
    for archive in (*ARCHIVES, *LONGER["train"], *LONGER["validation"]):
        if not archive.path.is_file():
            raise ValueError(
                f"{archive.path}: missing; `python -m hsa_mini fetch --longer` fetches the archives"
            )
    return _longer_documents()


def _longer_documents() -> Iterator[Document]:
    seen = {_words(content) for _, _, content in _files(archive.read() for archive in ARCHIVES)}
    for split, archives in LONGER.items():
        for path, kind, content in _files((archive.read() for archive in archives), _longer_kind):
            if not MIN_BYTES <= len(content) <= MAX_BYTES or _words(content) in seen:
                continue
            seen.add(_words(content))
            try:
                yield Document(path, kind, split, content.decode("utf-8"))
            except UnicodeDecodeError:
                continue


def _words(content: bytes) -> bytes:
    """A digest of a file without its white space."""
    return hashlib.sha256(b" ".join(content.split())).digest()


def _longer_kind(path: str) -> str | None:
    """The kind of a file; None for data, and for what another project has written."""
    if any(part in path for part in OTHERS) or not path.endswith(LONGER_ENDS):
        return None
    return "documentation" if path.endswith((".rst", ".md", ".txt")) else "code"


def _files(
    archives: Iterable[bytes], kind_of: Callable[[str], str | None] | None = None
) -> Iterator[tuple[str, str, bytes]]:
    """Path, kind and content of every regular file that has a kind."""
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            for member in tar:
                kind = (kind_of or _kind)(member.name) if member.isfile() else None
                content = None if kind is None else tar.extractfile(member)
                if kind is not None and content is not None:
                    yield member.name, kind, content.read()


def _kind(path: str) -> str | None:
    """The kind of a file; None if it is no text for the corpus."""
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
        return "train"  # the languages translate the same messages, so none could be held out
    folders = path.split("/")[:-1]
    return _split_of_package("/".join(folders[:4]))


def _split_of_package(name: str) -> str:
    """Choose by a hash of the name: `HELD_OUT_PERCENT` % of the packages are validation text."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
    return "validation" if bucket < HELD_OUT_PERCENT else "train"


def _standard_library() -> Iterator[Document]:
    """The modules of the running Python, split by top-level package, without tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "test", "tests", "idle_test"} & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        yield Document(str(relative), "code", _split_of_package(relative.parts[0]), text)
