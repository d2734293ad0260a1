"""Which chunks matter to each token, and how much: Eq. (1), §2.2. The operator, with its gradient.

Dimensions: B batch, T tokens, J retrieval heads, R retrieval dimension, N chunks, K chunks kept, BT
tokens per tile, BN chunks per tile, CAP candidates per token.
"""

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from hsa_kernels.common.checks import check_kernel
from hsa_kernels.common.selection import MAX_KEYS
from hsa_kernels.common.tiles import padded, precision
from hsa_kernels.retrieval.backward import backward
from hsa_kernels.retrieval.candidates import row_numbers
from hsa_kernels.retrieval.forward import retrieve_fwd_kernel
from hsa_mini.reference.checks import check_retrieve
from hsa_mini.reference.retrieval import weigh

CANDIDATES_BYTES = 1 << 29  # of the candidate buffers of one launch
BT = 16
BN = 32


@torch.library.custom_op("hsa_kernels::retrieve", mutates_args=())
def _retrieve_scores(
    retrieval_q: torch.Tensor, landmarks: torch.Tensor, offsets: torch.Tensor | None, offset: int,
    step: int, chunk_size: int,
    top_k: int, exclude_window: int, seed: torch.Tensor | None,
    first_chunks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Indices int32 and clean scores fp32 [B, T, J, K] of the chunks kept; -1 and -inf in empty
    slots.
    """
    B, T, J, R = retrieval_q.shape
    N = landmarks.shape[1]
    indices = torch.empty(B, T, J, top_k, dtype=torch.int32, device=retrieval_q.device)
    scores = torch.empty(B, T, J, top_k, device=retrieval_q.device)
    if 0 in (indices.numel(), N):
        return indices.fill_(-1), scores.fill_(float("-inf"))
    KP = triton.next_power_of_2(top_k)
    CAP = max(4 * KP, 8 * BN)
    row = row_numbers(CAP, seed is not None)
    together = max(CANDIDATES_BYTES // (B * J * BT * row * 4), 1) * BT  # tokens of a launch
    buffers = torch.empty(
        B * J * min(triton.cdiv(T, BT) * BT, together) * row,
        dtype=torch.uint32,
        device=retrieval_q.device,
    )
    for first in range(0, T, together):
        retrieve_fwd_kernel[triton.cdiv(min(together, T - first), BT), J, B](
            retrieval_q, landmarks, offsets, seed, first_chunks, indices, scores, buffers,
            landmarks.stride(0), offset, step, first, T, N,
            chunk_size, exclude_window, R**-0.5, J=J, R=R, K=top_k, RP=padded(R), KP=KP, BT=BT,
            BN=BN, CAP=CAP,
            OFFSETS=offsets is not None, NOISE=seed is not None,
            DOCUMENTS=first_chunks is not None,
            PRECISION=precision(retrieval_q.dtype),
            **_options(retrieval_q, noise=seed is not None),
        )  # fmt: skip
    return indices, scores


def _options(retrieval_q: torch.Tensor, *, noise: bool) -> dict:
    """Launch options, and how many rows of a candidate buffer are cleaned up at once.

    In 16 bits a program has one warp, so it never waits for another one. With at most 128 registers
    per thread the clean-up passes through memory, but more programs share a multiprocessor, which
    was measured to be faster.
    """
    if retrieval_q.dtype == torch.float32:
        return dict(num_warps=4, num_stages=2, ROWS=4)
    limit = dict(maxnreg=128) if retrieval_q.shape[-1] <= 128 and not noise else {}
    return dict(num_warps=1, num_stages=2, ROWS=1) | limit


@torch.library.custom_op("hsa_kernels::retrieve_backward", mutates_args=())
def _retrieve_backward(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    indices: torch.Tensor,
    grad_scores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return backward(retrieval_q, landmarks, indices, grad_scores)


@_retrieve_scores.register_fake
def _(retrieval_q, landmarks, offsets, offset, step, chunk_size, top_k, *_):
    shape = (*retrieval_q.shape[:3], top_k)
    indices = retrieval_q.new_empty(shape, dtype=torch.int32)
    return indices, retrieval_q.new_empty(shape, dtype=torch.float32)


@_retrieve_backward.register_fake
def _(retrieval_q, landmarks, indices, grad_scores):
    grad_landmarks = torch.empty_like(landmarks, memory_format=torch.contiguous_format)
    return torch.empty_like(retrieval_q), grad_landmarks


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[0])
    ctx.mark_non_differentiable(output[0])


def _backward(ctx, _, grad_scores):
    return (*_retrieve_backward(*ctx.saved_tensors, grad_scores.contiguous()), *(None,) * 8)


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
    document_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` best visible chunks of every token and weigh them. Eq. (1).

    retrieval_q [B, T, J, R], landmarks [B, N, J, R] in float16, bfloat16 or float32 -> indices
    int32 [B, T, J, K] (-1: empty slot) and weights float32 [B, T, J, K] (0 where empty; they carry
    the gradient). Options as in `hsa_mini.reference.retrieve`. The choice is exact, and ties go to
    the newest chunk. Memory O(T*K); every gradient is the same from run to run. Raises ValueError
    for wrong shapes, dtypes, devices, layouts or ranges.
    """
    check_retrieve(
        retrieval_q, landmarks, chunk_size, top_k, offset, weighting, gumbel_seed, exclude_window,
        query_block, document_starts,
    )  # fmt: skip
    check_kernel(retrieval_q=retrieval_q, landmarks=landmarks)
    # A candidate buffer holds four times as many chunks as are kept.
    if (kept := min(top_k, landmarks.shape[1])) > MAX_KEYS // 4:
        raise ValueError(f"top_k: got K={kept}, accepted are up to {MAX_KEYS // 4}")
    T = retrieval_q.shape[1]
    chooser = retrieval_q if query_block == 1 else retrieval_q[:, ::query_block].contiguous()
    first_chunks = None
    if document_starts is not None:  # rounded up
        first_chunks = (-(-document_starts[:, ::query_block] // chunk_size)).int().contiguous()
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
        first_chunks,
    )
    weights = weigh(scores, indices < 0, weighting)
    if query_block > 1:
        indices, weights = (
            x.repeat_interleave(query_block, dim=1)[:, :T] for x in (indices, weights)
        )
    return indices, weights
