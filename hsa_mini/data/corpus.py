"""Real text as tokens: the documents of a split, encoded once and then memory-mapped; or a text
file that the user names.

    archives (fetched by `python -m hsa_mini fetch`) -> documents -> train / validation -> tokens
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from hsa_mini.data.documents import Document, load_documents
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer, ranks_digest
from hsa_mini.paths import cache_dir

SPLITS = ("train", "validation")
FORMAT = 1  # raise it when documents, split or encoding change, so that older caches are not used


@dataclass(frozen=True)
class Corpus:
    """Tokens of one split: `tokens` uint16 [n]. Every document ends with the end-of-text token."""

    name: str
    tokens: np.ndarray
    starts: np.ndarray  # int64, the first token of each document

    def __len__(self) -> int:
        return len(self.tokens)


def load_corpus(split: str) -> Corpus:
    """Tokens of `split` ("train" or "validation"), encoded on first use and memory-mapped from then
    on.

    Raises ValueError for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, accepted are {', '.join(SPLITS)}")
    name, documents = load_documents()
    # The digest is part of the name, so another tokenizer never reads these tokens.
    folder = cache_dir() / f"corpus-{name}-v{FORMAT}-{ranks_digest()}"
    if not folder.is_dir():
        _encode(documents, folder)
    tokens = np.memmap(folder / f"{split}.bin", dtype=np.uint16, mode="r")
    return Corpus(f"{name}/{split}", tokens, np.load(folder / f"{split}-starts.npy"))


def _encode(documents: Iterable[Document], folder: Path) -> None:
    """Encode all documents into `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        writers = {split: _SplitWriter(fresh, split) for split in SPLITS}
        tokenizer = load_tokenizer()
        for document in tqdm(documents, desc="encoding the corpus", unit="file", mininterval=0.5):
            writers[document.split].write(document, tokenizer)
        for writer in writers.values():
            writer.close()
        kinds = {split: writer.kinds for split, writer in writers.items()}
        (fresh / "kinds.json").write_text(json.dumps(kinds, indent=1))
        try:
            os.rename(fresh, folder)
        except OSError:  # another process was faster, and its folder holds the same
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class _SplitWriter:
    """Writes the documents of one split: SPLIT.bin holds the tokens, SPLIT-starts.npy where
    documents start.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.file = (folder / f"{split}.bin").open("wb")
        self.starts_path = folder / f"{split}-starts.npy"
        self.starts: list[int] = []
        self.kinds: dict[str, int] = {}  # kind of document -> tokens

    def write(self, document: Document, tokenizer: tiktoken.Encoding) -> None:
        ids = [*tokenizer.encode_ordinary(document.text), end_of_text(tokenizer)]
        tokens = np.array(ids, dtype=np.uint16)
        self.starts.append(self.file.tell() // tokens.itemsize)
        self.kinds[document.kind] = self.kinds.get(document.kind, 0) + len(tokens)
        self.file.write(tokens.tobytes())

    def close(self) -> None:
        self.file.close()
        np.save(self.starts_path, np.array(self.starts, dtype=np.int64))


def load_text(path: str | Path, *, name: str = "path") -> Corpus:
    """Tokens of a UTF-8 text file that the user names, or of standard input for "-".

    Raises ValueError, which names the argument `name`, for a file that is missing or not UTF-8
    text.
    """
    path = Path(path)
    accepted = "accepted is any UTF-8 text file"
    standard_input = str(path) == "-"
    try:
        with open(
            0 if standard_input else path, encoding="utf-8", closefd=not standard_input
        ) as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: {path} is not UTF-8 text (byte {error.start}); {accepted}"
        ) from None
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path} ({error.strerror}); {accepted}") from None
    tokens = np.array(load_tokenizer().encode_ordinary(text), dtype=np.uint16)
    return Corpus(str(path), tokens, np.zeros(1, dtype=np.int64))
