"""One new token enters its window: queries and keys normed and turned, key and value put into their slot. One launch for what
else are twenty.

Dimensions: B batch, H query heads, J key/value heads, D head dimension (half of it padded to HP), W slots.
"""

import torch
import triton
import triton.language as tl

from hsa_mini.reference.checks import check_enter_ring

from .checks import check_kernel


@triton.jit
def _turned(x, gain, cos, sin, o, m, eps, D: tl.constexpr):
    """Both halves of a head [HP]: its root mean square made 1, times the gains, turned by the angles."""
    b_1 = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(x + D // 2 + o, mask=m, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(b_1 * b_1, 0) + tl.sum(b_2 * b_2, 0)) / D + eps)
    b_1 *= scale * tl.load(gain + o, mask=m, other=0.0).to(tl.float32)
    b_2 *= scale * tl.load(gain + D // 2 + o, mask=m, other=0.0).to(tl.float32)
    b_cos = tl.load(cos + o, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + o, mask=m, other=0.0).to(tl.float32)
    return b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin


@triton.jit
def _enter(
    q, k, v, ring_k, ring_v, slots, q_gain, k_gain, cos, sin, out, stride_k, stride_v, eps,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0)
    i_b = tl.program_id(1)
    o = tl.arange(0, HP)
    m = o < D // 2  # what pads half a head to a power of 2
    cos += i_b * (D // 2)
    sin += i_b * (D // 2)
    slot = tl.load(slots + i_b)
    if i_h < H:
        b_1, b_2 = _turned(q + (i_b * H + i_h) * D, q_gain, cos, sin, o, m, eps, D)
        p_out = out + (i_b * H + i_h) * D + o
        tl.store(p_out, b_1.to(out.dtype.element_ty), mask=m)
        tl.store(p_out + D // 2, b_2.to(out.dtype.element_ty), mask=m)
    else:
        i_j = i_h - H
        b_1, b_2 = _turned(k + (i_b * J + i_j) * D, k_gain, cos, sin, o, m, eps, D)
        p_k = ring_k + i_b.to(tl.int64) * stride_k + (slot * J + i_j) * D + o
        tl.store(p_k, b_1.to(ring_k.dtype.element_ty), mask=m)
        tl.store(p_k + D // 2, b_2.to(ring_k.dtype.element_ty), mask=m)
        p_v = ring_v + i_b.to(tl.int64) * stride_v + (slot * J + i_j) * D + o
        p_in = v + (i_b * J + i_j) * D + o
        tl.store(p_v, tl.load(p_in, mask=m), mask=m)
        tl.store(p_v + D // 2, tl.load(p_in + D // 2, mask=m), mask=m)


def enter_ring(
    q, k, v, ring_k, ring_v, slots, q_gain, k_gain, table, *, eps: float
) -> torch.Tensor:
    """The twin of `blockwise.enter_ring`, in float16, bfloat16 or float32, rounded once. No gradient.

    Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_enter_ring(q, k, v, ring_k, ring_v, slots)
    check_kernel(q=q, k=k, v=v)
    B, _, H, D = q.shape
    J = k.shape[2]
    out = torch.empty_like(q)
    cos, sin = (part.expand(B, 1, D // 2).contiguous() for part in table)
    _enter[H + J, B](
        q, k, v, ring_k, ring_v, slots, q_gain, k_gain, cos, sin, out, ring_k.stride(0), ring_v.stride(0), eps, H=H, J=J, D=D,
        HP=triton.next_power_of_2(D // 2), num_warps=1,
    )  # fmt: skip
    return out
