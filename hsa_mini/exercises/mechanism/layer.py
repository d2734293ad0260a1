"""The exercises of notebook 05: order inside a chunk, the reach of a model, and RoPE by distance.

Dimensions: N chunks, S tokens per chunk, D numbers per head.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal

_ORDER = [2, 0, 3, 1]

check_shuffle_tokens = Check(
    name="shuffle_tokens",
    answer=lambda k, v, order: (k[:, order], v[:, order]),
    examples=(
        (normal(4, 4, 3), normal(4, 4, 3, seed=1), _ORDER),
        (normal(5, 4, 2), normal(5, 4, 2, seed=1), [3, 2, 1, 0]),
    ),
    usual_mistakes={
        "you moved whole chunks. Permute the tokens inside each chunk: the second axis.": (
            lambda k, v, order: (k[order], v[order])
        ),
        "the values did not move. A key and its value belong to one token and move together.": (
            lambda k, v, order: (k[:, order], v)
        ),
        "the keys did not move. A key and its value belong to one token and move together.": (
            lambda k, v, order: (k, v[:, order])
        ),
        "this is the inverse permutation: place i must hold token order[i].": (
            lambda k, v, order: tuple(x[:, [order.index(i) for i in range(4)]] for x in (k, v))
        ),
    },
)


def _reach(lower_layers, upper_layers, window, *, lower=1, upper=1, own=1, more=0):
    return (lower * lower_layers + upper * upper_layers) * (window - own) + more


check_reach = Check(
    name="reach",
    answer=_reach,
    examples=((2, 2, 128), (3, 5, 16), (14, 14, 4096)),
    usual_mistakes={
        "the token itself is one of the W tokens: one layer reaches W - 1 tokens back.": partial(
            _reach, own=0
        ),
        "the layers of the lower decoder have windows too.": partial(_reach, lower=0),
        "the layers of the upper decoder have windows too.": partial(_reach, upper=0),
        "a stack reaches further than one layer: each layer adds W - 1 tokens.": (
            lambda lower_layers, upper_layers, window: window - 1
        ),
        "count how far back the model sees. The token itself is at distance 0.": partial(
            _reach, more=1
        ),
    },
)


def _score(q, k, distance, base, *, factor=2, neighbours=False):
    D = len(q)
    theta = base ** (-factor * torch.arange(D // 2, dtype=q.dtype) / D)
    (q_0, q_1), (k_0, k_1) = (
        x.unflatten(0, (-1, 2)).T if neighbours else x.chunk(2) for x in (q, k)
    )
    cos = (distance * theta).cos()
    sin = (distance * theta).sin()
    return ((q_0 * k_0 + q_1 * k_1) * cos + (q_0 * k_1 - q_1 * k_0) * sin).sum()


check_score_at_distance = Check(
    name="score_at_distance",
    answer=_score,
    examples=tuple(
        (normal(D, seed=1), normal(D, seed=2), distance, base)
        for D, distance, base in ((4, 3, 100.0), (8, 0, 1e4), (16, 1000, 1e4))
    ),
    usual_mistakes={
        "the key stands after the query. The query is `distance` tokens later than the key.": (
            lambda q, k, distance, base: _score(q, k, -distance, base)
        ),
        "this is the plain dot product. It has no position.": lambda q, k, distance, base: q @ k,
        "pair p is made of numbers p and p + D/2, not of neighbours.": partial(
            _score, neighbours=True
        ),
        "the angle of pair p is distance · base ** (-2p/D).": partial(_score, factor=1),
        "the sine is missing: the angle between the two pairs before the turn counts too.": (
            lambda q, k, distance, base: (
                (_score(q, k, distance, base) + _score(q, k, -distance, base)) / 2
            )
        ),
    },
)
