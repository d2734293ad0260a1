"""Work by chunk: which programs meet which choices, and slots that hold a choice's result until a token's are added up.

A choice is one token's slot k of K. Its result is G*D numbers, so only some tokens are under way at once: a launch takes as
many tiles of tokens as `SLOTS_BYTES` hold. Within a tile the tokens' rows stay in the L2 cache while the chunks go by, and
slots, which are written and read once, do not displace them.

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
CHOICES = (
    128  # of a chunk in a tile, on average, at least: they have to be worth loading its k and v
)
SLOTS_BYTES = 1 << 32


@triton.jit
def find_segment(
    row_starts, segment_starts, owners, i_segment, TILES, N, J: tl.constexpr, SIZE: tl.constexpr
):
    """Where a segment's choices begin and how many they are; its chunk, head and batch entry."""
    i_list = tl.load(owners + i_segment)
    first = tl.load(row_starts + i_list) + (i_segment - tl.load(segment_starts + i_list)) * SIZE
    count = tl.minimum(tl.load(row_starts + i_list + 1) - first, SIZE).to(tl.int32)
    return first, count, i_list % N, i_list // N % J, i_list // N // J // TILES


@triton.jit
def _sum_slots(
    places, starts, slots, out, scale, first_row, first_list, last_list,
    GD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What the slots of one token and head hold, in order, those alone that name a chunk."""
    i_row = first_row + tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    first = tl.load(starts + first_list)
    last = tl.load(starts + last_list)
    b_out = tl.zeros([BD], tl.float32)
    for slot in range(0, K, BK):
        o_k = slot + tl.arange(0, BK)
        b_place = tl.load(places + i_row * K + o_k, mask=o_k < K, other=last)
        mask = (b_place < last)[:, None] & (o_d < GD)[None, :]
        p_part = slots + (b_place - first)[:, None] * GD + o_d[None, :]
        b_part = tl.load(p_part, mask=mask, other=0.0, eviction_policy="evict_first")  # [BK, BD]
        b_out += tl.sum(b_part.to(tl.float32), 0)
    tl.store(out + i_row * GD + o_d, (b_out * scale).to(out.dtype.element_ty), mask=o_d < GD)


@triton.jit
def _arrange(
    entries, weights, rows, sorted_weights, places, E, K: tl.constexpr, BLOCK: tl.constexpr
):
    """The row and the weight of every choice, in the order of the index, and the place of every slot there."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    entry = tl.load(entries + o, mask=o < E, other=0)
    tl.store(rows + o, (entry // K).to(tl.int32), mask=o < E)
    tl.store(sorted_weights + o, tl.load(weights + entry), mask=o < E)
    tl.store(places + entry, o, mask=o < E)


class Launch(NamedTuple):
    """Tiles `first` to `last` (counted through the batch), whose lists are `lists`, in `grid` programs or fewer."""

    first: int
    last: int
    lists: tuple[int, int]
    grid: tuple[int]


class Choices:
    """All choices, sorted by tile of tokens and chunk, and the launches that work through them.

    rows int32 [E]: which row of [B*T*J] made a choice; weights fp32 [E]: its weight; places int64 [E]: where the choice of a slot
    stands among them; slots: room for the results of a launch; arguments: what a kernel needs to find its segment.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> None:
        B, T, J, K = indices.shape
        N = k.shape[1]
        S = k.shape[2]
        D = q.shape[3]
        self.B = B
        self.T = T
        self.J = J
        self.K = K
        self.N = N
        self.GD = q.shape[2] // J * D
        self.tile = min(max(TILE, triton.next_power_of_2(CHOICES * N // K)), LONGEST_TILE, T)
        self.tiles = triton.cdiv(T, self.tile)
        index = invert(indices, N, self.tile)
        self.starts = index.starts
        self.segments = cut(index, SEGMENT)
        E = len(index.entries)
        self.rows = indices.new_empty(E, dtype=torch.int32)
        self.weights = weights.new_empty(E)
        self.places = torch.empty_like(index.entries)
        _arrange[triton.cdiv(E, 1024),](
            index.entries, weights, self.rows, self.weights, self.places, E, K=K, BLOCK=1024
        )
        choices = self.tile * J * K
        self.segments_of_tile = min(J * N, choices) + choices // SEGMENT
        room = max(
            choices * self.GD * q.element_size(), self.segments_of_tile * 2 * S * D * 4
        )  # of slots; of dk and dv
        self.together = min(max(SLOTS_BYTES // room, 1), B * self.tiles)
        self.slots = q.new_empty(min(self.together * choices, B * T * J * K) * self.GD)
        self.arguments = (self.starts, *self.segments)

    def __iter__(self) -> Iterator[Launch]:
        for first in range(0, self.B * self.tiles, self.together):
            last = min(first + self.together, self.B * self.tiles)
            yield Launch(
                first,
                last,
                (first * self.J * self.N, last * self.J * self.N),
                ((last - first) * self.segments_of_tile,),
            )

    def sum_slots(self, launch: Launch, out: torch.Tensor, scale: float = 1.0) -> None:
        """Add up what a launch has put into slots, times `scale`, into its tokens' rows of out [B, T, J*G, D]."""

        def token(tile: int) -> int:
            return tile // self.tiles * self.T + tile % self.tiles * self.tile

        first = token(launch.first)
        BD = min(2048, triton.next_power_of_2(self.GD))
        _sum_slots[(token(launch.last) - first) * self.J, triton.cdiv(self.GD, BD)](
            self.places, self.starts, self.slots, out, scale, first * self.J, *launch.lists,
            GD=self.GD, K=self.K, BK=8, BD=BD, num_warps=max(BD // 256, 1),
        )  # fmt: skip
