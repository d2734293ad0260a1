"""The exercises of notebook 08: the worst stream, one tile fewer, and a merge of tiles.

Dimensions: N chunks, K kept chunks.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal

check_worst = Check(
    name="worst",
    answer=lambda N, K, capacity: 0 if N < capacity else 1 + (N - capacity) // (capacity - K),
    examples=((32, 8, 32), (1000, 8, 32), (20, 4, 30), (999, 5, 6), (262_144, 64, 256)),
    usual_mistakes={
        "the first choice comes when `capacity` chunks were read, not after capacity - K.": (
            lambda N, K, capacity: N // (capacity - K)
        ),
        "a choice leaves K candidates, so the next one comes capacity - K chunks later.": (
            lambda N, K, capacity: N // capacity
        ),
        "a text with fewer than `capacity` chunks needs no choice.": (
            lambda N, K, capacity: max(1 + (N - capacity) // (capacity - K), 1)
        ),
        "you forgot the first choice.": (
            lambda N, K, capacity: 0 if N < capacity else (N - capacity) // (capacity - K)
        ),
    },
)


def _misses(scores, K, tile, *, tiles=-1):
    chosen = scores.view(-1, tile).amax(1).topk(K + tiles).indices.tolist()
    return any(n // tile not in chosen for n in scores.topk(K).indices.tolist())


def _row(*tops: int) -> torch.Tensor:
    """32 scores in tiles of 4; the chunks named are the best, the first of them most of all."""
    scores = normal(32).abs() / -100
    for score, chunk in zip(range(len(tops), 0, -1), tops):
        scores[chunk] = score
    return scores


check_misses = Check(
    name="misses",
    answer=_misses,
    examples=(
        (_row(0, 4, 8), 3, 4),
        (_row(0, 1, 8), 3, 4),
        (_row(9, 30, 31, 2), 4, 4),
        (_row(9, 30, 17, 2), 4, 4),
        (_row(5, 6, 20), 3, 4),
        (_row(5, 25, 20, 21), 3, 4),
    ),
    usual_mistakes={
        "nothing is ever missed like this. Choose K - 1 tiles, and look for all K best chunks.": (
            partial(_misses, tiles=0)
        ),
        "the answer is the other way round: True means that a chunk is missed.": (
            lambda scores, K, tile: not _misses(scores, K, tile)
        ),
        "chunk n lies in tile n // tile.": (
            lambda scores, K, tile: any(
                n % tile not in scores.view(-1, tile).amax(1).topk(K - 1).indices.tolist()
                for n in scores.topk(K).indices.tolist()
            )
        ),
    },
)


def _merge(scores, chunks, tile, first, *, shift=True, largest=True, keep=True):
    K = len(scores)
    new = torch.arange(len(tile)) + (first if shift else 0)
    joined = torch.cat((scores, tile)) if keep else tile
    numbers = torch.cat((chunks, new)) if keep else new
    best = joined.topk(K, largest=largest)
    return best.values, numbers[best.indices]


_KEPT = torch.tensor([1.5, 0.2, -0.3], dtype=torch.float64)
_NUMBERS = torch.tensor([70, 66, 91])

check_merge = Check(
    name="merge",
    answer=_merge,
    examples=(
        (_KEPT, _NUMBERS, torch.tensor([0.1, 2.0, -1.0, 0.3], dtype=torch.float64), 60),
        (_KEPT, _NUMBERS, torch.tensor([-0.5, -2.0, -1.0, -0.4], dtype=torch.float64), 40),
        (normal(4).sort(descending=True).values, torch.arange(30, 34), normal(8, seed=1), 16),
    ),
    usual_mistakes={
        "a place in the tile is not yet the number of a chunk: add `first`.": partial(
            _merge, shift=False
        ),
        "these are places in the joined list. Look up which chunk stands at each place.": (
            lambda scores, chunks, tile, first: torch.cat((scores, tile)).topk(len(scores))
        ),
        "the K best so far are lost. Merge them with the tile, then choose.": partial(
            _merge, keep=False
        ),
        "you kept the lowest scores.": partial(_merge, largest=False),
        "nothing of the tile came in.": lambda scores, chunks, tile, first: (scores, chunks),
        "scores and chunks no longer belong together. Use the `indices` of topk for the chunks.": (
            lambda scores, chunks, tile, first: (
                _merge(scores, chunks, tile, first)[0],
                torch.cat((chunks, torch.arange(len(tile)) + first))[: len(scores)],
            )
        ),
    },
)
