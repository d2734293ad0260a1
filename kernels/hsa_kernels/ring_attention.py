"""One new token against its window: the slots of a ring, spread over the whole GPU.

Two launches, of fixed grids, so that a CUDA graph can hold them:
1. a program a stretch of slots: attention inside it, with the maximum and the sum that its softmax has there;
2. the stretches put together.

Dimensions: B batch, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP padded), W slots,
BW slots a stretch, NW stretches (NWP padded).
"""

import torch
import triton
import triton.language as tl

from hsa_mini.reference.checks import check_ring

from .checks import check_kernel
from .tiles import padded, precision, to_log2

BW = 64


@triton.jit
def _attend_slots(
    q, k, v, positions, parts, maxima, sums, stride_k, stride_v, scale_log2, W,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, BW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_w = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b * J + i_j).to(tl.int64)
    o_g = tl.arange(0, GP)
    o_d = tl.arange(0, DP)
    o_w = i_w * BW + tl.arange(0, BW)
    m_w = (o_w < W) & (
        o_w <= tl.load(positions + i_b)
    )  # until the ring has come round, later slots hold nothing
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    b_q = tl.load(
        q + row * G * D + o_g[:, None] * D + o_d[None, :], mask=m_q, other=0.0
    )  # [GP, DP]
    o_kv = (o_w * J + i_j)[:, None] * D + o_d[None, :]
    m_kv = m_w[:, None] & (o_d < D)[None, :]
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_kv, mask=m_kv, other=0.0)  # [BW, DP]
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_kv, mask=m_kv, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2
    b_s = tl.where(m_w[None, :], b_s, float("-inf"))
    b_max = tl.max(b_s, 1)
    b_p = tl.where(
        m_w[None, :], tl.exp2(b_s - tl.where(b_max > float("-inf"), b_max, 0.0)[:, None]), 0.0
    )
    b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    o_part = (row * tl.num_programs(0) + i_w) * G + o_g
    tl.store(parts + o_part[:, None] * D + o_d[None, :], b_out, mask=m_q)
    tl.store(maxima + o_part, b_max, mask=o_g < G)
    tl.store(sums + o_part, tl.sum(b_p, 1), mask=o_g < G)


@triton.jit
def _join_stretches(
    parts, maxima, sums, out, NW, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NWP: tl.constexpr
):  # fmt: skip
    i_g = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    o_w = tl.arange(0, NWP)
    o_d = tl.arange(0, DP)
    o_part = (row * NW + o_w) * G + i_g
    m_w = o_w < NW
    b_max = tl.load(maxima + o_part, mask=m_w, other=float("-inf"))
    b_scale = tl.exp2(b_max - tl.max(b_max, 0))  # slot 0 is always seen: the maximum is finite
    b_sum = tl.sum(tl.load(sums + o_part, mask=m_w, other=0.0) * b_scale, 0)
    b_part = tl.load(
        parts + o_part[:, None] * D + o_d[None, :],
        mask=m_w[:, None] & (o_d < D)[None, :],
        other=0.0,
    )  # [NWP, DP]
    b_out = tl.sum(b_part * (b_scale / b_sum)[:, None], 0)
    tl.store(out + (row * G + i_g) * D + o_d, b_out.to(out.dtype.element_ty), mask=o_d < D)


def ring_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The twin of `blockwise.ring_attention`, in float16, bfloat16 or float32. No gradient.

    Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_ring(q, k, v, positions)
    check_kernel(q=q, k=k, v=v)
    B, _, H, D = q.shape
    W, J = k.shape[1:3]
    G = H // J
    NW = triton.cdiv(W, BW)
    parts = torch.empty(B, J, NW, G, D, device=q.device)
    maxima, sums = (torch.empty(B, J, NW, G, device=q.device) for _ in range(2))
    _attend_slots[NW, J, B](
        q, k, v, positions, parts, maxima, sums, k.stride(0), v.stride(0), to_log2(D**-0.5), W, J=J, G=G, D=D, GP=padded(G),
        DP=padded(D), BW=BW, PRECISION=precision(q.dtype), num_warps=4,
    )  # fmt: skip
    out = torch.empty_like(q)
    _join_stretches[G, B * J](
        parts, maxima, sums, out, NW, G=G, D=D, DP=padded(D), NWP=triton.next_power_of_2(NW), num_warps=4
    )  # fmt: skip
    return out
