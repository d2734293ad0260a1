"""The operations of the model. The layers call these names and never choose a backend.

On an NVIDIA GPU from Ampere on, in 16 bits and where the sizes allow, the Triton kernels of
`hsa_kernels` and PyTorch's FlexAttention do the work. Everywhere else it is plain PyTorch
(`hsa_mini.ops.torch_backend`). `backend("torch")` uses PyTorch only.
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from hsa_mini import reference
from hsa_mini.ops import choice, torch_backend
from hsa_mini.ops.choice import backend, needs_gradient, runs_kernels, use_kernels
from hsa_mini.reference.checks import (
    check_chunk_attention,
    check_decode,
    check_retrieve,
    check_sliding_window,
)

__all__ = [
    "backend",
    "chunk_attention",
    "decode",
    "dispatch",
    "fetch",
    "grouped_experts",
    "retrieve",
    "sliding_window_attention",
    "update_window_cache",
    "window_decode_attention",
]

MIN_RETRIEVE_TOKENS = 4096  # with fewer the kernel underfills a GPU, and a matrix product is faster
MAX_KEPT = 256  # chunks per token; with more the candidates are too many for one program
MAX_DISPATCHED = 64  # tokens whose choices fit in one tile
MAX_EXPERTS = 256  # experts whose scores fit in one tile
MIN_WINDOW_TOKENS = 1024  # with fewer it does not pay to compile FlexAttention


def in_kernel(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the kernels do the work for heads q [B, T, H, D] and chunks k [B, N, S, J, D]."""
    H, D = q.shape[2:]
    S, J = k.shape[2:4]
    if not use_kernels(q, 16 <= D <= 256 and 16 <= S <= 128 and H <= 64 * J):
        return False
    if choice.current() == "kernels":
        return True
    from hsa_kernels.common.checks import tile_fits  # imported late, because Triton may be missing

    return tile_fits(q, k)


def _rows(memory: torch.Tensor) -> torch.Tensor:
    """Chunks as the kernels accept them.

    A memory with capacity behind every batch entry's chunks is not copied.
    """
    return memory if memory[:1].is_contiguous() else memory.contiguous()


def retrieve(
    retrieval_q,
    landmarks,
    *,
    chunk_size,
    top_k,
    offset: int | torch.Tensor = 0,
    weighting="softmax",
    gumbel_seed=None,
    exclude_window=0,
    query_block=1,
    document_starts=None,
):
    """`reference.retrieve`: same arguments, same numbers."""
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
        document_starts,
    )
    options: dict[str, Any] = dict(
        chunk_size=chunk_size,
        top_k=top_k,
        offset=offset,
        weighting=weighting,
        gumbel_seed=gumbel_seed,
        exclude_window=exclude_window,
        query_block=query_block,
        document_starts=document_starts,
    )
    tokens = retrieval_q.shape[:-1].numel() // query_block
    if use_kernels(retrieval_q, tokens >= MIN_RETRIEVE_TOKENS and top_k <= MAX_KEPT):
        return choice.kernels().retrieve(retrieval_q.contiguous(), _rows(landmarks), **options)
    return torch_backend.retrieve(retrieval_q, landmarks, **options)


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`reference.chunk_attention`: same arguments, same numbers."""
    check_chunk_attention(q, k, v, indices, weights)
    if in_kernel(q, k):
        tensors = q.contiguous(), _rows(k), _rows(v), indices.contiguous(), weights.contiguous()
        return choice.kernels().chunk_attention(*tensors, scale=scale)
    return torch_backend.chunk_attention(q, k, v, indices, weights, scale=scale)


def decode(retrieval_q, landmarks, q, k, v, *, chunk_size, top_k, offset, scale=None):
    """`reference.decode`: same arguments, same numbers; the kernel has no gradient."""
    check_decode(retrieval_q, landmarks, q, k, v, chunk_size)
    options: dict[str, Any] = dict(chunk_size=chunk_size, top_k=top_k, offset=offset, scale=scale)
    if not needs_gradient(retrieval_q, landmarks, q, k, v) and in_kernel(q, k):
        return choice.kernels().decode(
            retrieval_q.contiguous(),
            _rows(landmarks),
            q.contiguous(),
            _rows(k),
            _rows(v),
            **options,
        )
    return reference.decode(retrieval_q, landmarks, q, k, v, **options)


def dispatch(scores, bias, top_k):
    """`reference.dispatch`: same arguments and numbers; the kernel has no gradient.

    The kernel orders a token's experts by number, the reference by score.
    """
    fits = len(scores) <= MAX_DISPATCHED and len(bias) <= MAX_EXPERTS
    if fits and not needs_gradient(scores) and use_kernels(scores, True):
        return choice.kernels().dispatch(scores, bias, top_k)
    return reference.dispatch(scores, bias, top_k)


def grouped_experts(
    x, expert_offsets, token_indices, inverse_order, topk_scores, up_and_gate, down
):
    """`torch_backend.grouped_experts`: same arguments, same numbers; the kernel has no gradient."""
    arguments = (
        x.contiguous(),
        expert_offsets,
        token_indices,
        inverse_order,
        topk_scores,
        up_and_gate,
        down,
    )
    # PyTorch's grouped product, which serves many tokens, takes only rows of whole 16 bytes.
    fits = not any(size * down.itemsize % 16 for size in down.shape[1:])
    if not needs_gradient(x, topk_scores, up_and_gate, down) and use_kernels(x, fits):
        return choice.kernels().grouped_experts(*arguments)
    return torch_backend.grouped_experts(*arguments)


def fetch(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store [N, ...] in host memory, rows int64 [M] -> store[rows] [M, ...] on rows' device."""
    automatic = choice.current() == "auto" and runs_kernels(rows.device) and store.is_pinned()
    if choice.current() == "kernels" or (automatic and choice.kernels() is not None):
        return choice.kernels().fetch(store, rows)
    return store[rows.to(store.device)].to(rows.device)


def update_window_cache(q, k, v, cache_k, cache_v, slots, q_gain, k_gain, table, *, eps):
    """`torch_backend.update_window_cache`: same arguments, same numbers; no gradient on a GPU."""
    home = choice.kernels() if use_kernels(q, q.shape[3] <= 256) else torch_backend
    return home.update_window_cache(
        q, k, v, cache_k, cache_v, slots, q_gain, k_gain, table, eps=eps
    )


def window_decode_attention(q, k, v, positions):
    """`torch_backend.window_decode_attention`: same arguments and numbers; no gradient on a GPU."""
    if use_kernels(q, 16 <= q.shape[3] <= 256 and q.shape[2] <= 64 * k.shape[2]):
        return choice.kernels().window_decode_attention(q.contiguous(), k, v, positions)
    return torch_backend.window_decode_attention(q, k, v, positions)


def sliding_window_attention(q, k, v, *, window, document_starts=None):
    """`reference.sliding_window_attention`: same arguments, same numbers."""
    check_sliding_window(q, k, v, window, document_starts)
    flexible = (
        runs_kernels(q.device)
        and choice.current() == "auto"
        and q.shape[1] >= MIN_WINDOW_TOKENS
        and q.shape[3] in (16, 32, 64, 128)
    )
    if flexible and q.dtype in (torch.float16, torch.bfloat16):
        if document_starts is None and q.shape[1] == k.shape[1] <= window:  # plain causal attention
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        # imported late, because FlexAttention loads PyTorch's compiler
        from hsa_mini.ops.flex_window import sliding_window_attention

        return sliding_window_attention(q, k, v, window=window, document_starts=document_starts)
    return torch_backend.sliding_window_attention(
        q, k, v, window=window, document_starts=document_starts
    )
