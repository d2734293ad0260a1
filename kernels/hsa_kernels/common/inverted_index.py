"""The inverted index: for every chunk, the list of tokens that chose it. It makes the backward pass
linear in T*K.

Example: four tokens, one head, K = 2, three chunks, one tile of tokens.

    indices           entries by list              starts
    token 0:  0  2    chunk 0: entries 0 5         0
    token 1:  1 -1    chunk 1: entries 2 7         2
    token 2:  2  0    chunk 2: entries 1 4 6       4
    token 3:  2  1    (empty)  entry   3           7

An entry is the position of a choice in the flattened `indices`: token * K + slot.

Dimensions: B batch, T tokens, J key/value heads, N chunks, K chunks kept per token, E = B*T*J*K
entries, P = B * ceil(T/tile) tiles of tokens.
"""

from typing import NamedTuple

import torch


class InvertedIndex(NamedTuple):
    """One list per tile of tokens, head and chunk. List (p*J + j)*N + n holds the tokens of tile p
    whose head j chose chunk n.

    entries int64 [E]: ((b*T + t)*J + j)*K + slot, sorted by list, then by token; empty slots come
    last. starts int64 [P*J*N + 1]: where each list begins in `entries`.
    """

    entries: torch.Tensor
    starts: torch.Tensor


def invert(indices: torch.Tensor, chunks: int, tile: int | None = None) -> InvertedIndex:
    """indices int32 [B, T, J, K] -> their index. Slots that name none of the `chunks` belong to no
    list.

    tile: how many neighbouring tokens share one set of lists; None puts all tokens of a batch entry
    into one tile. The sort is stable, so the result is the same from run to run.
    """
    B, T, J, _ = indices.shape
    tile = tile or max(T, 1)
    tiles = -(-T // tile)
    lists = B * tiles * J * chunks
    count = dict(device=indices.device, dtype=torch.int32 if lists < 2**31 - 1 else torch.int64)
    # [B, T]: which tile a token belongs to
    tile_of = torch.arange(B, **count)[:, None] * tiles + torch.arange(T, **count) // tile
    # [B, T, J, 1]: the list of chunk 0
    first = (tile_of[:, :, None, None] * J + torch.arange(J, **count)[:, None]) * chunks
    # [B, T, J, K]
    keys = torch.where((indices >= 0) & (indices < chunks), first + indices, lists)
    numbers = torch.arange(lists + 1, **count)
    if lists < 2**16:  # 16-bit keys where they fit, because sorting takes one pass per 8 bits
        keys = (keys - 2**15).short()
        numbers = (numbers - 2**15).short()
    keys, entries = keys.flatten().sort(stable=True)
    return InvertedIndex(entries, torch.searchsorted(keys, numbers))


class Segments(NamedTuple):
    """The lists of an index, cut into segments of bounded length; one program works on one segment.

        list 0           list 1     list 2                    segments of at most 3 entries
        [a b c|d e]      []         [f g h|i j k|l]           starts = [0, 2, 2, 5]
         0     1                     2     3     4            owners = [0, 0, 2, 2, 2, ...]

    starts [lists + 1]: the first segment of each list. owners: the list of each segment; its length
    is an upper bound of the number of segments that is known without reading from the GPU.
    """

    starts: torch.Tensor
    owners: torch.Tensor


def cut(index: InvertedIndex, size: int) -> Segments:
    """Cut the lists into segments of at most `size` entries."""
    starts = torch.nn.functional.pad(((index.starts.diff() + size - 1) // size).cumsum(0), (1, 0))
    bound = min(len(index.starts) - 1, len(index.entries)) + len(index.entries) // size
    numbers = torch.arange(bound, device=starts.device)
    return Segments(starts, torch.searchsorted(starts, numbers, right=True) - 1)
