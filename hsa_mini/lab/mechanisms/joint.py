"""Attention in one softmax over the window and the chosen chunks.

In HSA a block reads its window first and its chunks afterwards. In HiLS and DashAttention both are
one attention with the same queries. A token's output is the sum of what it reads in its window and
in each of its chunks, weighted by their attention masses:

    out = sum over parts p of  mass(p) / (sum of all masses) * softmax attention inside p

The log mass of the window is the logsumexp of its logits. A mechanism says which chunks a token
chooses, and what their log masses are.

NOTE: both papers move the border of the window to that of a chunk, so that no token belongs to
both. Here a token that lies in the window and in a chosen chunk counts twice. HSA reads it twice
too, and all arms see the same window and the same chunks.

Dimensions: B batch, T tokens, C width, P cached keys, H query heads, J key/value heads, D head
dimension, N chunks, S chunk size, K chunks kept.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.lab.variants import Variant, WithoutCLS
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.chunk_source import ChunkSource, DeviceChunks
from hsa_mini.memory.rolling_cache import RollingKVCache
from hsa_mini.model.block import AttendChunks, Block
from hsa_mini.model.hsa import HSA, Retrieval
from hsa_mini.model.norm import RMSNorm
from hsa_mini.ops.rope import apply_rope, rope_table


def window_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.sliding_window_attention`, and the log mass of every token's window [B, T, H].

    It holds the logits of all pairs of queries and keys.
    """
    T, H, D = q.shape[1:]
    length = k.shape[1]
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    own = torch.arange(length - T, length, device=q.device)[:, None]
    key = torch.arange(length, device=q.device)
    logits = torch.einsum("bthd,blhd->bthl", q, k) * D**-0.5
    seen = (key <= own) & (key > own - window)
    logits = logits.masked_fill(~seen[:, None], float("-inf"))
    return torch.einsum("bthl,blhd->bthd", logits.softmax(-1), v), logits.logsumexp(-1)


class JointAttention(HSA):
    """x [B, T, C], keys and values of its window and a source of chunks -> [B, T, C]."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.retrieval_q, self.retrieval_norm
        size = config.hsa_kv_heads * config.hsa_head_dim
        self.near_k = nn.Linear(config.width, size, bias=False)
        self.near_v = nn.Linear(config.width, size, bias=False)
        self.near_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)

    def near(self, x: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, rotated by RoPE, and values [B, T, J, D] of a segment from `position` on."""
        k, v = (
            f(x).unflatten(-1, (-1, self.config.hsa_head_dim)) for f in (self.near_k, self.near_v)
        )
        return apply_rope(self.near_norm(k), self._table(x, position)), v

    def forward(
        self,
        x: torch.Tensor,
        source: DeviceChunks,
        *,
        near: tuple[torch.Tensor, torch.Tensor],
        position: int,
        gumbel_seed: int | torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        **_,
    ) -> tuple[torch.Tensor, Retrieval, None]:
        """near: keys and values [B, P+T, J, D] of the window, those of x last."""
        assert document_starts is None, "the laboratory reads one document a row"
        q = self.q(x).unflatten(-1, (-1, self.config.hsa_head_dim))
        calibration = self.calibrate(x)
        with torch.autocast(x.device.type, enabled=False):
            q = self.q_norm(q)
            exact = torch.promote_types(q.dtype, torch.float32)
            rotated = apply_rope(q, self._table(x, position))
            inside, near_mass = window_attention(
                *(part.to(exact) for part in (rotated, *near)), window=self.config.window
            )
            indices, far_masses = self.choose(
                q.to(exact), calibration, source, position=position, gumbel_seed=gumbel_seed
            )
            shares = torch.cat((near_mass[..., None], far_masses), dim=-1).softmax(-1)
            out = (shares[..., :1] * inside).to(q.dtype)
            out = out + self._read(q, source, indices, shares[..., 1:])
        groups = shares[..., 1:].unflatten(2, (indices.shape[2], -1)).mean(3)  # [B, T, J, K]
        return self.out(out.flatten(-2)), Retrieval(q, indices.int(), groups), None

    def calibrate(self, x: torch.Tensor) -> torch.Tensor | None:
        """What `choose` adds to its queries, [B, T, H, D]; None: nothing."""
        return None

    def choose(
        self,
        q: torch.Tensor,
        calibration: torch.Tensor | None,
        source: DeviceChunks,
        *,
        position: int,
        gumbel_seed: int | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chunks int64 [B, T, J, K], -1 for none, and their log masses [B, T, H, K], -inf for none.

        q [B, T, H, D]: normed, without positions, in float32 or float64.
        """
        raise NotImplementedError

    def _read(self, q, source: DeviceChunks, indices, shares) -> torch.Tensor:
        """Attention inside the chosen chunks, where every query head has shares of its own."""
        group = q.shape[2] // source.k.shape[3]
        k, v, indices = (
            part.repeat_interleave(group, dim=dim)
            for part, dim in ((source.k, 3), (source.v, 3), (indices, 2))
        )
        return ops.chunk_attention(q, k, v, indices.int(), shares)

    def _table(self, x: torch.Tensor, position: int):
        positions = torch.arange(position, position + x.shape[1], device=x.device)
        return rope_table(positions, self.config.hsa_head_dim, self.config.rope_base)


class JointBlock(Block):
    """A block whose window and chunks are read by one `JointAttention`."""

    def __init__(self, config: HSAConfig, attention: JointAttention) -> None:
        super().__init__(config, with_hsa=True, with_experts=False)
        del self.swa, self.swa_norm
        self.hsa = attention

    def forward(
        self,
        x: torch.Tensor,
        rope,
        cache: RollingKVCache | None,
        position: int,
        attend_chunks: AttendChunks | None = None,
        document_starts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RollingKVCache]:
        assert isinstance(self.hsa, JointAttention)
        assert self.hsa_norm is not None and attend_chunks is not None
        window = self.hsa.config.window
        normed = self.hsa_norm(x)
        k, v = self.hsa.near(normed, position)
        end = position + k.shape[1]
        if cache is not None:
            k, v = cache.in_front_of(k, v, position)
        attention: Any = partial(self.hsa, near=(k, v))
        x = x + attend_chunks(attention, normed)
        return x + self.mlp(self.mlp_norm(x)), RollingKVCache.from_order(k, v, end, window)


class JointVariant(Variant):
    """A model whose blocks with HSA are `JointBlock`s, and whose chunks no encoder has mixed.

    starts_at_0: names of parameters that are 0 before training.
    """

    attention: type[JointAttention]
    summarise: type[WithoutCLS]
    starts_at_0: tuple[str, ...] = ()

    def change(self) -> None:
        self.encoder = self.summarise(self.config)
        for i, block in enumerate(self.upper):
            if block.hsa is not None:
                self.upper[i] = JointBlock(self.config, self.attention(self.config))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.endswith(self.starts_at_0):
                parameter.zero_()

    def default_source(self, memory: ChunkMemory, position: int) -> ChunkSource:
        return memory.chunks.source()
