"""Chunk attention by chunk: a program owns a chunk and processes tokens that chose it.

A choice costs a token's rows of q, and a partial result that is written and read once. That is less
than a chunk's k and v, unless a block of neighbouring tokens shares these (`by_token_block.py`).

Dimensions: B batch, T tokens, J key/value heads, G heads each (GP padded to a power of 2), D head
dimension (DP padded), N chunks, S chunk size (SP padded), K chunks kept per token, M choices per
tile, R = M*GP rows of a tile.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.attention import partial_results as partial
from hsa_kernels.attention.partial_results import Choices, find_segment
from hsa_kernels.common.tiles import Sizes, chunk_tile, product, softmax_inside, to_log2


@triton.jit
def chunk_attention_fwd_by_chunk_kernel(
    q, k, v, rows, weights, starts, segment_starts, owners, partial_results, stride_k, stride_v,
    scale_log2, first_list,
    last_list, TILES, N, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the partial results of one segment, up to SIZE tokens that chose one chunk.

    Grid: (an upper bound of the launch's segments,). Row m*GP + g of a tile is head g of the m-th
    choice. The kernel is one function because the chunk stays in registers for all of the choices.

    - Inputs: q [B, T, J*G, D]; k and v [B, N, S, J, D], stride_k and stride_v from one batch entry
      to the next.
    - Sorted choices (`Choices`): rows and weights [E].
    - Inverted index: starts, segment_starts, owners.
    - Output: partial_results [choices of the launch, G, D].
    - Scale: scale_log2, for exp2.
    - The launch: first_list and last_list.
    - Sizes: TILES of tokens per batch entry, N, and the constants of `Sizes`.
    """
    # 1. Find the segment; the grid is an upper bound, so programs behind the last segment have
    #    nothing to do.
    i_segment = tl.load(segment_starts + first_list) + tl.program_id(0)
    if i_segment >= tl.load(segment_starts + last_list):
        return
    first, count, n, i_j, i_b = find_segment(
        starts, segment_starts, owners, i_segment, TILES, N, J, SIZE
    )

    # 2. Load the chunk's k and v, once.
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, DP)
    # [SP, DP] each
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_k, mask=m_k, other=0.0)
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_k, mask=m_k, other=0.0)

    # 3. Process the choices, M at a time.
    o_r = tl.arange(0, M * GP)
    o_d = tl.arange(0, DP)
    o_e = o_r // GP
    o_g = o_r % GP
    rows += first
    weights += first
    partial_results += (first - tl.load(starts + first_list)) * (G * D)
    # The row numbers of the next tile are read one step ahead, so that its queries can be loaded in
    # time. [R]
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)
    for start in range(0, count, M):
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        # [R]: not the choices of the next segment, nor the rows that pad G to a power of 2
        m_r = (start + o_e < count) & (o_g < G)
        # [R]
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)
        m_q = m_r[:, None] & (o_d < D)[None, :]
        # [R, DP]
        b_q = tl.load(
            q + (b_row.to(tl.int64) * G + o_g)[:, None] * D + o_d[None, :], mask=m_q, other=0.0
        )
        # [R, DP] @ [DP, SP] -> [R, SP]
        b_s = product(b_q, tl.trans(b_k), PRECISION)
        # [R, SP], [R]
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)
        b_p = b_p * (b_w / b_sum)[:, None]
        # [R, SP] @ [SP, DP] -> [R, DP]
        b_out = product(b_p.to(b_v.dtype), b_v, PRECISION)
        o_part = (o_e * G + o_g)[:, None] * D + o_d[None, :]
        b_out = b_out.to(partial_results.dtype.element_ty)
        tl.store(
            partial_results + start * (G * D) + o_part,
            b_out,
            mask=m_q,
            eviction_policy="evict_first",
        )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Chunk attention in chunk order; as `chunk_attention`, for scale >= 0."""
    choices = Choices(q, k, indices, weights)
    sizes = Sizes.of(q, k)
    # One stage needs less shared memory, so one more program fits on a multiprocessor.
    options = sizes.options() | dict(num_stages=1)
    out = torch.empty_like(q)
    for launch in choices:
        chunk_attention_fwd_by_chunk_kernel[launch.grid](
            q, k, v, choices.rows, choices.weights, *choices.arguments, choices.partial_results,
            k.stride(0), v.stride(0),
            to_log2(scale), *launch.lists, choices.tiles, choices.N, SIZE=partial.SEGMENT,
            **sizes.constants(), **options,
        )  # fmt: skip
        choices.sum_partial_results(launch, out)
    return out
