"""Sliding-window attention with RoPE and QK norm: what a token sees nearby.

Dimensions: B batch, T tokens, C width, W window, H heads, J key/value heads, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.model.qkv import QKV


@dataclass(frozen=True)
class WindowCache:
    """The keys and values that later tokens still see: k and v [B, <= W-1, J, D], turned by RoPE."""

    k: torch.Tensor
    v: torch.Tensor


class SlidingWindowAttention(nn.Module):
    """x [B, T, C] -> [B, T, C], and the cache for the segment that follows."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.window = config.window
        self.qkv = QKV(config)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)

    def forward(self, x, rope, cache=None) -> tuple[torch.Tensor, "WindowCache | WindowRing"]:
        """`rope`: the table of x's positions; `cache`: what the tokens in front left behind, a ring if x is one token."""
        if cache is not None and not isinstance(cache, WindowCache):
            return self.out(cache.attend(self.qkv, x, rope).flatten(-2)), cache
        q, k, v = self.qkv(x, rope)
        if cache is not None:
            k = torch.cat((cache.k, k), dim=1)
            v = torch.cat((cache.v, v), dim=1)
        out = ops.sliding_window_attention(q, k, v, window=self.window)
        first = max(k.shape[1] - (self.window - 1), 0)
        k = k[:, first:]
        v = v[:, first:]
        if (
            first and not k.requires_grad
        ):  # a view would hold the keys and values of the whole segment
            k = k.clone()
            v = v.clone()
        return self.out(out.flatten(-2)), WindowCache(k, v)
