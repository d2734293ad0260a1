"""One new token for every sequence of a memory, each at its own position, in tensors of fixed size
and place.

On a GPU a step can be recorded as a CUDA graph and replayed. A chunk is encoded outside of the
graph, after its last token. The CPU counts tokens, so it need not wait for the GPU to see this.

Dimensions: B batch, S chunk size, C width, W window.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch

from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.origin import check_origin
from hsa_mini.model.block import Block
from hsa_mini.model.core import HSACore
from hsa_mini.model.hsa import HSA
from hsa_mini.ops.rope import rope_table


class DecodeStep:
    """`step(token [B, 1]) -> logits [B, vocabulary]` of the next token; the memory has then read
    the token.

    With `graph`, on a GPU, steps are recorded, and the next step overwrites the logits. Raises
    MemoryError, before anything changes, if the memory has to grow and cannot.
    """

    def __init__(self, model: HSACore, memory: ChunkMemory, *, graph: bool = False) -> None:
        """Raises NotImplementedError for a model that has no step for single tokens, and ValueError
        for a memory that other weights made.
        """
        if not model.can_decode_steps:
            raise NotImplementedError(
                f"model: got {type(model).__name__}, which has no step for single tokens, "
                "accepted is `forward` with one token"
            )
        check_origin(memory.origin, model)
        self.model = model
        self.memory = memory
        self.graph = graph
        # The tensors that the last step used. If the memory now holds others, something else
        # changed it after that step.
        self._tail: torch.Tensor | None = None
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._positions: torch.Tensor | None = None  # int64 [B], of the token to come
        self._run: Callable[[torch.Tensor], tuple[torch.Tensor, ...]] | None = None

    @torch.no_grad()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        memory = self.memory
        memory.ensure_capacity(memory.position + 1)
        (logits,) = self._prepared()(token)
        memory.lengths = tuple(length + 1 for length in memory.lengths)
        self._encode_complete_chunks()
        return logits

    def _prepared(self) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
        """The step for the memory's current tensors; a new one only if they have moved."""
        memory = self.memory
        same_tensors = memory.tail is self._tail and memory.chunks.buffers is self._buffers
        if self._run is not None and same_tensors:
            return self._run
        if self._positions is None or memory.tail is not self._tail:
            memory.commit(memory.fork())  # copies: no other memory may see what a step writes
            self._tail = memory.tail
            device = memory.chunks.landmarks.device
            self._positions = torch.tensor(memory.lengths, device=device)
        self._buffers = memory.chunks.buffers
        step = partial(_decode, self.model, memory, self._positions, self.graph)
        self._run = CUDAGraphRunner(step) if self.graph else step
        return self._run

    def _encode_complete_chunks(self) -> None:
        """Encode the chunks that the last token has completed."""
        S = self.model.config.chunk_size
        lengths = self.memory.lengths
        rows = [row for row, length in enumerate(lengths) if length % S == 0]
        if rows and self._tail is not None:
            encoded = self.model.encoder(self._tail[rows][:, None])
            places = [lengths[row] // S - 1 for row in rows]
            self.memory.chunks.write(rows, places, encoded.k, encoded.v, encoded.landmarks)


def _decode(
    model: HSACore,
    memory: ChunkMemory,
    positions: torch.Tensor,
    whole_buffers: bool,
    token: torch.Tensor,
) -> tuple[torch.Tensor]:
    """One decode step. It never synchronises with the CPU, and moves `positions` on in place."""
    config = model.config
    slots = positions % config.window
    at = positions[:, None]
    table = rope_table(at, config.head_dim, config.rope_base, config.rope_factors)
    rope = tuple(part.to(model.norm.weight.dtype) for part in table)  # once, not in every block
    x = model.embedding(token)
    for block, cache in zip(cast(Iterable[Block], model.lower), memory.lower):
        assert cache is not None
        x = block.decode_step(x, rope, cache, positions, slots)
    place = (positions % config.chunk_size)[:, None, None].expand_as(x)
    assert memory.tail is not None
    memory.tail.scatter_(1, place, x)
    source = memory.chunks.source(whole_buffers=whole_buffers)
    block_queries = iter(memory.block_queries)

    def attend_chunks(hsa: HSA, x: torch.Tensor) -> torch.Tensor:
        return hsa.decode_step(x, source, positions, next(block_queries))

    for block, cache in zip(cast(Iterable[Block], model.upper), memory.upper):
        assert cache is not None
        x = block.decode_step(x, rope, cache, positions, slots, attend_chunks)
    positions.add_(1)
    return (model.logits(x)[:, -1],)
