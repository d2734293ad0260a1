"""The exercises of notebook 09: which chunks change, what the caches need, and a rolling cache.

Dimensions: S tokens per chunk, W window, L blocks of the lower decoder, U of the upper one, D
numbers per token.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal


def _changed(i, S, W, L, *, own=1, first=None):
    start = i if first is None else max(i + first * L * (W - 1), 0)
    return start // S, (i + L * (W - own)) // S


check_changed_chunks = Check(
    name="changed_chunks",
    answer=_changed,
    examples=((0, 4, 4, 2), (17, 4, 4, 2), (50, 4, 5, 3), (130, 64, 128, 2), (7, 4, 1, 2)),
    usual_mistakes={
        "one block carries a change W - 1 tokens further, because the token itself is one of the W "
        "tokens.": partial(_changed, own=0),
        "the change goes further than the token's own chunk: later windows hold this token.": (
            lambda i, S, W, L: (i // S, i // S)
        ),
        "a stack reaches further than one block: each of the L blocks adds W - 1 tokens.": (
            lambda i, S, W, L: _changed(i, S, W, 1)
        ),
        "no token sees its future, so nothing changes in front of token i.": partial(
            _changed, first=-1
        ),
        "return the number of the last chunk itself, not the number after it.": (
            lambda i, S, W, L: (i // S, _changed(i, S, W, L)[1] + 1)
        ),
        "these are tokens. Token t lies in chunk t // S.": lambda i, S, W, L: (i, i + L * (W - 1)),
    },
)

check_tail_for_caches = Check(
    name="tail_for_caches",
    answer=lambda U, W: U * (W - 1),
    examples=((4, 4), (1, 8), (3, 128), (14, 4096)),
    usual_mistakes={
        "this is what the last logits need. The oldest token in a cache is W - 1 tokens old, and "
        "its key depends on one block less.": lambda U, W: U * (W - 1) + 1,
        "a cache holds W - 1 tokens for the next token, not W. Each block adds W - 1.": (
            lambda U, W: U * W
        ),
        "these are the tokens in one cache. Their keys depend on tokens further back.": (
            lambda U, W: W - 1
        ),
        "the top block's own cache reaches W - 1 tokens back as well.": (
            lambda U, W: (U - 1) * (W - 1)
        ),
        "the key is made from the input of the block, which has passed through U - 1 blocks.": (
            lambda U, W: (U + 1) * (W - 1)
        ),
    },
)


def _in_order(cache, position, *, kept=-1, shift=0):
    W = len(cache)
    tokens = range(max(position - W - kept, 0), position)
    return cache[[(p + shift) % W for p in tokens]]


def _cache(W: int, position: int) -> torch.Tensor:
    """A rolling cache [W, 3] after `position` tokens."""
    tokens = normal(position, 3, seed=W)
    cache = torch.zeros(W, 3, dtype=tokens.dtype)
    for p, token in enumerate(tokens):
        cache[p % W] = token
    return cache


check_oldest_first = Check(
    name="oldest_first",
    answer=_in_order,
    examples=tuple((_cache(W, p), p) for W, p in ((4, 3), (4, 6), (4, 2), (5, 15), (3, 10))),
    usual_mistakes={
        "the slots lie in another order than the tokens: position p is in slot p % W.": (
            lambda cache, position: cache[: min(position, len(cache) - 1)]
        ),
        "one token too many: the next token takes the slot of the oldest one, and sees W - 1 "
        "others.": partial(_in_order, kept=0),
        "a slot that no token has filled yet is returned too. Only `position` tokens were read.": (
            lambda cache, position: cache[
                [p % len(cache) for p in range(position - len(cache) + 1, position)]
            ]
        ),
        "the newest token comes first. The order of time is oldest first.": (
            lambda cache, position: _in_order(cache, position).flip(0)
        ),
        "positions are counted from 0: the newest token is `position` - 1.": partial(
            _in_order, shift=1
        ),
    },
)
