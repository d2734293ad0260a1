"""Reading a long text: the lower decoder reads everything, the upper decoder only the tail that the
result depends on.

Dimensions: B batch, T tokens, C width.
"""

from collections.abc import Callable
from typing import Any

import torch

from hsa_mini.checks import check_integer, quoted
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, HSACore, Output
from hsa_mini.model.hsa import Retrieval

SEGMENT = 8192  # tokens that the lower decoder reads at once: this bounds the memory of a prefill
# On a GPU: tokens of all sequences together. With fewer, the GPU would wait for the CPU.
GPU_TOKENS = 1 << 15
CPU_TOKENS = 1 << 10  # on a CPU, of all sequences together: their numbers stay in its caches
MIN_CPU_SEGMENT = 256  # tokens of a sequence; with fewer, products and windows are less efficient

Progress = Callable[[int], object]


@torch.no_grad()
def prefill(
    model: HSACore,
    ids: torch.Tensor,
    memory: ChunkMemory | None = None,
    *,
    lengths: torch.Tensor | None = None,
    last: int = 1,
    segment: int | None = None,
    progress: Progress | None = None,
) -> Output:
    """Read ids [B, T] on top of `memory`; returns logits [B, last, vocabulary] of the last tokens,
    and the memory.

    The lower decoder reads everything, in segments (see `segment_tokens`). The upper decoder reads
    only the last `upper_tail + last - 1` tokens: these logits and every cache depend on no others,
    so the result is exact. `progress(n)` is called as n tokens are read.

    lengths int64 [B]: texts of different lengths stand in one batch, padded in front with any ids,
    and row b has lengths[b] tokens of text. Chunks are counted from a text's own first token, so
    every text is read by itself and depends on no other. The retrievals returned are then those of
    the last tokens alone.

    Raises ValueError as `HSACore.forward` does, and for lengths, last or segment out of range,
    before anything is read. Raises MemoryError that says how many tokens fit, before anything is
    allocated. If prefill fails, the memory is unchanged.
    """
    model.check_ids(ids, memory)
    segment = checked_segment(segment, ids)
    texts = [row[-n:] for row, n in zip(ids, _checked_lengths(lengths, ids))]
    shortest = min(map(len, texts))
    check_last(last, shortest)
    memory = ChunkMemory(model.config) if memory is None else memory
    starts = memory.lengths or (0,) * len(ids)
    total = max(start + len(text) for start, text in zip(starts, texts))
    # Capacity for the answer too. A memory that has enough is not moved: its forks share it.
    sizes: dict[str, Any] = dict(
        batch=len(ids), dtype=model.memory_dtype(ids.device), device=ids.device, spare=SEGMENT
    )
    if memory.batch is not None:
        memory.reserve(total, **sizes)  # before the draft, which would keep the old buffers alive
    draft = memory.draft()
    draft.reserve(total, **sizes)
    if len(set(starts)) == len(set(map(len, texts))) == 1:
        equal = ids[:, -shortest:]
        output = _read(model, equal, draft, last=last, segment=segment, progress=progress)
    else:
        rows = [draft.view_row(b) for b in range(len(ids))]
        outputs = [
            _read(model, text[None], row, last=last, segment=segment, progress=progress)
            for text, row in zip(texts, rows)
        ]
        draft.stack(rows)
        output = _stacked(outputs, draft)
    memory.commit(draft)
    return output._replace(memory=memory)


def check_last(last: int, tokens: int) -> None:
    """Raise ValueError unless `last` tokens can be the last ones of `tokens`."""
    if not isinstance(last, int) or not 1 <= last <= tokens:
        raise ValueError(f"last: got {quoted(last)}, accepted is an integer of 1 to {tokens}")


def segment_tokens(ids: torch.Tensor) -> int:
    """Tokens of each sequence of ids [B, T] to read at once: 256 to 1,024 on a CPU, 8,192 to 32,768
    on a GPU.
    """
    if ids.is_cuda:
        return max(SEGMENT, GPU_TOKENS // len(ids))
    return max(MIN_CPU_SEGMENT, CPU_TOKENS // len(ids)) if ids.device.type == "cpu" else SEGMENT


def checked_segment(segment: int | None, ids: torch.Tensor) -> int:
    """Tokens of each row of ids [B, T] to read at once. Raises ValueError for a wrong segment."""
    if segment is None:
        return segment_tokens(ids)
    check_integer("segment", segment, 1)
    return segment


def _checked_lengths(lengths: torch.Tensor | None, ids: torch.Tensor) -> list[int]:
    """Tokens of every text in ids [B, T]."""
    B, T = ids.shape
    if lengths is None:
        return [T] * B
    is_tensor = isinstance(lengths, torch.Tensor)
    fits = is_tensor and lengths.dtype == torch.int64 and lengths.shape == (B,)
    if not fits or not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        got = f"{lengths.tolist()} {lengths.dtype}" if is_tensor else repr(lengths)
        raise ValueError(f"lengths: got {got}, accepted is an int64 tensor [{B}] of 1 to {T}")
    return lengths.tolist()


def _read(
    model: HSACore,
    ids: torch.Tensor,
    memory: ChunkMemory,
    *,
    last: int,
    segment: int,
    progress: Progress | None,
) -> Output:
    """`prefill` of texts of one length, into the memory given."""
    first = model.config.tail_start(memory.position + ids.shape[1], last)
    if first > memory.position:
        memory.drop_upper_caches()
    first = max(first, memory.position)
    kept = []
    for part in ids.split(segment, dim=1):
        start = memory.position
        hidden = model.lower_decoder(part, memory)
        model.append_chunks(hidden, memory)
        if memory.position > first:
            kept.append(hidden[:, max(first - start, 0) :].clone())
        if progress:
            progress(part.shape[1])
    hidden, retrievals = model.upper_decoder(torch.cat(kept, dim=1), memory)
    return Output(model.logits(hidden[:, -last:]), memory, Aux(retrievals))


def _stacked(outputs: list[Output], memory: ChunkMemory) -> Output:
    """The outputs of several texts as one; only the last tokens' retrievals are kept."""
    by_layer = zip(*(output.aux.retrievals for output in outputs))
    retrievals = tuple(
        Retrieval(*(torch.cat([part[:, -1:] for part in parts]) for parts in zip(*of_texts)))
        for of_texts in by_layer
    )
    return Output(torch.cat([output.logits for output in outputs]), memory, Aux(retrievals))
