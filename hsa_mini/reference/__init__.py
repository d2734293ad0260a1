"""The operations in plain PyTorch: the oracle of every test and of every faster version."""

from .chunk_attention import chunk_attention
from .decode import decode
from .dispatch import dispatch
from .retrieval import retrieve
from .sliding_window import sliding_window_attention

__all__ = ["chunk_attention", "decode", "dispatch", "retrieve", "sliding_window_attention"]
