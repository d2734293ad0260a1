"""Chunk attention, token by token: a block of M neighbouring tokens passes once over the chunks that any of them chose.

Nothing but the result is written. A chunk's tiles come from the L2 cache once a block.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP
padded), N chunks, S chunk size (SP padded), K slots, M tokens a block, R = M*GP rows a tile, L = M*K list entries.
"""

import torch
import triton
import triton.language as tl

from .merge import MergedLists, merge
from .tiles import (
    Sizes,
    add_product,
    chunk_matrix,
    chunk_tile,
    copies_tiles,
    product,
    softmax_inside,
    to_log2,
)

MOST_MERGED = 1024  # choices of a block: their list is sorted by one program


@triton.jit
def _forward(
    q, k, v, counts, chunks, weights, out, stride_k, stride_v, scale_log2, T,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
    MATRICES: tl.constexpr,
):  # fmt: skip
    # late tokens see more chunks: the longest lists go first, and short ones fill what is left at the end
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    i_list = (i_b * tl.num_programs(0) + i_block).to(tl.int64) * J + i_j
    count = tl.load(counts + i_list)
    if count < 0:  # not this way
        return
    o_r = tl.arange(0, M * GP)
    o_d = tl.arange(0, DP)
    # row m*GP + g is head g of the block's token m
    o_m = o_r // GP
    o_g = o_r % GP
    o_t = i_block * M + o_m
    m_q = ((o_t < T) & (o_g < G))[:, None] & (o_d < D)[
        None, :
    ]  # not beyond the sequence, nor what pads G to a power of 2
    o_q = (((i_b * T + o_t).to(tl.int64) * J + i_j) * G + o_g)[:, None] * D + o_d[None, :]
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)  # [R, DP]
    chunks += i_list * L
    weights += i_list * L * M
    if MATRICES:
        row_k = i_b * (stride_k // (J * D))
        row_v = i_b * (stride_v // (J * D))
    else:
        k += i_b.to(tl.int64) * stride_k
        v += i_b.to(tl.int64) * stride_v
    b_out = tl.zeros([M * GP, DP], tl.float32)
    b_lost = tl.zeros([M * GP, DP], tl.float32)
    # a chunk's number is read one place ahead: its tiles can then be on their way in time
    next_chunk = tl.load(chunks)
    for place in range(count):
        chunk = next_chunk
        next_chunk = tl.load(chunks + tl.minimum(place + 1, count - 1))
        b_w = tl.load(weights + place * M + o_m)  # [R]
        if MATRICES:
            b_k = k.load([(row_k + chunk * S).to(tl.int32), i_j * D])  # [SP, DP]
            b_v = v.load([(row_v + chunk * S).to(tl.int32), i_j * D])
        else:
            o_k, m_k = chunk_tile(chunk, i_j, J, S, D, SP, DP)
            b_k = tl.load(k + o_k, mask=m_k, other=0.0)
            b_v = tl.load(v + o_k, mask=m_k, other=0.0)
        b_s = product(b_q, tl.trans(b_k), PRECISION)
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)  # [R, SP], [R]
        # every chunk has its own softmax: no maximum to carry, no rescaling of what was summed
        b_p = b_p * (b_w / b_sum)[:, None]
        b_out, b_lost = add_product(b_p.to(b_v.dtype), b_v, b_out, b_lost, PRECISION)
    tl.store(out + o_q, b_out.to(out.dtype.element_ty), mask=m_q)


def tokens_of_block(sizes: Sizes, K: int) -> int:
    """M: as many as fill a tile, fewer where the list to sort would be long, but never below 16 rows."""
    tokens = min(sizes.M, 16)
    while tokens * sizes.GP > 16 and tokens * K > MOST_MERGED:
        tokens //= 2
    return tokens


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    return pass_over(q, k, v, merge_blocks(q, k, indices, weights), torch.empty_like(q), scale)


def merge_blocks(
    q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> MergedLists:
    """The lists of blocks as large as a program takes."""
    return merge(indices, weights, k.shape[1], tokens_of_block(Sizes.of(q, k), indices.shape[3]))


def pass_over(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: MergedLists,
    out: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Writes into out [B, T, H, D] what blocks of tokens read; a block whose count is negative stays as it is."""
    B, T = q.shape[:2]
    _, blocks, J, L, M = lists.weights.shape
    sizes = Sizes.of(q, k)._replace(M=M)
    matrices = sizes.is_full and all(copies_tiles(x) for x in (k, v))
    # of 3 stages 2 pairs of tiles are under way
    options = sizes.options() | (dict(num_stages=3) if sizes.is_small else {})
    _forward[blocks, J, B](
        q, *((chunk_matrix(x) if matrices else x) for x in (k, v)), lists.counts, lists.chunks, lists.weights, out,
        k.stride(0), v.stride(0), to_log2(scale), T, L=L, MATRICES=matrices, **sizes.constants(), **options,
    )  # fmt: skip
    return out
