"""Choosing the next token from the logits: greedy, or sampled with temperature, top-k and top-p.

Dimensions: B batch.
"""

import math
from dataclasses import dataclass

import torch

from hsa_mini.checks import quoted


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The options of `generate`, `stream` and `continue_from`. Raises ValueError for an option out
    of range.

    max_new_tokens: generation ends there at the latest. temperature, top_k, top_p: see
    `probabilities`; temperature 0 takes the likeliest token. seed: of a generator for
    these draws alone. stop: ids of tokens that end a sequence. A sequence that has ended
    repeats its stop token, and reads it, until all have ended or `max_new_tokens` are made.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole_numbers = (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("top_k", self.top_k or 0, 0),
            ("seed", self.seed, 0),
        )
        for name, value, least in whole_numbers:
            if not isinstance(value, int) or not least <= value < 1 << 63:
                raise ValueError(
                    f"{name}: got {quoted(value)}, "
                    f"accepted is an integer of at least {least}, below 2**63"
                )
        if not 0 <= self.temperature < math.inf:  # NaN fails this test too
            raise ValueError(f"temperature: got {self.temperature}, accepted is 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, accepted is 0 to 1")
        is_tuple = isinstance(self.stop, tuple)
        if not is_tuple or not all(isinstance(token, int) for token in self.stop):
            raise ValueError(f"stop: got {quoted(self.stop)}, accepted is a tuple of token ids")


def choose(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> torch.Tensor:
    """logits [B, vocabulary] -> the next token [B, 1]: the likeliest one at temperature 0, else a
    draw.
    """
    if decoding.temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    chances = probabilities(
        logits, temperature=decoding.temperature, top_k=decoding.top_k, top_p=decoding.top_p
    )
    return torch.multinomial(chances, 1, generator=generator)


def probabilities(
    logits: torch.Tensor, *, temperature: float, top_k: int | None = None, top_p: float = 1.0
) -> torch.Tensor:
    """logits [B, vocabulary] -> the chance of each token to be drawn, float64 [B, vocabulary].

    1. The softmax of logits / temperature (above 0).
    2. Only the `top_k` likeliest tokens stay (0 or None: all), scaled to sum to 1.
    3. Tokens are then kept from the likeliest on until their sum reaches `top_p` (1: all), at least
       one; their chances are scaled again.

    Among equally likely tokens the lower id comes first.
    """
    # float64: the smallest temperature must not overflow, and a sum over a large vocabulary must
    # not end below top_p.
    logits, order = logits.double().sort(dim=-1, descending=True, stable=True)
    chances = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    chances[:, top_k or logits.shape[-1] :] = 0
    chances /= chances.sum(dim=-1, keepdim=True)
    if top_p < 1:
        likelier = chances.cumsum(dim=-1) - chances  # the sum of all likelier tokens
        likelier[:, 0] = -1
        chances[likelier >= top_p] = 0
        chances /= chances.sum(dim=-1, keepdim=True)
    return torch.zeros_like(chances).scatter_(-1, order, chances)
