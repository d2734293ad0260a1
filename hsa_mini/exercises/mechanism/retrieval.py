"""The exercises of notebook 03: what the window leaves to retrieval, shared choices, and Eq. (1).

Dimensions: T tokens, N chunks, R numbers of a landmark.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal


def _visible_outside(T, N, chunk_size, window, *, complete=True, outside=True, shift=0):
    t = torch.arange(T)[:, None]
    i = torch.arange(N)
    visible = torch.ones(T, N, dtype=torch.bool)
    if complete:
        visible &= (i + 1) * chunk_size <= t
    if outside:
        visible &= i * chunk_size <= t - window + shift
    return visible


check_visible_outside = Check(
    name="visible_outside",
    answer=_visible_outside,
    examples=((12, 3, 4, 8), (12, 3, 4, 5), (20, 5, 4, 0), (30, 9, 3, 12)),
    usual_mistakes={
        "chunks that are not complete are visible, so a token may see its future. Both conditions "
        "must hold.": partial(_visible_outside, complete=False),
        "the window changes nothing. A chunk must also begin at token t - W or before.": partial(
            _visible_outside, outside=False
        ),
        "a chunk that begins exactly at token t - W is visible too: use `<=`.": partial(
            _visible_outside, shift=-1
        ),
        "you ask whether the whole chunk lies before the window. It is enough that it begins at "
        "token t - W or before.": (
            lambda T, N, chunk_size, window: (
                (torch.arange(N) + 1) * chunk_size <= torch.arange(T)[:, None] - window
            )
        ),
    },
)

check_deciding_token = Check(
    name="deciding_token",
    answer=lambda t, block: t // block * block,
    examples=((11, 4), (8, 4), (3, 1), (100, 64)),
    usual_mistakes={
        "this is the number of the block. Which token is the first one of that block?": (
            lambda t, block: t // block
        ),
        "this is the place of the token inside its block.": lambda t, block: t % block,
        "this is the last token of the block. Its query contains the future of the others.": (
            lambda t, block: t // block * block + block - 1
        ),
        "this is the first token of the next block.": lambda t, block: t // block * block + block,
        "the first token of the block decides for all of its tokens.": lambda t, block: t,
    },
)


def _weights(queries, landmarks, chunk_size, top_k, *, scale=True, own=0, dim=1, early=False):
    """own: 1 to show a token its own chunk, N to show it all. early: softmax before the choice."""
    T = len(queries)
    N = len(landmarks)
    scores = queries @ landmarks.T
    if scale:
        scores = scores / queries.shape[1] ** 0.5
    visible = (torch.arange(N) + 1 - own) * chunk_size <= torch.arange(T)[:, None]
    seen = scores.masked_fill(~visible, -torch.inf)
    kept = torch.zeros_like(visible).scatter(1, seen.topk(min(top_k, N)).indices, True) & visible
    chosen = seen if early else seen.masked_fill(~kept, -torch.inf)
    return chosen.softmax(dim).masked_fill(~kept, 0.0)


def _with_nan(*inputs):
    weights = _weights(*inputs)
    return weights.masked_fill(weights.sum(dim=1, keepdim=True) == 0, torch.nan)


check_retrieval_weights = Check(
    name="retrieval_weights",
    answer=_weights,
    examples=tuple(
        (normal(T, 6, seed=T), normal(N, 6, seed=N), chunk_size, top_k)
        for T, N, chunk_size, top_k in ((12, 3, 4, 2), (15, 7, 2, 3), (12, 3, 4, 1))
    ),
    usual_mistakes={
        "future chunks are visible. Keep only chunks that are complete before the token.": partial(
            _weights, own=100
        ),
        "a token sees its own chunk, and so its future: chunk i is visible if (i + 1)·S <= t.": (
            partial(_weights, own=1)
        ),
        "the scale is missing: divide the scores by the square root of R.": partial(
            _weights, scale=False
        ),
        "softmax over the wrong axis. The shares of one token add up to 1: `dim=1`.": partial(
            _weights, dim=0
        ),
        "the softmax runs over all visible chunks. Only the K kept chunks count.": partial(
            _weights, early=True
        ),
        "every visible chunk is kept. Keep the K best.": (
            lambda queries, landmarks, chunk_size, top_k: _weights(
                queries, landmarks, chunk_size, len(landmarks)
            )
        ),
        "a token that sees no chunk gets NaN. The softmax of -inf alone is NaN: put 0 there.": (
            _with_nan
        ),
    },
)
