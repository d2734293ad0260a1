"""One door for every operation of the model: the layers call these names and never choose an implementation.

On an NVIDIA GPU, in 16 bits and where the sizes allow, the Triton kernels of `hsa_kernels` and PyTorch's FlexAttention do the
work; everywhere else the portable operations of `blockwise`. `implementation("portable")` keeps the kernels out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention

from hsa_mini import reference
from hsa_mini.ops import torch_backend as blockwise
from hsa_mini.reference.checks import (
    check_chunk_attention,
    check_decode,
    check_retrieve,
    check_sliding_window,
)

__all__ = [
    "chunk_attention", "decode", "dispatch", "enter_ring", "experts", "fetch", "implementation", "retrieve",
    "ring_attention", "sliding_window_attention",
]  # fmt: skip

CHOICES = ("auto", "kernels", "portable")
LEAST_TOKENS = 4096  # choosing tokens that fill a GPU with programs of `retrieve`; with fewer, a matrix product is faster
MOST_KEPT = 256  # chunks a token: beyond, its candidates are too many for one program
MOST_DISPATCHED = 64  # tokens: their choices are one tile of one program
LEAST_WINDOW_TOKENS = 1024  # worth compiling FlexAttention for

_choice = "auto"


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within, operations are done by the Triton kernels ("kernels"), by plain PyTorch ("portable") or as it suits ("auto").

    "kernels" raises ValueError for what they do not take; without a GPU they need Triton's interpreter.
    """
    global _choice
    if name not in CHOICES:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(CHOICES)}")
    before = _choice
    _choice = name
    try:
        yield
    finally:
        _choice = before


def _kernels():
    """`hsa_kernels`, or None where Triton is missing and nobody insists."""
    try:
        import hsa_kernels
    except ImportError:
        if _choice == "kernels":
            raise
        return None
    return hsa_kernels


def _suits(tensor: torch.Tensor, sizes_fit: bool) -> bool:
    if _choice != "auto":
        return _choice == "kernels"
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16)
        and sizes_fit
        and _kernels() is not None
    )


def in_kernel(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the kernels are made for such heads and chunks."""
    H, D = q.shape[2:]
    S, J = k.shape[2:4]
    return _suits(q, 16 <= D <= 256 and 16 <= S <= 128 and H <= 64 * J)


def _rows(memory: torch.Tensor) -> torch.Tensor:
    """A memory with room behind the chunks of every batch entry stays where it is; anything else is made contiguous."""
    return memory if memory[:1].is_contiguous() else memory.contiguous()


def retrieve(
    retrieval_q,
    landmarks,
    *,
    chunk_size,
    top_k,
    offset=0,
    weighting="softmax",
    gumbel_seed=None,
    exclude_window=0,
    query_block=1,
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
    )
    options = dict(
        chunk_size=chunk_size,
        top_k=top_k,
        offset=offset,
        weighting=weighting,
        gumbel_seed=gumbel_seed,
    )
    options |= dict(exclude_window=exclude_window, query_block=query_block)
    tokens = retrieval_q.shape[:-1].numel() // query_block
    if _suits(retrieval_q, tokens >= LEAST_TOKENS and top_k <= MOST_KEPT):
        return _kernels().retrieve(retrieval_q.contiguous(), _rows(landmarks), **options)
    return blockwise.retrieve(retrieval_q, landmarks, **options)


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`reference.chunk_attention`: same arguments, same numbers."""
    check_chunk_attention(q, k, v, indices, weights)
    if in_kernel(q, k):
        tensors = q.contiguous(), _rows(k), _rows(v), indices.contiguous(), weights.contiguous()
        return _kernels().chunk_attention(*tensors, scale=scale)
    return blockwise.chunk_attention(q, k, v, indices, weights, scale=scale)


def decode(retrieval_q, landmarks, q, k, v, *, chunk_size, top_k, offset, scale=None):
    """`reference.decode`: same arguments, same numbers; the kernel has no gradient."""
    check_decode(retrieval_q, landmarks, q, k, v, chunk_size)
    options = dict(chunk_size=chunk_size, top_k=top_k, offset=offset, scale=scale)
    learns = torch.is_grad_enabled() and any(
        x.requires_grad for x in (retrieval_q, landmarks, q, k, v)
    )
    if not learns and in_kernel(q, k):
        return _kernels().decode(
            retrieval_q.contiguous(),
            _rows(landmarks),
            q.contiguous(),
            _rows(k),
            _rows(v),
            **options,
        )
    return reference.decode(retrieval_q, landmarks, q, k, v, **options)


def dispatch(scores, bias, active):
    """`reference.dispatch`: same arguments, same numbers, a token's experts in any order; the kernel has no gradient."""
    learns = torch.is_grad_enabled() and scores.requires_grad
    if not learns and len(scores) <= MOST_DISPATCHED and len(bias) <= 256 and _suits(scores, True):
        return _kernels().dispatch(scores, bias, active)
    return reference.dispatch(scores, bias, active)


def experts(x, ends, tokens, places, gates, up_and_gate, down):
    """`blockwise.experts`: same arguments, same numbers; the kernel has no gradient."""
    given = x.contiguous(), ends, tokens, places, gates, up_and_gate, down
    learns = torch.is_grad_enabled() and any(
        part.requires_grad for part in (x, gates, up_and_gate, down)
    )
    if not learns and _suits(x, True):
        return _kernels().experts(*given)
    return blockwise.experts(*given)


def fetch(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store [N, ...] in host memory, rows int64 [M] -> store[rows] [M, ...] on the device of rows."""
    if _choice == "kernels" or (
        _choice == "auto" and rows.is_cuda and store.is_pinned() and _kernels() is not None
    ):
        return _kernels().fetch(store, rows)
    return store[rows.to(store.device)].to(rows.device)


def enter_ring(q, k, v, ring_k, ring_v, slots, q_gain, k_gain, table, *, eps):
    """`blockwise.enter_ring`: same arguments, same numbers; the kernel has no gradient."""
    suits = _suits(q, q.shape[3] <= 256)
    return (_kernels() if suits else blockwise).enter_ring(
        q, k, v, ring_k, ring_v, slots, q_gain, k_gain, table, eps=eps
    )


def ring_attention(q, k, v, positions):
    """`blockwise.ring_attention`: same arguments, same numbers; the kernel has no gradient."""
    if _suits(q, 16 <= q.shape[3] <= 256 and q.shape[2] <= 64 * k.shape[2]):
        return _kernels().ring_attention(q.contiguous(), k, v, positions)
    return blockwise.ring_attention(q, k, v, positions)


def sliding_window_attention(q, k, v, *, window):
    """`reference.sliding_window_attention`: same arguments, same numbers."""
    check_sliding_window(q, k, v, window)
    flexible = (
        q.is_cuda
        and _choice == "auto"
        and q.shape[1] >= LEAST_WINDOW_TOKENS
        and q.shape[3] in (16, 32, 64, 128)
    )
    if flexible and q.dtype in (torch.float16, torch.bfloat16):
        if q.shape[1] == k.shape[1] <= window:  # plain causal attention
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(1, 2)
        from hsa_mini.ops.flex_window import sliding_window_attention

        return sliding_window_attention(q, k, v, window=window)
    return blockwise.sliding_window_attention(q, k, v, window=window)
