"""Real text as tokens: the documents of a split, encoded once and then memory-mapped; or a text
file that the user names.

    archives (fetched by `python -m hsa_mini fetch`) -> documents -> train / validation -> tokens

Encoded corpora are kept in the cache, in folders with a sha256 manifest. A damaged one is encoded
anew.
"""

import codecs
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from hsa_mini.checks import quoted
from hsa_mini.data.documents import Document, load_documents, longer_documents
from hsa_mini.data.encoder import TextEncoder, load_encoder
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer, ranks_digest
from hsa_mini.files.whole_folder import MANIFEST, Content, read_folder, write_folder
from hsa_mini.paths import cache_dir

log = logging.getLogger(__name__)

SPLITS = ("train", "validation")
FORMAT = 2  # raise it when documents, split or encoding change, so that older caches are not used
KINDS = "kinds.json"  # tokens by split and kind of document
FILES = (KINDS, *(f"{split}{end}" for split in SPLITS for end in (".bin", "-starts.npy")))
BLOCK = 1 << 20  # bytes of a user's text that are read and encoded at a time
# No token holds both a letter or digit and white space behind it, so a text can be cut in between.
UP_TO_THE_LAST_WORD_END = re.compile(r".*[^\W_](?=\s)", re.DOTALL)


@dataclass(frozen=True)
class Corpus:
    """Tokens of one split: `tokens` uint16 or uint32 [n]. Every document ends with the end-of-text
    token.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray  # int64, the first token of each document

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def identity(self) -> dict[str, str]:
        """The name, and the sha256 of the tokens in hexadecimal. Result files and the settings of a
        run hold it.
        """
        tokens = self.tokens.astype(self.tokens.dtype.newbyteorder("<"), copy=False)
        return {"name": self.name, "sha256": hashlib.sha256(tokens.data).hexdigest()}


def load_corpus(split: str, *, longer: bool = False) -> Corpus:
    """Tokens of `split` ("train" or "validation"), encoded on first use and memory-mapped from then
    on.

    longer: of the longer corpus, whose archives have to be there.
    Raises ValueError for another split, and for an archive that is not the pinned one.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {quoted(split)}, accepted are {', '.join(SPLITS)}")
    name, documents = ("longer", longer_documents()) if longer else load_documents()
    # The digest is part of the name, so another tokenizer never reads these tokens.
    folder = cache_dir() / f"corpus-{name}-v{FORMAT}-{ranks_digest()}"
    if folder.exists():
        try:
            return _read(folder, name, split)
        except ValueError as error:
            log.warning("%s; the corpus is encoded anew", error)
            for file in (*FILES, MANIFEST):
                (folder / file).unlink(missing_ok=True)
    _encode(documents, folder)
    return _read(folder, name, split)


def _read(folder: Path, name: str, split: str) -> Corpus:
    """A split of an encoded corpus. Raises ValueError if any file of the corpus is damaged."""

    def mapped(files: dict[str, Path]) -> Corpus:
        tokens = np.memmap(files[f"{split}.bin"], dtype=np.uint16, mode="r")
        return Corpus(f"{name}/{split}", tokens, np.load(files[f"{split}-starts.npy"]))

    return read_folder(folder, FILES, mapped)


def _encode(documents: Iterable[Document], folder: Path) -> None:
    """Encode all documents into `folder`, which appears complete or not at all."""
    tokenizer = load_tokenizer()
    tokens = {split: [np.zeros(0, np.uint16)] for split in SPLITS}
    kinds: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for document in tqdm(documents, desc="encoding the corpus", unit="file", mininterval=0.5):
        ids = [*tokenizer.encode_ordinary(document.text), end_of_text(tokenizer)]
        tokens[document.split].append(np.array(ids, dtype=np.uint16))
        counts = kinds[document.split]
        counts[document.kind] = counts.get(document.kind, 0) + len(ids)
    files: dict[str, Content] = {KINDS: json.dumps(kinds, indent=1).encode()}
    for split, parts in tokens.items():
        files[f"{split}.bin"] = np.concatenate(parts).tobytes()
        starts = np.cumsum([len(part) for part in parts])[:-1]
        files[f"{split}-starts.npy"] = partial(np.save, arr=starts)
    write_folder(folder, files, kind=[KINDS])


def load_text(
    path: str | Path,
    *,
    max_tokens: int,
    name: str = "path",
    encoder: TextEncoder | None = None,
) -> Corpus:
    """The first `max_tokens` tokens of a UTF-8 text file that the user names, or of standard input
    for "-".

    Little more is read than these tokens need, so the input may be endless. A byte order mark is
    left out. encoder: None is the course's. Raises ValueError, which names the argument `name`,
    for a file that is missing or not UTF-8 text.
    """
    path = Path(path)
    accepted = "accepted is any UTF-8 text file"
    standard_input = str(path) == "-"
    encoder = encoder or load_encoder()
    parts = [np.zeros(0, encoder.dtype)]
    try:
        with open(0 if standard_input else path, "rb", closefd=not standard_input) as file:
            for text in text_blocks(file):
                parts.append(encoder.array(text))
                if sum(map(len, parts)) >= max_tokens:
                    break
    except OSError as error:
        raise ValueError(f"{name}: cannot read {path} ({error.strerror}); {accepted}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {path} {error}; {accepted}") from None
    return Corpus(str(path), np.concatenate(parts)[:max_tokens], np.zeros(1, dtype=np.int64))


def text_blocks(file: BinaryIO) -> Iterator[str]:
    """The text of a file in parts, whose tokens joined are the tokens of the whole text.

    (A megabyte in which no word ends is cut anywhere.) Raises ValueError for what is not UTF-8.
    """
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    read = 0  # bytes
    rest = ""
    more = True
    while more:
        block = file.read(BLOCK)
        more = bool(block)
        begun = len(decoder.getstate()[0])  # bytes of a character whose end is in this block
        try:
            text = rest + decoder.decode(block, final=not more)
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8 text (byte {read - begun + error.start})") from None
        if not read:
            text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # a byte order mark
        read += len(block)
        words = UP_TO_THE_LAST_WORD_END.match(text) if more else None
        cut = words.end() if words else len(text)
        rest = text[cut:]
        yield text[:cut]
