"""The K largest numbers of a row, found by bracketing a threshold instead of by sorting.

Scores become unsigned integers of the same order (`keyed`). The K-th largest key is then searched
in a bracket [low, high], which every step cuts to a third by counting how many keys reach two inner
points.

Dimensions: A rows searched at once, n keys in a row.
"""

import triton
import triton.language as tl

NOTHING = tl.constexpr(0)  # below the key of any number
LOWEST = tl.constexpr(0x007FFFFF)  # the key of -inf
# Keys of a row, in powers of 2. Two counts share the 32 bits of one sum, so neither may reach 2^16.
MAX_KEYS = 1 << 15


@triton.jit
def keyed(b_x):
    """float32 -> uint32 keys of the same order, all above `NOTHING`.

    Both zeros get the same key, and so does every NaN: the largest.
    """
    bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    bits = tl.where(b_x != b_x, 0x7FC00000, bits)  # a NaN may have a sign
    return (bits ^ ((bits >> 31) | -(2**31))).to(tl.uint32, bitcast=True)


@triton.jit
def unkeyed(b_key):
    """uint32 keys -> float32: the inverse of `keyed`."""
    bits = b_key.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -(2**31))).to(tl.float32, bitcast=True)


@triton.jit
def largest(b_key, b_floor, b_most, K: tl.constexpr):
    """Find the K largest keys of every row: b_key [A, n], K <= n < 2^16 -> mask [A, n] of them, and
    floor [A].

    b_floor [A]: a key that K keys of the row are known to reach, or `NOTHING`. b_most [A]: a key
    that none exceeds. Among equal keys the first ones are taken. A key equal to `NOTHING` is never
    taken. The floor that is returned is the smallest key taken: no key outside the mask exceeds it.
    It is `NOTHING` where a row has fewer than K keys.
    """
    # 1. Cut the bracket until it holds one key, or until a threshold is found that exactly K keys
    #    reach.
    low = b_floor
    high = tl.maximum(b_most, b_floor)
    # [A]: how many keys reach `low`; K + 1 as long as they have not been counted
    b_reached = tl.full([b_key.shape[0]], K + 1, tl.int32)
    while tl.max(high - low, 0) > 0:
        third = (high - low + 2) // 3
        one = low + third
        two = tl.minimum(low + 2 * third, high)
        # [A]: the keys that reach `one` in the low 16 bits, those that reach `two` in the high 16
        # bits
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

    # 2. Take every key at the threshold or above it; among equal keys at the threshold only as many
    #    as are missing. [A, n]
    m_kept = b_key >= tl.maximum(low, 1)[:, None]
    if tl.max(b_reached, 0) > K:  # more than K keys may reach the threshold, because some are equal
        above = b_key > low[:, None]
        equal = (b_key == low[:, None]).to(tl.int32)
        missing = K - tl.sum(above.to(tl.int32), 1)  # [A]
        m_kept = (above | ((equal > 0) & (tl.cumsum(equal, 1) <= missing[:, None]))) & (
            b_key > NOTHING
        )
    return m_kept, low
