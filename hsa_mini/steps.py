"""One token at a time for all sequences of a memory, each at its own position, in tensors of fixed size and place.

On a GPU a step can be a CUDA graph: hundreds of launches that the processor makes once. A chunk is encoded outside of it,
when it is complete, which the host knows.

Dimensions: B batch, S chunk size, C width.
"""

import torch

from .memory import ChunkMemory
from .model import HSAModel
from .nn.hsa import HSA
from .nn.rope import rope_table


class Steps:
    """`steps(token [B, 1]) -> logits [B, vocabulary]` of the next one; the memory has then read the token.

    With `graph`, on a GPU, the logits are overwritten by the next step. Raises MemoryError, before anything changes, if the
    memory has to grow and cannot.
    """

    def __init__(self, model: HSAModel, memory: ChunkMemory, *, graph: bool = False) -> None:
        self.model, self.memory = model, memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._wants_graph = graph
        self._captured: tuple = ()

    @torch.no_grad()
    def __call__(self, token: torch.Tensor) -> torch.Tensor:
        memory = self.memory
        memory.grow(memory.position + 1)
        memory.roll()
        if self._wants_graph:
            if self._captured != self._places():
                self._capture(token)
            self._token.copy_(token)
            self._graph.replay()
            logits = self._logits
        else:
            logits = self._step(token)
        memory.position += 1
        self._complete()
        return logits

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        """The whole model; asks the host nothing."""
        model, memory, clock = self.model, self.memory, self.memory.clock
        table = rope_table(clock.positions[:, None], model.config.head_dim, model.config.rope_base)
        rope = tuple(part.to(model.norm.weight.dtype) for part in table)  # once, not in every block
        x = model.embedding(token)
        for block, ring in zip(model.lower, memory.lower):
            x, _ = block(x, rope, ring)
        place = (clock.positions % model.config.chunk_size)[:, None, None].expand_as(x)
        memory.partial.scatter_(1, place, x)
        queries = iter(memory.block_queries)
        # a graph sees the room behind the chunks, which later tokens fill; without one there is no need to look at it
        chunks = memory.stores if self._wants_graph else (memory.k, memory.v, memory.landmarks)

        def ask(hsa: HSA, x: torch.Tensor) -> torch.Tensor:
            return hsa.step(x, *chunks, clock.positions, next(queries), operations=memory.operations)

        for block, ring in zip(model.upper, memory.upper):
            x, _ = block(x, rope, ring, ask)
        clock.set(clock.positions + 1)
        return model.predict(x)[:, -1]

    def _complete(self) -> None:
        """Encode the chunks that the last token has completed."""
        memory, S = self.memory, self.model.config.chunk_size
        rows = [b for b, position in enumerate(memory.positions) if position % S == 0]
        if rows:
            memory.append_to(rows, *self.model.encoder(memory.partial[rows][:, None]))

    def _capture(self, token: torch.Tensor) -> None:
        """A graph of `_step` on the tensors that the memory has now. To step twice at one position writes the same twice."""
        memory, main, side = self.memory, torch.cuda.current_stream(), torch.cuda.Stream()
        self._token, positions = token.clone(), memory.clock.positions.clone()
        side.wait_stream(main)
        with torch.cuda.stream(side):  # kernels are compiled and workspaces allocated before anything is captured
            self._step(self._token)
            memory.clock.set(positions)
        main.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step(self._token)
        self._captured = self._places()

    def _places(self) -> tuple:
        """What a graph was captured for: when the memory grows, or is rolled anew, it lies elsewhere."""
        return self.memory.clock, [(store.data_ptr(), store.shape) for store in self.memory.stores]
