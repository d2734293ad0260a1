"""Which chunks matter to each token, and how much: Eq. (1), §2.2. Forward and backward, never holding [T, N].

The chunks stream by, a tile at a time, the newest first. Every token puts those that may belong to its K best into a room of
its own; when rooms are full the K best stay, of equal scores the first and so the newest, and the least of them is what later
ones have to exceed. Fewer and fewer do: on random scores rooms fill after ever longer stretches.

Dimensions: B batch, T choosing tokens, J retrieval heads, R retrieval dimension (RP padded to a power of 2), N chunks, K
chunks kept (KP padded), BT tokens a tile, BN chunks a tile, CAP candidates a room, ROWS rows at once.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from hsa_mini.reference.checks import check_retrieve
from hsa_mini.reference.retrieval import weigh

from .checks import check_kernel
from .inverted_index import invert
from .selection import MOST, NOTHING, keyed, largest, unkeyed
from .tiles import padded, precision

ROOMS_BYTES = 1 << 29  # of the candidates of all tokens of a launch


@triton.jit
def _gumbel(seed, chunk, position, head, batch):
    """Gumbel(0, 1) noise, the reference's to the last bit but one: a logarithm near 0 needs float64."""
    bits, _, _, _ = tl.philox(seed, chunk, position, head, batch)
    uniform = (bits.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * (2.0**-32)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _choose(room, o_row, K: tl.constexpr, BT: tl.constexpr, CAP: tl.constexpr, NOISE: tl.constexpr):
    """Of the candidates in some rows' room: key, chunk and score, which to keep and where; how many there are; the floor."""
    tl.debug_barrier()  # other threads put them there
    b_count = tl.load(room + o_row).to(tl.int32)
    b_floor = tl.load(room + BT + o_row)
    o_c = 2 * BT + o_row[:, None] * CAP + tl.arange(0, CAP)[None, :]
    b_key = tl.load(
        room + o_c, mask=tl.arange(0, CAP)[None, :] < b_count[:, None], other=NOTHING
    )  # [ROWS, CAP]
    m_kept, b_floor = largest(b_key, b_floor, tl.max(b_key, 1), K)
    b_n = tl.load(room + BT * CAP + o_c, mask=m_kept, other=0).to(tl.int32, bitcast=True)
    if NOISE:
        b_s = tl.load(room + 2 * BT * CAP + o_c, mask=m_kept, other=0).to(tl.float32, bitcast=True)
    else:
        b_s = unkeyed(b_key)
    tl.debug_barrier()  # whatever is put there next, this was read
    return b_key, b_n, b_s, m_kept, tl.cumsum(m_kept.to(tl.int32), 1) - 1, b_count, b_floor


@triton.jit
def _put(
    room,
    o_row,
    b_place,
    mask,
    b_key,
    b_n,
    b_s,
    BT: tl.constexpr,
    CAP: tl.constexpr,
    NOISE: tl.constexpr,
):
    """Candidates into the rows' room: BT counts, BT floors, keys [BT, CAP], chunks, and scores if keys are not made of them."""
    o_c = 2 * BT + o_row[:, None] * CAP + b_place
    tl.store(room + o_c, b_key, mask=mask)
    tl.store(room + BT * CAP + o_c, b_n.to(tl.uint32, bitcast=True), mask=mask)
    if NOISE:
        tl.store(room + 2 * BT * CAP + o_c, b_s.to(tl.uint32, bitcast=True), mask=mask)


@triton.jit
def _retrieve(
    retrieval_q, landmarks, offsets, seeds, indices, scores, rooms, stride_l, offset, step, first, T, N, chunk_size,
    exclude_window, scale, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, CAP: tl.constexpr, ROWS: tl.constexpr,
    OFFSETS: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    o_t = first + i_t * BT + tl.arange(0, BT)
    o_r = tl.arange(0, RP)
    o_k = tl.arange(0, KP)
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    if NOISE:
        seed = tl.load(seeds)
    position = offset + o_t * step  # [BT]
    o_row = (i_b.to(tl.int64) * T + o_t) * J + i_j
    m_q = (o_t < T)[:, None] & (o_r < R)[None, :]
    b_q = tl.load(retrieval_q + o_row[:, None] * R + o_r[None, :], mask=m_q, other=0.0)  # [BT, RP]
    landmarks += i_b.to(tl.int64) * stride_l + i_j * R
    program = (i_b * tl.num_programs(1) + i_j) * tl.num_programs(0) + i_t
    room = rooms + program.to(tl.int64) * ((3 if NOISE else 2) * BT * CAP + 2 * BT)
    o_own = tl.arange(0, BT)

    b_count = tl.zeros([BT], tl.int32)
    b_floor = tl.full(
        [BT], NOTHING, tl.uint32
    )  # K candidates reach it: later ones have to exceed it
    tl.store(room + BT + o_own, b_floor)
    complete = tl.minimum(
        (offset + (tl.minimum(first + (i_t + 1) * BT, T) - 1) * step) // chunk_size, N
    ).to(tl.int32)
    for start in range((tl.cdiv(complete, BN) - 1) * BN, -1, -BN):
        o_n = start + BN - 1 - tl.arange(0, BN)  # the newest first
        m_l = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_l = tl.load(
            landmarks + o_n.to(tl.int64)[:, None] * (J * R) + o_r[None, :], mask=m_l, other=0.0
        )  # [BN, RP]
        b_s = tl.dot(b_q, tl.trans(b_l), input_precision=PRECISION) * scale  # [BT, BN]
        b_choice = b_s
        if NOISE:
            b_choice += _gumbel(seed, o_n[None, :], position[:, None].to(tl.int32), i_j, i_b)
        b_key = keyed(b_choice)
        o_first = o_n.to(tl.int64) * chunk_size  # a chunk's first token
        visible = (o_first + chunk_size)[None, :] <= position[:, None]
        visible &= (o_first[None, :] <= position[:, None] - exclude_window) & (o_n < N)[None, :]
        better = visible & (b_key > b_floor[:, None])
        b_new = better.to(tl.int32)
        _put(room, o_own, b_count[:, None] + tl.cumsum(b_new, 1) - 1, better, b_key,
             tl.broadcast_to(o_n[None, :], [BT, BN]), b_s, BT, CAP, NOISE)  # fmt: skip
        b_count += tl.sum(b_new, 1)
        if tl.max(b_count, 0) > CAP - BN:  # the next tile might not fit
            tl.store(room + o_own, b_count.to(tl.uint32))
            for i_row in range(0, BT, ROWS):
                o_some = i_row + tl.arange(0, ROWS)
                b_known, b_n, b_kept, m_kept, b_place, _, b_higher = _choose(
                    room, o_some, K, BT, CAP, NOISE
                )
                _put(room, o_some, b_place, m_kept, b_known, b_n, b_kept, BT, CAP, NOISE)
                tl.store(room + BT + o_some, b_higher)
            tl.debug_barrier()
            b_floor = tl.load(room + BT + o_own)
            b_count = tl.minimum(b_count, K)

    tl.store(room + o_own, b_count.to(tl.uint32))
    for i_row in range(0, BT, ROWS):
        o_some = i_row + tl.arange(0, ROWS)
        _, b_n, b_kept, m_kept, b_place, b_found, _ = _choose(room, o_some, K, BT, CAP, NOISE)
        o_token = first + i_t * BT + o_some
        m_t = (o_token < T)[:, None]
        o_out = ((i_b.to(tl.int64) * T + o_token) * J + i_j)[:, None] * K
        tl.store(indices + o_out + b_place, b_n, mask=m_kept & m_t)
        tl.store(scores + o_out + b_place, b_kept, mask=m_kept & m_t)
        m_empty = (o_k[None, :] >= b_found[:, None]) & (o_k < K)[None, :] & m_t
        tl.store(indices + o_out + o_k[None, :], tl.full([ROWS, KP], -1, tl.int32), mask=m_empty)
        tl.store(
            scores + o_out + o_k[None, :],
            tl.full([ROWS, KP], float("-inf"), tl.float32),
            mask=m_empty,
        )


@triton.jit
def _gather_landmarks(
    landmarks, indices, grad_scores, grad_q, stride_l, scale, T, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """dq of one token: its kept landmarks, each times the gradient of its score."""
    i_t = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    o_r = tl.arange(0, RP)
    o_k = tl.arange(0, KP)
    row = (i_b.to(tl.int64) * T + i_t) * J + i_j
    b_n = tl.load(indices + row * K + o_k, mask=o_k < K, other=-1)
    b_ds = tl.load(grad_scores + row * K + o_k, mask=o_k < K, other=0.0)
    o_l = i_b.to(tl.int64) * stride_l + b_n.to(tl.int64)[:, None] * (J * R) + i_j * R + o_r[None, :]
    b_l = tl.load(
        landmarks + o_l, mask=(b_n >= 0)[:, None] & (o_r < R)[None, :], other=0.0
    )  # [KP, RP]
    b_dq = tl.sum(b_l.to(tl.float32) * b_ds[:, None], 0) * scale
    tl.store(grad_q + row * R + o_r, b_dq.to(grad_q.dtype.element_ty), mask=o_r < R)


@triton.jit
def _sum_queries(
    retrieval_q, grad_scores, entries, starts, grad_landmarks, scale, N, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    RP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dlandmark of one chunk: the queries of the tokens that kept it, in order, each times the gradient of its score."""
    i_row = tl.program_id(0)  # (b*J + j)*N + n
    o_r = tl.arange(0, RP)
    b_dl = tl.zeros([RP], tl.float32)
    last = tl.load(starts + i_row + 1)
    for start in range(tl.load(starts + i_row), last, BE):
        o_e = start + tl.arange(0, BE)
        entry = tl.load(entries + o_e, mask=o_e < last, other=0).to(
            tl.int64
        )  # ((b*T + t)*J + j)*K + slot
        b_ds = tl.load(grad_scores + entry, mask=o_e < last, other=0.0)
        b_q = tl.load(
            retrieval_q + (entry // K)[:, None] * R + o_r[None, :],
            mask=(o_r < R)[None, :],
            other=0.0,
        )  # [BE, RP]
        b_dl += tl.sum(b_q.to(tl.float32) * b_ds[:, None], 0)
    o_l = ((i_row // N // J).to(tl.int64) * N + i_row % N) * J + i_row // N % J
    tl.store(
        grad_landmarks + o_l * R + o_r,
        (b_dl * scale).to(grad_landmarks.dtype.element_ty),
        mask=o_r < R,
    )


@torch.library.custom_op("hsa_kernels::retrieve", mutates_args=())
def _retrieve_scores(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, offsets: torch.Tensor | None, offset: int, step: int, chunk_size: int,
    top_k: int, exclude_window: int, seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Indices int32 and clean scores fp32 [B, T, J, K] of the chunks kept; -1 and -inf in empty slots."""
    B, T, J, R = retrieval_q.shape
    N = landmarks.shape[1]
    indices = torch.empty(B, T, J, top_k, dtype=torch.int32, device=retrieval_q.device)
    scores = torch.empty(B, T, J, top_k, device=retrieval_q.device)
    if 0 in (indices.numel(), N):
        return indices.fill_(-1), scores.fill_(float("-inf"))
    BT = 16
    BN = 32
    KP = triton.next_power_of_2(top_k)
    CAP = max(4 * KP, 8 * BN)
    row = 2 + (2 if seed is None else 3) * CAP  # numbers of a row's room
    together = max(ROOMS_BYTES // (B * J * BT * row * 4), 1) * BT  # tokens of a launch
    rooms = torch.empty(
        B * J * min(triton.cdiv(T, BT) * BT, together) * row,
        dtype=torch.uint32,
        device=retrieval_q.device,
    )
    # one warp a program never waits for another. 128 registers a thread are too few for sorting rooms out, which then goes
    # through memory, but let more programs share a processor: faster as measured
    options = dict(num_warps=1, num_stages=2, ROWS=1) | (
        dict(maxnreg=128) if R <= 128 and seed is None else {}
    )
    if retrieval_q.dtype == torch.float32:
        options = dict(num_warps=4, num_stages=2, ROWS=4)
    for first in range(0, T, together):
        _retrieve[triton.cdiv(min(together, T - first), BT), J, B](
            retrieval_q, landmarks, offsets, seed, indices, scores, rooms, landmarks.stride(0), offset, step, first, T, N,
            chunk_size, exclude_window, R**-0.5, J=J, R=R, K=top_k, RP=padded(R), KP=KP, BT=BT, BN=BN, CAP=CAP,
            OFFSETS=offsets is not None, NOISE=seed is not None, PRECISION=precision(retrieval_q.dtype),
            **options,
        )  # fmt: skip
    return indices, scores


@torch.library.custom_op("hsa_kernels::retrieve_backward", mutates_args=())
def _retrieve_backward(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    indices: torch.Tensor,
    grad_scores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, T, J, R = retrieval_q.shape
    N = landmarks.shape[1]
    K = indices.shape[3]
    grad_q = torch.empty_like(retrieval_q)
    grad_landmarks = torch.empty_like(landmarks, memory_format=torch.contiguous_format)
    if 0 in (indices.numel(), N):
        return grad_q.zero_(), grad_landmarks.zero_()
    sizes = dict(J=J, R=R, K=K, RP=padded(R))
    _gather_landmarks[T, J, B](
        landmarks,
        indices,
        grad_scores,
        grad_q,
        landmarks.stride(0),
        R**-0.5,
        T,
        KP=triton.next_power_of_2(K),
        **sizes,
    )
    index = invert(indices, N)
    _sum_queries[(B * J * N,)](
        retrieval_q, grad_scores, index.entries, index.starts, grad_landmarks, R**-0.5, N, BE=32, **sizes
    )  # fmt: skip
    return grad_q, grad_landmarks


@_retrieve_scores.register_fake
def _(retrieval_q, landmarks, offsets, offset, step, chunk_size, top_k, exclude_window, seed):
    shape = (*retrieval_q.shape[:3], top_k)
    return retrieval_q.new_empty(shape, dtype=torch.int32), retrieval_q.new_empty(
        shape, dtype=torch.float32
    )


@_retrieve_backward.register_fake
def _(retrieval_q, landmarks, indices, grad_scores):
    return torch.empty_like(retrieval_q), torch.empty_like(
        landmarks, memory_format=torch.contiguous_format
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[0])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx, _, grad_scores):
    return (*_retrieve_backward(*ctx.saved_tensors, grad_scores.contiguous()), *(None,) * 7)


_retrieve_scores.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hsa_kernels.retrieve)
def _flop(q_shape, landmarks_shape, *_, **__) -> int:
    B, T, J, R = q_shape
    N = landmarks_shape[1]
    return 2 * B * T * J * N * R


@register_flop_formula(torch.ops.hsa_kernels.retrieve_backward)
def _flop_backward(q_shape, landmarks_shape, indices_shape, *_, **__) -> int:
    B, T, J, R = q_shape
    K = indices_shape[3]
    return 4 * B * T * J * K * R


def retrieve(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor = 0,
    weighting: str = "softmax",
    gumbel_seed: int | torch.Tensor | None = None,
    exclude_window: int = 0,
    query_block: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` best visible chunks of every token and weigh them. Eq. (1).

    retrieval_q [B, T, J, R], landmarks [B, N, J, R] in float16, bfloat16 or float32 -> indices int32 [B, T, J, K] (-1: empty
    slot) and weights float32 [B, T, J, K] (0 where empty; they carry the gradient). Options as in
    `hsa_mini.reference.retrieve`; exact, and of equal scores the newest chunk is kept. Memory O(T*K); every gradient is
    the same from run to run. Raises ValueError for wrong shapes, dtypes, devices, layouts or ranges.
    """
    check_retrieve(
        retrieval_q,
        landmarks,
        chunk_size,
        top_k,
        offset,
        weighting,
        gumbel_seed,
        exclude_window,
        query_block,
    )
    check_kernel(retrieval_q=retrieval_q, landmarks=landmarks)
    if (kept := min(top_k, landmarks.shape[1])) > MOST // 4:  # a room holds four times as many
        raise ValueError(f"top_k: got K={kept}, accepted are up to {MOST // 4}")
    T = retrieval_q.shape[1]
    chooser = retrieval_q if query_block == 1 else retrieval_q[:, ::query_block].contiguous()
    offsets, first = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    if isinstance(gumbel_seed, int):
        signed = (gumbel_seed + (1 << 63)) % (1 << 64) - (1 << 63)  # the low 64 bits
        gumbel_seed = torch.full((), signed, dtype=torch.int64, device=retrieval_q.device)
    indices, scores = _retrieve_scores(
        chooser,
        landmarks,
        offsets,
        first,
        query_block,
        chunk_size,
        top_k,
        exclude_window,
        gumbel_seed,
    )
    weights = weigh(scores, indices < 0, weighting)
    if query_block > 1:
        indices, weights = (
            x.repeat_interleave(query_block, dim=1)[:, :T] for x in (indices, weights)
        )
    return indices, weights
