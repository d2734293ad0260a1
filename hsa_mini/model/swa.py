"""Sliding-window attention with RoPE and QK norm: what a token sees nearby.

Dimensions: B batch, T tokens, C width, W window, H heads, J key/value heads, D head dimension.
"""

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.memory.rolling_cache import RollingKVCache
from hsa_mini.model.qkv import QKV


class SlidingWindowAttention(nn.Module):
    """x [B, T, C] -> [B, T, C], and the cache for the tokens that follow."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.window = config.window
        self.eps = config.norm_eps
        self.qkv = QKV(config)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        rope,
        cache: RollingKVCache | None = None,
        position: int = 0,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RollingKVCache]:
        """A segment. rope: the table of x's positions, the first of which is `position`. cache: the
        keys and values of the tokens before x. document_starts [B, T]: the position where each
        token's document begins.
        """
        q, k, v = self.qkv(x, rope)
        end = position + k.shape[1]
        if cache is not None:
            k, v = cache.in_front_of(k, v, position)
        if document_starts is not None:
            document_starts = document_starts - (end - k.shape[1])  # counted from the first key on
        out = ops.sliding_window_attention(
            q, k, v, window=self.window, document_starts=document_starts
        )
        cache = RollingKVCache.from_order(k, v, end, self.window)
        return self.out(out.flatten(-2)), cache

    def decode_step(
        self,
        x: torch.Tensor,
        rope,
        cache: RollingKVCache,
        positions: torch.Tensor,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """One new token of every sequence, x [B, 1, C] at positions int64 [B], enters slots =
        positions % W of the cache.
        """
        q, k, v = self.qkv.project(x)
        norms = (self.qkv.q_norm, self.qkv.k_norm)
        q_gain, k_gain = (getattr(norm, "weight", None) for norm in norms)  # None without QK norm
        q = ops.update_window_cache(
            q, k, v, cache.k, cache.v, slots, q_gain, k_gain, rope, eps=self.eps
        )
        out = ops.window_decode_attention(q, cache.k, cache.v, positions)
        return self.out(out.flatten(-2))
