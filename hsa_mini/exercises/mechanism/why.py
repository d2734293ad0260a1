"""The exercises of notebook 01: the reach of a window, and where HSA begins to pay off.

Dimensions: T tokens, D numbers per head.
"""

import math
from functools import partial
from itertools import count

import torch

from hsa_mini.exercises.check import Check, normal

check_layers_needed = Check(
    name="layers_needed",
    answer=lambda distance, window: math.ceil(distance / (window - 1)),
    examples=((8, 4), (6, 4), (1, 2), (7, 8), (1000, 128)),
    usual_mistakes={
        "the token itself is one of its W tokens. How far back does one layer reach?": (
            lambda distance, window: math.ceil(distance / window)
        ),
        "you rounded down, so the last layer is missing. Round up.": (
            lambda distance, window: distance // (window - 1)
        ),
        "this is one layer too many where the distance is a multiple of the reach.": (
            lambda distance, window: distance // (window - 1) + 1
        ),
        "a model has a whole number of layers. Round up.": (
            lambda distance, window: distance / (window - 1)
        ),
    },
)


def _is_cheaper(T: int, S: int, K: int, H: int, D: int, R: int, score: bool, blend: bool) -> bool:
    K = min(K, T // S)
    hsa = score * 2 * R * (T // S) + 4 * K * S * H * D + blend * 2 * K * H * D
    return hsa < 4 * T * H * D


def _first_gain(S, K, H, D, R, *, step=None, score=True, blend=True) -> int:
    step = step or S
    return next(T for T in count(step, step) if _is_cheaper(T, S, K, H, D, R, score, blend))


check_first_gain = Check(
    name="first_gain",
    answer=_first_gain,
    examples=((4, 2, 1, 8, 8), (4, 64, 1, 8, 8), (16, 4, 2, 64, 256), (64, 64, 16, 128, 128)),
    usual_mistakes={
        "at K·S tokens HSA reads every token, and scores and blend cost FLOP too.": (
            lambda S, K, H, D, R: K * S
        ),
        "count in whole chunks: the text grows by S tokens at a time.": partial(
            _first_gain, step=1
        ),
        "return the length in tokens, not in chunks.": lambda S, *sizes: (
            _first_gain(S, *sizes) // S
        ),
        "you left out the FLOP of scores and blend.": partial(
            _first_gain, score=False, blend=False
        ),
    },
)


def _window_attention(q, k, v, window, *, scale=None, dim=-1, future=0, masked=-torch.inf):
    """`future`: tokens of the future that are read; negative: the newest ones that are not."""
    T, D = q.shape
    distance = torch.arange(T)[:, None] - torch.arange(T)  # [T, T]: how far back the key lies
    near = (distance >= -future) & (distance < window)
    scores = q @ k.T * (D**-0.5 if scale is None else scale)
    return scores.masked_fill(~near, masked).softmax(dim) @ v


def _removed_after_softmax(q, k, v, window):
    shares = (q @ k.T * q.shape[1] ** -0.5).softmax(-1)
    near = torch.ones_like(shares, dtype=torch.bool).tril().triu(1 - window)
    return shares.masked_fill(~near, 0.0) @ v


check_window_attention = Check(
    name="window_attention",
    answer=_window_attention,
    examples=tuple(
        (*(normal(T, 4, seed=seed) for seed in range(3)), window)
        for T, window in ((5, 2), (9, 4), (6, 6))
    ),
    usual_mistakes={
        "tokens see their future. A token may read its own key and earlier ones only.": partial(
            _window_attention, future=100
        ),
        "the window has no edge: all earlier keys are read.": (
            lambda q, k, v, window: _window_attention(q, k, v, len(q))
        ),
        "the window is one token too wide: the token's own key is one of the W keys.": (
            lambda q, k, v, window: _window_attention(q, k, v, window + 1)
        ),
        "the window is one token too narrow: token t - W + 1 is the farthest one.": (
            lambda q, k, v, window: _window_attention(q, k, v, window - 1)
        ),
        "the scale is missing: divide the scores by the square root of D.": partial(
            _window_attention, scale=1.0
        ),
        "divide the scores by the square root of D, not by D.": (
            lambda q, k, v, window: _window_attention(q, k, v, window, scale=1 / q.shape[1])
        ),
        "softmax over the wrong axis. A row of the scores belongs to one query: `dim=-1`.": partial(
            _window_attention, dim=0
        ),
        "a score of 0 still gets a share. Hide a key with a score of -inf.": partial(
            _window_attention, masked=0.0
        ),
        "you removed shares after the softmax, so the rest no longer adds up to 1. Hide the scores "
        "before it, with -inf.": _removed_after_softmax,
    },
)
