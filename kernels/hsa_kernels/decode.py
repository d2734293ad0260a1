"""One new token against the whole memory: Eq. (1) and Eq. (2), spread over the whole GPU without asking the host anything.

Three launches, of fixed grids, so that a CUDA graph can hold them:
1. scores of all landmarks, the newest first, and the best score of every tile and of every block of tiles: reads the
   landmarks once;
2. one program a kept slot: each finds the K best blocks, in them the K best tiles, in them the K best chunks by itself (the
   same for all, and cheaper than a launch that tells them), then attends to the chunk of its own slot;
3. the sum over slots, in order.

The K best blocks hold the K best tiles, and these the K best chunks: what lies elsewhere is beaten by K maxima.

Dimensions: B batch, H query heads, J key/value heads, G = H/J (GP padded to a power of 2), D head dimension (DP padded), R
retrieval dimension (RP padded), N chunks, S chunk size (SP padded), K slots (KP padded), NB blocks (NBP padded).
"""

import torch
import triton
import triton.language as tl

from hsa_mini.reference.checks import check_decode, check_retrieve

from .checks import check_kernel
from .selection import MOST, NOTHING, keyed, largest, unkeyed
from .tiles import before_hopper, chunk_tile, padded, precision, scaled, softmax_inside, to_log2

# chunks a tile, tiles a block: of 262,144 chunks 64 are chosen by looking at 2,048, 512 and 1,024 numbers
TILE = 16
TILES = 8


@triton.jit
def _complete(offsets, offset, i_b, N, chunk_size, OFFSETS: tl.constexpr):
    """How many chunks the new token may see."""
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    return tl.minimum(offset // chunk_size, N)


@triton.jit
def _score(
    retrieval_q, landmarks, offsets, scores, of_tiles, of_blocks, stride_l, offset, N, chunk_size, scale,
    J: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = i_b * J + i_j
    block = row.to(tl.int64) * tl.num_programs(0) + i_block
    o_t = tl.arange(0, TILES)
    o_r = tl.arange(0, RP)
    o_c = (
        o_t[None, :] * TILE + tl.arange(0, TILE)[:, None]
    )  # [TILE, TILES]: a thread holds a whole tile
    o_n = (tl.num_programs(0) - i_block) * TILE * TILES - 1 - o_c
    m_n = o_n < _complete(
        offsets, offset, i_b, N, chunk_size, OFFSETS
    )  # behind may lie anything, NaN too: it is never read
    b_q = tl.load(retrieval_q + row * R + o_r, mask=o_r < R, other=0.0).to(tl.float32)
    o_l = (
        i_b.to(tl.int64) * stride_l
        + o_n.to(tl.int64)[:, :, None] * (J * R)
        + i_j * R
        + o_r[None, None, :]
    )
    # [TILE, TILES, RP]: they leave the cache first, as they are read once, and what the choice needs stays
    b_l = tl.load(
        landmarks + o_l,
        mask=m_n[:, :, None] & (o_r < R)[None, None, :],
        other=0.0,
        eviction_policy="evict_first",
    )
    b_s = tl.sum(b_l.to(tl.float32) * b_q[None, None, :], 2) * scale
    b_key = tl.where(m_n, keyed(b_s), NOTHING)
    b_best = tl.max(b_key, 0)
    tl.store(scores + block * TILE * TILES + o_c, b_key)
    tl.store(of_tiles + block * TILES + o_t, b_best)
    tl.store(of_blocks + block, tl.max(b_best, 0))


@triton.jit
def _best(
    keys, b_place, m_place, there, b_floor, b_most, scratch, K: tl.constexpr, KP: tl.constexpr
):
    """Where the K largest of the keys at these places [1, n] stand, in order: [KP]; how many they are; the bounds.

    there: how many keys are above `NOTHING`, all of them at these places if they are not more than K. b_floor, b_most: what K
    keys reach, and what none exceeds, or `NOTHING` as long as nobody looked.
    """
    b_key = tl.load(keys + b_place, mask=m_place, other=NOTHING)
    m_kept = b_key > NOTHING
    if tl.max(b_most, 0) == NOTHING:
        b_most = tl.max(b_key, 1)
    if there > K:
        if tl.max(b_floor, 0) == NOTHING:
            b_floor = tl.min(tl.where(m_kept, b_key, 2**32 - 1).to(tl.uint32), 1)
        m_kept, b_floor = largest(b_key, b_floor, b_most, K)
    count = tl.minimum(there, K)
    tl.store(scratch + tl.cumsum(m_kept.to(tl.int32), 1) - 1, b_place, mask=m_kept)
    tl.debug_barrier()  # what other threads stored is read next
    o_k = tl.arange(0, KP)
    return tl.load(scratch + o_k, mask=o_k < count, other=0), count, b_floor, b_most


@triton.jit
def _parts(b_place, count, PARTS: tl.constexpr, KP: tl.constexpr):
    """Places [1, KP * PARTS] of the parts of the first `count` of these, and which of them there are."""
    b_part = b_place[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    m_part = tl.broadcast_to((tl.arange(0, KP) < count)[:, None], [KP, PARTS])
    return tl.reshape(b_part, [1, KP * PARTS]), tl.reshape(m_part, [1, KP * PARTS])


@triton.jit
def _attend(
    q, k, v, offsets, scores, of_tiles, of_blocks, parts, scratch, stride_k, stride_v, offset, N, chunk_size, scale_log2,
    J: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GP: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr, NB: tl.constexpr, NBP: tl.constexpr,
    OFFSETS: tl.constexpr, OVERLAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_slot = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    row = (i_b * J + i_j).to(tl.int64)
    scratch += (row * K + i_slot) * 3 * KP
    complete = _complete(offsets, offset, i_b, N, chunk_size, OFFSETS)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    b_floor = tl.full([1], NOTHING, tl.uint32)
    b_most = b_floor
    if NB > K:
        b_place = tl.arange(0, NBP)[None, :]
        there = tl.cdiv(complete, TILE * TILES)
        b_place, count, b_floor, b_most = _best(
            of_blocks + row * NB, b_place, b_place < NB, there, b_floor, b_most, scratch, K, KP
        )
        b_place, m_place = _parts(b_place, count, TILES, KP)
    else:
        b_place = tl.arange(0, NBP * TILES)[None, :]
        m_place = b_place < NB * TILES
    if NB * TILES > K:
        there = tl.cdiv(complete, TILE)
        b_place, count, b_floor, b_most = _best(
            of_tiles + row * NB * TILES,
            b_place,
            m_place,
            there,
            b_floor,
            b_most,
            scratch + KP,
            K,
            KP,
        )
        b_place, m_place = _parts(b_place, count, TILE, KP)
    else:
        b_place = tl.arange(0, NBP * TILES * TILE)[None, :]
        m_place = b_place < NB * TILES * TILE
    scores += row * NB * TILES * TILE
    scratch += 2 * KP
    b_place, count, _, b_most = _best(
        scores, b_place, m_place, complete, b_floor, b_most, scratch, K, KP
    )

    o_g = tl.arange(0, GP)
    o_d = tl.arange(0, DP)
    m_q = (o_g < G)[:, None] & (o_d < D)[None, :]
    o_q = o_g[:, None] * D + o_d[None, :]
    b_out = tl.zeros([GP, DP], tl.float32)
    if i_slot < count:
        place = tl.load(scratch + i_slot)
        b_q = tl.load(q + row * G * D + o_q, mask=m_q, other=0.0)  # [GP, DP]
        o_kv, m_kv = chunk_tile(NB * TILES * TILE - 1 - place, i_j, J, S, D, SP, DP)
        b_k = tl.load(k + i_b.to(tl.int64) * stride_k + o_kv, mask=m_kv, other=0.0)  # [SP, DP]
        b_v = tl.load(v + i_b.to(tl.int64) * stride_v + o_kv, mask=m_kv, other=0.0)
        # while they are on their way: the weight
        m_k = tl.arange(0, KP) < count
        best = unkeyed(tl.max(b_most, 0))
        b_s = unkeyed(tl.load(scores + b_place, mask=m_k, other=1))
        total = tl.sum(tl.where(m_k, tl.exp(b_s - best), 0.0))
        weight = tl.exp(unkeyed(tl.load(scores + place)) - best) / total
        b_p, b_sum = softmax_inside(
            tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION), scale_log2, S, SP
        )
        b_p = b_p * (weight / b_sum)[:, None]
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION)
    tl.store(parts + (row * K + i_slot) * G * D + o_q, b_out, mask=m_q)


@triton.jit
def _sum_parts(
    parts, out, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # until all of `_attend` is done
    i_g = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    o_k = tl.arange(0, KP)
    o_d = tl.arange(0, DP)
    mask = (o_k < K)[:, None] & (o_d < D)[None, :]
    b_part = tl.load(
        parts + ((row * K + o_k[:, None]) * G + i_g) * D + o_d[None, :], mask=mask, other=0.0
    )  # [KP, DP]
    tl.store(
        out + (row * G + i_g) * D + o_d, tl.sum(b_part, 0).to(out.dtype.element_ty), mask=o_d < D
    )


@torch.library.custom_op("hsa_kernels::decode", mutates_args=())
def _decode(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    offsets: torch.Tensor | None, offset: int, top_k: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    B, _, H, D = q.shape
    N, S, J = k.shape[1:4]
    R = landmarks.shape[3]
    K = min(top_k, N)
    if 0 in (q.numel(), N):
        return torch.zeros_like(q)
    G = H // J
    NB = triton.cdiv(N, TILE * TILES)
    KP = triton.next_power_of_2(K)
    scores, of_tiles, of_blocks = (
        torch.empty(B, J, NB * size, dtype=torch.uint32, device=q.device)
        for size in (TILE * TILES, TILES, 1)
    )
    scratch = torch.empty(B, J, K, 3, KP, dtype=torch.int32, device=q.device)
    parts = torch.empty(B, J, K, G, D, device=q.device)
    # from Hopper on, the sum is launched while the parts are still being made: its programs are few and wait on the GPU
    overlap = q.is_cuda and not before_hopper(q)
    launch_early = dict(launch_pdl=True) if overlap else {}
    position = (offset, N, S)
    sizes = dict(J=J, TILE=TILE, TILES=TILES, OFFSETS=offsets is not None)
    _score[NB, J, B](
        retrieval_q, landmarks, offsets, scores, of_tiles, of_blocks, landmarks.stride(0), *position, R**-0.5,
        R=R, RP=padded(R), **sizes, num_warps=4,
    )  # fmt: skip
    _attend[K, J, B](
        q, k, v, offsets, scores, of_tiles, of_blocks, parts, scratch, k.stride(0), v.stride(0), *position, to_log2(scale),
        G=G, D=D, S=S, K=K, GP=padded(G), DP=padded(D), SP=padded(S), KP=KP, NB=NB, NBP=triton.next_power_of_2(NB),
        OVERLAP=overlap, PRECISION=precision(q.dtype), **sizes, num_warps=8,
    )  # fmt: skip
    out = torch.empty_like(q)
    _sum_parts[G, B * J](
        parts, out, G=G, D=D, K=K, DP=padded(D), KP=KP, OVERLAP=overlap, num_warps=4, **launch_early
    )
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
    for name, what, got, most in (
        ("landmarks", "N", landmarks.shape[1], MOST * TILE * TILES), ("top_k", "K", min(top_k, landmarks.shape[1]), MOST // TILE)
    ):  # fmt: skip
        if got > most:
            raise ValueError(f"{name}: got {what}={got}, accepted are up to {most}")
    offsets, first = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    q, scale = scaled(q, scale)
    return _decode(retrieval_q, landmarks, q, k, v, offsets, first, top_k, scale)
