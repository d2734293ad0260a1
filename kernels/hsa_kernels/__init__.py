"""Triton kernels: each the twin of a reference operation."""

from .chunk_attention import chunk_attention
from .retrieval import retrieve

__all__ = ["chunk_attention", "retrieve"]
