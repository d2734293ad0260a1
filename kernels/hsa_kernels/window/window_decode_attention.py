"""One new token against its window: attention over the slots of a cache, spread over the whole GPU.

The key at position p lies in slot p % W, so slots are not in order of time. Attention does not
depend on the order.

Two launches with fixed grids, so that a CUDA graph can hold them:
1. one program per part of BW slots: attention inside the part, with the maximum and the sum of its
   softmax;
2. one program per query head: the parts combined.

    cache   | BW slots | BW slots | ... | rest |          parts  [B, J, NW, G, D]
              part 0     part 1           part NW - 1     maxima, sums [B, J, NW, G]

Dimensions: B batch, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head
dimension (DP padded), W slots, BW slots per part, NW parts (NWP padded).
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.common.checks import check_kernel
from hsa_kernels.common.tiles import (
    HOPPER,
    SHARED_MEMORY,
    padded,
    precision,
    shared_memory,
    to_log2,
)
from hsa_mini.reference.checks import check_window_decode


@triton.jit
def window_decode_attend_kernel(
    q, k, v, positions, parts, maxima, sums, stride_k, stride_v, scale_log2, W,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr,
    BW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: attention of G query heads inside one part of BW slots, not normalised. Grid:
    (NW, J, B).

    - Inputs: q [B, 1, J*G, D]; k and v [B, W, J, D], stride_k and stride_v from one batch entry to
      the next; positions [B].
    - Outputs: parts fp32 [B, J, NW, G, D], maxima and sums fp32 [B, J, NW, G].
    - Scale: scale_log2, for exp2.
    """
    # 1. Which slots. Before the cache is full, slots behind the position hold nothing.
    i_w = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b * J + i_j).to(tl.int64)
    o_g = tl.arange(0, GP)
    o_d = tl.arange(0, DP)
    o_w = i_w * BW + tl.arange(0, BW)
    m_w = (o_w < W) & (o_w <= tl.load(positions + i_b))

    # 2. Load queries [GP, DP], keys and values [BW, DP].
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(q + row * G * D + o_g[:, None] * D + o_d[None, :], mask=m_q, other=0.0)
    o_kv = (o_w * J + i_j)[:, None] * D + o_d[None, :]
    m_kv = m_w[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_kv, mask=m_kv, other=0.0)

    # 3. Attend.
    # [GP, DP] @ [DP, BW] -> [GP, BW]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_s = tl.where(m_w[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1)  # [GP], -inf if the part holds nothing
    b_p = tl.where(
        m_w[None, :], tl.exp2(b_s - tl.where(b_max > float("-inf"), b_max, 0.0)[:, None]), 0.0
    )
    # [GP, BW] @ [BW, DP] -> [GP, DP]
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)

    # 4. Write.
    o_part = (row * tl.num_programs(0) + i_w) * G + o_g
    tl.store(parts + o_part[:, None] * D + o_d[None, :], b_out, mask=m_q)
    tl.store(maxima + o_part, b_max, mask=o_g < G)
    tl.store(sums + o_part, tl.sum(b_p, 1), mask=o_g < G)


@triton.jit
def window_decode_combine_kernel(
    parts, maxima, sums, out, NW, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    NWP: tl.constexpr
):  # fmt: skip
    """One program: the output [D] of one query head, its NW parts rescaled to a common maximum.

    Grid: (G, B*J).
    """
    i_g = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    o_w = tl.arange(0, NWP)
    o_d = tl.arange(0, DP)
    o_part = (row * NW + o_w) * G + i_g
    m_w = o_w < NW
    # [NWP]
    b_max = tl.load(maxima + o_part, mask=m_w, other=float("-inf"))
    b_scale = tl.exp2(
        b_max - tl.max(b_max, 0)
    )  # slot 0 always holds a key, so the maximum is finite
    b_sum = tl.sum(tl.load(sums + o_part, mask=m_w, other=0.0) * b_scale, 0)
    # [NWP, DP]
    b_part = tl.load(
        parts + o_part[:, None] * D + o_d[None, :],
        mask=m_w[:, None] & (o_d < D)[None, :],
        other=0.0,
    )
    # [NWP, DP] -> [DP]
    b_out = tl.sum(b_part * (b_scale / b_sum)[:, None], 0)
    tl.store(out + (row * G + i_g) * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)


def window_decode_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The twin of `torch_backend.window_decode_attention`, in float16, bfloat16 or float32. No
    gradient.

    q [B, 1, H, D], k and v [B, W, J, D], positions int64 [B] of the new tokens -> [B, 1, H, D].
    Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_window_decode(q, k, v, positions)
    check_kernel(q=q, k=k, v=v)
    B, _, H, D = q.shape
    W, J = k.shape[1:3]
    G = H // J
    tight = q.dtype == torch.float32 and shared_memory(q) < SHARED_MEMORY[HOPPER]
    BW = 32 if tight else 64
    NW = triton.cdiv(W, BW)
    parts = torch.empty(B, J, NW, G, D, device=q.device)
    maxima, sums = (torch.empty(B, J, NW, G, device=q.device) for _ in range(2))
    window_decode_attend_kernel[NW, J, B](
        q, k, v, positions, parts, maxima, sums, k.stride(0), v.stride(0), to_log2(D**-0.5), W,
        J=J, G=G, D=D, GP=padded(G),
        DP=padded(D), BW=BW, PRECISION=precision(q.dtype), num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q)
    window_decode_combine_kernel[G, B * J](
        parts, maxima, sums, out, NW, G=G, D=D, DP=padded(D), NWP=triton.next_power_of_2(NW),
        num_warps=4
    )  # fmt: skip
    return out
