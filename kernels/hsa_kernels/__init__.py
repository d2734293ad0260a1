"""Triton kernels: each the twin of a portable operation, and `fetch`, which reads host memory."""

from .chunk_attention import chunk_attention
from .decode import decode
from .dispatch import dispatch
from .enter_ring import enter_ring
from .experts import experts
from .fetch import fetch
from .retrieval import retrieve
from .ring_attention import ring_attention

__all__ = [
    "chunk_attention",
    "decode",
    "dispatch",
    "enter_ring",
    "experts",
    "fetch",
    "retrieve",
    "ring_attention",
]
