"""A long text that is read once and kept on disk, and needles that are hidden in it and found.

The text is read as for an evaluation (see `Haystack`), so a question about another needle at
another depth costs a fraction of a second.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from hsa_mini.data.encoder import load_encoder
from hsa_mini.evaluation.demo import (
    NeedleFinding,
    Reading,
    draw_sample,
    report_finding,
)
from hsa_mini.evaluation.haystack import Haystack
from hsa_mini.evaluation.retrievals import chunks_retrieved, retrieval_scores
from hsa_mini.files.whole_folder import read_folder
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import continue_from
from hsa_mini.inference.prefill import prefill
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.memory_budget import peak_memory_bytes
from hsa_mini.memory.origin import check_origin
from hsa_mini.memory.saved_memory import FILES

TEXT = "text.bin"  # the token ids, uint16, little-endian
MIN_STORED_TOKENS = 1 << 18  # a shorter text is read again faster than its memory is worth


class NeedleSearch:
    """A text that the model has read, in which a needle can be hidden anywhere and asked for.

    text: uint16 [tokens]. folder: where the memory of a text of at least `MIN_STORED_TOKENS` is
    kept, about 0.5 KB a token with `mini`; it is read from there if it is that of this text and
    model. progress: called with the number of tokens, as they are read. Raises ValueError if the
    folder holds something else.
    """

    def __init__(
        self,
        model: HSAModel,
        text: np.ndarray,
        folder: Path,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        ids = torch.from_numpy(text.astype(np.int64))
        content = text.astype("<u2").tobytes()
        memory = _stored(model, content, folder)
        if memory is None:
            memory = prefill(model, ids[None], progress=progress).memory
            if len(text) >= MIN_STORED_TOKENS:
                memory.save(folder, files={TEXT: content})
        self.haystack = Haystack(model, ids, memory=memory)
        self._encoder = load_encoder()
        self._words = self._encoder.decode(text.tolist())

    @torch.no_grad()
    def find(self, *, depth: float = 0.5, seed: int = 0) -> NeedleFinding:
        """Hide needles and ask for one of them; depth and seed: as in `find_needle`."""
        model = self.haystack.model
        ids = self.haystack.text
        options = {"tokens": len(ids), "depth": depth, "seed": seed, "encoder": self._encoder}
        sample = draw_sample(model, self._words, **options)
        began = time.perf_counter()
        with self.haystack.read(sample) as output:
            scores = retrieval_scores(model, output)
            read = time.perf_counter()
            generation = continue_from(model, output, max_new_tokens=len(sample.answer))
        reading = Reading(
            answer=generation.ids[0].tolist(),
            retrieved_chunks=[sorted(chunks) for chunks in chunks_retrieved(generation.first)],
            scores=scores,
            prefill_seconds=round(read - began, 3),
            decode_seconds=round(time.perf_counter() - read, 3),
            peak_memory_bytes=peak_memory_bytes(ids.device),
        )
        placed = sample.apply(ids.numpy())
        return report_finding(model, sample, placed, reading, seed=seed, encoder=self._encoder)


def _stored(model: HSAModel, content: bytes, folder: Path) -> ChunkMemory | None:
    """The memory in the folder, or None if there is none of this text and of these weights."""
    try:
        return read_folder(folder, (TEXT, *FILES), partial(_checked, model, content))
    except ValueError:
        return None


def _checked(model: HSAModel, content: bytes, files: Mapping[str, Path]) -> ChunkMemory:
    """The memory in these verified files. Raises ValueError for another text or other weights."""
    if files[TEXT].read_bytes() != content:
        raise ValueError("text: got another one")
    memory = ChunkMemory.load(files)
    check_origin(memory.origin, model)
    if memory.config != model.config:
        raise ValueError("memory: got one of another configuration")
    return memory
