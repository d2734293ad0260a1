"""Which chunks matter to each token, and how much: Eq. (1), §2.2. Forward and backward, never holding [T, N].

Every token keeps its K best keys while the chunks stream by, a tile at a time, the newest first. A key is one 64-bit
number, score above chunk index: comparing keys compares scores, and of equal scores the newer chunk is larger.

Dimensions: B batch, T choosing tokens, J retrieval heads, R retrieval dimension (RP padded to a power of 2), N chunks, K
chunks kept (KP padded), BT tokens a tile, BN chunks a tile.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from hsa_mini.reference.checks import check_retrieve
from hsa_mini.reference.retrieval import weigh

from .checks import check_kernel
from .inverted_index import invert
from .tiles import ordered, padded, precision

NOTHING = tl.constexpr(-(2**63))  # below the key of any visible chunk
TAKEN = tl.constexpr(2**63 - 1)  # above it: pads K to a power of 2


@triton.jit
def _gumbel(seed, chunk, position, head, batch):
    """Gumbel(0, 1) noise, the reference's to the last bit but one: a logarithm near 0 needs float64."""
    bits, _, _, _ = tl.philox(seed, chunk, position, head, batch)
    uniform = (bits.to(tl.uint32, bitcast=True).to(tl.float64) + 0.5) * (2.0**-32)
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _keys(b_choice, o_n):
    """Floats as integers of the same order, above the chunk index."""
    return (ordered(b_choice).to(tl.int64) << 32) | o_n.to(tl.int64)


@triton.jit
def _retrieve(
    retrieval_q, landmarks, offsets, indices, scores, stride_l, offset, step, seed, T, N, chunk_size, exclude_window, scale,
    J: tl.constexpr, R: tl.constexpr, K: tl.constexpr, RP: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, OFFSETS: tl.constexpr, NOISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_t, i_j, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_t, o_r, o_k = i_t * BT + tl.arange(0, BT), tl.arange(0, RP), tl.arange(0, KP)
    if OFFSETS:
        offset = tl.load(offsets + i_b)
    position = offset + o_t * step  # [BT]
    o_row = (i_b.to(tl.int64) * T + o_t) * J + i_j
    m_q = (o_t < T)[:, None] & (o_r < R)[None, :]
    b_q = tl.load(retrieval_q + o_row[:, None] * R + o_r[None, :], mask=m_q, other=0.0)  # [BT, RP]
    landmarks += i_b.to(tl.int64) * stride_l + i_j * R

    # empty slots hold keys of their own below any chunk's, so that one at a time is the least
    b_top = tl.where(o_k < K, o_k.to(tl.int64) + NOTHING, TAKEN)[None, :] + tl.zeros([BT, 1], tl.int64)  # [BT, KP]
    b_kept = tl.zeros([BT, KP], tl.float32)  # scores without noise
    complete = tl.minimum((offset + (tl.minimum((i_t + 1) * BT, T) - 1) * step) // chunk_size, N).to(tl.int32)
    for start in range((tl.cdiv(complete, BN) - 1) * BN, -1, -BN):
        o_n = start + tl.arange(0, BN)
        m_l = (o_n < N)[:, None] & (o_r < R)[None, :]
        b_l = tl.load(landmarks + o_n.to(tl.int64)[:, None] * (J * R) + o_r[None, :], mask=m_l, other=0.0)  # [BN, RP]
        b_s = tl.dot(b_q, tl.trans(b_l), input_precision=PRECISION) * scale  # [BT, BN]
        b_choice = b_s
        if NOISE:
            b_choice += _gumbel(seed, o_n[None, :], position[:, None].to(tl.int32), i_j, i_b)
        o_first = o_n.to(tl.int64) * chunk_size  # a chunk's first token
        visible = (o_first + chunk_size)[None, :] <= position[:, None]
        visible &= (o_first[None, :] <= position[:, None] - exclude_window) & (o_n < N)[None, :]
        b_new = tl.where(visible, _keys(b_choice, o_n[None, :]), NOTHING)
        best, least = tl.max(b_new, 1), tl.min(b_top, 1)
        while tl.max((best > least).to(tl.int32), 0) > 0:  # some token replaces its least key by the best new one
            m_put = (b_top == least[:, None]) & (best > least)[:, None]
            m_got = b_new == best[:, None]
            b_kept = tl.where(m_put, tl.sum(tl.where(m_got, b_s, 0.0), 1)[:, None], b_kept)
            b_top = tl.where(m_put, best[:, None], b_top)
            b_new = tl.where(m_got, NOTHING, b_new)
            best, least = tl.max(b_new, 1), tl.min(b_top, 1)

    empty = b_top < NOTHING + KP
    m_out = (o_t < T)[:, None] & (o_k < K)[None, :]
    o_out = o_row[:, None] * K + o_k[None, :]
    tl.store(indices + o_out, tl.where(empty, -1, b_top.to(tl.int32)), mask=m_out)
    tl.store(scores + o_out, tl.where(empty, float("-inf"), b_kept), mask=m_out)


@triton.jit
def _gather_landmarks(
    landmarks, indices, grad_scores, grad_q, stride_l, scale, T, J: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
    RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """dq of one token: its kept landmarks, each times the gradient of its score."""
    i_t, i_j, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_r, o_k = tl.arange(0, RP), tl.arange(0, KP)
    row = (i_b.to(tl.int64) * T + i_t) * J + i_j
    b_n = tl.load(indices + row * K + o_k, mask=o_k < K, other=-1)
    b_ds = tl.load(grad_scores + row * K + o_k, mask=o_k < K, other=0.0)
    o_l = i_b.to(tl.int64) * stride_l + b_n.to(tl.int64)[:, None] * (J * R) + i_j * R + o_r[None, :]
    b_l = tl.load(landmarks + o_l, mask=(b_n >= 0)[:, None] & (o_r < R)[None, :], other=0.0)  # [KP, RP]
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
        entry = tl.load(entries + o_e, mask=o_e < last, other=0).to(tl.int64)  # ((b*T + t)*J + j)*K + slot
        b_ds = tl.load(grad_scores + entry, mask=o_e < last, other=0.0)
        b_q = tl.load(retrieval_q + (entry // K)[:, None] * R + o_r[None, :], mask=(o_r < R)[None, :], other=0.0)  # [BE, RP]
        b_dl += tl.sum(b_q.to(tl.float32) * b_ds[:, None], 0)
    o_l = ((i_row // N // J).to(tl.int64) * N + i_row % N) * J + i_row // N % J
    tl.store(grad_landmarks + o_l * R + o_r, (b_dl * scale).to(grad_landmarks.dtype.element_ty), mask=o_r < R)


@torch.library.custom_op("hsa_kernels::retrieve", mutates_args=())
def _retrieve_scores(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, offsets: torch.Tensor | None, offset: int, step: int, chunk_size: int,
    top_k: int, exclude_window: int, seed: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Indices int32 and clean scores fp32 [B, T, J, K] of the chunks kept; -1 and -inf in empty slots."""
    (B, T, J, R), N = retrieval_q.shape, landmarks.shape[1]
    indices = torch.empty(B, T, J, top_k, dtype=torch.int32, device=retrieval_q.device)
    scores = torch.empty(B, T, J, top_k, device=retrieval_q.device)
    if 0 in (indices.numel(), N):
        return indices.fill_(-1), scores.fill_(float("-inf"))
    BT = 16 if top_k > 64 or retrieval_q.dtype == torch.float32 else 32
    _retrieve[triton.cdiv(T, BT), J, B](
        retrieval_q, landmarks, offsets, indices, scores, landmarks.stride(0), offset, step, seed or 0, T, N, chunk_size,
        exclude_window, R**-0.5, J=J, R=R, K=top_k, RP=padded(R), KP=triton.next_power_of_2(top_k), BT=BT, BN=64,
        OFFSETS=offsets is not None, NOISE=seed is not None, PRECISION=precision(retrieval_q.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
    return indices, scores


@torch.library.custom_op("hsa_kernels::retrieve_backward", mutates_args=())
def _retrieve_backward(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, grad_scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (B, T, J, R), N, K = retrieval_q.shape, landmarks.shape[1], indices.shape[3]
    grad_q, grad_landmarks = torch.empty_like(retrieval_q), torch.empty_like(landmarks, memory_format=torch.contiguous_format)
    if 0 in (indices.numel(), N):
        return grad_q.zero_(), grad_landmarks.zero_()
    sizes = dict(J=J, R=R, K=K, RP=padded(R))
    _gather_landmarks[T, J, B](
        landmarks, indices, grad_scores, grad_q, landmarks.stride(0), R**-0.5, T, KP=triton.next_power_of_2(K), **sizes
    )
    _sum_queries[(B * J * N,)](retrieval_q, grad_scores, *invert(indices, N), grad_landmarks, R**-0.5, N, BE=32, **sizes)
    return grad_q, grad_landmarks


@_retrieve_scores.register_fake
def _(retrieval_q, landmarks, offsets, offset, step, chunk_size, top_k, exclude_window, seed):
    shape = (*retrieval_q.shape[:3], top_k)
    return retrieval_q.new_empty(shape, dtype=torch.int32), retrieval_q.new_empty(shape, dtype=torch.float32)


@_retrieve_backward.register_fake
def _(retrieval_q, landmarks, indices, grad_scores):
    return torch.empty_like(retrieval_q), torch.empty_like(landmarks, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[0])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx, _, grad_scores):
    return (*_retrieve_backward(*ctx.saved_tensors, grad_scores.contiguous()), *(None,) * 7)


_retrieve_scores.register_autograd(_backward, setup_context=_setup)


@register_flop_formula(torch.ops.hsa_kernels.retrieve)
def _flop(q_shape, landmarks_shape, *_, **__) -> int:
    (B, T, J, R), N = q_shape, landmarks_shape[1]
    return 2 * B * T * J * N * R


@register_flop_formula(torch.ops.hsa_kernels.retrieve_backward)
def _flop_backward(q_shape, landmarks_shape, indices_shape, *_, **__) -> int:
    (B, T, J, R), K = q_shape, indices_shape[3]
    return 4 * B * T * J * K * R


def retrieve(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor = 0,
    weighting: str = "softmax",
    gumbel_seed: int | None = None,
    exclude_window: int = 0,
    query_block: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` best visible chunks of every token and weigh them. Eq. (1).

    retrieval_q [B, T, J, R], landmarks [B, N, J, R] in float16, bfloat16 or float32 -> indices int32 [B, T, J, K] (-1: empty
    slot) and weights float32 [B, T, J, K] (0 where empty; they carry the gradient). Options as in
    `hsa_mini.reference.retrieve`; exact, and of equal scores the newest chunk is kept. Memory O(T*K); every gradient is
    the same from run to run. Raises ValueError for wrong shapes, dtypes, devices, layouts or ranges.
    """
    check_retrieve(retrieval_q, landmarks, chunk_size, top_k, offset, weighting, gumbel_seed, exclude_window, query_block)
    check_kernel(retrieval_q=retrieval_q, landmarks=landmarks)
    T = retrieval_q.shape[1]
    chooser = retrieval_q if query_block == 1 else retrieval_q[:, ::query_block].contiguous()
    offsets, first = (offset, 0) if isinstance(offset, torch.Tensor) else (None, offset)
    indices, scores = _retrieve_scores(
        chooser, landmarks, offsets, first, query_block, chunk_size, top_k, exclude_window, gumbel_seed
    )
    if weighting == "stick_breaking":
        indices, order = indices.sort(dim=-1, descending=True)
        scores = scores.gather(-1, order)
    weights = weigh(scores, indices < 0, weighting)
    if query_block > 1:
        indices, weights = (x.repeat_interleave(query_block, dim=1)[:, :T] for x in (indices, weights))
    return indices, weights
