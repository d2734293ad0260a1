"""The operations in plain PyTorch, as simple as possible.

Every test and every faster version is compared with them.
"""

from hsa_mini.reference.chunk_attention import chunk_attention
from hsa_mini.reference.decode import decode
from hsa_mini.reference.dispatch import dispatch
from hsa_mini.reference.retrieval import retrieve
from hsa_mini.reference.sliding_window import sliding_window_attention

__all__ = ["chunk_attention", "decode", "dispatch", "retrieve", "sliding_window_attention"]
