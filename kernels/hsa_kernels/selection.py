"""The K largest of a row of numbers, found by the bits of a threshold instead of by sorting."""

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
def largest(b_key, K: tl.constexpr):
    """Which keys [rows, n] are the K largest of their row, and the least of these [rows]; of equal ones the first, none at
    `NOTHING`. The least is `NOTHING` where there are fewer than K."""
    b_least = tl.zeros([b_key.shape[0]], tl.uint32)
    for bit in range(31, -1, -1):  # the largest threshold that K keys reach
        b_higher = b_least | (tl.full([], 1, tl.uint32) << bit)
        b_least = tl.where(tl.sum((b_key >= b_higher[:, None]).to(tl.int32), 1) >= K, b_higher, b_least)
    above, equal = b_key > b_least[:, None], (b_key == b_least[:, None]).to(tl.int32)
    room = K - tl.sum(above.to(tl.int32), 1)
    return (above | ((equal > 0) & (tl.cumsum(equal, 1) <= room[:, None]))) & (b_key > NOTHING), b_least
