"""Reading a long text and going on from it: streaming prefill, greedy and sampled decoding.

Dimensions: B batch, T tokens, C width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .memory import ChunkMemory
from .model import Aux, HSAModel, Output

SEGMENT = 8192  # tokens of the lower decoder at once: what bounds the memory of a prefill


@dataclass(frozen=True)
class Generation:
    """ids int64 [B, new]; the memory, which has read all of them but the last; `first`: what each HSA layer retrieved for the first new token."""

    ids: torch.Tensor
    memory: ChunkMemory
    first: Aux


@torch.no_grad()
def prefill(
    model: HSAModel,
    ids: torch.Tensor,
    memory: ChunkMemory | None = None,
    *,
    segment: int = SEGMENT,
    progress: Callable[[int], None] | None = None,
) -> Output:
    """Read ids [B, T] on top of `memory`; returns the last token's logits [B, 1, vocabulary] and the memory.

    The lower decoder reads everything, in segments; the upper decoder only the last `upper_tail` tokens, on which the
    last logits and every cache alone depend: exact, not an approximation. `progress(n)` is called as n tokens are read.
    Raises ValueError as `HSAModel.forward` does, and for a segment below 1.
    """
    if not isinstance(segment, int) or segment < 1:
        raise ValueError(f"segment: got {segment!r}, accepted is an integer of at least 1")
    tokens = ids.shape[-1]
    memory = ChunkMemory(model.config, reserve_tokens=tokens + SEGMENT) if memory is None else memory
    model.check_ids(ids, memory)
    first = tail_start(model, memory.position + tokens)
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
    return Output(model.predict(hidden[:, -1:]), memory, Aux(retrievals))


def tail_start(model: HSAModel, tokens: int) -> int:
    """The first position that the upper decoder must read so that everything after `tokens` tokens is exact."""
    start = max(tokens - model.config.upper_tail, 0)
    return start - start % model.config.query_block


@torch.no_grad()
def generate(
    model: HSAModel,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    memory: ChunkMemory | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop: tuple[int, ...] = (),
    segment: int = SEGMENT,
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Continue ids [B, T] (on top of `memory`) by up to `max_new_tokens` tokens.

    temperature 0 is greedy; above it samples, reproducibly by `seed`. Ends early once every sequence has produced a
    token of `stop`. Raises ValueError for arguments out of range.
    """
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: got {max_new_tokens!r}, accepted is an integer of at least 1")
    if not temperature >= 0:  # nan is neither
        raise ValueError(f"temperature: got {temperature}, accepted is 0 (greedy) or more")
    output = prefill(model, ids, memory, segment=segment, progress=progress)
    return continue_from(model, output, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop)


@torch.no_grad()
def continue_from(
    model: HSAModel, output: Output, *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0, stop: tuple[int, ...] = ()
) -> Generation:
    """Decode token by token from a prefill's output; the memory grows as chunks complete."""
    first, memory = output.aux, output.memory
    generator = torch.Generator(output.logits.device).manual_seed(seed)
    done = torch.zeros(output.logits.shape[0], dtype=torch.bool, device=output.logits.device)
    new = []
    for i in range(max_new_tokens):
        token = choose(output.logits[:, -1], temperature, generator)
        new.append(token)
        if stop:
            done |= torch.isin(token[:, 0], torch.tensor(stop, device=token.device))
            if done.all():
                break
        if i + 1 < max_new_tokens:
            output = model(token, memory)
    return Generation(torch.cat(new, dim=1), memory, first)


def choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    """logits [B, vocabulary] -> the next token [B, 1]: the likeliest, or a draw at `temperature`."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(dim=-1), 1, generator=generator)
