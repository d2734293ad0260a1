"""Continuing a text: greedy or sampled, all new tokens at once or one by one.

Dimensions: B batch, T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hsa_mini.inference.decode_step import DecodeStep
from hsa_mini.inference.prefill import SEGMENT, Progress, prefill
from hsa_mini.inference.sampling import Decoding, choose
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, HSACore, Output

MIN_RECORDED = 32  # new tokens; with fewer, recording a CUDA graph costs more than it saves


@dataclass(frozen=True)
class Generation:
    """The new ids int64 [B, new]; the memory, which has read all of them but the last.

    first: what each HSA layer retrieved for the first new token.
    """

    ids: torch.Tensor
    memory: ChunkMemory
    first: Aux


def generate(
    model: HSACore,
    ids: torch.Tensor,
    *,
    memory: ChunkMemory | None = None,
    lengths: torch.Tensor | None = None,
    segment: int | None = None,
    progress: Progress | None = None,
    **options,
) -> Generation:
    """Continue ids [B, T] (on top of `memory`) by up to `max_new_tokens` tokens; for the options
    see `Decoding` and `prefill`.

    Raises ValueError for an option out of range before anything is read; the memory is unchanged
    then.
    """
    Decoding(**options)  # checked before the prefill
    output = prefill(model, ids, memory, lengths=lengths, segment=segment, progress=progress)
    return continue_from(model, output, **options)


def stream(
    model: HSACore,
    ids: torch.Tensor,
    *,
    memory: ChunkMemory | None = None,
    lengths: torch.Tensor | None = None,
    segment: int | None = None,
    progress: Progress | None = None,
    **options,
) -> Iterator[torch.Tensor]:
    """As `generate`, but one token at a time: ids are read now, and each step of the iterator makes
    one new token int64 [B, 1].

    Whenever the iterator pauses or is closed, `memory` has read every token that came out of it but
    the last. The next call goes on from there, with that token first.
    """
    Decoding(**options)  # checked before the prefill
    output = prefill(model, ids, memory, lengths=lengths, segment=segment, progress=progress)
    return stream_from(model, output, **options)


def stream_from(model: HSACore, output: Output, **options) -> Iterator[torch.Tensor]:
    """As `stream`, from the output of a prefill; the options are those of `Decoding`."""
    return _decode(model, output, Decoding(**options))


def continue_from(model: HSACore, output: Output, **options) -> Generation:
    """Continue from the output of a prefill; the memory grows as chunks complete. The options are
    those of `Decoding`.
    """
    tokens = torch.cat(list(stream_from(model, output, **options)), dim=1)
    return Generation(tokens, output.memory, output.aux)


@torch.no_grad()
def _decode(model: HSACore, output: Output, decoding: Decoding) -> Iterator[torch.Tensor]:
    """The new tokens [B, 1], one by one."""
    logits = output.logits
    memory = output.memory
    generator = torch.Generator(logits.device).manual_seed(decoding.seed)
    stop_tokens = torch.tensor(decoding.stop, dtype=torch.int64, device=logits.device)
    # Make capacity for all new tokens at once: whenever the buffers move, the step has to be
    # recorded anew.
    memory.ensure_capacity(memory.position + min(decoding.max_new_tokens, SEGMENT))
    in_kernels = logits.is_cuda and logits.dtype in (torch.float16, torch.bfloat16)
    graph = in_kernels and decoding.max_new_tokens >= MIN_RECORDED
    step = DecodeStep(model, memory, graph=graph)
    token = choose(logits[:, -1], decoding, generator)
    for _ in range(decoding.max_new_tokens - 1):
        yield token
        ended = torch.isin(
            token, stop_tokens
        )  # a sequence that ended earlier has its stop token here again
        if decoding.stop and ended.all():
            return
        token = torch.where(ended, token, choose(step(token), decoding, generator))
    yield token
