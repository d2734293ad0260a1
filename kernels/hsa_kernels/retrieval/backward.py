"""The gradients of `retrieve`: each kept score q . landmark * R^-0.5 passes its gradient to both.

Dimensions: B batch, T choosing tokens, J retrieval heads, R retrieval dimension (RP padded to a
power of 2), N chunks, K chunks kept (KP padded), BE entries of the inverted index per step, E =
B*T*J*K.
"""

import torch
import triton
import triton.language as tl

from hsa_kernels.common.inverted_index import invert
from hsa_kernels.common.tiles import padded


@triton.jit
def retrieve_bwd_query_kernel(
    landmarks, indices, grad_scores, grad_q, stride_l, scale, T, J: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr,
    RP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """One program: dq [R] of one token and head: its kept landmarks, each times the gradient of its
    score.

    Grid: (T, J, B).
    """
    i_t = tl.program_id(0)
    i_j = tl.program_id(1)
    i_b = tl.program_id(2)
    o_r = tl.arange(0, RP)
    o_k = tl.arange(0, KP)
    row = (i_b.to(tl.int64) * T + i_t) * J + i_j
    # [KP] each
    b_n = tl.load(indices + row * K + o_k, mask=o_k < K, other=-1)
    b_ds = tl.load(grad_scores + row * K + o_k, mask=o_k < K, other=0.0)
    o_l = i_b.to(tl.int64) * stride_l + b_n.to(tl.int64)[:, None] * (J * R) + i_j * R + o_r[None, :]
    # [KP, RP]; an empty slot has no landmark
    b_l = tl.load(landmarks + o_l, mask=(b_n >= 0)[:, None] & (o_r < R)[None, :], other=0.0)
    # [KP, RP] -> [RP]
    b_dq = tl.sum(b_l.to(tl.float32) * b_ds[:, None], 0) * scale
    tl.store(grad_q + row * R + o_r, b_dq.to(grad_q.dtype.element_ty), mask=o_r < R)


@triton.jit
def retrieve_bwd_landmark_kernel(
    retrieval_q, grad_scores, entries, starts, grad_landmarks, scale, N, J: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
    RP: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program: dlandmark [R] of one chunk and head: the queries that kept it, in order, each
    times its score's gradient.

    Grid: (B*J*N,).
    """
    i_row = tl.program_id(0)  # (b*J + j)*N + n
    o_r = tl.arange(0, RP)
    b_dl = tl.zeros([RP], tl.float32)
    last = tl.load(starts + i_row + 1)
    for start in range(tl.load(starts + i_row), last, BE):
        o_e = start + tl.arange(0, BE)
        # [BE]: ((b*T + t)*J + j)*K + slot
        entry = tl.load(entries + o_e, mask=o_e < last, other=0).to(tl.int64)
        b_ds = tl.load(grad_scores + entry, mask=o_e < last, other=0.0)
        # [BE, RP]
        b_q = tl.load(
            retrieval_q + (entry // K)[:, None] * R + o_r[None, :],
            mask=(o_r < R)[None, :],
            other=0.0,
        )
        # [BE, RP] -> [RP]
        b_dl += tl.sum(b_q.to(tl.float32) * b_ds[:, None], 0)
    o_l = ((i_row // N // J).to(tl.int64) * N + i_row % N) * J + i_row // N % J
    tl.store(
        grad_landmarks + o_l * R + o_r,
        (b_dl * scale).to(grad_landmarks.dtype.element_ty),
        mask=o_r < R,
    )


def backward(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    indices: torch.Tensor,
    grad_scores: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """retrieval_q [B, T, J, R], landmarks [B, N, J, R], indices and grad_scores [B, T, J, K] ->
    their gradients.
    """
    B, T, J, R = retrieval_q.shape
    N = landmarks.shape[1]
    K = indices.shape[3]
    grad_q = torch.empty_like(retrieval_q)
    grad_landmarks = torch.empty_like(landmarks, memory_format=torch.contiguous_format)
    if 0 in (indices.numel(), N):
        return grad_q.zero_(), grad_landmarks.zero_()
    sizes = dict(J=J, R=R, K=K, RP=padded(R))
    retrieve_bwd_query_kernel[T, J, B](
        landmarks, indices, grad_scores, grad_q, landmarks.stride(0), R**-0.5, T,
        KP=triton.next_power_of_2(K), **sizes
    )  # fmt: skip
    index = invert(indices, N)
    retrieve_bwd_landmark_kernel[(B * J * N,)](
        retrieval_q, grad_scores, index.entries, index.starts, grad_landmarks, R**-0.5, N, BE=32,
        **sizes
    )  # fmt: skip
    return grad_q, grad_landmarks
