"""Context parallelism for HSA: each process of a group reads one part of every sequence.

    window attention   a part needs the keys and values of the W-1 tokens in front of it, which lie
                       on the process to the left, or on several if parts are shorter than that
    HSA                all chunks are gathered once a pass: all HSA layers share one chunk memory
    all else           works token by token, or chunk by chunk, and needs no other process

A part begins at a chunk's first token, so that no chunk lies on two processes. The parts are as
equal as whole chunks allow; the last one has the tokens of the unfinished chunk besides.

Dimensions: B batch, T tokens of a part, W window, J key/value heads, D head dimension, C width, S
chunk size, P processes of the group.
"""

from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist

from hsa_mini.hsa_model import HSAModel
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, Output
from hsa_mini.model.inputs import check_document_starts
from hsa_mini.training.parallel.collectives import all_to_all, gather


def part_bounds(tokens: int, chunk_size: int, parts: int) -> list[int]:
    """Where the parts of a sequence begin, and where the last one ends: `parts` + 1 positions.

    Raises ValueError for fewer complete chunks than parts.
    """
    chunks = tokens // chunk_size
    if chunks < parts:
        raise ValueError(
            f"tokens: got {tokens} for {parts} processes, accepted are at least "
            f"{parts * chunk_size}, a chunk of {chunk_size} for each"
        )
    return [chunks * i // parts * chunk_size for i in range(parts)] + [tokens]


def split_sequences(model: HSAModel, group: dist.ProcessGroup, tokens: int) -> None:
    """Let `model` read, from now on, this process's part of sequences of `tokens` tokens.

    Its forward pass takes ids [B, T] and document_starts of the part alone; the positions in
    document_starts count from the beginning of the sequence. Its output is that of the part. Raises
    ValueError for sequences too short.
    """
    bounds = part_bounds(tokens, model.config.chunk_size, dist.get_world_size(group))
    model.forward = partial(_forward, model, bounds, group)  # pyright: ignore


class _Halo:
    """Stands where a window cache stands, and fetches what lies in front of a part."""

    def __init__(self, bounds: list[int], window: int, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.bounds = bounds
        self.window = window
        processes = range(len(bounds) - 1)
        self.stretches = [self._needed(self.rank, other) for other in processes]
        self.received = [len(self._needed(other, self.rank)) for other in processes]

    def _needed(self, source: int, target: int) -> range:
        """The positions on process `source` that lie in front of the part of `target`, in reach of
        its window.
        """
        start = self.bounds[target]
        first = max(start - self.window + 1, self.bounds[source])
        return range(first, max(min(start, self.bounds[source + 1]), first))

    def in_front_of(
        self, k: torch.Tensor, v: torch.Tensor, position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v [B, T, J, D] of this part -> [B, <= W-1 + T, J, D], those of the window in front.

        Every process takes part, and keeps what it receives, even if that is empty: otherwise its
        backward pass would leave the others waiting.
        """
        both = torch.cat((k, v), dim=-1).transpose(0, 1)  # [T, B, J, 2D]: one message
        sent = [both[part.start - position : part.stop - position] for part in self.stretches]
        sizes = [len(part) for part in self.stretches]
        front = all_to_all(torch.cat(sent), sizes, self.received, self.group)
        k, v = torch.cat((front, both)).transpose(0, 1).chunk(2, dim=-1)
        return k, v


def _forward(
    model: HSAModel,
    bounds: list[int],
    group: dist.ProcessGroup,
    ids: torch.Tensor,
    *,
    document_starts: torch.Tensor | None = None,
    chunk_source: None = None,
    gumbel_noise: bool = True,
    gumbel_seed: int | torch.Tensor | None = None,
    with_logits: bool = True,
) -> Output:
    """`HSACore.forward` for one part; see `split_sequences`. There is no chunk queue."""
    assert chunk_source is None
    S = model.config.chunk_size
    rank = dist.get_rank(group)
    start = bounds[rank]
    end = bounds[rank + 1]
    if ids.shape[1] != end - start:
        raise ValueError(f"ids: got a part of {ids.shape[1]} tokens, accepted is {end - start}")
    model.check_ids(ids, None, wait=False)
    if document_starts is not None:
        check_document_starts(document_starts, ids, start, S)
    memory = _memory_in_front(model, bounds, group, len(ids))
    hidden = model.lower_decoder(ids, memory, document_starts)
    complete = (end - start) // S
    own = model.encoder(hidden[:, : complete * S].unflatten(1, (complete, S)))
    chunks = [(right - left) // S for left, right in pairwise(bounds)]
    memory.chunks.append(*gather((own.k, own.v, own.landmarks), chunks, group))
    memory.resume(hidden[:, complete * S :], end)
    hidden, retrievals = model.upper_decoder(
        hidden,
        memory,
        document_starts=document_starts,
        gumbel_noise=gumbel_noise,
        gumbel_seed=gumbel_seed,
    )
    return Output(model.logits(hidden) if with_logits else hidden, memory, Aux(retrievals))


def _memory_in_front(
    model: HSAModel, bounds: list[int], group: dist.ProcessGroup, batch: int
) -> ChunkMemory:
    """A memory of `batch` sequences that stands where the part begins."""
    memory = ChunkMemory(model.config)
    halo = _Halo(bounds, model.config.window, group)
    memory.lengths = (bounds[dist.get_rank(group)],) * batch
    memory.lower = [halo] * len(memory.lower)  # pyright: ignore
    memory.upper = [halo] * len(memory.upper)  # pyright: ignore
    return memory
