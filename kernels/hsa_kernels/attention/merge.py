"""Merged lists: M neighbouring tokens form a block, and its list names each of their chunks once.

A chunk costs the same traffic however many tokens read it, and the rows of M tokens fill a
tensor-core tile. The list is sorted by chunk, oldest first, and holds M weights per chunk, 0 where
a token did not choose it:

    choices of a block (M = 2, K = 3)      its merged list
    token 0: chunks 7 2 4                  chunks    2    4    7    9      (at most L = M*K = 6)
    token 1: chunks 4 9 7                  token 0  w02  w04  w07   0
                                           token 1   0   w14  w17  w19

Dimensions: B batch, T tokens, J key/value heads, N chunks, K chunks kept per token, M tokens per
block, L = M*K entries per list, I blocks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class MergedLists(NamedTuple):
    """The merged list of every block of M tokens and head.

    choices int32 [B, I, J]: how many choices the block's tokens made. counts int32 [B, I, J]: how
    many different chunks these name. chunks int32 [B, I, J, L]: the first `counts` are valid.
    weights fp32 [B, I, J, L, M].
    """

    choices: torch.Tensor
    counts: torch.Tensor
    chunks: torch.Tensor
    weights: torch.Tensor


@triton.jit
def chunk_attention_merge_kernel(
    indices, weights, choices, counts, chunks, merged_weights,
    T, N, J: tl.constexpr, K: tl.constexpr, M: tl.constexpr, LANES: tl.constexpr, KEY: tl.constexpr,
):  # fmt: skip
    """One program: the merged list of one block and one head, by sorting its M*K choices.

    Grid: (I, J, B). LANES = M * SLOTS, where SLOTS is K padded to a power of 2: one lane per slot.
    KEY: the integer type of the sort keys.
    """
    i_block = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    L: tl.constexpr = M * K
    SLOTS: tl.constexpr = LANES // M

    # 1. Load the choices, one per lane: [M, SLOTS] flattened to [LANES].
    o_lane = tl.arange(0, LANES)
    o_m = o_lane // SLOTS
    o_slot = o_lane % SLOTS
    o_t = i_block * M + o_m
    m_lane = (o_slot < K) & (o_t < T)  # slots beyond K and tokens beyond the sequence are padding
    o_entry = ((i_b * T + o_t).to(tl.int64) * J + i_j) * K + o_slot
    b_chunk = tl.load(indices + o_entry, mask=m_lane, other=-1)
    # Empty slots, and slots that name no chunk, get the number N.
    b_chunk = tl.where((b_chunk >= 0) & (b_chunk < N), b_chunk, N)

    # 2. Sort: equal chunks become neighbours, and empty slots go last. The key also holds the lane
    #    it came from.
    key = b_chunk.to(KEY) * LANES + o_lane
    key = tl.sort(key)
    b_sorted = (key // LANES).to(tl.int32)
    o_from = (key % LANES).to(tl.int32)

    # 3. Number the different chunks. A token that names a chunk twice gets two entries, because an
    #    entry has one weight per token.
    before = tl.gather(b_sorted, tl.maximum(o_lane - 1, 0), 0)
    o_m = o_from // SLOTS
    m_before = tl.gather(o_m, tl.maximum(o_lane - 1, 0), 0)
    fresh = (o_lane == 0) | (b_sorted != before) | (o_m == m_before)
    kept = b_sorted < N
    o_list = tl.cumsum((fresh & kept).to(tl.int32), 0) - 1  # [LANES]: entry of the merged list

    # 4. Write the list.
    row = (i_b * tl.num_programs(0) + i_block).to(tl.int64) * J + i_j
    tl.store(choices + row, tl.sum(kept.to(tl.int32), 0))
    tl.store(counts + row, tl.sum((fresh & kept).to(tl.int32), 0))
    tl.store(chunks + row * L + o_list, b_sorted, mask=fresh & kept)
    o_entry = ((i_b * T + i_block * M + o_m).to(tl.int64) * J + i_j) * K + o_from % SLOTS
    b_weight = tl.load(weights + o_entry, mask=kept, other=0.0)
    tl.store(merged_weights + (row * L + o_list) * M + o_m, b_weight, mask=kept)


def merge(indices: torch.Tensor, weights: torch.Tensor, chunks: int, tokens: int) -> MergedLists:
    """indices int32 and weights fp32 [B, T, J, K], contiguous -> the merged lists.

    tokens: M, a power of 2.

    chunks: how many chunks the memory holds.
    """
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
    chunk_attention_merge_kernel[blocks, J, B](
        indices, weights, *lists, T, chunks, J=J, K=K, M=tokens, LANES=lanes, KEY=wide, num_warps=4
    )  # fmt: skip
    return lists
