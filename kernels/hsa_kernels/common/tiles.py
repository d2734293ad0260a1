"""What the tiles of all kernels share: padded sizes, precision of products, the tile of a chunk,
the softmax inside it.

Dimensions: B batch, T tokens, N chunks, H query heads, J key/value heads, G = H/J (GP padded to a
power of 2), D head dimension (DP padded), S chunk size (SP padded), M tokens, or choices, per tile,
R = M*GP rows of a tile.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
HOPPER = (9, 0)
# Bytes of shared memory that one program can have, by compute capability (CUDA's documentation).
SHARED_MEMORY = {
    **dict.fromkeys([(8, 0), (8, 7)], 163 << 10),
    **dict.fromkeys([HOPPER, (10, 0), (10, 1), (10, 3), (11, 0)], 227 << 10),
}
MIN_SHARED_MEMORY = 99 << 10  # of every other GPU from capability 8.0 on


def padded(size: int) -> int:
    """The smallest side of a `tl.dot` tile that holds `size` numbers.

    It is a power of 2, and at least 16.
    """
    return max(triton.next_power_of_2(size), 16)


def precision(dtype: torch.dtype) -> str:
    """The option `input_precision` of `tl.dot`.

    Float32 stays float32. For 16-bit inputs the option has no effect.
    """
    return "ieee" if dtype == torch.float32 else "tf32"


def scaled(q: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float]:
    """q and a scale of its scores that is never negative (the sign moves to q); default D^-0.5."""
    if scale is None:
        return q, q.shape[-1] ** -0.5
    return (-q, -scale) if scale < 0 else (q, scale)


def to_log2(scale: float) -> float:
    """The scale of scores for exp2 in place of exp.

    It stays above 0, because masked scores are -inf and 0 * -inf would be NaN.
    """
    return max(scale, 1e-30) * LOG2_E


class Sizes(NamedTuple):
    """The compile-time constants of chunk attention; the module's docstring explains them."""

    J: int
    G: int
    D: int
    S: int
    M: int
    GP: int
    DP: int
    SP: int
    dtype: torch.dtype
    shared: int  # bytes of shared memory

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor) -> "Sizes":
        """q [B, T, H, D], k [B, N, S, J, D] -> their sizes, with tiles of R = 64 rows.

        64 rows fill a tensor core. No tensor core multiplies float32, so there a tile has 16 rows.
        Large chunks leave space for 32 rows where there is less shared memory than on Hopper.
        """
        H, D = q.shape[2:]
        S, J = k.shape[2:4]
        GP = triton.next_power_of_2(H // J)
        sizes = cls(
            J=J,
            G=H // J,
            D=D,
            S=S,
            M=1,
            GP=GP,
            DP=padded(D),
            SP=padded(S),
            dtype=q.dtype,
            shared=shared_memory(q),
        )
        rows = 32 if sizes.is_tight else 64
        return sizes._replace(M=max((16 if q.dtype == torch.float32 else rows) // GP, 1))

    @property
    def tile_bytes(self) -> int:
        """Bytes of one chunk's tile of k, or of v."""
        return self.SP * self.DP * self.dtype.itemsize

    @property
    def is_small(self) -> bool:
        """Whether a chunk's tile is no larger than 64 tokens of 128 numbers in 16 bits."""
        return self.tile_bytes <= 1 << 14

    @property
    def is_tight(self) -> bool:
        """Whether a large tile has to do with less shared memory than on Hopper."""
        return not self.is_small and self.shared < SHARED_MEMORY[HOPPER]

    @property
    def is_full(self) -> bool:
        """Whether a chunk's tile has no padding."""
        return (self.S, self.D) == (self.SP, self.DP)

    def options(self) -> dict:
        """Launch options: warps and pipeline stages.

        There are two stages where the tiles of two steps fit into shared memory.
        """
        deep = self.tile_bytes <= 1 << 15 and not self.is_tight
        return dict(num_warps=4 if self.is_small else 8, num_stages=2 if deep else 1)

    def constants(self) -> dict:
        """The `tl.constexpr` arguments of a kernel, by name."""
        sizes = self._asdict()
        del sizes["shared"]
        return sizes | {"PRECISION": precision(sizes.pop("dtype"))}


def capability(x: torch.Tensor) -> tuple[int, int]:
    """Compute capability of the GPU on which x lies. On the CPU, Triton's interpreter does as on
    Hopper.
    """
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else HOPPER


def shared_memory(x: torch.Tensor) -> int:
    """Bytes of shared memory that one program can have on x's GPU."""
    return SHARED_MEMORY.get(capability(x), MIN_SHARED_MEMORY)


def copies_tiles(x: torch.Tensor) -> bool:
    """Whether the GPU's copy engine (Hopper and later) can load chunks [B, N, S, J, D] as tiles of
    a matrix.
    """
    return (
        capability(x) >= HOPPER
        and x.data_ptr() % 16 == 0
        and x.stride(0) % (x.shape[3] * x.shape[4]) == 0
    )


def chunk_matrix(x: torch.Tensor) -> TensorDescriptor:
    """Chunks [B, N, S, J, D] as a matrix [tokens, J*D], loaded in tiles [S, D].

    A tile is one head of one chunk.
    """
    B, N, S, J, D = x.shape
    width = J * D
    return TensorDescriptor(
        x, [(B - 1) * (x.stride(0) // width) + N * S, width], [width, 1], [S, D]
    )


@triton.jit
def chunk_tile(
    chunk, i_j, J: tl.constexpr, S: tl.constexpr, D: tl.constexpr, SP: tl.constexpr,
    DP: tl.constexpr, FIRST: tl.constexpr = 0
):  # fmt: skip
    """Offsets and mask, both [SP, DP], of one chunk's tile of k or v inside its batch entry.

    The tile's columns are columns FIRST to FIRST + DP of the head dimension.
    """
    o_s = tl.arange(0, SP)
    o_d = FIRST + tl.arange(0, DP)
    o_row = (chunk.to(tl.int64) * S + o_s) * J + i_j  # [SP]
    return o_row[:, None] * D + o_d[None, :], (o_s < S)[:, None] & (o_d < D)[None, :]


@triton.jit
def softmax_inside(b_s, scale_log2, S: tl.constexpr, SP: tl.constexpr):
    """Softmax over one chunk, not yet normalised: scores [R, SP] -> exponentials [R, SP] and their
    sums [R].

    The exponentials are exp2(scale_log2 * (score - maximum of the row)), and 0 beyond the chunk's S
    tokens. Since scale_log2 > 0, the largest score stays the largest after scaling, and scaling
    costs one multiply-add per score.
    """
    if S < SP:
        # [R, SP]: the columns that pad S to a power of 2 hold no token
        b_s = tl.where((tl.arange(0, SP) < S)[None, :], b_s, float("-inf"))
    # [R, SP]
    b_p = tl.exp2(b_s * scale_log2 - (tl.max(b_s, 1) * scale_log2)[:, None])
    return b_p, tl.sum(b_p, 1)


@triton.jit
def product(b_a, b_b, PRECISION: tl.constexpr):
    """b_a [R, C] @ b_b [C, X] -> [R, X].

    In float32 the sum over C is split into parts of 16 additions, and the parts are added
    afterwards, because one long chain of additions loses more to rounding.
    """
    if PRECISION == "ieee":
        PARTS: tl.constexpr = b_a.shape[1] // 16
        # [R, C] -> [PARTS, R, 16]
        b_a = tl.permute(tl.reshape(b_a, [b_a.shape[0], PARTS, 16]), [1, 0, 2])
        # [C, X] -> [PARTS, 16, X]
        b_b = tl.reshape(b_b, [PARTS, 16, b_b.shape[1]])
        # [PARTS, R, X] -> [R, X]
        return tl.sum(tl.dot(b_a, b_b, input_precision=PRECISION), 0)
    else:
        return tl.dot(b_a, b_b)


@triton.jit
def add_product(b_a, b_b, b_total, b_lost, PRECISION: tl.constexpr):
    """b_total [R, X] + b_a [R, C] @ b_b [C, X] -> the new total and the new rounding error, both
    [R, X].

    In float32, b_lost carries what rounding has taken from the total so far (Kahan summation), so
    that a long sum is as precise as a short one. In 16 bits b_lost stays as it is.
    """
    if PRECISION == "ieee":
        b_term = product(b_a, b_b, PRECISION) - b_lost
        b_new = b_total + b_term
        b_lost = (b_new - b_total) - b_term
        b_total = b_new
    else:
        b_total = tl.dot(b_a, b_b, b_total)
    return b_total, b_lost
