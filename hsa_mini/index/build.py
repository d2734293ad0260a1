"""Reading a text into an index: from its beginning, or from where an earlier call stopped."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hsa_mini.checks import quoted
from hsa_mini.files.lock import locked
from hsa_mini.hsa_model import HSAModel
from hsa_mini.index.stored import (
    FOLDER,
    Index,
    check_folder,
    check_model,
    read_index,
    to_read,
)
from hsa_mini.index.texts import Text, encode_files, find_files, ordered
from hsa_mini.inference.prefill import SEGMENT, prefill
from hsa_mini.memory.chunk_memory import ChunkMemory

SAVE_SECONDS = 30.0  # between two saves; for every second that a save takes, 30 more
# Tokens between two moments at which the index could be saved. Each ends with the upper decoder's
# reading of some hundred tokens, which this number makes cheap.
BLOCK = 2 * SEGMENT


def build_index(
    model: HSAModel,
    path: Path,
    folder: Path,
    *,
    checkpoint: str,
    restart: bool = False,
    save_seconds: float = SAVE_SECONDS,
) -> tuple[Index, int, int]:
    """Read the text file or the folder `path` into the index in `folder`; returns the index, how
    many tokens this call has read, and how many files it has skipped.

    An index that is there is completed: its tokens must be the first ones of the text. New files
    come after those that it knows. restart: read everything anew. checkpoint: see `Index`.

    The index is saved from time to time, and whenever an exception or Ctrl-C ends the reading.
    Raises ValueError for a text that cannot be read or has no tokens, for a folder that holds
    something else or that another process writes, for a damaged index, and for one of other weights
    or of another text; MemoryError, before anything is read, if the index does not fit.
    """
    check_folder(folder)
    found, skipped = find_files(path, without=folder)
    existed = folder.is_dir()
    try:
        with locked(folder, "DIR"):
            old = None
            if (folder / FOLDER).exists() and not restart:
                old = read_index(folder, model.embedding.weight.device)
                check_model(old, model, folder)
            files = ordered(found, old.text.names if old else [])
            with tqdm(files, desc="encoding", unit="file", delay=1) as bar:
                text = encode_files(bar)
            if not len(text):
                raise ValueError(f"TEXT: {path} holds no text, accepted is at least one token")
            if old:
                _check_same_beginning(text, old, folder)
            memory = _memory_to_fill(model, text, old)
            before = memory.position
            index = Index(text, memory, checkpoint)
            same = old is not None and old.text.same_as(text)
            index = _read(index, model, folder, save_seconds, old=same)
    except BaseException:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    return index, index.memory.position - before, skipped


def _memory_to_fill(model: HSAModel, text: Text, old: Index | None) -> ChunkMemory:
    """The memory of the old index, or an empty one, with capacity for the whole text."""
    memory = old.memory if old else ChunkMemory(model.config)
    device = model.embedding.weight.device
    sizes = dict(batch=1, dtype=model.memory_dtype(device), device=device)
    memory.reserve(to_read(text), spare=SEGMENT, **sizes)
    return memory


def _check_same_beginning(text: Text, old: Index, folder: Path) -> None:
    """Raise ValueError unless the text begins with the tokens that the old index has read."""
    read = old.memory.position
    same = min(read, to_read(text))
    differs = np.flatnonzero(text.tokens[:same] != old.text.tokens[:same])
    first = int(differs[0]) if len(differs) else same
    if first < read:
        name, line, _ = old.text.lines(first, first + 1)
        raise ValueError(
            f"TEXT: from {quoted(name)}, line {line} on, it differs from what {folder} has read; "
            "accepted is the same text with more at its end, another folder, or --restart"
        )


def _read(index: Index, model: HSAModel, folder: Path, save_seconds: float, *, old: bool) -> Index:
    """Read what the memory has not read yet, and save; returns the index at the end.

    old: whether the folder holds this index as it is.
    """
    ids = torch.from_numpy(index.text.tokens[: to_read(index.text)].astype(np.int64))[None]
    read = index.memory.position
    saved = old
    due = time.monotonic() + save_seconds
    try:
        with tqdm(
            total=ids.shape[1],
            initial=read,
            unit=" tokens",
            unit_scale=True,
            mininterval=0.2,
            desc="reading",
        ) as bar:
            for first in range(read, ids.shape[1], BLOCK):
                # Of a draft that Ctrl-C interrupts, nothing is seen in the memory.
                draft = index.memory.draft()
                part = ids[:, first : first + BLOCK].to(model.embedding.weight.device)
                prefill(model, part, draft, progress=bar.update)
                saved = False
                index = replace(index, memory=draft)
                if (now := time.monotonic()) > due:
                    index.save(folder)
                    saved = True
                    took = time.monotonic() - now
                    due = time.monotonic() + save_seconds * (1 + took)
    finally:
        if not saved and index.memory.position:
            index.save(folder)
    return index
