"""What the tiles of all kernels share: padded sizes, the precision of products, a chunk's tile and the softmax inside it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634


def padded(size: int) -> int:
    """The power of 2 that a side of a tile of `tl.dot` needs to hold `size` numbers; 16 is its least."""
    return max(triton.next_power_of_2(size), 16)


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 stays float32; in 16 bits nothing is left to choose."""
    return "ieee" if dtype == torch.float32 else "tf32"


def scaled(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float]:
    """q and a scale of its scores that is not negative, for any scale; by default D^-0.5."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    return (-q, -scale) if scale < 0 else (q, scale)


def to_log2(scale: float) -> float:
    """A scale of scores for powers of 2 in place of e. Above 0: masked scores are -inf, and 0 times -inf is no number."""
    return max(scale, 1e-30) * LOG2_E


class Sizes(NamedTuple):
    """The compile-time constants of chunk attention. M: how many tokens, or choices, are rows of one tile."""

    J: int
    G: int
    D: int
    S: int
    M: int
    GP: int
    DP: int
    SP: int
    dtype: torch.dtype

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> "Sizes":
        """64 rows, which fill a tensor core; in float32, which no tensor core multiplies, 16."""
        H, D = q.shape[2:]
        S, J = k.shape[2:4]
        GP = triton.next_power_of_2(H // J)
        return cls(
            J,
            H // J,
            D,
            S,
            max((16 if q.dtype == torch.float32 else 64) // GP, 1),
            GP,
            padded(D),
            padded(S),
            q.dtype,
        )

    @property
    def tile_bytes(self) -> int:
        """Of a chunk's tile of k or v."""
        return self.SP * self.DP * self.dtype.itemsize

    @property
    def is_small(self) -> bool:
        """Whether a tile is at most one of 64 tokens of 128 numbers in 16 bits."""
        return self.tile_bytes <= 1 << 14

    @property
    def is_full(self) -> bool:
        """Whether a chunk's tile has no padding."""
        return (self.S, self.D) == (self.SP, self.DP)

    def options(self) -> dict:
        """Warps, and stages of the pipeline: two where the tiles of two steps fit into shared memory."""
        return dict(
            num_warps=4 if self.is_small else 8, num_stages=2 if self.tile_bytes <= 1 << 15 else 1
        )

    def constants(self) -> dict:
        sizes = self._asdict()
        return sizes | {"PRECISION": precision(sizes.pop("dtype"))}


def before_hopper(x: torch.Tensor) -> bool:
    """Whether x is on a GPU that is older."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) < (9, 0)


def copies_tiles(x: torch.Tensor) -> bool:
    """Whether the GPU's copy engine can read chunks [B, N, S, J, D] as tiles of a matrix; it does from Hopper on."""
    return (
        not before_hopper(x)
        and x.data_ptr() % 16 == 0
        and x.stride(0) % (x.shape[3] * x.shape[4]) == 0
    )


def chunk_matrix(x: torch.Tensor) -> TensorDescriptor:
    """Chunks [B, N, S, J, D] as a matrix of all their tokens [.., J*D], read in tiles [S, D], a chunk's of one head."""
    B, N, S, J, D = x.shape
    width = x.shape[3] * x.shape[4]
    return TensorDescriptor(
        x, [(B - 1) * (x.stride(0) // width) + N * S, width], [width, 1], [S, D]
    )


@triton.jit
def chunk_tile(
    chunk, i_j, J: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, DP: tl.constexpr, FIRST: tl.constexpr = 0
):  # fmt: skip
    """Offsets inside a batch entry, and mask, of a chunk's tile [SP, DP] of k or v: the columns from `FIRST` on."""
    o_s = tl.arange(0, SP)
    o_d = FIRST + tl.arange(0, DP)
    o_row = (chunk.to(tl.int64) * S + o_s) * J + i_j
    return o_row[:, None] * D + o_d[None, :], (o_s < S)[:, None] & (o_d < D)[None, :]


@triton.jit
def softmax_inside(b_s, scale_log2, S: tl.constexpr, SP: tl.constexpr):
    """Scores [R, SP] over one chunk -> exp2(scale_log2 * (scores - their maximum)), 0 beyond its S tokens, and their sums.

    scale_log2 > 0: the largest score is then the largest after scaling, which becomes one multiply-add a score.
    """
    if S < SP:
        b_s = tl.where((tl.arange(0, SP) < S)[None, :], b_s, float("-inf"))
    b_p = tl.exp2(b_s * scale_log2 - (tl.max(b_s, 1) * scale_log2)[:, None])
    return b_p, tl.sum(b_p, 1)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """b_a [R, C] @ b_b [C, X]. In float32 as parts of 16 additions each, then added: a long chain of additions rounds more."""
    if PRECISION == "ieee":
        PARTS: tl.constexpr = b_a.shape[1] // 16
        b_a = tl.permute(tl.reshape(b_a, [b_a.shape[0], PARTS, 16]), [1, 0, 2])
        b_b = tl.reshape(b_b, [PARTS, 16, b_b.shape[1]])
        return tl.sum(tl.dot(b_a, b_b, input_precision=PRECISION), 0)
    else:
        return tl.dot(b_a, b_b)


@triton.jit
def add_product(b_a, b_b, b_total, b_lost, PRECISION: tl.constexpr):
    """b_total + b_a @ b_b. In float32, what rounding loses is carried in b_lost: a long sum stays as precise as a short one."""
    if PRECISION == "ieee":
        b_term = product(b_a, b_b, PRECISION) - b_lost
        b_new = b_total + b_term
        b_lost = (b_new - b_total) - b_term
        b_total = b_new
    else:
        b_total = tl.dot(b_a, b_b, b_total)
    return b_total, b_lost
