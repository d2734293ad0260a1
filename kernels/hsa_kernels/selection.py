"""The K largest of a row of numbers, found by cutting the range of a threshold in three instead of by sorting."""

import triton
import triton.language as tl

NOTHING = tl.constexpr(0)  # below the key of any number
MOST = 1 << 15  # keys of a row, in powers of 2: two counts share 32 bits


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
def largest(b_key, b_floor, b_most, K: tl.constexpr):
    """Which keys [rows, n] are the K largest of their row, K <= n < 2^16, and a floor of theirs [rows] that no other key exceeds.

    b_floor [rows]: what K keys of the row are known to reach, or `NOTHING`; b_most [rows]: what none exceeds. Of equal keys the
    first are taken; none at `NOTHING`, which is the floor where there are fewer than K.
    """
    # the floor lies in [low, high]; found as soon as K keys reach it, and in the end where equal keys make it more
    low = b_floor
    high = tl.maximum(b_most, b_floor)
    b_reached = tl.full(
        [b_key.shape[0]], K + 1, tl.int32
    )  # how many keys reach `low`, or K + 1 as long as nobody counted
    while tl.max(high - low, 0) > 0:
        third = (high - low + 2) // 3
        one = low + third
        two = tl.minimum(low + 2 * third, high)
        # two counts in one sum
        b_count = tl.sum(
            (b_key >= one[:, None]).to(tl.uint32) + ((b_key >= two[:, None]).to(tl.uint32) << 16), 1
        )
        reach_one = (b_count & 0xFFFF).to(tl.int32)
        reach_two = (b_count >> 16).to(tl.int32)
        b_reached = tl.where(
            reach_two >= K, reach_two, tl.where(reach_one >= K, reach_one, b_reached)
        )
        high = tl.where(reach_one < K, one - 1, tl.where(reach_two < K, two - 1, high))
        low = tl.where(reach_two >= K, two, tl.where(reach_one >= K, one, low))
        high = tl.where(b_reached == K, low, high)
    m_kept = b_key >= tl.maximum(low, 1)[:, None]
    if tl.max(b_reached, 0) > K:  # of equal keys there may be more than have room
        above = b_key > low[:, None]
        equal = (b_key == low[:, None]).to(tl.int32)
        room = K - tl.sum(above.to(tl.int32), 1)
        m_kept = (above | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))) & (
            b_key > NOTHING
        )
    return m_kept, low
