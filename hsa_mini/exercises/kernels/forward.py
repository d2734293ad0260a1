"""The exercises of notebook 06: what a block loads, what atomic additions save, and a kernel.

Dimensions: T tokens, K kept chunks, G heads that share a chunk, D numbers per head.
"""

from functools import partial

import torch

from hsa_mini.exercises.check import Check, normal


def _merged(indices, M, *, lowest=0):
    blocks = indices.split(M)
    return sum(len(block[block >= lowest].unique()) for block in blocks)


_CHOICES = (
    torch.tensor([[-1, -1], [0, -1], [0, 1], [1, 0]]),
    torch.tensor([[0, 2], [2, 0], [1, 2], [3, 1], [0, 3], [3, 2]]),
    torch.tensor([[-1, -1, -1], [-1, 0, -1], [1, 0, -1], [0, 1, 2], [3, 2, 1]]),
)

check_merged_chunks = Check(
    name="merged_chunks",
    answer=_merged,
    examples=((_CHOICES[0], 2), (_CHOICES[1], 3), (_CHOICES[2], 2), (_CHOICES[1], 1)),
    usual_mistakes={
        "-1 is an empty slot. No program loads it.": partial(_merged, lowest=-1),
        "a chunk that two tokens of a block keep is loaded once for both.": (
            lambda indices, M: int((indices >= 0).sum())
        ),
        "a chunk that two blocks keep is loaded twice, once by each block.": (
            lambda indices, M: _merged(indices, len(indices))
        ),
        "only the first block is counted. Add up all blocks.": (
            lambda indices, M: _merged(indices[:M], M)
        ),
    },
)


def _moved(pairs, T, G, D, *, times=3, rows=1, atomic_rows=0):
    return (times * pairs + rows * T) * G * D, (3 * pairs + atomic_rows * T) * G * D


check_numbers_moved = Check(
    name="numbers_moved",
    answer=_moved,
    examples=((1000, 50, 16, 128), (10, 8, 1, 4), (64, 16, 2, 8)),
    usual_mistakes={
        "a pair moves three rows: it loads q, stores its partial result, and loads it again.": (
            partial(_moved, times=2)
        ),
        "the second round stores one row for each token.": partial(_moved, rows=0),
        "with atomic additions there is no second round that stores `out`.": partial(
            _moved, atomic_rows=1
        ),
        "a row has G·D numbers: all heads of the token.": (
            lambda pairs, T, G, D: ((3 * pairs + T) * D, 3 * pairs * D)
        ),
        "the order is: with partial results first, with atomic additions second.": (
            lambda *sizes: _moved(*sizes)[::-1]
        ),
        "an atomic addition loads q, loads the row of `out` and stores it: three rows.": (
            lambda pairs, T, G, D: ((3 * pairs + T) * G * D, 2 * pairs * G * D)
        ),
    },
)


def _rms(x, *, divide_by=None, root=True, other=0.0):
    width = 1 << (x.shape[1] - 1).bit_length()
    squares = (x * x).sum(dim=1, keepdim=True) + other * (width - x.shape[1])
    mean = squares / (divide_by or x.shape[1])
    return x / (mean.sqrt() if root else mean)


def _with_the_next_row(x):
    T, D = x.shape
    width = 1 << (D - 1).bit_length()
    behind = torch.cat((x.flatten(), x.new_full((width,), torch.nan)))
    squares = behind.square().unfold(0, width, D)[:T].sum(dim=1, keepdim=True)
    return x / (squares / D).sqrt()


check_run_norm = Check(
    name="run_norm",
    answer=_rms,
    examples=tuple(
        (normal(T, D, seed=D, dtype=torch.float32),) for T, D in ((3, 9), (5, 4), (2, 20))
    ),
    usual_mistakes={
        "you divided by the width of the tile. A row has only D numbers.": (
            lambda x: _rms(x, divide_by=1 << (x.shape[1] - 1).bit_length())
        ),
        "the root is missing: divide by the root of the mean square.": partial(_rms, root=False),
        "this is the root of the sum of squares. Divide the sum by D first.": partial(
            _rms, divide_by=1
        ),
        "beyond the row the tile must hold 0. Another number enters the sum: `other=0.0`.": partial(
            _rms, other=1.0
        ),
        "a tile is wider than a row, and reaches into the next row: the load needs a mask.": (
            _with_the_next_row
        ),
        "rows are copied and not divided.": lambda x: x,
        "all rows are those of program 0: the addresses must contain the number of the program.": (
            lambda x: _rms(x)[:1].expand_as(x)
        ),
        "every program stores to the first row: the addresses must contain its number.": (
            lambda x: torch.cat((_rms(x)[-1:], torch.full_like(x[1:], torch.nan)))
        ),
    },
)
