"""sampling: TODO."""

import math
from dataclasses import dataclass

import torch


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
        whole = (
            ("max_new_tokens", self.max_new_tokens, 1),
            ("top_k", self.top_k or 0, 0),
            ("seed", self.seed, 0),
        )
        for name, value, least in whole:
            if not isinstance(value, int) or not least <= value < 1 << 63:
                raise ValueError(
                    f"{name}: got {value!r}, accepted is an integer of at least {least}, below 2**63"
                )
        if not 0 <= self.temperature < math.inf:  # nan is neither
            raise ValueError(f"temperature: got {self.temperature}, accepted is 0 (greedy) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: got {self.top_p}, accepted is 0 to 1")
        if not isinstance(self.stop, tuple) or not all(
            isinstance(token, int) for token in self.stop
        ):
            raise ValueError(f"stop: got {self.stop!r}, accepted is a tuple of token ids")


def choose(logits: torch.Tensor, decoding: Decoding, generator: torch.Generator) -> torch.Tensor:
    """logits [B, vocabulary] -> the next token [B, 1]: the likeliest at temperature 0, else a draw."""
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
