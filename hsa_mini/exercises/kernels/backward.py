"""The exercises of notebook 07: through a softmax, programs of segments, and an inverted index.

Dimensions: E entries of a chunk's list, S tokens per chunk, T tokens, K kept chunks.
"""

import math
from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal


def _through(p, dp, *, dim=1):
    return p * (dp - (p * dp).sum(dim, keepdim=True))


check_softmax_backward = Check(
    name="softmax_backward",
    answer=_through,
    examples=tuple(
        (normal(E, S, seed=1).softmax(1), normal(E, S)) for E, S in ((1, 4), (5, 4), (4, 4))
    ),
    usual_mistakes={
        "the other shares shrink when one grows. Subtract delta, the mean of dp weighted by p.": (
            lambda p, dp: p * dp
        ),
        "delta is the mean weighted by p, not the plain mean.": (
            lambda p, dp: p * (dp - dp.mean(1, keepdim=True))
        ),
        "delta is subtracted from dp, before the product with p.": (
            lambda p, dp: p * dp - (p * dp).sum(1, keepdim=True)
        ),
        "the factor p in front is missing.": lambda p, dp: dp - (p * dp).sum(1, keepdim=True),
        "delta is a sum over the wrong axis. Each entry has a softmax of its own: `dim=1`.": (
            partial(_through, dim=0)
        ),
        "delta is a sum over all entries. Each entry has its own.": (
            lambda p, dp: p * (dp - (p * dp).sum())
        ),
    },
)

check_count_programs = Check(
    name="count_programs",
    answer=lambda lengths, size: sum(math.ceil(length / size) for length in lengths),
    examples=(([8, 4, 0], 4), ([5, 1, 0, 9], 4), ([3, 3, 3], 2), ([7], 10)),
    usual_mistakes={
        "the last piece of a list may be shorter, and it needs a program too. Round up.": (
            lambda lengths, size: sum(length // size for length in lengths)
        ),
        "a program works on one chunk. Cut each list by itself, not all lists together.": (
            lambda lengths, size: math.ceil(sum(lengths) / size)
        ),
        "a chunk that no token kept needs no program.": (
            lambda lengths, size: sum(max(math.ceil(length / size), 1) for length in lengths)
        ),
        "this is one program too many where a list is a multiple of the size.": (
            lambda lengths, size: sum(length // size + 1 for length in lengths)
        ),
        "this is the number of chunks. A long list needs several programs.": (
            lambda lengths, size: len(lengths)
        ),
    },
)


def _invert(indices, chunks, *, empty=None, newest=False):
    flat = indices.flatten()
    keys = flat.masked_fill(flat < 0, chunks) if empty is None else flat
    entries = keys.argsort(stable=True, descending=newest)
    lengths = torch.bincount(flat[flat >= 0], minlength=chunks)
    return entries, torch.cat((lengths.new_zeros(1), lengths)).cumsum(0)


def _tokens(indices, chunks):
    entries, starts = _invert(indices, chunks)
    return entries // indices.shape[1], starts


_CHOICE = torch.tensor([[-1, -1], [0, -1], [1, 0], [0, 1], [2, 0], [2, 1]])

check_invert = Check(
    name="invert_by_sorting",
    answer=_invert,
    examples=(
        (_CHOICE[1:], 3),
        (_CHOICE, 4),
        (torch.tensor([[-1, -1, -1], [0, -1, -1], [1, 0, -1], [2, 0, 1], [4, 2, 1]]), 6),
    ),
    usual_mistakes={
        "-1 is below every chunk, so the empty slots came first. Sort them by the key `chunks`.": (
            partial(_invert, empty=-1)
        ),
        "an entry is t·K + slot. You returned the numbers of tokens.": _tokens,
        "`starts` needs one number more. The first list starts at 0.": lambda indices, chunks: (
            _invert(indices, chunks)[0],
            _invert(indices, chunks)[1][1:],
        ),
        "`starts` holds the lengths of the lists. Add them up with `cumsum`.": (
            lambda indices, chunks: (
                _invert(indices, chunks)[0],
                _invert(indices, chunks)[1].diff(prepend=torch.zeros(1, dtype=torch.int64)),
            )
        ),
        "the lists stand from the last chunk to the first.": partial(_invert, newest=True),
    },
)
