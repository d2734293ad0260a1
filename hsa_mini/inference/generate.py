"""Reading a long text and going on from it: streaming prefill, greedy and sampled decoding, token by token or at once.

Dimensions: B batch, T tokens, C width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hsa_mini.inference.decode_step import Steps
from hsa_mini.inference.prefill import SEGMENT, prefill
from hsa_mini.inference.sampling import Decoding, choose
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, HSACore, Output

LEAST_RECORDED = 32  # new tokens that are worth recording a step for


@dataclass(frozen=True)
class Generation:
    """ids int64 [B, new]; the memory, which has read all of them but the last; `first`: what each HSA layer retrieved for the first new token."""

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
    progress: Callable[[int], None] | None = None,
    **options,
) -> Generation:
    """Continue ids [B, T] (on top of `memory`) by up to `max_new_tokens` tokens; for the options see `Decoding` and `prefill`.

    Raises ValueError for whatever is out of range, before anything is read: the memory is as it was.
    """
    Decoding(**options)  # refuses what is out of range before the prefill
    output = prefill(model, ids, memory, lengths=lengths, segment=segment, progress=progress)
    return continue_from(model, output, **options)


def stream(
    model: HSACore,
    ids: torch.Tensor,
    *,
    memory: ChunkMemory | None = None,
    lengths: torch.Tensor | None = None,
    segment: int | None = None,
    progress: Callable[[int], None] | None = None,
    **options,
) -> Iterator[torch.Tensor]:
    """As `generate`, but ids are read now and each new token int64 [B, 1] is made when it is asked for.

    Whenever the iterator rests or is closed, `memory` has read every token that came out of it but the last: the next
    call goes on from there, with that token first.
    """
    decoding = Decoding(**options)
    output = prefill(model, ids, memory, lengths=lengths, segment=segment, progress=progress)
    return _decode(model, output, decoding)


def continue_from(model: HSACore, output: Output, **options) -> Generation:
    """`generate` from a prefill's output on; the memory grows as chunks complete."""
    tokens = torch.cat(list(_decode(model, output, Decoding(**options))), dim=1)
    return Generation(tokens, output.memory, output.aux)


@torch.no_grad()
def _decode(model: HSACore, output: Output, decoding: Decoding) -> Iterator[torch.Tensor]:
    """The new tokens [B, 1], one by one."""
    logits = output.logits
    memory = output.memory
    generator = torch.Generator(logits.device).manual_seed(decoding.seed)
    ends = torch.tensor(decoding.stop, dtype=torch.int64, device=logits.device)
    memory.grow(
        memory.position + min(decoding.max_new_tokens, SEGMENT)
    )  # when it moves, a step is recorded anew
    in_kernels = logits.is_cuda and logits.dtype in (torch.float16, torch.bfloat16)
    steps = Steps(model, memory, graph=in_kernels and decoding.max_new_tokens >= LEAST_RECORDED)
    token = choose(logits[:, -1], decoding, generator)
    for _ in range(decoding.max_new_tokens - 1):
        yield token
        ended = torch.isin(token, ends)  # who ended earlier has its stop token here again
        if decoding.stop and ended.all():
            return
        token = torch.where(ended, token, choose(steps(token), decoding, generator))
    yield token
