"""The first launch of `decode`: scores of all landmarks, and the best score of every tile and of
every block of tiles.

Scores are stored from the newest chunk to the oldest, as keys (`selection.keyed`). TILE = 16 chunks
form a tile and TILES = 8 tiles form a block, so that the choice that follows can find the K best
from the top down:

    block_maxima   [NB]                 B0                              B1              ...
                                        |                               |
    tile_maxima    [NB*TILES]           T0   T1   T2  ...  T7           T8  ...
                                        |
    scores         [NB*TILES*TILE]      s0 s1 s2 ... s15 | s16 ...
                   newest chunk  ->  ->  ->  ->  ->  ->  ->  ->  oldest chunk

Index i in `scores` belongs to chunk NB*TILES*TILE - 1 - i; the first ones may lie beyond the N
chunks and hold `NOTHING`.

Dimensions: B batch, J retrieval heads, R retrieval dimension (RP padded to a power of 2), N chunks,
NB blocks.
"""

import triton
import triton.language as tl

from hsa_kernels.common.selection import NOTHING, keyed


@triton.jit
def complete_chunks(offsets, offset, i_b, N, chunk_size, OFFSETS: tl.constexpr):
    """How many chunks are complete at the position of batch entry i_b's new token."""
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    return tl.minimum(offset // chunk_size, N)


@triton.jit
def decode_score_kernel(
    retrieval_q, landmarks, offsets, scores, tile_maxima, block_maxima, stride_l, offset, N,
    chunk_size, scale,
    J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """One program: the scores of one block of chunks for one head, the maximum of each tile, and
    that of the block.

    Grid: (NB, J, B).

    - Inputs: retrieval_q [B, 1, J, R]; landmarks [B, N, J, R], stride_l from one batch entry to the
      next.
    - Position: offset, or offsets [B] if OFFSETS.
    - Scale: scale, R^-0.5.
    - Sizes: N, chunk_size and the constants.
    - Outputs, all uint32 keys: scores [B, J, NB*TILES*TILE], tile_maxima [B, J, NB*TILES],
      block_maxima [B, J, NB].
    """
    # 1. Which chunks. A thread holds a whole tile, because the tile runs along the first axis.
    #    [TILE, TILES]
    i_block = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = i_b * J + i_j
    block = row.to(tl.int64) * tl.num_programs(0) + i_block
    o_t = tl.arange(0, TILES)
    o_r = tl.arange(0, RP)
    o_c = o_t[None, :] * TILE + tl.arange(0, TILE)[:, None]
    o_n = (tl.num_programs(0) - i_block) * TILE * TILES - 1 - o_c
    # Landmarks of incomplete chunks are never read: they may hold anything, even NaN.
    m_n = o_n < complete_chunks(offsets, offset, i_b, N, chunk_size, OFFSETS)

    # 2. Load the query [RP] and the landmarks [TILE, TILES, RP]. Landmarks are read once, so they
    #    may leave the cache first. Then scores and maxima stay in it; the next launch reads these
    #    many times.
    b_q = tl.load(retrieval_q + row * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    o_l = (
        i_b.to(tl.int64) * stride_l
        + o_n.to(tl.int64)[:, :, None] * (J * R)
        + i_j * R
        + o_r[None, None, :]
    )
    b_l = tl.load(
        landmarks + o_l,
        mask=m_n[:, :, None] & (o_r < R)[None, None, :],
        other=0.0,
        eviction_policy="evict_first",
    )

    # 3. Scores: [TILE, TILES, RP] -> [TILE, TILES], and their maxima [TILES].
    b_s = tl.sum(b_l.to(tl.float32) * b_q[None, None, :], 2) * scale
    b_key = tl.where(m_n, keyed(b_s), NOTHING)
    b_best = tl.max(b_key, 0)
    tl.store(scores + block * TILE * TILES + o_c, b_key)
    tl.store(tile_maxima + block * TILES + o_t, b_best)
    tl.store(block_maxima + block, tl.max(b_best, 0))
