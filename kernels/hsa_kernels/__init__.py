"""Triton kernels: each the twin of a reference operation."""

from .chunk_attention import chunk_attention
from .decode import decode
from .retrieval import retrieve

__all__ = ["chunk_attention", "decode", "retrieve"]
