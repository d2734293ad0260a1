"""prefill: TODO."""

from collections.abc import Callable

import torch

from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, HSACore, Output
from hsa_mini.model.hsa import Retrieval

SEGMENT = 8192  # tokens of the lower decoder at once: what bounds the memory of a prefill
GPU_TOKENS = 1 << 15  # of all sequences at once: with fewer a GPU may wait for the host


@torch.no_grad()
def prefill(
    model: HSACore,
    ids: torch.Tensor,
    memory: ChunkMemory | None = None,
    *,
    lengths: torch.Tensor | None = None,
    last: int = 1,
    segment: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Output:
    """Read ids [B, T] on top of `memory`; returns logits [B, last, vocabulary] of the last tokens, and the memory.

    The lower decoder reads everything, in segments (of 8,192 tokens, on a GPU up to 32,768); the upper decoder only the last
    `upper_tail + last - 1` tokens, on which these logits and every cache alone depend: exact, not an approximation.
    `progress(n)` is called as n tokens are read.

    `lengths` int64 [B]: texts of different lengths are padded in front with any ids, and this many of each row are its text.
    Chunks are counted from a text's own first token, so each is read by itself: nothing of it depends on the others. The
    retrievals returned are then those of the last tokens alone.

    Raises ValueError as `HSACore.forward` does, and for lengths, last or segment out of range, before anything is read, and
    MemoryError that says how many tokens fit, before anything is allocated. Whatever cuts it short, the memory is as it was.
    """
    model.check_ids(ids, memory)
    if segment is None:
        segment = max(SEGMENT, GPU_TOKENS // len(ids)) if ids.is_cuda else SEGMENT
    if not isinstance(segment, int) or segment < 1:
        raise ValueError(f"segment: got {segment!r}, accepted is an integer of at least 1")
    texts = [row[-n:] for row, n in zip(ids, _counted(lengths, ids))]
    if not isinstance(last, int) or not 1 <= last <= min(map(len, texts)):
        raise ValueError(
            f"last: got {last!r}, accepted is an integer of 1 to {min(map(len, texts))}"
        )
    memory = ChunkMemory(model.config) if memory is None else memory
    starts = memory.positions or [0] * len(ids)
    total = max(start + len(text) for start, text in zip(starts, texts)) + SEGMENT
    room = dict(batch=len(ids), dtype=model.memory_dtype(ids.device), device=ids.device)
    if memory.batch is not None:  # before the branch, which would keep what moves
        memory.make_room(total, **room)
    reader = memory.branch()
    reader.make_room(total, **room)
    if len(set(starts)) == len(set(map(len, texts))) == 1:
        output = _read(model, ids[:, -len(texts[0]) :], reader, last, segment, progress)
    else:
        rows = [reader.row(b) for b in range(len(ids))]
        outputs = [
            _read(model, text[None], row, last, segment, progress) for text, row in zip(texts, rows)
        ]
        reader.gather(rows)
        ends = [
            [
                Retrieval(*(part[:, -1:] for part in retrieval))
                for retrieval in output.aux.retrievals
            ]
            for output in outputs
        ]
        together = tuple(Retrieval(*map(torch.cat, zip(*retrievals))) for retrievals in zip(*ends))
        output = Output(torch.cat([output.logits for output in outputs]), reader, Aux(together))
    memory.adopt(reader)
    return output._replace(memory=memory)


def _counted(lengths: torch.Tensor | None, ids: torch.Tensor) -> list[int]:
    """Tokens of every text in ids [B, T]."""
    B, T = ids.shape
    if lengths is None:
        return [T] * B
    fits = (
        isinstance(lengths, torch.Tensor) and lengths.dtype == torch.int64 and lengths.shape == (B,)
    )
    if not fits or not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        got = (
            f"{lengths.tolist()} {lengths.dtype}"
            if isinstance(lengths, torch.Tensor)
            else repr(lengths)
        )
        raise ValueError(f"lengths: got {got}, accepted is an int64 tensor [{B}] of 1 to {T}")
    return lengths.tolist()


def _read(
    model: HSACore,
    ids: torch.Tensor,
    memory: ChunkMemory,
    last: int,
    segment: int,
    progress: Callable[[int], None] | None,
) -> Output:
    """`prefill` of texts of one length, into the memory given."""
    memory.unroll()
    first = model.config.tail_start(memory.position + ids.shape[1], last)
    if first > memory.position:  # the upper decoder starts afresh, behind what it has seen so far
        memory.upper = [None] * len(memory.upper)
        memory.block_queries = [None] * len(memory.block_queries)
    first = max(first, memory.position)
    kept = []
    for part in ids.split(segment, dim=1):
        start = memory.position
        hidden = model.read(part, memory)
        if memory.position > first:
            kept.append(hidden[:, max(first - start, 0) :].clone())
        if progress:
            progress(part.shape[1])
    hidden, retrievals = model.look_up(torch.cat(kept, dim=1), first, memory)
    return Output(model.predict(hidden[:, -last:]), memory, Aux(retrievals))
