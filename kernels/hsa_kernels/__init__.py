"""Triton kernels: twins of operations in plain PyTorch, and `fetch`, which reads host memory.

A package per operation: `attention` (chunk attention), `retrieval`, `decoding`, `window`,
`experts`, `host`; `common` is what they share.
"""

from hsa_kernels.attention.operator import chunk_attention
from hsa_kernels.common.interpreter import check_interpreter
from hsa_kernels.decoding.operator import decode
from hsa_kernels.experts.dispatch import dispatch
from hsa_kernels.experts.grouped_experts import grouped_experts
from hsa_kernels.host.fetch import fetch
from hsa_kernels.retrieval.operator import retrieve
from hsa_kernels.window.update_window_cache import update_window_cache
from hsa_kernels.window.window_decode_attention import window_decode_attention

check_interpreter()

__all__ = [
    "chunk_attention",
    "decode",
    "dispatch",
    "fetch",
    "grouped_experts",
    "retrieve",
    "update_window_cache",
    "window_decode_attention",
]
