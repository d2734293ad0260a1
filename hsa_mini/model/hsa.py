"""The HSA layer: a token retrieves chunks from the chunk memory, however far back they lie, and
attends to them. Eq. (1), (2).

Dimensions: B batch, T tokens, C width, H heads, J key/value heads, J_r retrieval heads, D head
dimension, R retrieval dimension, K chunks kept.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_source import ChunkSource, DeviceChunks
from hsa_mini.memory.host_chunks import HostChunks
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.recency import prefer_newer


class Retrieval(NamedTuple):
    """What an HSA layer searched for and found: queries [B, T, J_r, R], indices int32 and weights
    [B, T, J, K].
    """

    queries: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor


class HSA(nn.Module):
    """x [B, T, C] and a source of chunks -> [B, T, C], and the retrieval that led to it."""

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
        self.recency = nn.Linear(config.width, config.hsa_kv_heads) if config.recency else None
        self.out = nn.Linear(config.hsa_heads * config.hsa_head_dim, config.width, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        source: ChunkSource,
        *,
        position: int,
        block_query: torch.Tensor | None = None,
        gumbel_seed: int | torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Retrieval, torch.Tensor | None]:
        """A segment whose first token stands at `position` of its sequence.

        block_query [B, 1, J_r, R]: if tokens retrieve in blocks of `query_block`, the query of the
        first token of the block that x continues. The third result is the one to pass with the next
        segment (None if every token retrieves alone). document_starts [B, T]: the position where
        each token's document begins, a multiple of the chunk size.
        """
        config = self.config
        q, queries = self._queries(x, source.landmarks.dtype)
        recency = None if self.recency is None else self.recency(x)
        late = position % config.query_block  # tokens of x's first block that came before x
        choosers = queries
        if late:
            assert block_query is not None
            choosers = torch.cat((block_query.expand(-1, late, -1, -1), queries), dim=1)
        if document_starts is not None:
            document_starts = source.visible_from(document_starts)
            # A block of queries lies in one document.
            earlier = document_starts[:, :1].expand(-1, late)
            document_starts = torch.cat((earlier, document_starts), dim=1)
        # Autocast would round the scores to bfloat16. Only their inputs may be rounded.
        with torch.autocast(x.device.type, enabled=False):
            indices, weights = ops.retrieve(
                choosers,
                source.landmarks,
                chunk_size=config.chunk_size,
                top_k=config.top_k,
                offset=source.position_offset + position - late,
                weighting=config.weighting,
                gumbel_seed=gumbel_seed,
                exclude_window=config.window if config.exclude_window else 0,
                query_block=config.query_block,
                document_starts=document_starts,
            )
            # [B, late+T, J_r, K] -> [B, T, J, K]: a shared retrieval head chooses for every KV head
            indices = indices[:, late:].expand(-1, -1, config.hsa_kv_heads, -1)
            weights = weights[:, late:].expand(-1, -1, config.hsa_kv_heads, -1)
            if recency is not None:
                weights = prefer_newer(indices, weights, recency)
            out = source.attend(self.q_norm(q), indices, weights)
        retrieval = Retrieval(queries, indices, weights)
        return self.out(out.flatten(-2)), retrieval, self._open_query(choosers)

    def decode_step(
        self,
        x: torch.Tensor,
        source: DeviceChunks | HostChunks,
        positions: torch.Tensor,
        block_query: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One new token of every sequence, x [B, 1, C] at positions int64 [B] -> [B, 1, C]. Never
        synchronises with the CPU.

        A token sees the chunks that are complete at its position; the source may have spare
        capacity behind them. block_query [B, 1, J_r, R]: as in `forward`, brought up to date in
        place.
        """
        config = self.config
        q, choosers = self._queries(x, source.landmarks.dtype)
        recency = None if self.recency is None else self.recency(x)
        late = positions % config.query_block
        if block_query is not None:
            choosers = torch.where((late == 0)[:, None, None, None], choosers, block_query)
            block_query.copy_(choosers)
        options: dict[str, Any] = dict(
            chunk_size=config.chunk_size, top_k=config.top_k, offset=positions - late
        )
        fused = (
            config.weighting == "softmax"
            and recency is None
            and not config.exclude_window
            and config.retrieval_heads == config.hsa_kv_heads
        )
        with torch.autocast(x.device.type, enabled=False):
            q = self.q_norm(q)
            if fused:
                out = source.decode(choosers, q, **options)
            else:
                indices, weights = ops.retrieve(
                    choosers,
                    source.landmarks,
                    weighting=config.weighting,
                    exclude_window=config.window if config.exclude_window else 0,
                    **options,
                )
                indices, weights = (
                    part.expand(-1, -1, config.hsa_kv_heads, -1) for part in (indices, weights)
                )
                if recency is not None:
                    weights = prefer_newer(indices, weights, recency)
                out = source.attend(q, indices, weights)
        return self.out(out.flatten(-2))

    def _queries(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries for attention [B, T, H, D], not yet normed, and for retrieval [B, T, J_r, R]."""
        retrieval_q = self.retrieval_q(x).unflatten(-1, (-1, self.config.retrieval_dim))
        q = self.q(x).unflatten(-1, (-1, self.config.hsa_head_dim))
        return q, self.retrieval_norm(retrieval_q).to(dtype)

    def _open_query(self, choosers: torch.Tensor) -> torch.Tensor | None:
        """The first query of the last query block if that block is unfinished, otherwise 0.

        choosers [B, L, J_r, R]: the retrieval queries from the start of a query block on.
        """
        if self.config.query_block == 1:
            return None
        tokens = choosers.shape[1]
        first = tokens - tokens % self.config.query_block
        return (
            choosers[:, first : first + 1] if first < tokens else torch.zeros_like(choosers[:, :1])
        )
