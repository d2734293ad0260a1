"""Candidate buffers: where a program of `retrieve` collects the chunks that may be among the K
best.

The buffer of one program, in numbers of 32 bits (BT tokens, CAP candidates per token):

    offset 0      BT       2*BT              2*BT + BT*CAP       2*BT + 2*BT*CAP
    +-------------+--------+-----------------+-------------------+-------------------------+
    | counts [BT] | floors | keys [BT, CAP]  | chunks [BT, CAP]  | scores [BT, CAP]        |
    |             | [BT]   | (`keyed`)       | (their numbers)   | (only if there is noise)|
    +-------------+--------+-----------------+-------------------+-------------------------+

    one row, K = 3:  | k k k k k k . . . . |   6 candidates, CAP = 10
                     | k k k . . . . . . . |   after `choose` and `put`: the 3 best, in front

A row's floor is a key that K candidates are known to reach: later chunks have to exceed it. Without
noise a score is computed back from its key. With noise the key is made of the noisy score, so the
clean score is stored too.
"""

import triton
import triton.language as tl

from hsa_kernels.common.selection import NOTHING, largest, unkeyed


def row_numbers(capacity: int, noise: bool) -> int:
    """How many 32-bit numbers one token's row takes.

    They are its count, its floor, and two or three per candidate.
    """
    return 2 + (3 if noise else 2) * capacity


@triton.jit
def choose(
    buffer, o_row, K: tl.constexpr, BT: tl.constexpr, CAP: tl.constexpr, NOISE: tl.constexpr
):
    """Find the K best candidates of the rows o_row [ROWS].

    Returns keys, chunks and scores [ROWS, CAP]; the mask of those to keep and their new positions
    [ROWS, CAP]; how many candidates each row had [ROWS]; and the new floors [ROWS].
    """
    tl.debug_barrier()  # other threads have written the candidates
    b_count = tl.load(buffer + o_row).to(tl.int32)
    b_floor = tl.load(buffer + BT + o_row)
    o_c = 2 * BT + o_row[:, None] * CAP + tl.arange(0, CAP)[None, :]
    # [ROWS, CAP]
    b_key = tl.load(buffer + o_c, mask=tl.arange(0, CAP)[None, :] < b_count[:, None], other=NOTHING)
    m_kept, b_floor = largest(b_key, b_floor, tl.max(b_key, 1), K)
    # [ROWS, CAP]
    b_n = tl.load(buffer + BT * CAP + o_c, mask=m_kept, other=0).to(tl.int32, bitcast=True)
    if NOISE:
        b_s = tl.load(buffer + 2 * BT * CAP + o_c, mask=m_kept, other=0).to(
            tl.float32, bitcast=True
        )
    else:
        b_s = unkeyed(b_key)
    tl.debug_barrier()  # everything is read before anything is overwritten
    return b_key, b_n, b_s, m_kept, tl.cumsum(m_kept.to(tl.int32), 1) - 1, b_count, b_floor


@triton.jit
def put(
    buffer, o_row, b_position, mask, b_key, b_n, b_s, BT: tl.constexpr, CAP: tl.constexpr,
    NOISE: tl.constexpr
):  # fmt: skip
    """Write candidates (keys, chunks, scores, all [ROWS, X]) to positions b_position [ROWS, X] of
    the rows o_row [ROWS].
    """
    # [ROWS, X]
    o_c = 2 * BT + o_row[:, None] * CAP + b_position
    tl.store(buffer + o_c, b_key, mask=mask)
    tl.store(buffer + BT * CAP + o_c, b_n.to(tl.uint32, bitcast=True), mask=mask)
    if NOISE:
        tl.store(buffer + 2 * BT * CAP + o_c, b_s.to(tl.uint32, bitcast=True), mask=mask)
