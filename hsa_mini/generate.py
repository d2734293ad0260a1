"""Reading a long text and going on from it: streaming prefill, greedy and sampled decoding, token by token or at once.

Dimensions: B batch, T tokens, C width.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .memory import ChunkMemory
from .model import Aux, HSAModel, Output
from .nn.hsa import Retrieval
from .steps import Steps

SEGMENT = 8192  # tokens of the lower decoder at once: what bounds the memory of a prefill
GPU_TOKENS = 1 << 15  # of all sequences at once: with fewer a GPU may wait for the host
LEAST_RECORDED = 32  # new tokens that are worth recording a step for


@dataclass(frozen=True)
class Generation:
    """ids int64 [B, new]; the memory, which has read all of them but the last; `first`: what each HSA layer retrieved for the first new token."""

    ids: torch.Tensor
    memory: ChunkMemory
    first: Aux


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are made: the options of `generate`, `stream` and `continue_from`. Raises ValueError if out of range.

    max_new_tokens: at most so many. temperature, top_k, top_p: see `probabilities`; temperature 0 takes the likeliest
    token. seed: of the draws, which use nobody else's random numbers. stop: ids of tokens that end a sequence. One that
    has ended repeats its stop token, and reads it, until all have ended or `max_new_tokens` are made.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole = (("max_new_tokens", self.max_new_tokens, 1), ("top_k", self.top_k or 0, 0), ("seed", self.seed, 0))
        for name, value, least in whole:
            if not isinstance(value, int) or not least <= value < 1 << 63:
                raise ValueError(f"{name}: got {value!r}, accepted is an integer of at least {least}, below 2**63")
        if not 0 <= self.temperature < math.inf:  # nan is neither
            raise ValueError(f"temperature: got {self.temperature}, accepted is 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, accepted is 0 to 1")
        if not isinstance(self.stop, tuple) or not all(isinstance(token, int) for token in self.stop):
            raise ValueError(f"stop: got {self.stop!r}, accepted is a tuple of token ids")


@torch.no_grad()
def prefill(
    model: HSAModel,
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

    Raises ValueError as `HSAModel.forward` does, and for lengths, last or segment out of range, before anything is read, and
    MemoryError that says how many tokens fit, before anything is allocated. Whatever cuts it short, the memory is as it was.
    """
    model.check_ids(ids, memory)
    if segment is None:
        segment = max(SEGMENT, GPU_TOKENS // len(ids)) if ids.is_cuda else SEGMENT
    if not isinstance(segment, int) or segment < 1:
        raise ValueError(f"segment: got {segment!r}, accepted is an integer of at least 1")
    texts = [row[-n:] for row, n in zip(ids, _counted(lengths, ids))]
    if not isinstance(last, int) or not 1 <= last <= min(map(len, texts)):
        raise ValueError(f"last: got {last!r}, accepted is an integer of 1 to {min(map(len, texts))}")
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
        outputs = [_read(model, text[None], row, last, segment, progress) for text, row in zip(texts, rows)]
        reader.gather(rows)
        ends = [[Retrieval(*(part[:, -1:] for part in retrieval)) for retrieval in output.aux.retrievals] for output in outputs]
        together = tuple(Retrieval(*map(torch.cat, zip(*retrievals))) for retrievals in zip(*ends))
        output = Output(torch.cat([output.logits for output in outputs]), reader, Aux(together))
    memory.adopt(reader)
    return output._replace(memory=memory)


def _counted(lengths: torch.Tensor | None, ids: torch.Tensor) -> list[int]:
    """Tokens of every text in ids [B, T]."""
    B, T = ids.shape
    if lengths is None:
        return [T] * B
    fits = isinstance(lengths, torch.Tensor) and lengths.dtype == torch.int64 and lengths.shape == (B,)
    if not fits or not 1 <= int(lengths.min()) <= int(lengths.max()) <= T:
        got = f"{lengths.tolist()} {lengths.dtype}" if isinstance(lengths, torch.Tensor) else repr(lengths)
        raise ValueError(f"lengths: got {got}, accepted is an int64 tensor [{B}] of 1 to {T}")
    return lengths.tolist()


def _read(
    model: HSAModel, ids: torch.Tensor, memory: ChunkMemory, last: int, segment: int, progress: Callable[[int], None] | None
) -> Output:
    """`prefill` of texts of one length, into the memory given."""
    memory.unroll()
    first = tail_start(model, memory.position + ids.shape[1], last)
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


def tail_start(model: HSAModel, tokens: int, last: int = 1) -> int:
    """The first position that the upper decoder must read so that the `last` of `tokens` tokens and all after are exact."""
    start = max(tokens - last + 1 - model.config.upper_tail, 0)
    return start - start % model.config.query_block


def generate(
    model: HSAModel,
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
    model: HSAModel,
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


def continue_from(model: HSAModel, output: Output, **options) -> Generation:
    """`generate` from a prefill's output on; the memory grows as chunks complete."""
    tokens = torch.cat(list(_decode(model, output, Decoding(**options))), dim=1)
    return Generation(tokens, output.memory, output.aux)


@torch.no_grad()
def _decode(model: HSAModel, output: Output, decoding: Decoding) -> Iterator[torch.Tensor]:
    """The new tokens [B, 1], one by one."""
    logits, memory = output.logits, output.memory
    generator = torch.Generator(logits.device).manual_seed(decoding.seed)
    ends = torch.tensor(decoding.stop, dtype=torch.int64, device=logits.device)
    memory.grow(memory.position + min(decoding.max_new_tokens, SEGMENT))  # when it moves, a step is recorded anew
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


def choose(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> torch.Tensor:
    """logits [B, vocabulary] -> the next token [B, 1]: the likeliest at temperature 0, else a draw."""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    chances = probabilities(logits, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    return torch.multinomial(chances, 1, generator=generator)


def probabilities(logits: torch.Tensor, *, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> torch.Tensor:
    """logits [B, vocabulary] -> the chance of each token to be drawn, float64 [B, vocabulary].

    In this order: the softmax of logits / temperature (above 0); the `top_k` likeliest tokens alone (0 or None: all); of
    these, their chances scaled to sum to 1, the fewest likeliest ones whose sum reaches `top_p` (1: all), at least one.
    What is left is scaled to sum to 1. Of equally likely tokens the lower id goes first.
    """
    # float64: the smallest temperature must not overflow, nor a sum over a large vocabulary end below top_p
    logits, order = logits.double().sort(dim=-1, descending=True, stable=True)
    chances = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    chances[:, top_k or logits.shape[-1] :] = 0
    chances /= chances.sum(dim=-1, keepdim=True)
    if top_p < 1:
        before = chances.cumsum(dim=-1) - chances  # of all likelier tokens together
        before[:, 0] = -1
        chances[before >= top_p] = 0
        chances /= chances.sum(dim=-1, keepdim=True)
    return torch.zeros_like(chances).scatter_(-1, order, chances)
