"""Chunk attention by token block: M neighbouring tokens read their chunks together, each once.

Only the result is written. A block loads the tiles of a chunk once, mostly from the L2 cache.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J (GP padded to a power of
2), D head dimension (DP padded), N chunks, S chunk size (SP padded), K chunks kept per token, M
tokens per block, R = M*GP rows of a tile, L = M*K entries of a merged list.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.attention.merge import MergedLists, merge
from hsa_kernels.common.tiles import (
    Sizes,
    add_product,
    chunk_matrix,
    chunk_tile,
    copies_tiles,
    product,
    softmax_inside,
    to_log2,
)

MAX_MERGED = 1024  # choices of a block, because one program sorts them


@triton.jit
def chunk_attention_fwd_by_token_block_kernel(
    q, k, v, counts, chunks, weights, out, stride_k, stride_v, scale_log2, T,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, L: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
    MATRICES: tl.constexpr,
):  # fmt: skip
    """One program: the output [M tokens, G heads, D] of one block of tokens and one key/value head.

    Grid: (blocks, J, B). The tile's row m*GP + g is head g of the block's token m.
    The kernel is one function because queries and sums stay in registers for the whole list.

    - Inputs: q [B, T, J*G, D]; k and v [B, N, S, J, D], as pointers, or as tensor descriptors if
      MATRICES.
    - Merged lists: counts [B, blocks, J] (negative: another schedule computes the block), chunks
      [.., L], weights [.., L, M].
    - Output: out [B, T, J*G, D].
    - Strides: stride_k and stride_v, from one batch entry to the next.
    - Scale: scale_log2, for exp2.
    - Sizes: T and the constants of `Sizes`.
    """
    # 1. Find the block. Late tokens see more chunks, so the longest lists start first and short
    #    ones fill the end.
    i_block = tl.num_programs(0) - 1 - tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    i_list = (i_b * tl.num_programs(0) + i_block).to(tl.int64) * J + i_j
    count = tl.load(counts + i_list)
    if count < 0:  # this block is computed in chunk order
        return

    # 2. Load the queries.
    o_r = tl.arange(0, M * GP)
    o_d = tl.arange(0, DP)
    o_m = o_r // GP
    o_g = o_r % GP
    o_t = i_block * M + o_m
    # rows beyond the sequence, rows that pad G, and columns that pad D hold nothing
    m_q = ((o_t < T) & (o_g < G))[:, None] & (o_d < D)[None, :]
    o_q = (((i_b * T + o_t).to(tl.int64) * J + i_j) * G + o_g)[:, None] * D + o_d[None, :]
    # [R, DP]
    b_q = tl.load(q + o_q, mask=m_q, other=0.0)

    # 3. Pass over the merged list.
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
    # The number of the next chunk is read one step ahead, so that its tiles can be loaded in time.
    next_chunk = tl.load(chunks)
    for i in range(count):
        chunk = next_chunk
        next_chunk = tl.load(chunks + tl.minimum(i + 1, count - 1))
        # [R]: the weight that each row's token gives to the chunk
        b_w = tl.load(weights + i * M + o_m)
        # [SP, DP] each
        if MATRICES:
            b_k = k.load([(row_k + chunk * S).to(tl.int32), i_j * D])
            b_v = v.load([(row_v + chunk * S).to(tl.int32), i_j * D])
        else:
            o_k, m_k = chunk_tile(chunk, i_j, J, S, D, SP, DP)
            b_k = tl.load(k + o_k, mask=m_k, other=0.0)
            b_v = tl.load(v + o_k, mask=m_k, other=0.0)
        # [R, DP] @ [DP, SP] -> [R, SP]
        b_s = product(b_q, tl.trans(b_k), PRECISION)
        # [R, SP], [R]
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)
        # Every chunk has its own softmax: no maximum is carried over, and no earlier sum is
        # rescaled.
        b_p = b_p * (b_w / b_sum)[:, None]
        # [R, SP] @ [SP, DP] -> [R, DP]
        b_out, b_lost = add_product(b_p.to(b_v.dtype), b_v, b_out, b_lost, PRECISION)

    # 4. Write the result.
    tl.store(out + o_q, b_out.to(out.dtype.element_ty), mask=m_q)


def tokens_per_block(sizes: Sizes, K: int) -> int:
    """M: as many tokens as fill a tile, but fewer where their list would be too long to sort.

    A tile has at least 16 rows.
    """
    tokens = min(sizes.M, 16)
    while tokens * sizes.GP > 16 and tokens * K > MAX_MERGED:
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
    """Chunk attention with every token in a block; as `chunk_attention`, for scale >= 0."""
    return attend_blocks(q, k, v, merge_blocks(q, k, indices, weights), torch.empty_like(q), scale)


def merge_blocks(
    q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
) -> MergedLists:
    """The merged lists of blocks of the size that one program takes."""
    return merge(indices, weights, k.shape[1], tokens_per_block(Sizes.of(q, k), indices.shape[3]))


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: MergedLists,
    out: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Write the results of blocks of tokens into out [B, T, H, D].

    Blocks with a negative count are left as they are.
    """
    B = q.shape[0]
    T = q.shape[1]
    _, blocks, J, L, M = lists.weights.shape
    sizes = Sizes.of(q, k)._replace(M=M)
    matrices = sizes.is_full and all(copies_tiles(x) for x in (k, v))
    # With 3 stages, 2 pairs of tiles are being loaded while one is used.
    options = sizes.options() | (dict(num_stages=3) if sizes.is_small else {})
    chunk_attention_fwd_by_token_block_kernel[blocks, J, B](
        q, *((chunk_matrix(x) if matrices else x) for x in (k, v)), lists.counts, lists.chunks,
        lists.weights, out,
        k.stride(0), v.stride(0), to_log2(scale), T, L=L, MATRICES=matrices, **sizes.constants(),
        **options,
    )  # fmt: skip
    return out
