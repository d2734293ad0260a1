"""The chunk encoder turns every complete chunk into keys, values and one landmark, once, for all
HSA layers.

Dimensions: B batch, N chunks, S chunk size, C width, J key/value heads, D head dimension, R
retrieval dimension.
"""

from typing import NamedTuple

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.model.mlp import MLP
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.qkv import QKV
from hsa_mini.ops.rope import rope_table


class EncoderBlock(nn.Module):
    """A bidirectional block over the S tokens of a chunk and its [CLS]: x [M, S+1, C] -> [M, S+1,
    C].
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.qkv = QKV(config)
        self.out = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.encoder_mlp_width or config.mlp_width)

    def forward(self, x: torch.Tensor, rope) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x), rope)
        k, v = (part.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for part in (k, v))
        out = nn.functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (q, k, v))
        )
        x = x + self.out(out.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class EncodedChunks(NamedTuple):
    """k (normed) and v [B, N, S, J, D], landmarks [B, N, J_r, R], and cls_states [B, N, C], from
    which the landmarks are computed.

    cls_states is None if the encoder has no [CLS], as in some variants of the laboratory.
    """

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    cls_states: torch.Tensor | None


class ChunkEncoder(nn.Module):
    """hidden [B, N, S, C] of N complete chunks -> `EncodedChunks`."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.config = config
        self.cls = nn.Parameter(torch.empty(config.width))
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.k = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.v = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.k_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)
        self.landmark = nn.Linear(
            config.width, config.retrieval_heads * config.retrieval_dim, bias=False
        )
        self.landmark_norm = (
            RMSNorm(config.retrieval_dim, eps=config.norm_eps)
            if config.retrieval_norm
            else nn.Identity()
        )

    def forward(self, hidden: torch.Tensor) -> EncodedChunks:
        B, N, S, C = hidden.shape
        cls = self.cls.to(hidden.dtype).expand(B * N, 1, C)
        rows = torch.cat((hidden.flatten(0, 1), cls), dim=1)  # [CLS] last: [B*N, S+1, C]
        mixed = self.mix(rows).unflatten(0, (B, N))  # [B*N, S+1, C] -> [B, N, S+1, C]
        cls_states = mixed[:, :, S]
        k, v = self.keys_and_values(mixed[:, :, :S])
        return EncodedChunks(k, v, self.landmarks(cls_states).to(v.dtype), cls_states)

    def mix(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all blocks and the norm to the L vectors of each of M chunks: x [M, L, C] -> [M, L,
        C].
        """
        positions = torch.arange(x.shape[1], device=x.device)
        rope = rope_table(positions, self.config.head_dim, self.config.rope_base)
        for block in self.blocks:
            x = block(x, rope)
        return self.norm(x)

    def keys_and_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed tokens [B, N, S, C] -> k (normed) and v [B, N, S, J, D]."""
        k, v = (
            project(tokens).unflatten(-1, (-1, self.config.hsa_head_dim))
            for project in (self.k, self.v)
        )
        return self.k_norm(k), v

    def landmarks(self, cls_states: torch.Tensor) -> torch.Tensor:
        """The normed [CLS] state of every chunk, [B, N, C], -> landmarks [B, N, J_r, R]."""
        projected = self.landmark(cls_states).unflatten(-1, (-1, self.config.retrieval_dim))
        return self.landmark_norm(projected)
