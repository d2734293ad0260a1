"""Which tokens chose a chunk: the choice turned around, so that the backward pass is linear in T*K.

Dimensions: B batch, T tokens, J key/value heads, N chunks, K slots, E = B*T*J*K entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class InvertedIndex(NamedTuple):
    """Compressed rows: row (b*J + j)*N + n is chunk n of batch entry b and head j.

    entries [E]: ((b*T + t)*J + j)*K + slot, by row, then by token. starts [B*J*N + 1]: where a row begins.
    """

    entries: torch.Tensor
    starts: torch.Tensor


def invert(indices: torch.Tensor, chunks: int) -> InvertedIndex:
    """indices int32 [B, T, J, K]; slots that name none of the `chunks` belong to no row. Sorted, so always the same."""
    B, _, J, _ = indices.shape
    rows = B * J * chunks
    wide = torch.int32 if rows < 2**31 - 1 else torch.int64
    heads = torch.arange(B * J, device=indices.device, dtype=wide).view(B, 1, J, 1)
    keys = torch.where((indices >= 0) & (indices < chunks), heads * chunks + indices, rows)
    keys, entries = keys.flatten().sort(stable=True)
    return InvertedIndex(entries, torch.searchsorted(keys, torch.arange(rows + 1, device=indices.device, dtype=wide)))


def cut(index: InvertedIndex, size: int) -> tuple[torch.Tensor, int]:
    """`starts` counted in segments of at most `size` entries, and a bound of their number that need not ask the GPU."""
    segments = torch.nn.functional.pad(((index.starts.diff() + size - 1) // size).cumsum(0), (1, 0))
    return segments, len(index.starts) - 1 + len(index.entries) // size


@triton.jit
def find_row(starts, rows, x):
    """The row whose part of [starts[0], starts[rows]) holds x; `rows` if none does."""
    low, high = tl.zeros([], tl.int32), rows + 1  # the last row that starts at or before x is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= x:
            low = middle
        else:
            high = middle
    return low
