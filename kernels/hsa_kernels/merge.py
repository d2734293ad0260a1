"""Neighbouring tokens share one pass over their chunks: the merged list of the chunks that M tokens chose.

A chunk costs the same traffic however many tokens read it, and the rows of M tokens fill a tensor-core tile. So M tokens
make one block; its list names every chunk that any of them chose once, oldest first, and holds M weights a chunk, 0 where a
token did not choose it.

Dimensions: B batch, T tokens, J key/value heads, K slots a token, M tokens a block, L = M*K entries a list, I blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class MergedLists(NamedTuple):
    """What `merge` found for every block of M tokens and head.

    choices int32 [B, I, J]: how many there are; counts int32 [B, I, J]; chunks int32 [B, I, J, L], `counts` of them meant; weights
    fp32 [B, I, J, L, M].
    """

    choices: torch.Tensor
    counts: torch.Tensor
    chunks: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _merge(
    indices, weights, choices, counts, chunks, merged_weights,
    T, N, J: tl.constexpr, K: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    L: tl.constexpr = M * K
    SLOTS: tl.constexpr = LANES // M
    # one lane a slot: [M, SLOTS] flattened
    o_lane = tl.arange(0, LANES)
    o_m = o_lane // SLOTS
    o_slot = o_lane % SLOTS
    o_t = i_block * M + o_m
    m_lane = (o_slot < K) & (o_t < T)  # slots beyond K and tokens beyond the sequence are padding
    o_entry = ((i_b * T + o_t).to(tl.int64) * J + i_j) * K + o_slot
    b_chunk = tl.load(indices + o_entry, mask=m_lane, other=-1)
    b_chunk = tl.where(
        (b_chunk >= 0) & (b_chunk < N), b_chunk, N
    )  # an empty slot, or one that names no chunk

    # equal chunks become neighbours, and the key still tells the lane it came from; empty slots go last
    key = b_chunk.to(KEY) * LANES + o_lane
    key = tl.sort(key)
    b_sorted = (key // LANES).to(tl.int32)
    o_from = (key % LANES).to(tl.int32)
    before = tl.gather(b_sorted, tl.maximum(o_lane - 1, 0), 0)
    o_m = o_from // SLOTS
    m_before = tl.gather(o_m, tl.maximum(o_lane - 1, 0), 0)
    # a token that names a chunk twice reads it twice: each place of the list has one weight a token
    fresh = (o_lane == 0) | (b_sorted != before) | (o_m == m_before)
    kept = b_sorted < N
    place = tl.cumsum((fresh & kept).to(tl.int32), 0) - 1

    row = (i_b * tl.num_programs(0) + i_block).to(tl.int64) * J + i_j
    tl.store(choices + row, tl.sum(kept.to(tl.int32), 0))
    tl.store(counts + row, tl.sum((fresh & kept).to(tl.int32), 0))
    tl.store(chunks + row * L + place, b_sorted, mask=fresh & kept)
    o_entry = ((i_b * T + i_block * M + o_m).to(tl.int64) * J + i_j) * K + o_from % SLOTS
    b_weight = tl.load(weights + o_entry, mask=kept, other=0.0)
    tl.store(merged_weights + (row * L + place) * M + o_m, b_weight, mask=kept)


def merge(indices: torch.Tensor, weights: torch.Tensor, chunks: int, tokens: int) -> MergedLists:
    """indices int32 and weights fp32 [B, T, J, K], contiguous; `chunks` in memory; `tokens` M a block, a power of 2."""
    B, T, J, K = indices.shape
    blocks = triton.cdiv(T, tokens)
    length = tokens * K
    lanes = tokens * triton.next_power_of_2(K)
    lists = MergedLists(
        choices=indices.new_empty(B, blocks, J),
        counts=indices.new_empty(B, blocks, J),
        chunks=indices.new_empty(B, blocks, J, length),
        weights=weights.new_zeros(B, blocks, J, length, tokens),
    )
    wide = tl.int64 if (chunks + 1) * lanes > 2**31 - 1 else tl.int32
    _merge[blocks, J, B](
        indices, weights, *lists, T, chunks, J=J, K=K, M=tokens, LANES=lanes, KEY=wide, num_warps=4
    )  # fmt: skip
    return lists
