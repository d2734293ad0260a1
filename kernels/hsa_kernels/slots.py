"""Work by chunk: which programs meet which choices, and slots that hold a choice's result until a token's are added up.

A choice is one token's slot k of K. Its result is G*D numbers, so only some tokens are under way at once: a launch takes as
many tiles of tokens as `SLOTS_BYTES` hold. Within a tile the tokens' rows stay in the L2 cache while the chunks go by.

To add up is all traffic, to fill slots for the most part waiting for products: a launch does both, and some of its programs,
evenly among the others, add up what the launch before has put into slots.

Dimensions: B batch, T tokens, J key/value heads, G heads each, D head dimension, N chunks, S chunk size, K slots.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .inverted_index import cut, invert

SEGMENT = 256  # choices that one program meets
TILE = 2048  # tokens, at least: their rows of q and of a gradient, 16 heads of 128 numbers each, fit the L2 cache of a H200
LONGEST_TILE = 32768
CHOICES = 128  # of a chunk in a tile, on average, at least: they have to be worth loading its k and v
SLOTS_BYTES = 1 << 30  # twice: those that are filled, and those that are added up

# what differs from launch to launch: a kernel is not compiled anew for numbers that 16 divides
VARYING = ("first_list", "last_list", "adding", "added_row", "first_added", "last_added")


@triton.jit
def find_segment(row_starts, segment_starts, owners, i_segment, TILES, N, J: tl.constexpr, SIZE: tl.constexpr):
    """Where a segment's choices begin and how many they are; its chunk, head and batch entry."""
    i_list = tl.load(owners + i_segment)
    first = tl.load(row_starts + i_list) + (i_segment - tl.load(segment_starts + i_list)) * SIZE
    count = tl.minimum(tl.load(row_starts + i_list + 1) - first, SIZE).to(tl.int32)
    return first, count, i_list % N, i_list // N % J, i_list // N // J // TILES


@triton.jit
def share_out(i, programs, adding):
    """Whether program i adds up, as `adding` of them do, evenly among all; its number among these, or among the others."""
    i = i.to(tl.int64)
    before = i * adding // programs
    adds = (i + 1) * adding // programs > before
    return adds, tl.where(adds, before, i - before)


@triton.jit
def add_up(
    i_part, places, starts, slots, out, scale, first_row, first_list, last_list, GD: tl.constexpr, K: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """`BD` columns of what the slots of one token and head hold, in order, those alone that name a chunk."""
    PARTS: tl.constexpr = (GD + BD - 1) // BD
    BK: tl.constexpr = 16  # slots on their way at once
    i_row, o_d = first_row + i_part // PARTS, i_part % PARTS * BD + tl.arange(0, BD)
    first, last = tl.load(starts + first_list), tl.load(starts + last_list)
    b_out = tl.zeros([BD], tl.float32)
    for slot in range(0, K, BK):
        o_k = slot + tl.arange(0, BK)
        b_place = tl.load(places + i_row * K + o_k, mask=o_k < K, other=last)
        mask = (b_place < last)[:, None] & (o_d < GD)[None, :]
        b_slots = tl.load(slots + (b_place - first)[:, None] * GD + o_d[None, :], mask=mask, other=0.0)  # [BK, BD]
        b_out += tl.sum(b_slots.to(tl.float32), 0)
    tl.store(out + i_row * GD + o_d, (b_out * scale).to(out.dtype.element_ty), mask=o_d < GD)


class Launch(NamedTuple):
    """`grid` programs: tiles `first` to `last` (counted through the batch) fill slots, those of the launch before are added up.

    arguments: the slots to fill, the list that begins the first tile and the one behind the last; how many programs add up, the
    slots they read, their first row, and the same two lists.
    """

    first: int
    last: int
    grid: tuple[int]
    arguments: tuple


class Choices:
    """All choices, sorted by tile of tokens and chunk, and the launches that work through them.

    rows int32 [E]: which row of [B*T*J] made a choice; weights fp32 [E]: its weight; places int64 [E]: where the choice of a slot
    stands among them; slots: room for the results of two launches; arguments and constants: what a kernel needs of all this.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> None:
        B, T, J, K = indices.shape
        N, S, D = k.shape[1], k.shape[2], q.shape[3]
        self.B, self.T, self.J, self.K, self.N, self.GD = B, T, J, K, N, q.shape[2] // J * D
        self.tile = min(max(TILE, triton.next_power_of_2(CHOICES * N // K)), LONGEST_TILE, T)
        self.tiles = triton.cdiv(T, self.tile)
        index = invert(indices, N, self.tile)
        self.starts, self.places, self.segments = index.starts, index.places, cut(index, SEGMENT)
        self.rows, self.weights = (index.entries // K).int(), weights.flatten()[index.entries]
        choices = self.tile * J * K
        self.segments_of_tile = min(J * N, choices) + choices // SEGMENT
        room = max(choices * self.GD * q.element_size(), self.segments_of_tile * 2 * S * D * 4)  # of slots; of dk and dv
        self.together = min(max(SLOTS_BYTES // room, 1), B * self.tiles)
        buffers = 1 if self.together == B * self.tiles else 2
        self.slots = q.new_empty(buffers, min(self.together * choices, B * T * J * K) * self.GD)
        self.arguments = (self.rows, self.weights, self.places, self.starts, *self.segments, self.tiles, N)
        self.constants = dict(SIZE=SEGMENT, K=K, BD=min(1024, triton.next_power_of_2(self.GD)))

    def _row(self, tile: int) -> int:
        """The first row of [B*T*J] in a tile."""
        return (tile // self.tiles * self.T + tile % self.tiles * self.tile) * self.J

    def __iter__(self) -> Iterator[Launch]:
        adding, tiles = (0, 0, 0, 0), self.B * self.tiles
        for i, first in enumerate(range(0, tiles + self.together, self.together)):  # the last launch only adds up
            first, last = min(first, tiles), min(first + self.together, tiles)
            lists, rows = (first * self.J * self.N, last * self.J * self.N), (self._row(first), self._row(last))
            grid = ((last - first) * self.segments_of_tile + adding[0],)
            filled, added = (self.slots[j % len(self.slots)] for j in (i, i - 1))
            yield Launch(first, last, grid, (filled, *lists, adding[0], added, *adding[1:]))
            adding = ((rows[1] - rows[0]) * triton.cdiv(self.GD, self.constants["BD"]), rows[0], *lists)
