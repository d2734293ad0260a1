"""The gradients of chunk attention, chunk by chunk: every program owns a chunk's tiles and meets the tokens that chose it.

A choice is one token's slot: it costs its rows of q and of the upstream gradient (4 times less than a chunk's k and v), and
one computation of the probabilities serves all four gradients. No atomics, every sum in a fixed order:

- dk and dv of a chunk stay in registers for a segment of its choices, then the segments are added in order;
- dq of a choice is written to a slot of its own, then the slots of a token are added in order;
- dweights of a choice is one number: written, and put back into the order of tokens.

The slots of dq take G*D numbers a choice, so only some tokens are under way at once: a launch takes as many tiles of tokens
as `SLOTS_BYTES` hold. Within a tile the tokens' q and upstream gradient stay in the L2 cache while the chunks go by.

Columns of k, q and their gradients come in two halves: dq of a block, held whole, would not leave registers enough for tensor
cores to run on while the sums are in use.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP
padded, HP half of it), N chunks, S chunk size (SP padded), K slots (KP padded), M choices a block, R = M*GP rows.
"""

import torch
import triton
import triton.language as tl

from .inverted_index import cut, invert
from .tiles import LOG2_E, chunk_tile, softmax_inside

SEGMENT = 512  # choices that one program adds up
TILE = 4096  # tokens, at least: 16 heads of 128 numbers, twice, are half of an H200's L2
LONGEST_TILE = 32768
CHOICES = 128  # of a chunk in a tile, on average, at least: they have to be worth loading and adding its tiles
SLOTS_BYTES = 1 << 32


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
    i_list = tl.load(owners + i_segment)
    first = tl.load(starts + i_list) + (i_segment - tl.load(segment_starts + i_list)) * SIZE
    count = tl.minimum(tl.load(starts + i_list + 1) - first, SIZE).to(tl.int32)
    i_j, i_b = i_list // N % J, i_list // N // J // TILES
    n = i_list % N
    k += i_b.to(tl.int64) * stride_k
    v += i_b.to(tl.int64) * stride_v
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP)
    b_k0 = tl.load(k + o_k, mask=m_k, other=0.0)  # [SP, HP]
    o_k, m_k = chunk_tile(n, i_j, J, S, D, SP, HP, HP)
    b_k1 = tl.load(k + o_k, mask=m_k, other=0.0)
    o_v, m_v = chunk_tile(n, i_j, J, S, D, SP, DP)
    b_v = tl.load(v + o_v, mask=m_v, other=0.0)  # [SP, DP]
    o_r, o_m, o_s, o_h, o_d = tl.arange(0, M * GP), tl.arange(0, M), tl.arange(0, SP), tl.arange(0, HP), tl.arange(0, DP)
    o_e, o_g = o_r // GP, o_r % GP
    rows += first
    weights += first
    grad_weights += first
    slots_q += (first - tl.load(starts + first_list)) * (G * D)
    b_dk0 = tl.zeros([SP, HP], tl.float32)
    b_dk1 = tl.zeros([SP, HP], tl.float32)
    b_dv = tl.zeros([SP, DP], tl.float32)
    # whose rows the next block needs is read one block ahead: they can then be on their way in time
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)  # [R]
    for start in range(0, count, M):
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        m_r = (start + o_e < count) & (o_g < G)  # choices of the next segment, and rows that pad G to a power of 2
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)  # [R]
        o_row = (b_row.to(tl.int64) * G + o_g)[:, None] * D
        m_0, m_1 = m_r[:, None] & (o_h < D)[None, :], m_r[:, None] & (HP + o_h < D)[None, :]
        b_q0 = tl.load(q + o_row + o_h[None, :], mask=m_0, other=0.0)  # [R, HP]
        b_q1 = tl.load(q + o_row + HP + o_h[None, :], mask=m_1, other=0.0)
        b_do = tl.load(grad_out + o_row + o_d[None, :], mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)  # [R, DP]
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=PRECISION)
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=PRECISION)
        b_p, b_sum = softmax_inside(b_s * scale_log2, S, SP)  # [R, SP], [R]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_delta = tl.sum(b_p * b_dp, 1) / b_sum  # [R]: do . o of this chunk, what the weight is multiplied with
        b_p *= (b_w / b_sum)[:, None]
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_q0.dtype)
        b_dv = tl.dot(tl.trans(b_p.to(b_do.dtype)), b_do, b_dv, input_precision=PRECISION)
        b_dk0 = tl.dot(tl.trans(b_ds), b_q0, b_dk0, input_precision=PRECISION)
        b_dk1 = tl.dot(tl.trans(b_ds), b_q1, b_dk1, input_precision=PRECISION)
        p_slot = slots_q + start * (G * D) + (o_e * G + o_g)[:, None] * D + o_h[None, :]
        b_dq = tl.dot(b_ds, b_k0, input_precision=PRECISION)  # [R, HP]
        tl.store(p_slot, b_dq.to(slots_q.dtype.element_ty), mask=m_0)
        b_dq = tl.dot(b_ds, b_k1, input_precision=PRECISION)
        tl.store(p_slot + HP, b_dq.to(slots_q.dtype.element_ty), mask=m_1)
        tl.store(grad_weights + start + o_m, tl.sum(tl.reshape(b_delta, [M, GP]), 1), mask=start + o_m < count)
    part = parts_kv + i_part.to(tl.int64) * (2 * S * D)
    o_part = o_s[:, None] * D
    tl.store(part + o_part + o_h[None, :], b_dk0, mask=(o_s < S)[:, None] & (o_h < D)[None, :])
    tl.store(part + o_part + HP + o_h[None, :], b_dk1, mask=(o_s < S)[:, None] & (HP + o_h < D)[None, :])
    tl.store(part + S * D + o_part + o_d[None, :], b_dv, mask=(o_s < S)[:, None] & (o_d < D)[None, :])


@triton.jit
def _forward(
    q, k, v, rows, weights, starts, segment_starts, owners, slots, stride_k, stride_v, scale_log2, first_list, last_list, TILES, N,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_segment = tl.load(segment_starts + first_list) + tl.program_id(0)
    if i_segment >= tl.load(segment_starts + last_list):  # there are fewer segments than could be
        return
    i_list = tl.load(owners + i_segment)
    first = tl.load(starts + i_list) + (i_segment - tl.load(segment_starts + i_list)) * SIZE
    count = tl.minimum(tl.load(starts + i_list + 1) - first, SIZE).to(tl.int32)
    i_j, i_b = i_list // N % J, i_list // N // J // TILES
    o_k, m_k = chunk_tile(i_list % N, i_j, J, S, D, SP, DP)
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_k, mask=m_k, other=0.0)  # [SP, DP]
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_k, mask=m_k, other=0.0)
    o_r, o_d = tl.arange(0, M * GP), tl.arange(0, DP)
    o_e, o_g = o_r // GP, o_r % GP
    rows += first
    weights += first
    slots += (first - tl.load(starts + first_list)) * (G * D)
    b_next = tl.load(rows + o_e, mask=o_e < count, other=0)  # [R]
    for start in range(0, count, M):
        b_row = b_next
        b_next = tl.load(rows + start + M + o_e, mask=start + M + o_e < count, other=0)
        m_r = (start + o_e < count) & (o_g < G)
        b_w = tl.load(weights + start + o_e, mask=m_r, other=0.0)  # [R]
        m_q = m_r[:, None] & (o_d < D)[None, :]
        b_q = tl.load(q + (b_row.to(tl.int64) * G + o_g)[:, None] * D + o_d[None, :], mask=m_q, other=0.0)  # [R, DP]
        b_p, b_sum = softmax_inside(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2, S, SP)
        b_p *= (b_w / b_sum)[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
        tl.store(slots + start * (G * D) + (o_e * G + o_g)[:, None] * D + o_d[None, :], b_o.to(slots.dtype.element_ty), mask=m_q)


@triton.jit
def _sum_slots(
    places, starts, slots_q, grad_q, scale, first_row, first_list, last_list,
    GD: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of one token and head: what its slots hold, those alone that name a chunk."""
    i_row, i_d = first_row + tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d = i_d * BD + tl.arange(0, BD)
    first, last = tl.load(starts + first_list), tl.load(starts + last_list)
    b_dq = tl.zeros([BD], tl.float32)
    for slot in range(0, K, BK):
        o_k = slot + tl.arange(0, BK)
        b_place = tl.load(places + i_row * K + o_k, mask=o_k < K, other=last)
        mask = (b_place < last)[:, None] & (o_d < GD)[None, :]
        b_part = tl.load(slots_q + (b_place - first)[:, None] * GD + o_d[None, :], mask=mask, other=0.0)  # [BK, BD]
        b_dq += tl.sum(b_part.to(tl.float32), 0)
    tl.store(grad_q + i_row * GD + o_d, (b_dq * scale).to(grad_q.dtype.element_ty), mask=o_d < GD)


@triton.jit
def _sum_segments(
    parts_kv, segment_starts, grad_kv, scale, first_pair, last_pair, first_list, TILES, B, N,
    J: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Adds the segments of a launch, in order, to dk or dv of a chunk, fp32 [2, B, N, S, J, D]."""
    i_chunk, i_kv = tl.program_id(0), tl.program_id(1)
    n, i_j, i_b = i_chunk % N, i_chunk // N % J, i_chunk // N // J
    o_s, o_d = tl.arange(0, SP), tl.arange(0, DP)
    o_sd = o_s[:, None] * D + o_d[None, :]
    o_k, mask = chunk_tile(n, i_j, J, S, D, SP, DP)
    grad_kv += (i_kv * B + i_b).to(tl.int64) * N * S * J * D
    base = tl.load(segment_starts + first_list)
    total = tl.zeros([SP, DP], tl.float32)
    for pair in range(tl.maximum(first_pair, i_b * TILES), tl.minimum(last_pair, (i_b + 1) * TILES)):
        i_list = (pair * J + i_j) * N + n
        for segment in range(tl.load(segment_starts + i_list), tl.load(segment_starts + i_list + 1)):
            total += tl.load(parts_kv + ((segment - base) * 2 + i_kv) * S * D + o_sd, mask=mask, other=0.0)
    if i_kv == 0:
        total *= scale
    tl.store(grad_kv + o_k, tl.load(grad_kv + o_k, mask=mask, other=0.0) + total, mask=mask)


def _tile(tokens: int, chunks: int, slots: int) -> int:
    """Tokens of a tile: few enough for the L2 cache, enough to choose each chunk `CHOICES` times."""
    return min(max(TILE, triton.next_power_of_2(CHOICES * chunks // slots)), LONGEST_TILE, tokens)


class _Launches:
    """Choices sorted by tile of tokens and chunk, and what a launch takes of them."""

    def __init__(self, q, k, indices, weights, *, parts: bool) -> None:
        B, T, J, K = indices.shape
        N, S, J, D = k.shape[1:]
        self.J, self.N, self.K, self.GD = J, N, K, q.shape[2] // J * D
        tile = _tile(T, N, K)
        self.tile, self.tiles, self.T, self.B = tile, triton.cdiv(T, tile), T, B
        self.index = invert(indices, N, tile)
        self.segments = cut(self.index, SEGMENT)
        self.rows, self.weights = (self.index.entries // K).int(), weights.flatten()[self.index.entries]
        # how many tiles a launch takes: as many as the slots of their choices, and the parts of their segments, have room
        choices = tile * J * K
        self.segments_of_tile = min(J * N, choices) + choices // SEGMENT
        bytes_of_parts = self.segments_of_tile * 2 * S * D * 4 if parts else 0
        self.together = max(SLOTS_BYTES // max(choices * self.GD * q.element_size(), bytes_of_parts), 1)
        self.slots = q.new_empty(min(self.together * choices, B * T * J * K) * self.GD)

    def token(self, pair: int) -> int:
        """The first of a tile, counted through the batch."""
        return pair // self.tiles * self.T + pair % self.tiles * self.tile

    def __iter__(self):
        for pair in range(0, self.B * self.tiles, self.together):
            last = min(pair + self.together, self.B * self.tiles)
            yield pair, last, (pair * self.J * self.N, last * self.J * self.N), ((last - pair) * self.segments_of_tile,)

    def sum_slots(self, out, scale, pair, last, lists):
        BD = min(1024, triton.next_power_of_2(self.GD))
        _sum_slots[(self.token(last) - self.token(pair)) * self.J, triton.cdiv(self.GD, BD)](
            self.index.places, self.index.starts, self.slots, out, scale, self.token(pair) * self.J, *lists,
            GD=self.GD, K=self.K, BK=8, BD=BD,
        )  # fmt: skip


def forward(q, k, v, indices, weights, scale: float, sizes: dict, options: dict) -> torch.Tensor:
    launches, out = _Launches(q, k, indices, weights, parts=False), torch.empty_like(q)
    for pair, last, lists, grid in launches:
        _forward[grid](
            q, k, v, launches.rows, launches.weights, launches.index.starts, *launches.segments, launches.slots,
            k.stride(0), v.stride(0), scale * LOG2_E, *lists, launches.tiles, launches.N, SIZE=SEGMENT, **sizes, **options,
        )  # fmt: skip
        launches.sum_slots(out, 1.0, pair, last, lists)
    return out


def backward(q, k, v, indices, weights, grad_out, scale: float, sizes: dict, options: dict) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dweights. sizes: the compile-time constants of a tile; options: warps and stages."""
    B, T, J, K = indices.shape
    N, S, J, D = k.shape[1:]
    launches = _Launches(q, k, indices, weights, parts=True)
    index, segments, tiles = launches.index, launches.segments, launches.tiles
    sorted_grad_weights = torch.zeros_like(launches.weights)
    parts_kv = q.new_empty(
        min(launches.together, B * tiles) * launches.segments_of_tile, 2, S, D, dtype=torch.float32
    )
    grad_q, grad_kv = torch.empty_like(q), q.new_zeros(2, *k.shape, dtype=torch.float32)
    for pair, last, lists, grid in launches:
        _backward[grid](
            q, k, v, grad_out, launches.rows, launches.weights, index.starts, *segments, launches.slots, parts_kv,
            sorted_grad_weights, k.stride(0), v.stride(0), scale * LOG2_E, *lists, tiles, N,
            SIZE=SEGMENT, HP=max(sizes["DP"] // 2, 16), **sizes, **options,
        )  # fmt: skip
        launches.sum_slots(grad_q, scale, pair, last, lists)
        _sum_segments[B * J * N, 2](
            parts_kv, segments.starts, grad_kv, scale, pair, last, lists[0], tiles, B, N,
            J=J, D=D, S=S, DP=sizes["DP"], SP=sizes["SP"],
        )  # fmt: skip
    grad_k, grad_v = (grad.to(q.dtype, copy=True) for grad in grad_kv)  # results of an operator share no memory
    grad_weights = sorted_grad_weights[index.places].view_as(weights)
    return grad_q, grad_k, grad_v, grad_weights
