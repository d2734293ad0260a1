"""One door for every operation of the model: the layers call these names and never choose an implementation.

On an NVIDIA GPU, in 16 bits and where the sizes allow, the Triton kernels of `hsa_kernels` and PyTorch's FlexAttention do the
work; everywhere else the portable operations of `blockwise`. `implementation("portable")` keeps the kernels out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from . import blockwise, reference

__all__ = ["chunk_attention", "decode", "implementation", "retrieve", "sliding_window_attention"]

CHOICES = ("auto", "kernels", "portable")
LEAST_TOKENS = 4096  # choosing tokens that fill a GPU with programs of `retrieve`; with fewer, a matrix product is faster
LEAST_WINDOW_TOKENS = 1024  # worth compiling FlexAttention for

_choice: ContextVar[str] = ContextVar("implementation", default="auto")


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Within, operations are done by the Triton kernels ("kernels"), by plain PyTorch ("portable") or as it suits ("auto").

    "kernels" raises ValueError for what they do not take; without a GPU they need Triton's interpreter.
    """
    if name not in CHOICES:
        raise ValueError(f"name: got {name!r}, accepted are {', '.join(CHOICES)}")
    token = _choice.set(name)
    try:
        yield
    finally:
        _choice.reset(token)


def _kernels():
    """`hsa_kernels`, or None where Triton is missing and nobody insists."""
    try:
        import hsa_kernels
    except ImportError:
        if _choice.get() == "kernels":
            raise
        return None
    return hsa_kernels


def _suits(tensor: torch.Tensor, sizes_fit: bool) -> bool:
    if _choice.get() != "auto":
        return _choice.get() == "kernels"
    return tensor.is_cuda and tensor.dtype in (torch.float16, torch.bfloat16) and sizes_fit and _kernels() is not None


def _rows(memory: torch.Tensor) -> torch.Tensor:
    """A memory with room behind the chunks of every batch entry stays where it is; anything else is made contiguous."""
    return memory if memory[:1].is_contiguous() else memory.contiguous()


def retrieve(retrieval_q, landmarks, *, query_block=1, **options):
    """`reference.retrieve`: same arguments, same numbers."""
    tokens = retrieval_q.shape[:-1].numel() // query_block
    if _suits(retrieval_q, tokens >= LEAST_TOKENS and options["top_k"] <= 256):
        return _kernels().retrieve(retrieval_q.contiguous(), _rows(landmarks), query_block=query_block, **options)
    return blockwise.retrieve(retrieval_q, landmarks, query_block=query_block, **options)


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`reference.chunk_attention`: same arguments, same numbers."""
    (H, D), (S, J) = q.shape[2:], k.shape[2:4]
    if _suits(q, 16 <= D <= 256 and 16 <= S <= 128 and H <= 64 * J):
        tensors = q.contiguous(), _rows(k), _rows(v), indices.contiguous(), weights.contiguous()
        return _kernels().chunk_attention(*tensors, scale=scale)
    return blockwise.chunk_attention(q, k, v, indices, weights, scale=scale)


def decode(retrieval_q, landmarks, q, k, v, **options):
    """`reference.decode`: same arguments, same numbers."""
    (H, D), (S, J) = q.shape[2:], k.shape[2:4]
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (retrieval_q, landmarks, q, k, v))
    if not needs_gradient and _suits(q, 16 <= D <= 256 and 16 <= S <= 128 and H <= 64 * J):
        return _kernels().decode(retrieval_q.contiguous(), _rows(landmarks), q.contiguous(), _rows(k), _rows(v), **options)
    return reference.decode(retrieval_q, landmarks, q, k, v, **options)


def sliding_window_attention(q, k, v, *, window):
    """`reference.sliding_window_attention`: same arguments, same numbers."""
    if _suits(q, q.shape[1] >= LEAST_WINDOW_TOKENS and q.shape[3] in (16, 32, 64, 128)) and q.is_cuda:
        from .flex_window import sliding_window_attention

        return sliding_window_attention(q, k, v, window=window)
    return blockwise.sliding_window_attention(q, k, v, window=window)
