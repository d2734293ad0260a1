"""What the tiles of all kernels share: padded sizes, the precision of products, floats as integers of the same order."""

import torch
import triton
import triton.language as tl


def padded(size: int) -> int:
    """The power of 2 that a side of a tile of `tl.dot` needs to hold `size` numbers; 16 is its least."""
    return max(triton.next_power_of_2(size), 16)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 stays float32; in 16 bits nothing is left to choose."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def ordered(b_x):
    """fp32 as int32 of the same order; either zero becomes 0."""
    bits = (b_x + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(b_bits):
    """The inverse of `ordered`."""
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
