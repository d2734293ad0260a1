"""What the tiles of all kernels share: padded sizes, the precision of products, a chunk's tile."""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


def padded(size: int) -> int:
    """The power of 2 that a side of a tile of `tl.dot` needs to hold `size` numbers; 16 is its least."""
    return max(triton.next_power_of_2(size), 16)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 stays float32; in 16 bits nothing is left to choose."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def chunk_tile(
    chunk, i_j, J: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr = 0
):  # fmt: skip
    """Offsets inside a batch entry, and mask, of a chunk's tile [SP, DP] of k or v: the columns from `FIRST` on."""
    o_s, o_d = tl.arange(0, SP), FIRST + tl.arange(0, DP)
    o_row = (chunk.to(tl.int64) * S + o_s) * J + i_j
    return o_row[:, None] * D + o_d[None, :], (o_s < S)[:, None] & (o_d < D)[None, :]


@triton.jit
def softmax_inside(b_s, S: tl.constexpr, SP: tl.constexpr):
    """Scores [R, SP] over one chunk, in units of log 2 -> exp(scores - their maximum), 0 beyond its S tokens, and their sums."""
    if S < SP:
        b_s = tl.where((tl.arange(0, SP) < S)[None, :], b_s, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, 1)[:, None])
    return b_p, tl.sum(b_p, 1)
