"""Reading one long text on several processes at once: each reads a part, then all have the memory.

The chunks depend on the lower decoder alone, which looks back through its windows and no further:
`lower_reach` tokens. So a process first re-reads that many tokens in front of its part, and then
needs no other process until the end:

    process 0    [ part 0              ]
    process 1            [ re-read     | part 1 ]
    process 2                 [ re-read         | part 2 ]

Window caches could be sent instead, but a part's first segment needs what its left neighbour
computes last: all processes but one would wait. Re-reading costs less: for the 8B configuration,
57,330 tokens.

Every process then has the whole memory, and reads the last tokens with the upper decoder itself.

Dimensions: B batch, T tokens, C width, S chunk size, P processes.
"""

import hashlib
import math
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from hsa_mini.config import HSAConfig
from hsa_mini.inference.prefill import SEGMENT, Progress, check_last, checked_segment
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.origin import fingerprint
from hsa_mini.model.core import Aux, HSACore, Output


@torch.no_grad()
def prefill_parallel(
    model: HSACore,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    last: int = 1,
    segment: int | None = None,
    progress: Progress | None = None,
) -> Output:
    """`prefill(model, ids, last=last, segment=segment)`, read by all processes of `group` together
    (None: all that there are). Each calls this with the same arguments, ids [B, T] whole and on its
    own device, and gets the same output, from which it can decode alone.

    Parts begin where a segment of `prefill` begins, so that every matrix product has the same sizes
    there. Dense models compute the same numbers, bit for bit. In a mixture of experts, the first
    tokens that are re-read may choose other experts; the products of the others then have other
    rows beside them, which may round differently. `progress(n)` is called as this process reads n
    tokens of its part.

    Raises ValueError as `prefill` does, and where processes differ in arguments, configuration or
    weights; MemoryError if the memory does not fit. If one process raises either, the others raise
    RuntimeError that names it. All this happens before anything is read.
    """
    memory, segment = _prepared(model, ids, group, last, segment)
    B, T = ids.shape
    S = model.config.chunk_size
    bounds = part_bounds(model.config, T, segment, dist.get_world_size(group))
    first = model.config.tail_start(T, last)
    kept = min(first, T - T % S)  # the unfinished chunk is needed too
    own = _read_part(model, ids, memory, bounds, segment, kept, dist.get_rank(group), progress)
    for buffer in memory.chunks.buffers:
        _share(buffer, [bound // S for bound in bounds], group)
    hidden = own.new_empty(B, T - kept, own.shape[2])
    bounds_of_kept = [max(bound - kept, 0) for bound in bounds]
    hidden[:, slice(*bounds_of_kept[dist.get_rank(group) :][:2])] = own
    _share(hidden, bounds_of_kept, group)
    for part in (part for cache in memory.lower if cache for part in cache):
        dist.broadcast(part, group=group, group_src=bounds.index(T) - 1)
    memory.chunks.length = T // S
    memory.resume(hidden[:, T - T % S - kept :], T)
    memory.origin = model
    out, retrievals = model.upper_decoder(hidden[:, first - kept :], memory)
    return Output(model.logits(out[:, -last:]), memory, Aux(retrievals))


def part_bounds(config: HSAConfig, tokens: int, segment: int, processes: int) -> list[int]:
    """Where the parts of a text begin, and where the last one ends: `processes` + 1 positions.

    All processes read equally much, tokens that they re-read included. So the first part is the
    longest, and in a short text later ones may be empty. Parts begin where a segment and a chunk
    begin.
    """
    unit = math.lcm(segment, config.chunk_size)
    units = -(-tokens // unit)
    again = -(-config.lower_reach // unit)
    share = units + (processes - 1) * again  # what each reads, times `processes`
    starts = [share * i // processes - (i - 1) * again for i in range(1, processes)]
    return [0, *(min(start * unit, tokens) for start in starts), tokens]


def _prepared(
    model: HSACore,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    last: int,
    segment: int | None,
) -> tuple[ChunkMemory, int]:
    """An empty memory with capacity for the text, and the tokens of a segment, once all processes
    have agreed.
    """
    memory = ChunkMemory(model.config)
    given: dict[str, Any] = {}
    error = None
    try:
        model.check_ids(ids, None)
        B, T = ids.shape
        check_last(last, T)
        segment = checked_segment(segment, ids)
        dtype = model.memory_dtype(ids.device)
        memory.reserve(T, spare=SEGMENT, batch=B, dtype=dtype, device=ids.device)
        given = {
            "ids": (ids.shape, hashlib.sha256(ids.cpu().numpy().tobytes()).digest()),
            "last": last,
            "segment": segment,
            "model": (model.config, dtype, fingerprint(model)),
        }
    except (ValueError, MemoryError) as raised:
        error = raised
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, (error and str(error), given), group=group)
    if error:
        raise error
    for rank, (message, other) in enumerate(every):
        if message:
            raise RuntimeError(f"process {rank} of the group: {message}")
        for name in other:
            if other[name] != every[0][1].get(name):
                raise ValueError(
                    f"{name}: got another on process {rank} of the group than on process 0, "
                    "accepted is the same on all"
                )
    assert segment is not None
    return memory, segment


def _read_part(
    model: HSACore,
    ids: torch.Tensor,
    memory: ChunkMemory,
    bounds: list[int],
    segment: int,
    kept: int,
    rank: int,
    progress: Progress | None,
) -> torch.Tensor:
    """Read the part of process `rank` into its place in `memory`; returns the lower decoder's
    output [B, n, C] for those of its tokens that stand at the position `kept` or later.
    """
    B = len(ids)
    start, end = bounds[rank : rank + 2]
    again = -(-model.config.lower_reach // segment) * segment
    begin = max(start - again, 0) if start < end else end
    parts = []
    if begin:
        # One token makes window caches of full size. The segments that follow then have the sizes
        # that they have for one process. What the caches do not hold, no token of the part needs.
        memory.lengths = (begin - 1,) * B
        parts.append(model.lower_decoder(ids[:, begin - 1 : begin], memory)[:, :0])
    memory.lengths = (begin,) * B
    memory.chunks.length = start // model.config.chunk_size
    for first in range(begin, end, segment):
        hidden = model.lower_decoder(ids[:, first : min(first + segment, end)], memory)
        if first < start:
            memory.lengths = (first + segment,) * B
            continue
        model.append_chunks(hidden, memory)
        parts.append(hidden[:, max(kept - first, 0) :].clone())
        if progress:
            progress(hidden.shape[1])
    return torch.cat(parts, dim=1)


def _share(tensor: torch.Tensor, bounds: list[int], group: dist.ProcessGroup | None) -> None:
    """Complete tensor [B, n, ...], of which each process has filled its own part, on all of them;
    bounds: where the parts begin, and where the last one ends.

    Broadcasts write into the tensor. Gathering parts of unequal size would hold all of it twice.
    """
    for row in tensor:
        for rank, (first, end) in enumerate(pairwise(bounds)):
            if first < end:
                dist.broadcast(row[first:end], group=group, group_src=rank)
