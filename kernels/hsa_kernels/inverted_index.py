"""Which tokens chose a chunk: the choice turned around, so that the backward pass is linear in T*K.

Dimensions: B batch, T tokens, J key/value heads, N chunks, K slots, E = B*T*J*K entries, P = B * ceil(T/tile) tiles of tokens.
"""

from typing import NamedTuple

import torch


class InvertedIndex(NamedTuple):
    """Compressed rows: row (p*J + j)*N + n is chunk n of head j, as the tokens of tile p chose it.

    entries [E]: ((b*T + t)*J + j)*K + slot, by row, then by token. starts [P*J*N + 1]: where a row begins.
    """

    entries: torch.Tensor
    starts: torch.Tensor


def invert(indices: torch.Tensor, chunks: int, tile: int | None = None) -> InvertedIndex:
    """indices int32 [B, T, J, K]; slots that name none of the `chunks` belong to no row. Sorted, so always the same.

    tile: tokens whose choices are listed together, in front of those of later tokens; all of a batch entry if None.
    """
    B, T, J, _ = indices.shape
    tile = tile or max(T, 1)
    tiles = -(-T // tile)
    rows = B * tiles * J * chunks
    wide = torch.int32 if rows < 2**31 - 1 else torch.int64
    count = dict(device=indices.device, dtype=wide)
    tile_of = torch.arange(B, **count)[:, None] * tiles + torch.arange(T, **count) // tile  # [B, T]
    first = (tile_of[:, :, None, None] * J + torch.arange(J, **count)[:, None]) * chunks  # [B, T, J, 1]
    keys = torch.where((indices >= 0) & (indices < chunks), first + indices, rows)
    keys, entries = keys.flatten().sort(stable=True)
    return InvertedIndex(entries, torch.searchsorted(keys, torch.arange(rows + 1, **count)))


class Segments(NamedTuple):
    """Rows cut into pieces of bounded length.

    starts [rows + 1]: `InvertedIndex.starts` counted in segments. owners [a bound of their number, which need not ask the
    GPU]: the row of a segment.
    """

    starts: torch.Tensor
    owners: torch.Tensor


def cut(index: InvertedIndex, size: int) -> Segments:
    """Segments of at most `size` entries."""
    starts = torch.nn.functional.pad(((index.starts.diff() + size - 1) // size).cumsum(0), (1, 0))
    most = len(index.starts) - 1 + len(index.entries) // size
    return Segments(starts, torch.searchsorted(starts, torch.arange(most, device=starts.device), right=True) - 1)
