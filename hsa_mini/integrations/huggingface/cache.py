"""A `ChunkMemory` as the cache that transformers hands from one call of a model to the next."""

from typing import NoReturn

import torch
from transformers.cache_utils import Cache

from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import HSACore


class HSACache(Cache):
    """What a model has read: `generate(ids, cache=HSACache(memory))` continues after `memory`.

    ids are then the new tokens alone, with an attention mask over old and new ones; or the old and
    the new ones. `copy.deepcopy` makes a cache that goes on by itself.
    """

    def __init__(self, memory: ChunkMemory) -> None:
        super().__init__(layers=[])
        self.memory = memory
        self.columns = memory.position  # of ids that were read, padding included
        self._step: DecodeStep | None = None

    def step(self, model: HSACore, token: torch.Tensor) -> torch.Tensor:
        """One more token [B, 1] of every sequence -> logits [B, 1, vocabulary]."""
        graph = token.is_cuda and model.norm.weight.dtype in (torch.float16, torch.bfloat16)
        if self._step is None or self._step.model is not model:
            self._step = DecodeStep(model, self.memory, graph=graph)
        logits = self._step(token)[:, None]
        return logits.clone() if graph else logits  # the next step of a graph overwrites them

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return self.memory.batch or -1

    @property
    def is_initialized(self) -> bool:
        return self.memory.batch is not None

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # so `generate` cuts what was read off ids

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        """Forget everything."""
        self.memory.commit(ChunkMemory(self.memory.config, offload=self.memory.chunks.offload))
        self.columns = 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences in this order: an integer tensor [B'], repeats allowed."""
        self.memory.reorder(indices.long())

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        rows = torch.arange(self.memory.batch or 0, device=self.memory.chunks.landmarks.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise NotImplementedError("crop: a chunk memory cannot forget; copy the cache beforehand")

    def __deepcopy__(self, memo) -> "HSACache":
        """A copy that shares no tensor with this cache, and that is read by the same model."""
        memory = self.memory.fork()
        if memory.batch is not None:
            memory.reorder(torch.arange(memory.batch, device=memory.chunks.landmarks.device))
        copied = HSACache(memory)
        copied.columns = self.columns
        return copied
