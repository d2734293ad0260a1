"""One new token enters its window: queries and keys are normed and rotated, key and value are
written into the cache.

One launch replaces twenty.

Dimensions: B batch, H query heads, J key/value heads, D head dimension (half of it padded to HP), W
slots of the cache.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.common.checks import check_kernel
from hsa_mini.reference.checks import check_update_window_cache


@triton.jit
def _norm_and_rotate(x, gain, cos, sin, o, m, eps, D: tl.constexpr):
    """RMSNorm (unless gain is None) and rotary embedding of one head: x [D] -> its two halves,
    each [HP].
    """
    b_1 = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    b_2 = tl.load(x + D // 2 + o, mask=m, other=0.0).to(tl.float32)
    if gain is not None:
        scale = 1.0 / tl.sqrt((tl.sum(b_1 * b_1, 0) + tl.sum(b_2 * b_2, 0)) / D + eps)
        b_1 *= scale * tl.load(gain + o, mask=m, other=0.0).to(tl.float32)
        b_2 *= scale * tl.load(gain + D // 2 + o, mask=m, other=0.0).to(tl.float32)
    b_cos = tl.load(cos + o, mask=m, other=0.0).to(tl.float32)
    b_sin = tl.load(sin + o, mask=m, other=0.0).to(tl.float32)
    return b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin


@triton.jit
def update_window_cache_kernel(
    q, k, v, cache_k, cache_v, slots, q_gain, k_gain, cos, sin, out, stride_k, stride_v, eps,
    H: tl.constexpr, J: tl.constexpr, D: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """One program: one query head, or one key/value head, of one sequence's new token.

    Grid: (H + J, B). The first H programs of a sequence write queries, the other J write into the
    cache.

    - Inputs: q [B, 1, H, D], k and v [B, 1, J, D], as projected.
    - Norm: q_gain and k_gain [D] or None, eps.
    - Rotation: cos and sin [B, 1, D/2].
    - Outputs: out [B, 1, H, D]; cache_k and cache_v [B, W, J, D], with stride_k and stride_v from
      one batch entry to the next, at slots int64 [B].
    """
    i_h = tl.program_id(0)
    i_b = tl.program_id(1)
    o = tl.arange(0, HP)
    m = o < D // 2  # the rest pads half a head to a power of 2
    cos += i_b * (D // 2)
    sin += i_b * (D // 2)
    slot = tl.load(slots + i_b)
    if i_h < H:
        # A query head: two halves [HP].
        b_1, b_2 = _norm_and_rotate(q + (i_b * H + i_h) * D, q_gain, cos, sin, o, m, eps, D)
        p_out = out + (i_b * H + i_h) * D + o
        tl.store(p_out, b_1.to(out.dtype.element_ty), mask=m)
        tl.store(p_out + D // 2, b_2.to(out.dtype.element_ty), mask=m)
    else:
        # A key head: two halves [HP].
        i_j = i_h - H
        b_1, b_2 = _norm_and_rotate(k + (i_b * J + i_j) * D, k_gain, cos, sin, o, m, eps, D)
        p_k = cache_k + i_b.to(tl.int64) * stride_k + (slot * J + i_j) * D + o
        tl.store(p_k, b_1.to(cache_k.dtype.element_ty), mask=m)
        tl.store(p_k + D // 2, b_2.to(cache_k.dtype.element_ty), mask=m)
        # Its value head is copied as it is.
        p_v = cache_v + i_b.to(tl.int64) * stride_v + (slot * J + i_j) * D + o
        p_in = v + (i_b * J + i_j) * D + o
        tl.store(p_v, tl.load(p_in, mask=m), mask=m)
        tl.store(p_v + D // 2, tl.load(p_in + D // 2, mask=m), mask=m)


def update_window_cache(
    q, k, v, cache_k, cache_v, slots, q_gain, k_gain, table, *, eps: float
) -> torch.Tensor:
    """The twin of `torch_backend.update_window_cache`, in float16, bfloat16 or float32, rounded
    once. No gradient.

    q [B, 1, H, D], k and v [B, 1, J, D], cache_k and cache_v [B, W, J, D] (written in place), slots
    int64 [B], q_gain and k_gain [D] or None, table: cos and sin [1 or B, 1, D/2] -> q [B, 1, H, D],
    normed and rotated. Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_update_window_cache(q, k, v, cache_k, cache_v, slots)
    check_kernel(q=q, k=k, v=v)
    B, _, H, D = q.shape
    J = k.shape[2]
    out = torch.empty_like(q)
    cos, sin = (part.expand(B, 1, D // 2).contiguous() for part in table)
    update_window_cache_kernel[H + J, B](
        q, k, v, cache_k, cache_v, slots, q_gain, k_gain, cos, sin, out, cache_k.stride(0),
        cache_v.stride(0), eps,
        H=H, J=J, D=D, HP=triton.next_power_of_2(D // 2), num_warps=1,
    )  # fmt: skip
    return out
