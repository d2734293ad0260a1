"""The second and third launch of `decode`: choose, attend to the chosen chunks, and add up.

Every program of the second launch finds the K best chunks by itself: the K best blocks, in them the
K best tiles, in them the K best chunks. Every program repeats the same search. That costs less than
a further launch that searches once for all. The search is exact: a chunk outside the K best tiles
is beaten by the K maxima of these tiles, and the same holds for tiles and blocks.

    scratch of one program   [3, KP]   row 0: the K best blocks, as indices into block_maxima
                                       row 1: the K best tiles,  as indices into tile_maxima
                                       row 2: the K best chunks, as indices into scores
    parts of one head        [K, G, D] the result of every kept chunk, times its weight

Dimensions: B batch, J key/value heads, G heads each (GP padded to a power of 2), D head dimension
(DP padded), N chunks, S chunk size (SP padded), K chunks kept (KP padded), NB blocks (NBP padded),
n indices looked at.
"""

import triton
import triton.language as tl

from hsa_kernels.common.selection import NOTHING, largest, unkeyed
from hsa_kernels.common.tiles import chunk_tile, softmax_inside
from hsa_kernels.decoding.score import complete_chunks


@triton.jit
def _best(
    keys, b_index, m_index, there, b_floor, b_most, scratch, K: tl.constexpr, KP: tl.constexpr
):
    """The indices [KP] of the K largest among the keys at b_index [1, n], in order; their number;
    floor and maximum [1].

    there: how many keys are above `NOTHING`; if these are no more than K, all of them are among
    b_index. b_floor [1]: a key that K keys reach. b_most [1]: a key that none exceeds. Both are
    `NOTHING` as long as they are not known.
    """
    # [1, n]
    b_key = tl.load(keys + b_index, mask=m_index, other=NOTHING)
    m_kept = b_key > NOTHING
    if tl.max(b_most, 0) == NOTHING:
        b_most = tl.max(b_key, 1)
    if there > K:
        if tl.max(b_floor, 0) == NOTHING:
            b_floor = tl.min(tl.where(m_kept, b_key, 2**32 - 1).to(tl.uint32), 1)
        m_kept, b_floor = largest(b_key, b_floor, b_most, K)
    count = tl.minimum(there, K)
    tl.store(scratch + tl.cumsum(m_kept.to(tl.int32), 1) - 1, b_index, mask=m_kept)
    tl.debug_barrier()  # the next line reads what other threads have stored
    o_k = tl.arange(0, KP)
    return tl.load(scratch + o_k, mask=o_k < count, other=0), count, b_floor, b_most


@triton.jit
def _children(b_index, count, PARTS: tl.constexpr, KP: tl.constexpr):
    """Indices [1, KP * PARTS] of the PARTS children of b_index [KP], and the mask of the children
    of the first `count`.
    """
    # [KP, PARTS]
    b_part = b_index[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    m_part = tl.broadcast_to((tl.arange(0, KP) < count)[:, None], [KP, PARTS])
    return tl.reshape(b_part, [1, KP * PARTS]), tl.reshape(m_part, [1, KP * PARTS])


@triton.jit
def decode_attend_kernel(
    q, k, v, offsets, scores, tile_maxima, block_maxima, parts, scratch, stride_k, stride_v,
    offset, N, chunk_size, scale_log2,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, NB: tl.constexpr,
    NBP: tl.constexpr,
    OFFSETS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the result [G, D] of one kept slot and one head, that is attention inside its
    chunk times its weight.

    Grid: (K, J, B). The kernel is one function because its four phases hand on floors and maxima in
    registers.

    - Inputs: q [B, 1, J*G, D]; k and v [B, N, S, J, D], stride_k and stride_v from one batch entry
      to the next.
    - Scores: scores, tile_maxima, block_maxima (see `score.py`).
    - Position: offset, or offsets [B] if OFFSETS.
    - Output: parts fp32 [B, J, K, G, D].
    - Scratch: scratch int32 [B, J, K, 3, KP].
    - Scale: scale_log2, for exp2.
    - OVERLAP: whether the third launch may start early.
    - Sizes: N, chunk_size and the constants.
    """
    i_slot = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b * J + i_j).to(tl.int64)
    scratch += (row * K + i_slot) * 3 * KP
    complete = complete_chunks(offsets, offset, i_b, N, chunk_size, OFFSETS)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()

    # 1. The K best blocks; with no more than K blocks, all of them.
    b_floor = tl.full([1], NOTHING, tl.uint32)
    b_most = b_floor
    if NB > K:
        b_index = tl.arange(0, NBP)[None, :]
        there = tl.cdiv(complete, TILE * TILES)
        b_index, count, b_floor, b_most = _best(
            block_maxima + row * NB, b_index, b_index < NB, there, b_floor, b_most, scratch, K, KP
        )
        b_index, m_index = _children(b_index, count, TILES, KP)
    else:
        b_index = tl.arange(0, NBP * TILES)[None, :]
        m_index = b_index < NB * TILES

    # 2. The K best tiles of these blocks; with no more than K tiles, all of them.
    if NB * TILES > K:
        there = tl.cdiv(complete, TILE)
        b_index, count, b_floor, b_most = _best(
            tile_maxima + row * NB * TILES,
            b_index,
            m_index,
            there,
            b_floor,
            b_most,
            scratch + KP,
            K,
            KP,
        )
        b_index, m_index = _children(b_index, count, TILE, KP)
    else:
        b_index = tl.arange(0, NBP * TILES * TILE)[None, :]
        m_index = b_index < NB * TILES * TILE

    # 3. The K best chunks of these tiles. [KP]
    scores += row * NB * TILES * TILE
    scratch += 2 * KP
    b_index, count, _, b_most = _best(
        scores, b_index, m_index, complete, b_floor, b_most, scratch, K, KP
    )

    # 4. Attend to the chunk of this program's slot, unless the slot is empty.
    o_g = tl.arange(0, GP)
    o_d = tl.arange(0, DP)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    o_q = o_g[:, None] * D + o_d[None, :]
    b_out = tl.zeros([GP, DP], tl.float32)
    if i_slot < count:
        index = tl.load(scratch + i_slot)
        # [GP, DP]
        b_q = tl.load(q + row * G * D + o_q, mask=m_q, other=0.0)
        o_kv, m_kv = chunk_tile(NB * TILES * TILE - 1 - index, i_j, J, S, D, SP, DP)
        # [SP, DP] each
        b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_kv, mask=m_kv, other=0.0)
        b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_kv, mask=m_kv, other=0.0)
        # While these loads are under way: the slot's weight, a softmax over the kept scores [KP].
        m_k = tl.arange(0, KP) < count
        best = unkeyed(tl.max(b_most, 0))
        best = tl.where(best == float("-inf"), 0.0, best)  # then every weight is 0, not NaN
        b_s = unkeyed(tl.load(scores + b_index, mask=m_k, other=1))
        total = tl.sum(tl.where(m_k, tl.exp(b_s - best), 0.0))
        total = tl.where(total == 0.0, 1.0, total)
        weight = tl.exp(unkeyed(tl.load(scores + index)) - best) / total
        # [GP, DP] @ [DP, SP] -> [GP, SP]
        b_p, b_sum = softmax_inside(
            tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale_log2, S, SP
        )
        b_p = b_p * (weight / b_sum)[:, None]
        # [GP, SP] @ [SP, DP] -> [GP, DP]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    tl.store(parts + (row * K + i_slot) * G * D + o_q, b_out, mask=m_q)


@triton.jit
def decode_sum_kernel(
    parts, out, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr,
    KP: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """One program: the output [D] of one query head, the sum of its K parts in slot order.

    Grid: (G, B*J). parts fp32 [B, J, K, G, D] -> out [B, 1, J*G, D].
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # until every program of `decode_attend_kernel` has finished
    i_g = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, KP)
    o_d = tl.arange(0, DP)
    mask = (o_k < K)[:, None] & (o_d < D)[None, :]
    # [KP, DP]
    b_part = tl.load(
        parts + ((row * K + o_k[:, None]) * G + i_g) * D + o_d[None, :], mask=mask, other=0.0
    )
    tl.store(
        out + (row * G + i_g) * D + o_d, tl.sum(b_part, 0).to(out.dtype.element_ty), mask=o_d < D
    )
