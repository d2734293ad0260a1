"""One block of the decoder: window attention, HSA in the first block of a group, then an MLP or a
mixture of experts.

Dimensions: B batch, T tokens, C width.
"""

from collections.abc import Callable

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.memory.rolling_cache import RollingKVCache
from hsa_mini.model.hsa import HSA
from hsa_mini.model.mlp import MLP
from hsa_mini.model.moe import MoE
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.swa import SlidingWindowAttention

AttendChunks = Callable[[HSA, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """Every part reads the normed residual stream, and its output is added to the stream.

    `forward` and `decode_step` both take `attend_chunks(hsa, x)`, which returns the output of the
    HSA layer.
    """

    def __init__(self, config: HSAConfig, *, with_hsa: bool, with_experts: bool) -> None:
        super().__init__()
        self.bypass = config.residual == "bypass"
        self.swa_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.swa = SlidingWindowAttention(config)
        self.hsa_norm = RMSNorm(config.width, eps=config.norm_eps) if with_hsa else None
        self.hsa = HSA(config) if with_hsa else None
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = (
            MoE(config.width, config.expert_width, config.experts, config.experts_active)
            if with_experts
            else MLP(config.width, config.mlp_width)
        )

    def forward(
        self,
        x: torch.Tensor,
        rope,
        cache: RollingKVCache | None,
        position: int,
        attend_chunks: AttendChunks | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RollingKVCache]:
        """A segment x [B, T, C] from `position` on -> [B, T, C], and the window cache to keep.

        document_starts [B, T]: see `SlidingWindowAttention.forward`.
        """
        near, new_cache = self.swa(self.swa_norm(x), rope, cache, position, document_starts)
        return self._behind_window(x + near, attend_chunks), new_cache

    def decode_step(
        self,
        x: torch.Tensor,
        rope,
        cache: RollingKVCache,
        positions: torch.Tensor,
        slots: torch.Tensor,
        attend_chunks: AttendChunks | None = None,
    ) -> torch.Tensor:
        """One new token of every sequence, x [B, 1, C] -> [B, 1, C]; see
        `SlidingWindowAttention.decode_step`.
        """
        near = self.swa.decode_step(self.swa_norm(x), rope, cache, positions, slots)
        return self._behind_window(x + near, attend_chunks)

    def _behind_window(self, x: torch.Tensor, attend_chunks: AttendChunks | None) -> torch.Tensor:
        """HSA, if the block has it, and the MLP or the experts."""
        mlp_input = x
        if self.hsa is not None and self.hsa_norm is not None and attend_chunks is not None:
            mlp_input = x + attend_chunks(self.hsa, self.hsa_norm(x))
            x = x if self.bypass else mlp_input
        return x + self.mlp(self.mlp_norm(mlp_input))
