"""Queries, keys and values of an attention layer: projections, QK norm (arXiv 2010.04245) unless
`qk_norm` is False, RoPE.

Dimensions: T tokens, C width, H heads, J key/value heads, D head dimension.
"""

from collections.abc import Iterator

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.model.norm import RMSNorm
from hsa_mini.ops.rope import apply_rope


class QKV(nn.Module):
    """x [..., T, C] and the RoPE table of its positions -> q [..., T, H, D], k and v [..., T, J,
    D].
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.q_norm = self._norm(config)
        self.k_norm = self._norm(config)

    @staticmethod
    def _norm(config: HSAConfig) -> nn.Module:
        return RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, rope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.project(x)
        return apply_rope(self.q_norm(q), rope), apply_rope(self.k_norm(k), rope), v

    def project(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """q, k and v as `forward` returns them, but neither normed nor rotated."""
        return (
            project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q, self.k, self.v)
        )
