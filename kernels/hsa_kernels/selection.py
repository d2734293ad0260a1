"""The K largest of a row of numbers, found by bisection of a threshold instead of by sorting."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(0)  # below the key of any number


@triton.jit
def keyed(b_x):
    """fp32 as uint32 of the same order, above `NOTHING`; either zero becomes the same."""
    bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def unkeyed(b_key):
    """The inverse of `keyed`."""
    bits = b_key.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -(2**31))).to(tl.float32, bitcast=True)


@triton.jit
def largest(b_key, b_floor, K: tl.constexpr):
    """Which keys [rows, n] are the K largest of their row, and a floor of theirs [rows] that no other key exceeds.

    b_floor [rows]: what K keys of the row are known to reach, or `NOTHING`. Of equal keys the first are taken; none at
    `NOTHING`, which is the floor where there are fewer than K.
    """
    # the floor lies in [low, high]; found as soon as K keys reach it, and in the end where equal keys make it more
    low, high = b_floor, tl.maximum(tl.max(b_key, 1), b_floor)
    while tl.max(high - low, 0) > 0:
        middle = high - ((high - low) >> 1)
        reached = tl.sum((b_key >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(reached >= K, middle, low)
        high = tl.where(reached > K, high, tl.where(reached == K, middle, middle - 1))
    m_kept = b_key >= tl.maximum(low, 1)[:, None]
    if tl.max(tl.sum(m_kept.to(tl.int32), 1), 0) > K:  # of equal keys there are more than have room
        above, equal = b_key > low[:, None], (b_key == low[:, None]).to(tl.int32)
        room = K - tl.sum(above.to(tl.int32), 1)
        m_kept = (above | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))) & (b_key > NOTHING)
    return m_kept, low
