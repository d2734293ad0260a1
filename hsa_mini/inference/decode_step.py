"""One token at a time for all sequences of a memory, each at its own position, in tensors of fixed size and place.

On a GPU a step can be recorded and replayed. A chunk is encoded outside of it, when it is complete, which the host knows.

Dimensions: B batch, S chunk size, C width.
"""

from functools import partial

import torch

from hsa_mini.inference.cuda_graph import Replay
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import HSACore
from hsa_mini.model.hsa import HSA
from hsa_mini.model.rope import rope_table


class Steps:
    """`steps(token [B, 1]) -> logits [B, vocabulary]` of the next one; the memory has then read the token.

    With `graph`, on a GPU, steps are recorded, and the next one overwrites the logits. Raises MemoryError, before anything
    changes, if the memory has to grow and cannot.
    """

    def __init__(self, model: HSACore, memory: ChunkMemory, *, graph: bool = False) -> None:
        self.model = model
        self.memory = memory
        self.graph = graph
        self._replayed: tuple | None = None  # where everything lay when the recording began

    @torch.no_grad()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        memory = self.memory
        memory.grow(memory.position + 1)
        memory.roll()
        if self.graph:
            places = memory.clock, [(store.data_ptr(), store.shape) for store in memory.stores]
            if (
                self._replayed != places
            ):  # first of all, when the memory has grown, and when it was rolled anew
                self._replayed, self._replay = (
                    places,
                    Replay(partial(_step, self.model, memory, True)),
                )
            (logits,) = self._replay(token)
        else:
            (logits,) = _step(self.model, memory, False, token)
        memory.position += 1
        self._complete()
        return logits

    def _complete(self) -> None:
        """Encode the chunks that the last token has completed."""
        memory = self.memory
        S = self.model.config.chunk_size
        rows = [b for b, position in enumerate(memory.positions) if position % S == 0]
        if rows:
            memory.append_to(rows, *self.model.encoder(memory.partial[rows][:, None]))


def _step(
    model: HSACore, memory: ChunkMemory, recorded: bool, token: torch.Tensor
) -> tuple[torch.Tensor]:
    """The whole model; asks the host nothing."""
    S = model.config.chunk_size
    clock = memory.clock
    table = rope_table(clock.positions[:, None], model.config.head_dim, model.config.rope_base)
    rope = tuple(part.to(model.norm.weight.dtype) for part in table)  # once, not in every block
    x = model.embedding(token)
    for block, ring in zip(model.lower, memory.lower):
        x, _ = block(x, rope, ring)
    place = (clock.positions % S)[:, None, None].expand_as(x)
    memory.partial.scatter_(1, place, x)
    queries = iter(memory.block_queries)
    # what is recorded sees the room behind the chunks, which later tokens fill; else there is no need to look at it
    chunks = memory.stores if recorded else (memory.k, memory.v, memory.landmarks)

    def ask(hsa: HSA, x: torch.Tensor) -> torch.Tensor:
        return hsa.step(x, *chunks, clock.positions, next(queries), operations=memory.operations)

    for block, ring in zip(model.upper, memory.upper):
        x, _ = block(x, rope, ring, ask)
    clock.set(clock.positions + 1)
    return (model.predict(x)[:, -1],)
