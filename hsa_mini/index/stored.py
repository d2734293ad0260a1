"""An index on disk: `DIR/index`, one verified folder that is written as a whole.

    config.json, position.json,   the memory (see `memory.saved_memory`), which has read the text up
    memory.safetensors            to its position; position.json has the fingerprint of the weights
    index.json                    which model made it, and the first token of each file
    tokens.bin                    the tokens of the whole text, uint16, little-endian

The memory leaves the last `LEFT_OUT` tokens of the text unread, since a text that is added later
may change how they are encoded. Every question reads them first.
"""

import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_mini.checks import quoted
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.files.disk import TEMPORARY
from hsa_mini.files.lock import LOCK
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import check_replaceable, read_folder
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.texts import MAX_TOKENS, Text
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.origin import check_origin
from hsa_mini.memory.saved_memory import FILES as MEMORY

FOLDER = "index"
INDEX = "index.json"
TOKENS = "tokens.bin"
LEFT_OUT = 64


@dataclass(frozen=True)
class Index:
    """A text, the memory that has read it, and the checkpoint of the model that made the memory: a
    path, or the name of a shipped model.
    """

    text: Text
    memory: ChunkMemory
    checkpoint: str

    @property
    def complete(self) -> bool:
        """Whether the memory has read all that it has to."""
        return self.memory.position == to_read(self.text)

    def save(self, folder: Path) -> None:
        """Write the index into the folder `folder`."""
        about = {
            "checkpoint": self.checkpoint,
            "names": self.text.names,
            "starts": self.text.starts,
        }
        content = f"{json.dumps(about, indent=1)}\n".encode()
        tokens = self.text.tokens.astype("<u2").tobytes()
        self.memory.save(folder / FOLDER, files={INDEX: content, TOKENS: tokens})


def to_read(text: Text) -> int:
    """How many tokens of a text the memory reads: at least one."""
    return max(len(text) - LEFT_OUT, 1)


def read_index(folder: Path, device: torch.device) -> Index:
    """The index in the folder `folder`, with its memory on `device`.

    Raises ValueError, which names what is missing, altered or contradictory; MemoryError if the
    index does not fit.
    """
    if not (folder / FOLDER).is_dir():
        raise ValueError(
            f"DIR: {folder} holds no index; accepted is a folder that `hsa-mini index` made"
        )

    def read(files: dict[str, Path]) -> Index:
        about = read_json(files[INDEX])
        try:
            text = _checked_text(files[TOKENS], about.get("names"), about.get("starts"))
            checkpoint: Any = about.get("checkpoint")
            _require(isinstance(checkpoint, str) and checkpoint, "checkpoint", checkpoint)
            memory = ChunkMemory.load(files, device=device)
            fits = memory.batch == 1 and memory.position <= to_read(text)
            _require(fits, "position", memory.lengths)
        except ValueError as error:
            raise ValueError(f"{files[INDEX].parent} cannot be read ({error})") from None
        return Index(text, memory, checkpoint)

    try:
        return read_folder(folder / FOLDER, (INDEX, TOKENS, *MEMORY), read)
    except ValueError as error:
        reason = str(error).removeprefix("path: ")
        raise ValueError(
            f"DIR: the index is damaged: {reason}; remove {folder / FOLDER} and index the text anew"
        ) from None


def check_model(index: Index, model: HSAModel, folder: Path) -> None:
    """Raise ValueError for an index that other weights made, or the same in another dtype."""
    landmarks = index.memory.chunks.landmarks
    try:
        check_origin(index.memory.origin, model)
        if index.memory.config != model.config:
            raise ValueError
        if landmarks.dtype != model.memory_dtype(landmarks.device):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"DIR: {folder} holds an index that other weights made, or these in another dtype; "
            f"accepted is the model that made it, {quoted(index.checkpoint)} in {landmarks.dtype}"
        ) from None


def check_folder(folder: Path) -> None:
    """Raise ValueError unless `folder` can become an index: it is new, empty, or holds one."""
    try:
        found = set(os.listdir(folder)) if folder.is_dir() else set()
        others = {name for name in found if not name.startswith(TEMPORARY)} - {FOLDER, LOCK}
        if others - {"lost+found"}:
            raise ValueError(f"{folder} holds {quoted(min(others))}")
        check_replaceable(folder / FOLDER, {INDEX})
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix("path: ")
        raise ValueError(f"DIR: {reason}; accepted is a new or empty folder, or an index") from None


def _checked_text(file: Path, names: Any, starts: Any) -> Text:
    """The text. Raises ValueError unless names and starts are those of files in these tokens."""
    tokens = np.frombuffer(file.read_bytes(), dtype="<u2").astype(np.uint16)
    fits = type(names) is list and all(type(name) is str for name in names)
    _require(fits and names, "names", names)
    fits = type(starts) is list and all(type(start) is int for start in starts)
    fits = fits and len(starts) == len(names) and starts[0] == 0
    fits = fits and all(first < second for first, second in pairwise([*starts, len(tokens)]))
    _require(fits, "starts", starts)
    fits = len(tokens) <= MAX_TOKENS and tokens.max() < load_tokenizer().n_vocab
    _require(fits, "tokens", len(tokens))
    return Text(tokens, names, starts)


def _require(fits: object, name: str, got: object) -> None:
    if not fits:
        raise ValueError(f"{name}: got {quoted(got)}, accepted is what `hsa-mini index` wrote")
