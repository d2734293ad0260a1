"""The chunk encoder: every complete chunk becomes keys, values and one landmark, once, for all HSA layers.

Dimensions: B batch, N chunks, S chunk size, C width, J key/value heads, D head dimension, R retrieval dimension.
"""

import torch
from torch import nn

from ..config import HSAConfig
from .mlp import MLP
from .norm import RMSNorm
from .qkv import QKV
from .rope import rope_table

class EncoderBlock(nn.Module):
    """A bidirectional block over the S tokens of a chunk and its [CLS]: x [M, S+1, C] -> [M, S+1, C]."""

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
        out = nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + self.out(out.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class ChunkEncoder(nn.Module):
    """hidden [B, N, S, C] -> k (normed) and v [B, N, S, J, D], landmarks [B, N, J_r, R].

    NOTE: differs from the paper because a landmark is made of what distinguishes a chunk's [CLS] from `centre` [C], their
    running mean. What all landmarks share moves all scores of a token alike, which softmax does not see: the weights are the
    same. But trained among chunks of earlier batches (`Crowd`) it tells old from new, grows to thousands of times the
    differences between chunks, and leaves 16 bits no room for these.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.config = config
        self.cls = nn.Parameter(torch.empty(config.width))
        self.register_buffer("centre", torch.zeros(config.width))
        self.seen: torch.Tensor | None = None  # in training, the mean [CLS] of the last batch
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps)
        self.k = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.v = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.k_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)
        self.landmark = nn.Linear(config.width, config.retrieval_heads * config.retrieval_dim, bias=False)
        self.landmark_norm = RMSNorm(config.retrieval_dim, eps=config.norm_eps) if config.retrieval_norm else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        B, N, S, C = hidden.shape
        cls = self.cls.to(hidden.dtype).expand(B * N, 1, C)
        x = torch.cat((hidden.flatten(0, 1), cls), dim=1)  # [CLS] last: [B*N, S+1, C]
        rope = rope_table(torch.arange(S + 1, device=x.device), self.config.head_dim, self.config.rope_base)
        for block in self.blocks:
            x = block(x, rope)
        x = self.norm(x).unflatten(0, (B, N))
        tokens, summary = x[:, :, :S], x[:, :, S]
        k, v = (project(tokens).unflatten(-1, (-1, self.config.hsa_head_dim)) for project in (self.k, self.v))
        landmarks = self.landmark(summary - self.centre.to(summary.dtype)).unflatten(-1, (-1, self.config.retrieval_dim))
        if self.training and N:
            self.seen = summary.detach().mean(dim=(0, 1))
        return self.k_norm(k), v, self.landmark_norm(landmarks).to(v.dtype)

    @torch.no_grad()
    def recentre(self, rate: float) -> None:
        """Move `centre` by this share of the way to what the last batch had in common. Nothing but rounding changes."""
        if self.seen is not None:
            self.centre.lerp_(self.seen.to(self.centre.dtype), rate)
            self.seen = None
