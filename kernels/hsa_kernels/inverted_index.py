"""Which tokens chose a chunk: the choice turned around, so that the backward pass is linear in T*K.

Dimensions: B batch, T tokens, J key/value heads, N chunks, K slots, E = B*T*J*K entries, P = B * ceil(T/tile) tiles of tokens.
"""

from typing import NamedTuple

import torch


class InvertedIndex(NamedTuple):
    """One list for every chunk and tile: list (p*J + j)*N + n is chunk n of head j, as the tokens of tile p chose it.

    entries int64 [E]: ((b*T + t)*J + j)*K + slot, by list, then by token; empty slots last. starts int64 [P*J*N + 1]: where a
    list begins.
    """

    entries: torch.Tensor
    starts: torch.Tensor


def invert(indices: torch.Tensor, chunks: int, tile: int | None = None) -> InvertedIndex:
    """indices int32 [B, T, J, K]; slots that name none of the `chunks` belong to no list. Sorted, so always the same.

    tile: tokens whose choices are listed together, in front of those of later tokens; all of a batch entry if None.
    """
    B, T, J, _ = indices.shape
    tile = tile or max(T, 1)
    tiles = -(-T // tile)
    lists = B * tiles * J * chunks
    count = dict(device=indices.device, dtype=torch.int32 if lists < 2**31 - 1 else torch.int64)
    tile_of = torch.arange(B, **count)[:, None] * tiles + torch.arange(T, **count) // tile  # [B, T]
    first = (
        tile_of[:, :, None, None] * J + torch.arange(J, **count)[:, None]
    ) * chunks  # [B, T, J, 1]
    keys = torch.where((indices >= 0) & (indices < chunks), first + indices, lists)
    numbers = torch.arange(lists + 1, **count)
    if lists < 2**16:  # as narrow as they fit: sorting takes a pass for every 8 bits
        keys, numbers = ((x - 2**15).short() for x in (keys, numbers))
    keys, entries = keys.flatten().sort(stable=True)
    return InvertedIndex(entries, torch.searchsorted(keys, numbers))


class Segments(NamedTuple):
    """Lists cut into pieces of bounded length.

    starts [lists + 1]: `InvertedIndex.starts` counted in segments. owners [a bound of their number, which need not ask the
    GPU]: the list of a segment.
    """

    starts: torch.Tensor
    owners: torch.Tensor


def cut(index: InvertedIndex, size: int) -> Segments:
    """Segments of at most `size` entries."""
    starts = torch.nn.functional.pad(((index.starts.diff() + size - 1) // size).cumsum(0), (1, 0))
    most = min(len(index.starts) - 1, len(index.entries)) + len(index.entries) // size
    return Segments(
        starts, torch.searchsorted(starts, torch.arange(most, device=starts.device), right=True) - 1
    )
