"""The gradients of chunk attention, in chunk order; all four share the same probabilities.

There are no atomics; every sum has a fixed order:

- dk and dv of a chunk stay in registers for one segment of its choices; afterwards the segments are
  added in order;
- dq of a choice is a partial result of its own; afterwards the partial results of a token are added
  in order;
- dweights of a choice is one number, which is written in sorted order and put back into the order
  of tokens.

The columns of k, q and their gradients come in two halves. A whole dq tile would take so many
registers that the tensor cores could not run while the sums are in use.

Dimensions: B batch, T tokens, J key/value heads, G heads each (GP padded to a power of 2), D head
dimension (DP padded, HP half of it), N chunks, S chunk size (SP padded), K chunks kept per token, M
choices per tile, R = M*GP rows of a tile.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.attention import partial_results as partial
from hsa_kernels.attention.partial_results import Choices, find_segment
from hsa_kernels.common.tiles import (
    Sizes,
    add_product,
    chunk_tile,
    product,
    softmax_inside,
    to_log2,
)


@triton.jit
def chunk_attention_bwd_kernel(
    q, k, v, grad_out, rows, weights, starts, segment_starts, owners, partial_q, parts_kv,
    grad_weights,
    stride_k, stride_v, scale_log2, first_list, last_list, TILES, N,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of one segment, up to SIZE tokens that chose one chunk.

    Grid: (an upper bound of the launch's segments,). Row m*GP + g of a tile is head g of the m-th
    choice. The kernel is one function because its phases share registers: split up, every tile
    would pass through memory.

    - Inputs: q and grad_out [B, T, J*G, D]; k and v [B, N, S, J, D], stride_k and stride_v from one
      batch entry to the next.
    - Sorted choices (`Choices`): rows and weights [E].
    - Inverted index: starts, segment_starts, owners.
    - Outputs: partial_q [choices of the launch, G, D], dq of each choice; parts_kv fp32 [segments
      of the launch, 2, S, D], dk and dv of each segment; grad_weights [E], in sorted order.
    - Scale: scale_log2, for exp2; dq and dk are scaled when they are added up.
    - The launch: first_list and last_list.
    - Sizes: TILES of tokens per batch entry, N, and the constants of `Sizes`.
    """
    # 1. Find the segment; the grid is an upper bound, so programs behind the last segment have
    #    nothing to do.
    i_part = tl.program_id(0)
    i_segment = tl.load(segment_starts + first_list) + i_part
    if i_segment >= tl.load(segment_starts + last_list):
        return
    first, count, n, i_j, i_b = find_segment(
        starts, segment_starts, owners, i_segment, TILES, N, J, SIZE
    )

    # 2. Load the chunk's k, in two halves, and its v.
    k += i_b.to(tl.int64) * stride_k
    v += i_b.to(tl.int64) * stride_v
    # [SP, HP]: columns 0 to HP
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP)
    b_k0 = tl.load(k + o_k, mask=m_k, other=0.0)
    # [SP, HP]: columns HP to 2*HP
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP, HP)
    b_k1 = tl.load(k + o_k, mask=m_k, other=0.0)
    # [SP, DP]
    o_v, m_v = chunk_tile(n, i_j, J, S, D, SP, DP)
    b_v = tl.load(v + o_v, mask=m_v, other=0.0)

    # 3. Prepare offsets and sums.
    o_r = tl.arange(0, M * GP)
    o_m = tl.arange(0, M)
    o_s = tl.arange(0, SP)
    o_h = tl.arange(0, HP)
    o_d = tl.arange(0, DP)
    o_e = o_r // GP
    o_g = o_r % GP
    rows += first
    weights += first
    grad_weights += first
    partial_q += (first - tl.load(starts + first_list)) * (G * D)
    b_dk0 = tl.zeros([SP, HP], tl.float32)
    b_lost0 = tl.zeros([SP, HP], tl.float32)
    b_dk1 = tl.zeros([SP, HP], tl.float32)
    b_lost1 = tl.zeros([SP, HP], tl.float32)
    b_dv = tl.zeros([SP, DP], tl.float32)
    b_lost = tl.zeros([SP, DP], tl.float32)

    # 4. Process the choices, M at a time. The row numbers of the next tile are read one step ahead,
    #    so that its queries can be loaded in time. [R]
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)
    for start in range(0, count, M):
        # 4a. Load weights [R], queries [R, HP] twice, and upstream gradients [R, DP].
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        # [R]: not the choices of the next segment, nor the rows that pad G to a power of 2
        m_r = (start + o_e < count) & (o_g < G)
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)
        o_row = (b_row.to(tl.int64) * G + o_g)[:, None] * D
        m_0 = m_r[:, None] & (o_h < D)[None, :]
        m_1 = m_r[:, None] & (HP + o_h < D)[None, :]
        b_q0 = tl.load(q + o_row + o_h[None, :], mask=m_0, other=0.0)
        b_q1 = tl.load(q + o_row + HP + o_h[None, :], mask=m_1, other=0.0)
        b_do = tl.load(
            grad_out + o_row + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0
        )

        # 4b. Compute the probabilities once more.
        # [R, HP] @ [HP, SP] -> [R, SP], for both halves
        b_s = product(b_q0, tl.trans(b_k0), PRECISION) + product(b_q1, tl.trans(b_k1), PRECISION)
        # [R, SP], [R]
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)
        # [R, DP] @ [DP, SP] -> [R, SP]
        b_dp = product(b_do, tl.trans(b_v), PRECISION)
        # [R]: do . o of this chunk alone, which is also the gradient of its weight
        b_delta = tl.sum(b_p * b_dp, 1) / b_sum
        # [R, SP]: probabilities times weight, and the gradient of the scores
        b_p *= (b_w / b_sum)[:, None]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q0.dtype)

        # 4c. Add to dv [SP, DP] and to both halves of dk [SP, HP].
        b_dv, b_lost = add_product(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, b_lost, PRECISION)
        b_dk0, b_lost0 = add_product(tl.trans(b_ds), b_q0, b_dk0, b_lost0, PRECISION)
        b_dk1, b_lost1 = add_product(tl.trans(b_ds), b_q1, b_dk1, b_lost1, PRECISION)

        # 4d. Write dq, half by half, and dweights.
        p_part = partial_q + start * (G * D) + (o_e * G + o_g)[:, None] * D + o_h[None, :]
        # [R, SP] @ [SP, HP] -> [R, HP]
        b_dq = product(b_ds, b_k0, PRECISION)
        tl.store(
            p_part, b_dq.to(partial_q.dtype.element_ty), mask=m_0, eviction_policy="evict_first"
        )
        b_dq = product(b_ds, b_k1, PRECISION)
        tl.store(
            p_part + HP,
            b_dq.to(partial_q.dtype.element_ty),
            mask=m_1,
            eviction_policy="evict_first",
        )
        # [R] -> [M, GP] -> [M]: the heads of a choice share its weight
        tl.store(
            grad_weights + start + o_m,
            tl.sum(tl.reshape(b_delta, [M, GP]), 1),
            mask=start + o_m < count,
        )

    # 5. Write dk and dv of the segment.
    part = parts_kv + i_part.to(tl.int64) * (2 * S * D)
    o_part = o_s[:, None] * D
    tl.store(part + o_part + o_h[None, :], b_dk0, mask=(o_s < S)[:, None] & (o_h < D)[None, :])
    tl.store(
        part + o_part + HP + o_h[None, :], b_dk1, mask=(o_s < S)[:, None] & (HP + o_h < D)[None, :]
    )
    tl.store(
        part + S * D + o_part + o_d[None, :], b_dv, mask=(o_s < S)[:, None] & (o_d < D)[None, :]
    )


@triton.jit
def chunk_attention_bwd_sum_segments_kernel(
    parts_kv, segment_starts, grad_kv, scale, first_tile, last_tile, first_list, TILES, B, N,
    J: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """One program: dk, or dv, of one chunk and head: adds the segments of a launch to it, in order.

    Grid: (B*J*N, 2); the second axis is 0 for dk and 1 for dv.

    - Inputs: parts_kv fp32 [segments of the launch, 2, S, D], segment_starts.
    - Output: grad_kv fp32 [2, B, N, S, J, D].
    - Scale: of dk.
    - The launch: first_tile to last_tile, first_list.
    - Sizes: TILES of tokens per batch entry, B, N, constants.
    """
    # 1. Find the chunk.
    i_chunk = tl.program_id(0)
    i_kv = tl.program_id(1)
    n = i_chunk % N
    i_j = i_chunk // N % J
    i_b = i_chunk // N // J
    o_s = tl.arange(0, SP)
    o_d = tl.arange(0, DP)
    o_sd = o_s[:, None] * D + o_d[None, :]
    o_k, mask = chunk_tile(n, i_j, J, S, D, SP, DP)
    grad_kv += (i_kv * B + i_b).to(tl.int64) * N * S * J * D

    # 2. Add its segments, tile of tokens by tile of tokens. [SP, DP]
    base = tl.load(segment_starts + first_list)
    total = tl.zeros([SP, DP], tl.float32)
    for tile in range(
        tl.maximum(first_tile, i_b * TILES), tl.minimum(last_tile, (i_b + 1) * TILES)
    ):
        i_list = (tile * J + i_j) * N + n
        for segment in range(
            tl.load(segment_starts + i_list), tl.load(segment_starts + i_list + 1)
        ):
            total += tl.load(
                parts_kv + ((segment - base) * 2 + i_kv) * S * D + o_sd, mask=mask, other=0.0
            )

    # 3. Add the sum to what earlier launches have found.
    if i_kv == 0:
        total *= scale
    tl.store(grad_kv + o_k, tl.load(grad_kv + o_k, mask=mask, other=0.0) + total, mask=mask)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor,
    weights: torch.Tensor, grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """grad_out [B, T, H, D], and the inputs of `chunk_attention` -> dq, dk, dv and dweights."""
    B, N, S, J, D = k.shape
    choices = Choices(q, k, indices, weights)
    sizes = Sizes.of(q, k)
    parts = q.new_empty(choices.together * choices.segments_of_tile, 2, S, D, dtype=torch.float32)
    grad_q = torch.empty_like(q)
    grad_kv = q.new_zeros(2, *k.shape, dtype=torch.float32)
    sorted_grad_weights = torch.zeros_like(choices.weights)
    for launch in choices:
        chunk_attention_bwd_kernel[launch.grid](
            q, k, v, grad_out, choices.rows, choices.weights, *choices.arguments,
            choices.partial_results, parts,
            sorted_grad_weights, k.stride(0), v.stride(0), to_log2(scale), *launch.lists,
            choices.tiles, N,
            SIZE=partial.SEGMENT, HP=max(sizes.DP // 2, 16), **sizes.constants(), **sizes.options(),
        )  # fmt: skip
        choices.sum_partial_results(launch, grad_q, scale)
        chunk_attention_bwd_sum_segments_kernel[B * J * N, 2](
            parts, choices.segments.starts, grad_kv, scale, launch.first, launch.last,
            launch.lists[0], choices.tiles, B, N,
            J=J, D=D, S=S, DP=sizes.DP, SP=sizes.SP,
        )  # fmt: skip
    # copy=True, because the results of a custom operator must not share memory
    grad_k, grad_v = (grad.to(q.dtype, copy=True) for grad in grad_kv)
    return grad_q, grad_k, grad_v, sorted_grad_weights[choices.inverse_order].view_as(weights)
