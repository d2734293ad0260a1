"""One new token against the whole memory: Eq. (1) and Eq. (2), spread over the whole GPU without asking the host anything.

Three launches, of fixed grids, so that a CUDA graph can hold them:
1. scores of all landmarks, the newest first, and the best score of every tile of chunks: reads the landmarks once;
2. one program a kept slot: each finds the K best chunks by itself (the same for all, and cheaper than a launch that tells
   them), then attends to the chunk of its own slot;
3. the sum over slots, in order.

The K tiles of the best maxima hold the K best chunks: a chunk of another tile is beaten by each of those maxima.

Dimensions: B batch, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP padded), R
retrieval dimension (RP padded), N chunks, S chunk size (SP padded), K slots (KP padded), BN chunks a tile, NT tiles.
"""

import torch
import triton
import triton.language as tl

from hsa_mini.reference.checks import check_decode, check_retrieve

from .checks import check_kernel
from .selection import NOTHING, keyed, largest, unkeyed
from .tiles import LOG2_E, chunk_tile, padded, precision, softmax_inside

@triton.jit
def _score(
    retrieval_q, landmarks, offsets, scores, maxima, stride_l, offset, N, chunk_size, scale,
    J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BN: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    i_tile, i_j, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    complete = tl.minimum(offset // chunk_size, N)
    row = i_b * J + i_j
    o_place, o_r = i_tile * BN + tl.arange(0, BN), tl.arange(0, RP)
    o_n = tl.num_programs(0) * BN - 1 - o_place
    m_n = o_n < complete  # what lies behind may be anything, NaN too: it is never read
    b_q = tl.load(retrieval_q + row * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    o_l = i_b.to(tl.int64) * stride_l + o_n.to(tl.int64)[:, None] * (J * R) + i_j * R + o_r[None, :]
    b_l = tl.load(landmarks + o_l, mask=m_n[:, None] & (o_r < R)[None, :], other=0.0)  # [BN, RP]
    b_s = tl.sum(b_l.to(tl.float32) * b_q[None, :], 1) * scale
    b_key = tl.where(m_n, keyed(b_s), NOTHING)
    tl.store(scores + row.to(tl.int64) * tl.num_programs(0) * BN + o_place, b_key)
    tl.store(maxima + row * tl.num_programs(0) + i_tile, tl.max(b_key, 0))


@triton.jit
def _attend(
    q, k, v, scores, maxima, parts, scratch, stride_k, stride_v, scale_log2,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NT: tl.constexpr, BN: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, NTP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_slot, i_j, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (i_b * J + i_j).to(tl.int64)
    scratch += (row * K + i_slot) * KP
    scores += row * NT * BN
    o_k = tl.arange(0, KP)

    o_tile = tl.arange(0, NTP)[None, :]
    b_max = tl.load(maxima + row * NT + o_tile, mask=o_tile < NT, other=NOTHING)
    m_max = b_max > NOTHING
    b_least = tl.min(tl.where(m_max, b_max, 2**32 - 1), 1)
    b_floor = tl.where(tl.sum(m_max.to(tl.int32), 1) >= K, b_least, NOTHING).to(tl.uint32)
    m_tile, b_floor = largest(b_max, b_floor, K)
    tl.store(scratch + tl.cumsum(m_tile.to(tl.int32), 1) - 1, o_tile, mask=m_tile)
    tiles = tl.sum(m_tile.to(tl.int32))
    tl.debug_barrier()  # what other threads stored is read next
    b_tile = tl.load(scratch + o_k, mask=o_k < tiles, other=0)
    o_place = tl.reshape(b_tile[:, None] * BN + tl.arange(0, BN)[None, :], [1, KP * BN])
    m_place = tl.reshape(tl.broadcast_to((o_k < tiles)[:, None], [KP, BN]), [1, KP * BN])
    b_key = tl.load(scores + o_place, mask=m_place, other=NOTHING)
    m_kept, _ = largest(b_key, b_floor, K)
    best = tl.max(tl.where(m_kept, b_key, NOTHING))
    b_w = tl.where(m_kept, tl.exp(unkeyed(b_key) - unkeyed(best)), 0.0)
    mine = m_kept & (tl.cumsum(m_kept.to(tl.int32), 1) == i_slot + 1)  # slots in the order of the tiles
    place = tl.max(tl.where(mine, o_place, -1))

    o_g, o_d = tl.arange(0, GP), tl.arange(0, DP)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    o_q = o_g[:, None] * D + o_d[None, :]
    b_out = tl.zeros([GP, DP], tl.float32)
    if place >= 0:
        chunk = NT * BN - 1 - place
        weight = tl.sum(tl.where(mine, b_w, 0.0)) / tl.sum(b_w)
        b_q = tl.load(q + row * G * D + o_q, mask=m_q, other=0.0)  # [GP, DP]
        o_kv, m_kv = chunk_tile(chunk, i_j, J, S, D, SP, DP)
        b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_kv, mask=m_kv, other=0.0)  # [SP, DP]
        b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_kv, mask=m_kv, other=0.0)
        b_p, b_sum = softmax_inside(tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale_log2, S, SP)
        b_p = b_p * (weight / b_sum)[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    tl.store(parts + (row * K + i_slot) * G * D + o_q, b_out, mask=m_q)


@triton.jit
def _sum_parts(parts, out, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr):
    i_g, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_k, o_d = tl.arange(0, KP), tl.arange(0, DP)
    mask = (o_k < K)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(parts + ((row * K + o_k[:, None]) * G + i_g) * D + o_d[None, :], mask=mask, other=0.0)  # [KP, DP]
    tl.store(out + (row * G + i_g) * D + o_d, tl.sum(b_part, 0).to(out.dtype.element_ty), mask=o_d < D)


@torch.library.custom_op("hsa_kernels::decode", mutates_args=())
def _decode(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    offsets: torch.Tensor | None, offset: int, top_k: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    (B, _, H, D), (N, S, J), R = q.shape, k.shape[1:4], landmarks.shape[3]
    K = min(top_k, N)
    if 0 in (q.numel(), N):
        return torch.zeros_like(q)
    G, BN = H // J, max(64, triton.next_power_of_2(triton.cdiv(N, 4096)))  # the maxima of 4096 tiles fit one program
    NT, KP = triton.cdiv(N, BN), triton.next_power_of_2(K)
    scores = torch.empty(B, J, NT * BN, dtype=torch.uint32, device=q.device)
    maxima = torch.empty(B, J, NT, dtype=torch.uint32, device=q.device)
    parts = torch.empty(B, J, K, G, D, device=q.device)
    scratch = torch.empty(B, J, K, KP, dtype=torch.int32, device=q.device)
    _score[NT, J, B](
        retrieval_q, landmarks, offsets, scores, maxima, landmarks.stride(0), offset, N, S, R**-0.5, J=J, R=R, RP=padded(R), BN=BN,
        OFFSETS=offsets is not None, num_warps=8,
    )  # fmt: skip
    _attend[K, J, B](
        q, k, v, scores, maxima, parts, scratch, k.stride(0), v.stride(0), scale * LOG2_E, J=J, G=G, D=D, S=S, K=K, NT=NT, BN=BN,
        GP=padded(G), DP=padded(D), SP=padded(S), KP=KP, NTP=triton.next_power_of_2(NT), PRECISION=precision(q.dtype), num_warps=8,
    )  # fmt: skip
    out = torch.empty_like(q)
    _sum_parts[G, B * J](parts, out, G=G, D=D, K=K, DP=padded(D), KP=KP, num_warps=4)
    return out


@_decode.register_fake
def _(retrieval_q, landmarks, q, k, v, offsets, offset, top_k, scale):
    return torch.empty_like(q)


def decode(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Retrieve and attend for one new token per sequence: the twin of `retrieve` followed by `chunk_attention`.

    retrieval_q [B, 1, J, R], landmarks [B, N, J, R], q [B, 1, H, D], k and v [B, N, S, J, D] in float16, bfloat16 or float32
    -> [B, 1, H, D]. offset: position of the new token; as a tensor [B] it may change between replays of a CUDA graph. Chunks
    that are not complete by then are never read. No gradient. Raises ValueError for wrong shapes, dtypes, devices or layouts.
    """
    check_decode(retrieval_q, landmarks, q, k, v, chunk_size)
    check_retrieve(retrieval_q, landmarks, chunk_size, top_k, offset, "softmax", None, 0, 1)
    check_kernel(retrieval_q=retrieval_q, landmarks=landmarks, q=q, k=k, v=v)
    offsets, first = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    return _decode(retrieval_q, landmarks, q, k, v, offsets, first, top_k, q.shape[3] ** -0.5 if scale is None else scale)
