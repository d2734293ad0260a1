"""Triton kernels: each the twin of a reference operation, and `fetch`, which reads host memory."""

from .chunk_attention import chunk_attention
from .decode import decode
from .fetch import fetch
from .retrieval import retrieve

__all__ = ["chunk_attention", "decode", "fetch", "retrieve"]
