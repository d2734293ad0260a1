"""The forward kernel of `retrieve`: scores, visibility, noise and the K best in one pass that never
stores [T, N].

The chunks are scored tile by tile, the newest first. Every token collects those that may belong to
its K best in a candidate buffer. When a buffer is nearly full, only its K best stay, and the worst
of them becomes the floor that later chunks have to exceed. Fewer and fewer chunks exceed it: on
random scores the time between two such clean-ups keeps growing. Ties go to the newest chunk,
because it came first.

Dimensions: B batch, T choosing tokens, J retrieval heads, R retrieval dimension (RP padded to a
power of 2), N chunks, K chunks kept (KP padded), BT tokens per tile, BN chunks per tile, CAP
candidates per token, ROWS rows cleaned up at once.
"""

import triton
import triton.language as tl

from hsa_kernels.common.selection import LOWEST, NOTHING, keyed
from hsa_kernels.retrieval.candidates import choose, put


@triton.jit
def _gumbel(seed, chunk, position, head, batch):
    """Gumbel(0, 1) noise, equal to the reference's except for the last bit.

    The inner logarithm is near 0 for uniform numbers near 1, so it is computed in float64.
    """
    bits, _, _, _ = tl.philox(seed, chunk, position, head, batch)
    uniform = (bits.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * (2.0**-32)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def retrieve_fwd_kernel(
    retrieval_q, landmarks, offsets, seeds, first_chunks, indices, scores, buffers, stride_l,
    offset, step, first, T, N, chunk_size,
    exclude_window, scale, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr,
    KP: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    OFFSETS: tl.constexpr, NOISE: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the K best chunks, and their scores, of BT tokens and one head.

    Grid: (tiles of tokens of the launch, J, B). The kernel is one function because the loop and the
    clean-up share counts and floors that stay in registers.

    - Inputs: retrieval_q [B, T, J, R]; landmarks [B, N, J, R], stride_l from one batch entry to the
      next.
    - Positions: token t of entry b stands at offset + t*step; the offset comes from offsets [B] if
      OFFSETS.
    - Noise: the seed at seeds [], if NOISE.
    - Outputs: indices int32 and scores fp32 [B, T, J, K].
    - Scratch: buffers, one candidate buffer per program (see `candidates.py`).
    - The launch: first, its first token.
    - Visibility: chunk_size, exclude_window; first_chunks int32 [B, T], the first chunk of
      every token's document, if DOCUMENTS.
    - Scale: scale, R^-0.5.
    - Sizes: T, N and the constants that the module's docstring explains.
    """
    # 1. Load the queries.
    i_t = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    o_t = first + i_t * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    o_k = tl.arange(0, KP)
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    if NOISE:
        seed = tl.load(seeds)
    position = offset + o_t * step  # [BT]
    o_row = (i_b.to(tl.int64) * T + o_t) * J + i_j
    m_q = (o_t < T)[:, None] & (o_r < R)[None, :]
    # [BT, RP]
    b_q = tl.load(retrieval_q + o_row[:, None] * R + o_r[None, :], mask=m_q, other=0.0)
    landmarks += i_b.to(tl.int64) * stride_l + i_j * R

    # 2. Prepare the candidate buffer.
    program = (i_b * tl.num_programs(1) + i_j) * tl.num_programs(0) + i_t
    buffer = buffers + program.to(tl.int64) * ((3 if NOISE else 2) * BT * CAP + 2 * BT)
    o_own = tl.arange(0, BT)
    # [BT]: candidates of every token so far, and the key that later ones have to exceed; a score of
    # -inf never does. The buffer holds `NOTHING` as long as there are fewer than K candidates.
    b_count = tl.zeros([BT], tl.int32)
    b_floor = tl.full([BT], LOWEST, tl.uint32)
    tl.store(buffer + BT + o_own, tl.full([BT], NOTHING, tl.uint32))

    # 3. Score the chunks that are complete for the tile's last token, the newest first.
    complete = tl.minimum(
        (offset + (tl.minimum(first + (i_t + 1) * BT, T) - 1) * step) // chunk_size, N
    ).to(tl.int32)
    stop = -1
    if DOCUMENTS:
        # [BT]; tokens beyond T see no chunk
        b_first = tl.load(first_chunks + i_b.to(tl.int64) * T + o_t, mask=o_t < T, other=N)
        stop = tl.min(b_first, 0) // BN * BN - 1
    for start in range((tl.cdiv(complete, BN) - 1) * BN, stop, -BN):
        # 3a. Compute the scores of a tile.
        o_n = start + BN - 1 - tl.arange(0, BN)  # [BN], the newest chunk first
        m_l = (o_n < N)[:, None] & (o_r < R)[None, :]
        # [BN, RP]
        b_l = tl.load(
            landmarks + o_n.to(tl.int64)[:, None] * (J * R) + o_r[None, :], mask=m_l, other=0.0
        )
        # [BT, RP] @ [RP, BN] -> [BT, BN]
        b_s = tl.dot(b_q, tl.trans(b_l), input_precision=PRECISION) * scale
        b_choice = b_s
        if NOISE:
            b_choice += _gumbel(seed, o_n[None, :], position[:, None].to(tl.int32), i_j, i_b)
        # [BT, BN]
        b_key = keyed(b_choice)

        # 3b. Keep what is visible and exceeds the floor: [BT, BN].
        o_first = o_n.to(tl.int64) * chunk_size  # [BN], the first token of each chunk
        visible = (o_first + chunk_size)[None, :] <= position[:, None]
        visible &= (o_first[None, :] <= position[:, None] - exclude_window) & (o_n < N)[None, :]
        if DOCUMENTS:
            visible &= o_n[None, :] >= b_first[:, None]
        better = visible & (b_key > b_floor[:, None])
        b_new = better.to(tl.int32)
        put(buffer, o_own, b_count[:, None] + tl.cumsum(b_new, 1) - 1, better, b_key,
            tl.broadcast_to(o_n[None, :], [BT, BN]), b_s, BT, CAP, NOISE)  # fmt: skip
        b_count += tl.sum(b_new, 1)

        # 3c. Clean up when the next tile might not fit: the K best of every row move to its front.
        if tl.max(b_count, 0) > CAP - BN:
            tl.store(buffer + o_own, b_count.to(tl.uint32))
            for i_row in range(0, BT, ROWS):
                o_some = i_row + tl.arange(0, ROWS)
                b_known, b_n, b_kept, m_kept, b_position, _, b_higher = choose(
                    buffer, o_some, K, BT, CAP, NOISE
                )
                put(buffer, o_some, b_position, m_kept, b_known, b_n, b_kept, BT, CAP, NOISE)
                tl.store(buffer + BT + o_some, b_higher)
            tl.debug_barrier()
            b_floor = tl.maximum(tl.load(buffer + BT + o_own), LOWEST)
            b_count = tl.minimum(b_count, K)

    # 4. Write the K best of every row, and -1 and -inf into the slots that stay empty.
    tl.store(buffer + o_own, b_count.to(tl.uint32))
    for i_row in range(0, BT, ROWS):
        o_some = i_row + tl.arange(0, ROWS)
        _, b_n, b_kept, m_kept, b_position, b_found, _ = choose(buffer, o_some, K, BT, CAP, NOISE)
        o_token = first + i_t * BT + o_some
        m_t = (o_token < T)[:, None]
        o_out = ((i_b.to(tl.int64) * T + o_token) * J + i_j)[:, None] * K
        tl.store(indices + o_out + b_position, b_n, mask=m_kept & m_t)
        tl.store(scores + o_out + b_position, b_kept, mask=m_kept & m_t)
        m_empty = (o_k[None, :] >= b_found[:, None]) & (o_k < K)[None, :] & m_t
        tl.store(indices + o_out + o_k[None, :], tl.full([ROWS, KP], -1, tl.int32), mask=m_empty)
        tl.store(
            scores + o_out + o_k[None, :],
            tl.full([ROWS, KP], float("-inf"), tl.float32),
            mask=m_empty,
        )
