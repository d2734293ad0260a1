"""Chunk order: choices sorted by chunk, launches over them, and the partial results they write.

A choice is one of a token's K kept chunks. Its partial result is the G*D numbers that this chunk
adds to the token's output (or to its gradient of q). A program that owns a chunk computes the
partial results of many tokens; afterwards another kernel adds up the K partial results of every
token:

    sorted choices       | chunk 0: t2 t5 t9 | chunk 1: t2 t3 | chunk 2: t5 t9 | ...
    partial_results      [ r0   r1   r2        r3   r4          r5   r6    ... ]   each G*D numbers
    inverse_order[t5]    = [1, 5]  ->  out[t5] = r1 + r5

The buffer would be too large for a long sequence, so one launch covers only as many tiles of tokens
as `PARTIAL_RESULTS_BYTES` allow. A tile's rows of q stay in the L2 cache while its chunks are
processed. Partial results are written once and read once, so they are stored with a hint that they
may leave the cache first.

Dimensions: B batch, T tokens, J key/value heads, G heads each, D head dimension, N chunks, S chunk
size, K chunks kept per token, E = B*T*J*K choices.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsa_kernels.common.inverted_index import cut, invert

SEGMENT = 256  # choices that one program processes
# Tokens of a tile. The rows of q and of a gradient of 2,048 tokens, 16 heads of 128 numbers each,
# fit the L2 cache of an H200.
MIN_TILE = 2048
MAX_TILE = 32768
# Choices per chunk and tile, on average. With fewer it does not pay to load the chunk's k and v for
# them.
MIN_CHOICES = 128
PARTIAL_RESULTS_BYTES = 1 << 32


@triton.jit
def find_segment(
    row_starts, segment_starts, owners, i_segment, TILES, N, J: tl.constexpr, SIZE: tl.constexpr
):
    """Segment number -> its first choice and how many it has; its chunk, head and batch entry."""
    i_list = tl.load(owners + i_segment)
    first = tl.load(row_starts + i_list) + (i_segment - tl.load(segment_starts + i_list)) * SIZE
    count = tl.minimum(tl.load(row_starts + i_list + 1) - first, SIZE).to(tl.int32)
    return first, count, i_list % N, i_list // N % J, i_list // N // J // TILES


@triton.jit
def chunk_attention_sum_partial_results_kernel(
    inverse_order, starts, partial_results, out, scale, first_row, first_list, last_list,
    GD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program: BD of the G*D outputs of one token and head, summed in the order of its slots.

    Grid: (rows of the launch's tokens and heads, ceil(G*D / BD)). Only slots that name a chunk are
    added.
    """
    # 1. The token's row, the program's columns, and the launch's range of sorted choices.
    i_row = first_row + tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    first = tl.load(starts + first_list)
    last = tl.load(starts + last_list)

    # 2. Add the partial results, BK slots at a time.
    b_out = tl.zeros([BD], tl.float32)
    for slot in range(0, K, BK):
        o_k = slot + tl.arange(0, BK)
        # [BK]: where the partial result of each slot lies; empty slots were sorted behind `last`
        b_index = tl.load(inverse_order + i_row * K + o_k, mask=o_k < K, other=last)
        mask = (b_index < last)[:, None] & (o_d < GD)[None, :]
        p_part = partial_results + (b_index - first)[:, None] * GD + o_d[None, :]
        # [BK, BD]
        b_part = tl.load(p_part, mask=mask, other=0.0, eviction_policy="evict_first")
        b_out += tl.sum(b_part.to(tl.float32), 0)
    tl.store(out + i_row * GD + o_d, (b_out * scale).to(out.dtype.element_ty), mask=o_d < GD)


@triton.jit
def chunk_attention_sort_choices_kernel(
    entries, weights, rows, sorted_weights, inverse_order, E, K: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: the rows of q, the weights and the inverse order of BLOCK sorted choices.

    Grid: (ceil(E / BLOCK),).
    """
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    entry = tl.load(entries + o, mask=o < E, other=0)
    tl.store(rows + o, (entry // K).to(tl.int32), mask=o < E)
    tl.store(sorted_weights + o, tl.load(weights + entry), mask=o < E)
    tl.store(inverse_order + entry, o, mask=o < E)


class Launch(NamedTuple):
    """One launch of a kernel in chunk order.

    It covers the tiles from `first` up to `last` (counted through the batch), whose lists are
    `lists[0]` to `lists[1]`. grid: an upper bound of the number of segments; programs beyond the
    last segment return at once.
    """

    first: int
    last: int
    lists: tuple[int, int]
    grid: tuple[int]


class Choices:
    """All choices, sorted by tile of tokens and chunk, and the launches that work through them.

    rows int32 [E]: which row of [B*T*J] made a choice. weights fp32 [E]: its weight. inverse_order
    int64 [E]: where the choice of a slot stands in the sorted order. partial_results: the buffer of
    one launch, G*D numbers per choice. arguments: the tensors with which a kernel finds its
    segment.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """q [B, T, H, D], k [B, N, S, J, D], indices int32 and weights fp32 [B, T, J, K]."""
        B, T, J, K = indices.shape
        N, S = k.shape[1:3]
        D = q.shape[3]
        self.B = B
        self.T = T
        self.J = J
        self.K = K
        self.N = N
        self.GD = q.shape[2] // J * D
        self.tile = min(max(MIN_TILE, triton.next_power_of_2(MIN_CHOICES * N // K)), MAX_TILE, T)
        self.tiles = triton.cdiv(T, self.tile)
        index = invert(indices, N, self.tile)
        self.starts = index.starts
        self.segments = cut(index, SEGMENT)
        E = len(index.entries)
        self.rows = indices.new_empty(E, dtype=torch.int32)
        self.weights = weights.new_empty(E)
        self.inverse_order = torch.empty_like(index.entries)
        chunk_attention_sort_choices_kernel[triton.cdiv(E, 1024),](
            index.entries, weights, self.rows, self.weights, self.inverse_order, E, K=K, BLOCK=1024
        )
        choices = self.tile * J * K
        self.segments_of_tile = min(J * N, choices) + choices // SEGMENT
        result_bytes = choices * self.GD * q.element_size()
        gradient_bytes = self.segments_of_tile * 2 * S * D * 4  # dk and dv of every segment
        self.together = min(
            max(PARTIAL_RESULTS_BYTES // max(result_bytes, gradient_bytes), 1), B * self.tiles
        )
        self.partial_results = q.new_empty(min(self.together * choices, B * T * J * K) * self.GD)
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

    def sum_partial_results(self, launch: Launch, out: torch.Tensor, scale: float = 1.0) -> None:
        """Write sums of a launch's partial results, times `scale`, into out [B, T, J*G, D]."""

        def token(tile: int) -> int:
            """The first token of a tile, both counted through the batch."""
            return tile // self.tiles * self.T + tile % self.tiles * self.tile

        first = token(launch.first)
        BD = min(2048, triton.next_power_of_2(self.GD))
        grid = (token(launch.last) - first) * self.J, triton.cdiv(self.GD, BD)
        chunk_attention_sum_partial_results_kernel[grid](
            self.inverse_order, self.starts, self.partial_results, out, scale, first * self.J,
            *launch.lists,
            GD=self.GD, K=self.K, BK=8, BD=BD, num_warps=max(BD // 256, 1),
        )  # fmt: skip
