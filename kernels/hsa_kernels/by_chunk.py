"""Chunk attention, chunk by chunk: every program owns a chunk's tiles and meets the tokens that chose it.

A choice costs a token's rows of q, and its result written and read once: less than a chunk's k and v, unless a block of
neighbouring tokens shares these (`by_token.py`).

Dimensions: B batch, T tokens, J key/value heads, G heads each (GP padded to a power of 2), D head dimension (DP padded), N
chunks, S chunk size (SP padded), K slots, M choices a block, R = M*GP rows.
"""

import torch
import triton
import triton.language as tl

from . import slots
from .slots import Choices, find_segment
from .tiles import Sizes, chunk_tile, product, softmax_inside, to_log2


@triton.jit
def _forward_by_chunk(
    q, k, v, rows, weights, starts, segment_starts, owners, out_slots, stride_k, stride_v, scale_log2, first_list, last_list,
    TILES, N, J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_segment = tl.load(segment_starts + first_list) + tl.program_id(0)
    if i_segment >= tl.load(segment_starts + last_list):  # there are fewer segments than could be
        return
    first, count, n, i_j, i_b = find_segment(
        starts, segment_starts, owners, i_segment, TILES, N, J, SIZE
    )
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, DP)
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_k, mask=m_k, other=0.0)  # [SP, DP]
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_k, mask=m_k, other=0.0)
    o_r = tl.arange(0, M * GP)
    o_d = tl.arange(0, DP)
    o_e = o_r // GP
    o_g = o_r % GP
    rows += first
    weights += first
    out_slots += (first - tl.load(starts + first_list)) * (G * D)
    # whose rows the next block needs is read one block ahead: they can then be on their way in time
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)  # [R]
    for start in range(0, count, M):
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        m_r = (start + o_e < count) & (
            o_g < G
        )  # choices of the next segment, and rows that pad G to a power of 2
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)  # [R]
        m_q = m_r[:, None] & (o_d < D)[None, :]
        b_q = tl.load(
            q + (b_row.to(tl.int64) * G + o_g)[:, None] * D + o_d[None, :], mask=m_q, other=0.0
        )  # [R, DP]
        b_s = product(b_q, tl.trans(b_k), PRECISION)
        b_p, b_sum = softmax_inside(b_s, scale_log2, S, SP)  # [R, SP], [R]
        b_p = b_p * (b_w / b_sum)[:, None]
        b_out = product(b_p.to(b_v.dtype), b_v, PRECISION)
        o_slot = (o_e * G + o_g)[:, None] * D + o_d[None, :]
        b_out = b_out.to(out_slots.dtype.element_ty)
        tl.store(
            out_slots + start * (G * D) + o_slot, b_out, mask=m_q, eviction_policy="evict_first"
        )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    choices = Choices(q, k, indices, weights)
    sizes = Sizes.of(q, k)
    out = torch.empty_like(q)
    for launch in choices:
        _forward_by_chunk[launch.grid](
            q, k, v, choices.rows, choices.weights, *choices.arguments, choices.slots, k.stride(0), v.stride(0), to_log2(scale),
            *launch.lists, choices.tiles, choices.N, SIZE=slots.SEGMENT, **sizes.constants(),
            **sizes.options() | dict(num_stages=1),  # leaves room for one more program on a processor
        )  # fmt: skip
        choices.sum_slots(launch, out)
    return out
