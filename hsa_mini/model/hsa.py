"""The HSA layer: a token asks the chunk memory, wherever in the past its chunks lie. Eq. (1), Eq. (2).

Dimensions: B batch, T tokens, C width, H heads, J key/value heads, D head dimension, R retrieval dimension, K chunks kept.
"""

from typing import NamedTuple

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.model.norm import RMSNorm


class Retrieval(NamedTuple):
    """What an HSA layer asked for and got: queries [B, T, J_r, R], indices int32 and weights [B, T, J, K]."""

    queries: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


class HSA(nn.Module):
    """x [B, T, C] and the memory's chunks -> [B, T, C], and the retrieval that led to it."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.config = config
        self.q = nn.Linear(config.width, config.hsa_heads * config.hsa_head_dim, bias=False)
        self.q_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)
        self.retrieval_q = nn.Linear(
            config.width, config.retrieval_heads * config.retrieval_dim, bias=False
        )
        self.retrieval_norm = (
            RMSNorm(config.retrieval_dim, eps=config.norm_eps)
            if config.retrieval_norm
            else nn.Identity()
        )
        self.out = nn.Linear(config.hsa_heads * config.hsa_head_dim, config.width, bias=False)

    def forward(
        self,
        x,
        landmarks,
        attend,
        *,
        position: int,
        in_front: int | torch.Tensor = 0,
        block_query=None,
        gumbel_seed=None,
    ) -> tuple[torch.Tensor, Retrieval, torch.Tensor | None]:
        """landmarks [B, N, J_r, R] to choose among; `attend(q, indices, weights)` reads the chunks chosen; `position` is
        that of x's first token, behind `in_front` more tokens (int, or int64 [B]), a multiple of the chunk size.

        `block_query` [B, 1, J_r, R] is the query of the first token of a block of `query_block` tokens that x continues;
        the third result is the one to pass on (None at the end of a block).
        """
        config = self.config
        T = x.shape[1]
        q, queries = self._queries(x, landmarks.dtype)
        late = position % config.query_block  # tokens of the block that came before x
        choosers = (
            torch.cat((block_query.expand(-1, late, -1, -1), queries), dim=1) if late else queries
        )
        # Under autocast the scores would be rounded to bfloat16: what is rounded is the input, never the scores.
        with torch.autocast(x.device.type, enabled=False):
            indices, weights = ops.retrieve(
                choosers,
                landmarks,
                chunk_size=config.chunk_size,
                top_k=config.top_k,
                offset=in_front + position - late,
                weighting=config.weighting,
                gumbel_seed=gumbel_seed,
                exclude_window=config.window if config.exclude_window else 0,
                query_block=config.query_block,
            )
            # [B, late+T, J_r, K] -> [B, T, J, K]: a shared retrieval head chooses for every KV head
            indices, weights = (
                part[:, late:].expand(-1, -1, config.hsa_kv_heads, -1)
                for part in (indices, weights)
            )
            out = attend(self.q_norm(q), indices, weights)
        unfinished = (position + T) % config.query_block
        next_block = (
            choosers[:, -unfinished : choosers.shape[1] - unfinished + 1] if unfinished else None
        )
        return self.out(out.flatten(-2)), Retrieval(queries, indices, weights), next_block

    def step(
        self,
        x,
        k,
        v,
        landmarks,
        positions: torch.Tensor,
        block_query: torch.Tensor | None = None,
        *,
        operations=ops,
    ) -> torch.Tensor:
        """One token of every sequence, x [B, 1, C] at positions int64 [B] -> [B, 1, C]; asks the host nothing.

        k, v and landmarks with whatever room they have: a token sees what is complete at its position. `block_query`
        [B, 1, J_r, R], not None if tokens choose in blocks, is brought up to date. `operations`: `ops`, or `offload` for k
        and v in host memory.
        """
        config = self.config
        q, choosers = self._queries(x, landmarks.dtype)
        late = positions % config.query_block
        if block_query is not None:
            choosers = torch.where((late == 0)[:, None, None, None], choosers, block_query)
            block_query.copy_(choosers)
        options = dict(chunk_size=config.chunk_size, top_k=config.top_k, offset=positions - late)
        plain = (
            config.weighting == "softmax"
            and not config.exclude_window
            and config.retrieval_heads == config.hsa_kv_heads
        )
        with torch.autocast(x.device.type, enabled=False):
            q = self.q_norm(q)
            if plain:
                out = operations.decode(choosers, landmarks, q, k, v, **options)
            else:
                options |= dict(
                    weighting=config.weighting,
                    exclude_window=config.window if config.exclude_window else 0,
                )
                choice = ops.retrieve(choosers, landmarks, **options)
                out = operations.chunk_attention(
                    q, k, v, *(part.expand(-1, -1, config.hsa_kv_heads, -1) for part in choice)
                )
        return self.out(out.flatten(-2))

    def _queries(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """For attention [B, T, H, D], not yet normed, and for retrieval [B, T, J_r, R]."""
        queries = self.retrieval_q(x).unflatten(-1, (-1, self.config.retrieval_dim))
        return self.q(x).unflatten(-1, (-1, self.config.hsa_head_dim)), self.retrieval_norm(
            queries
        ).to(dtype)
