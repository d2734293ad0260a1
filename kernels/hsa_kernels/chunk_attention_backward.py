"""The gradients of chunk attention, chunk by chunk: every program owns a chunk's tiles and meets the tokens that chose it.

A choice is one token's slot: it costs its rows of q and of the upstream gradient (4 times less than a chunk's k and v), and
one computation of the probabilities serves all four gradients. No atomics, every sum in a fixed order:

- dweights of a choice is written where it belongs;
- dk and dv of a chunk stay in registers for a segment of its choices, then the segments are added in order;
- dq of a choice is written to a slot of its own, then the slots of a token are added in order.

The slots of dq take G*D numbers a choice, so only some tokens are under way at once: a launch takes as many tiles of tokens
as `SLOTS_BYTES` hold. Within a tile the tokens' q and upstream gradient stay in the L2 cache while the chunks go by.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP
padded), N chunks, S chunk size (SP padded), K slots (KP padded), M choices a block, R = M*GP rows.
"""

import torch
import triton
import triton.language as tl

from .inverted_index import cut, invert
from .tiles import LOG2_E, chunk_tile

SEGMENT = 512  # choices that one program adds up
TILE = 4096  # tokens, at least: 16 heads of 128 numbers, twice, are half of an H200's L2
LONGEST_TILE = 32768
CHOICES = 128  # of a chunk in a tile, on average, at least: they have to be worth loading and adding its tiles
SLOTS_BYTES = 1 << 32


@triton.jit
def _backward(
    q, k, v, weights, grad_out, entries, row_starts, segment_starts, owners, slots_q, parts_kv, grad_weights,
    stride_k, stride_v, scale_log2, first_row, last_row, first_entry, TILES, N,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
    M: tl.constexpr, GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0)
    i_segment = tl.load(segment_starts + first_row) + i_part
    if i_segment >= tl.load(segment_starts + last_row):  # there are fewer segments than could be
        return
    row = tl.load(owners + i_segment)
    first = tl.load(row_starts + row) + (i_segment - tl.load(segment_starts + row)) * SIZE
    last = tl.minimum(first + SIZE, tl.load(row_starts + row + 1))
    i_j, i_b = row // N % J, row // N // J // TILES
    o_k, m_k = chunk_tile(row % N, i_j, J, S, D, SP, DP)
    b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_k, mask=m_k, other=0.0)  # [SP, DP]
    b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_k, mask=m_k, other=0.0)
    o_r, o_m, o_s, o_d = tl.arange(0, M * GP), tl.arange(0, M), tl.arange(0, SP), tl.arange(0, DP)
    b_dk = tl.zeros([SP, DP], tl.float32)
    b_dv = tl.zeros([SP, DP], tl.float32)
    for start in range(first, last, M):
        o_e = start + o_r // GP
        m_r = (o_e < last) & (o_r % GP < G)  # choices of the next segment, and rows that pad G to a power of 2
        entry = tl.load(entries + o_e, mask=m_r, other=0).to(tl.int64)
        b_w = tl.load(weights + entry, mask=m_r, other=0.0)  # [R]
        m_q = m_r[:, None] & (o_d < D)[None, :]
        o_q = (entry // K * G + o_r % GP)[:, None] * D + o_d[None, :]
        b_q = tl.load(q + o_q, mask=m_q, other=0.0)  # [R, DP]
        b_do = tl.load(grad_out + o_q, mask=m_q, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale_log2  # [SP, R]
        if S < SP:
            b_s = tl.where((o_s < S)[:, None], b_s, float("-inf"))
        b_p = tl.exp2(b_s - tl.max(b_s, 0)[None, :])
        b_p = b_p / tl.sum(b_p, 0)[None, :]
        b_dv = tl.dot((b_p * b_w[None, :]).to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_delta = tl.sum(b_p * b_dp, 0)  # [R]: do . o of this chunk, what the weight is multiplied with
        b_ds = (b_p * (b_dp - b_delta[None, :]) * b_w[None, :]).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)  # [R, DP]
        o_slot = ((entry - first_entry) * G + o_r % GP)[:, None] * D + o_d[None, :]
        tl.store(slots_q + o_slot, b_dq.to(slots_q.dtype.element_ty), mask=m_q)
        choice = tl.load(entries + start + o_m, mask=start + o_m < last, other=0)
        tl.store(grad_weights + choice, tl.sum(tl.reshape(b_delta, [M, GP]), 1), mask=start + o_m < last)
    o_part = (i_part.to(tl.int64) * 2 * S + o_s[:, None]) * D + o_d[None, :]
    m_part = (o_s < S)[:, None] & (o_d < D)[None, :]
    tl.store(parts_kv + o_part, b_dk, mask=m_part)
    tl.store(parts_kv + o_part + S * D, b_dv, mask=m_part)


@triton.jit
def _sum_slots(
    indices, slots_q, grad_q, scale, first_token, N, GD: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """dq of one token and head: what its slots hold, those alone that name a chunk."""
    i_row, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_k, o_d = tl.arange(0, KP), i_d * BD + tl.arange(0, BD)
    b_n = tl.load(indices + (first_token + i_row) * K + o_k, mask=o_k < K, other=-1)
    mask = ((b_n >= 0) & (b_n < N))[:, None] & (o_d < GD)[None, :]
    b_dq = tl.load(slots_q + (i_row * K + o_k)[:, None] * GD + o_d[None, :], mask=mask, other=0.0)  # [KP, BD]
    total = tl.sum(b_dq.to(tl.float32), 0) * scale
    tl.store(grad_q + (first_token + i_row) * GD + o_d, total.to(grad_q.dtype.element_ty), mask=o_d < GD)


@triton.jit
def _sum_segments(
    parts_kv, segment_starts, grad_kv, scale, first_pair, last_pair, first_row, TILES, B, N,
    J: tl.constexpr, D: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """Adds the segments of a launch, in order, to dk or dv of a chunk, fp32 [2, B, N, S, J, D]."""
    i_chunk, i_kv = tl.program_id(0), tl.program_id(1)
    n, i_j, i_b = i_chunk % N, i_chunk // N % J, i_chunk // N // J
    o_s, o_d = tl.arange(0, SP), tl.arange(0, DP)
    o_sd = o_s[:, None] * D + o_d[None, :]
    o_k, mask = chunk_tile(n, i_j, J, S, D, SP, DP)
    grad_kv += (i_kv * B + i_b).to(tl.int64) * N * S * J * D
    base = tl.load(segment_starts + first_row)
    total = tl.zeros([SP, DP], tl.float32)
    for pair in range(tl.maximum(first_pair, i_b * TILES), tl.minimum(last_pair, (i_b + 1) * TILES)):
        row = (pair * J + i_j) * N + n
        for segment in range(tl.load(segment_starts + row), tl.load(segment_starts + row + 1)):
            total += tl.load(parts_kv + ((segment - base) * 2 + i_kv) * S * D + o_sd, mask=mask, other=0.0)
    if i_kv == 0:
        total *= scale
    tl.store(grad_kv + o_k, tl.load(grad_kv + o_k, mask=mask, other=0.0) + total, mask=mask)


def _tile(tokens: int, chunks: int, slots: int) -> int:
    """Tokens of a tile: few enough for the L2 cache, enough to choose each chunk `CHOICES` times."""
    return min(max(TILE, triton.next_power_of_2(CHOICES * chunks // slots)), LONGEST_TILE, tokens)


def backward(q, k, v, indices, weights, grad_out, scale: float, sizes: dict, options: dict) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv and dweights. sizes: the compile-time constants of a tile; options: warps and stages."""
    B, T, J, K = indices.shape
    N, S, J, D = k.shape[1:]
    GD = q.shape[2] // J * D
    tile = _tile(T, N, K)
    tiles = triton.cdiv(T, tile)
    index = invert(indices, N, tile)
    segments = cut(index, SEGMENT)

    together = max(SLOTS_BYTES // (tile * J * K * GD * q.element_size()), 1)  # tiles of a launch
    slots_q = q.new_empty(min(together * tile, B * T) * J * K * GD)
    parts_kv = q.new_empty(min(together, B * tiles) * J * N + slots_q.numel() // GD // SEGMENT, 2, S, D, dtype=torch.float32)
    grad_q, grad_weights = torch.empty_like(q), torch.zeros_like(weights)
    grad_kv = q.new_zeros(2, *k.shape, dtype=torch.float32)

    def token(pair: int) -> int:
        """The first of a tile, counted through the batch."""
        return pair // tiles * T + pair % tiles * tile

    for pair in range(0, B * tiles, together):
        last = min(pair + together, B * tiles)
        first_token, tokens = token(pair), token(last) - token(pair)
        rows = pair * J * N, last * J * N
        most = rows[1] - rows[0] + tokens * J * K // SEGMENT
        _backward[(most,)](
            q, k, v, weights, grad_out, index.entries, index.starts, segments.starts, segments.owners, slots_q, parts_kv,
            grad_weights, k.stride(0), v.stride(0), scale * LOG2_E, *rows, first_token * J * K, tiles, N,
            K=K, SIZE=SEGMENT, **sizes, **options,
        )  # fmt: skip
        KP = triton.next_power_of_2(K)
        BD = min(max(8192 // KP, 16), triton.next_power_of_2(GD))
        _sum_slots[tokens * J, triton.cdiv(GD, BD)](
            indices, slots_q, grad_q, scale, first_token * J, N, GD=GD, K=K, KP=KP, BD=BD
        )  # fmt: skip
        _sum_segments[B * J * N, 2](
            parts_kv, segments.starts, grad_kv, scale, pair, last, rows[0], tiles, B, N,
            J=J, D=D, S=S, DP=sizes["DP"], SP=sizes["SP"],
        )  # fmt: skip
    grad_k, grad_v = (grad.to(q.dtype, copy=True) for grad in grad_kv)  # results of an operator share no memory
    return grad_q, grad_k, grad_v, grad_weights
