"""One door for every operation of the model: the layers call these names and never choose an implementation."""

from .blockwise import chunk_attention, retrieve, sliding_window_attention
from .reference import decode

__all__ = ["chunk_attention", "decode", "retrieve", "sliding_window_attention"]
