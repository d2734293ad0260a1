"""The gradients of chunk attention, chunk by chunk: one computation of the probabilities serves all four.

No atomics, every sum in a fixed order:

- dk and dv of a chunk stay in registers for a segment of its choices, then the segments are added in order;
- dq of a choice is written to a slot of its own, then the slots of a token are added in order;
- dweights of a choice is one number: written, and put back into the order of tokens.

Columns of k, q and their gradients come in two halves: dq of a block, held whole, would not leave registers enough for tensor
cores to run on while the sums are in use.

Dimensions: B batch, T tokens, J key/value heads, G heads each (GP padded to a power of 2), D head dimension (DP padded, HP
half of it), N chunks, S chunk size (SP padded), K slots, M choices a block, R = M*GP rows.
"""

import torch
import triton
import triton.language as tl

from . import slots
from .slots import Choices, find_segment
from .tiles import Sizes, add_product, chunk_tile, product, softmax_inside, to_log2


@triton.jit
def _backward(
    q, k, v, grad_out, rows, weights, starts, segment_starts, owners, slots_q, parts_kv, grad_weights,
    stride_k, stride_v, scale_log2, first_list, last_list, TILES, N,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0)
    i_segment = tl.load(segment_starts + first_list) + i_part
    if i_segment >= tl.load(segment_starts + last_list):  # there are fewer segments than could be
        return
    first, count, n, i_j, i_b = find_segment(
        starts, segment_starts, owners, i_segment, TILES, N, J, SIZE
    )
    k += i_b.to(tl.int64) * stride_k
    v += i_b.to(tl.int64) * stride_v
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP)
    b_k0 = tl.load(k + o_k, mask=m_k, other=0.0)  # [SP, HP]
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP, HP)
    b_k1 = tl.load(k + o_k, mask=m_k, other=0.0)
    o_v, m_v = chunk_tile(n, i_j, J, S, D, SP, DP)
    b_v = tl.load(v + o_v, mask=m_v, other=0.0)  # [SP, DP]
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
    slots_q += (first - tl.load(starts + first_list)) * (G * D)
    b_dk0 = tl.zeros([SP, HP], tl.float32)
    b_lost0 = tl.zeros([SP, HP], tl.float32)
    b_dk1 = tl.zeros([SP, HP], tl.float32)
    b_lost1 = tl.zeros([SP, HP], tl.float32)
    b_dv = tl.zeros([SP, DP], tl.float32)
    b_lost = tl.zeros([SP, DP], tl.float32)
    # whose rows the next block needs is read one block ahead: they can then be on their way in time
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)  # [R]
    for start in range(0, count, M):
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        m_r = (start + o_e < count) & (
            o_g < G
        )  # choices of the next segment, and rows that pad G to a power of 2
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)  # [R]
        o_row = (b_row.to(tl.int64) * G + o_g)[:, None] * D
        m_0 = m_r[:, None] & (o_h < D)[None, :]
        m_1 = m_r[:, None] & (HP + o_h < D)[None, :]
        b_q0 = tl.load(q + o_row + o_h[None, :], mask=m_0, other=0.0)  # [R, HP]
        b_q1 = tl.load(q + o_row + HP + o_h[None, :], mask=m_1, other=0.0)
        b_do = tl.load(
            grad_out + o_row + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0
        )  # [R, DP]
        b_s = product(b_q0, tl.trans(b_k0), PRECISION) + product(b_q1, tl.trans(b_k1), PRECISION)
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)  # [R, SP], [R]
        b_dp = product(b_do, tl.trans(b_v), PRECISION)
        b_delta = (
            tl.sum(b_p * b_dp, 1) / b_sum
        )  # [R]: do . o of this chunk, what the weight is multiplied with
        b_p *= (b_w / b_sum)[:, None]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q0.dtype)
        b_dv, b_lost = add_product(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, b_lost, PRECISION)
        b_dk0, b_lost0 = add_product(tl.trans(b_ds), b_q0, b_dk0, b_lost0, PRECISION)
        b_dk1, b_lost1 = add_product(tl.trans(b_ds), b_q1, b_dk1, b_lost1, PRECISION)
        p_slot = slots_q + start * (G * D) + (o_e * G + o_g)[:, None] * D + o_h[None, :]
        b_dq = product(b_ds, b_k0, PRECISION)  # [R, HP]
        tl.store(p_slot, b_dq.to(slots_q.dtype.element_ty), mask=m_0, eviction_policy="evict_first")
        b_dq = product(b_ds, b_k1, PRECISION)
        tl.store(
            p_slot + HP, b_dq.to(slots_q.dtype.element_ty), mask=m_1, eviction_policy="evict_first"
        )
        tl.store(
            grad_weights + start + o_m,
            tl.sum(tl.reshape(b_delta, [M, GP]), 1),
            mask=start + o_m < count,
        )
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
def _sum_segments(
    parts_kv, segment_starts, grad_kv, scale, first_tile, last_tile, first_list, TILES, B, N,
    J: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Adds the segments of a launch, in order, to dk or dv of a chunk, fp32 [2, B, N, S, J, D]."""
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
    if i_kv == 0:
        total *= scale
    tl.store(grad_kv + o_k, tl.load(grad_kv + o_k, mask=mask, other=0.0) + total, mask=mask)


def backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, grad_out: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv and dweights."""
    B, N, S, J, D = k.shape
    choices = Choices(q, k, indices, weights)
    sizes = Sizes.of(q, k)
    parts = q.new_empty(choices.together * choices.segments_of_tile, 2, S, D, dtype=torch.float32)
    grad_q = torch.empty_like(q)
    grad_kv = q.new_zeros(2, *k.shape, dtype=torch.float32)
    sorted_grad_weights = torch.zeros_like(choices.weights)
    for launch in choices:
        _backward[launch.grid](
            q, k, v, grad_out, choices.rows, choices.weights, *choices.arguments, choices.slots, parts, sorted_grad_weights,
            k.stride(0), v.stride(0), to_log2(scale), *launch.lists, choices.tiles, N, SIZE=slots.SEGMENT,
            HP=max(sizes.DP // 2, 16), **sizes.constants(), **sizes.options(),
        )  # fmt: skip
        choices.sum_slots(launch, grad_q, scale)
        _sum_segments[B * J * N, 2](
            parts, choices.segments.starts, grad_kv, scale, launch.first, launch.last, launch.lists[0], choices.tiles, B, N,
            J=J, D=D, S=S, DP=sizes.DP, SP=sizes.SP,
        )  # fmt: skip
    grad_k, grad_v = (
        grad.to(q.dtype, copy=True) for grad in grad_kv
    )  # results of an operator share no memory
    return grad_q, grad_k, grad_v, sorted_grad_weights[choices.places].view_as(weights)
