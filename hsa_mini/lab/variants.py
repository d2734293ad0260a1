"""Models that differ from `HSAModel` in one thing each, built without changing it.

Every variant trains, reads a text in segments and continues from it as `HSAModel` does, through
`forward` and `prefill`. None supports the decode step for single tokens, cross-batch chunks, or a
memory with `offload`.

Dimensions: B batch, T tokens, C width, N chunks, S chunk size, H query heads, J key/value heads,
D head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab.reading import concatenated, grouped_gates, mean_query
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.block import Block
from hsa_mini.model.chunk_encoder import ChunkEncoder, EncodedChunks
from hsa_mini.model.hsa import HSA
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.qkv import QKV
from hsa_mini.ops.rope import apply_rope, rope_table


@dataclass(frozen=True)
class OtherChunks:
    """A source of chunks (`memory.chunk_source`) with its own way to attend to them."""

    landmarks: torch.Tensor
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    position_offset: int = 0

    def visible_from(self, document_starts: torch.Tensor) -> torch.Tensor:
        return document_starts


class Variant(HSAModel):
    """An `HSAModel` whose layers `change` replaces and whose chunks are read by `attend`. It has no
    step for single tokens.
    """

    can_decode_steps = False

    def __init__(
        self,
        config: HSAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device)
        with torch.device(device or "cpu"):
            self.change()
        self.reset_parameters()
        if dtype is not None:
            self.to(dtype)

    def change(self) -> None:
        """Replace layers."""

    def attend(self, memory: ChunkMemory, position: int, q, indices, weights) -> torch.Tensor:
        """q [B, T, H, D], normed, of tokens from `position` on; their chunks and weights [B, T, J,
        K] -> [B, T, H, D].
        """
        return memory.chunks.source().attend(q, indices, weights)

    def default_source(self, memory: ChunkMemory, position: int) -> OtherChunks:
        return OtherChunks(memory.chunks.landmarks, partial(self.attend, memory, position))


NO_HSA = dict.fromkeys(
    ("hsa_heads", "hsa_kv_heads", "hsa_head_dim", "retrieval_dim", "retrieval_heads"), 1
)


class WithoutHSA(Variant):
    """Only the sliding window: no HSA layer and no chunk encoder, so the memory holds zeros for
    each chunk.

    With a window as long as the text this is full attention with RoPE. The configuration should
    have the sizes `NO_HSA`.
    """

    def change(self) -> None:
        self.encoder = NoEncoder(self.config)
        for block in self.upper:
            assert isinstance(block, Block)
            block.hsa = None
            block.hsa_norm = None


class NoEncoder(nn.Module):
    """hidden [B, N, S, C] -> zeros for k and v [B, N, S, J, D] and landmarks [B, N, J_r, R]."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden: torch.Tensor) -> EncodedChunks:
        c = self.config
        B, N, S = hidden.shape[:3]
        k = hidden.new_zeros(B, N, S, c.hsa_kv_heads, c.hsa_head_dim)
        landmarks = hidden.new_zeros(B, N, c.retrieval_heads, c.retrieval_dim)
        return EncodedChunks(k, k.clone(), landmarks, None)


class RopeInside(Variant):
    """HSA with positions: RoPE rotates queries and keys of chunks by their positions."""

    def attend(self, memory, position, q, indices, weights):
        turn = partial(rope_table, dim=self.config.hsa_head_dim, base=self.config.rope_base)
        N, S = memory.chunks.k.shape[1:3]
        T = q.shape[1]
        q = apply_rope(q, turn(torch.arange(position, position + T, device=q.device)))
        k = apply_rope(
            memory.chunks.k.flatten(1, 2), turn(torch.arange(N * S, device=q.device))
        ).unflatten(1, (N, S))
        return ops.chunk_attention(q, k, memory.chunks.v, indices, weights)


class Concatenated(Variant):
    """Select, then concatenate (the selected branch of NSA): landmarks choose chunks but get no
    gradient.
    """

    def attend(self, memory, position, q, indices, weights):
        return concatenated(q, memory.chunks.k, memory.chunks.v, indices)


class WithoutCLS(ChunkEncoder):
    """A chunk encoder without [CLS]: `summary` computes the landmark from the encoded tokens."""

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.cls

    def forward(self, hidden: torch.Tensor) -> EncodedChunks:
        tokens = self.mix(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])  # [B, N, S, C]
        k, v = self.keys_and_values(tokens)
        return EncodedChunks(k, v, self.summary(tokens, k).to(v.dtype), None)

    def summary(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Mixed tokens [B, N, S, C] and keys [B, N, S, J, D] -> landmarks [B, N, J_r, R]."""
        raise NotImplementedError


class MeanEncoder(WithoutCLS):
    """No layer mixes the tokens: k and v come from each token alone, the landmark from the mean of
    the tokens.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList()

    def summary(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.landmarks(tokens.mean(dim=2))


class MeanKeyEncoder(WithoutCLS):
    """The landmark is the mean key, [B, N, S, J, D] -> [B, N, J, D]; it has no parameters of its
    own.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.landmark, self.landmark_norm

    def summary(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k.mean(dim=2)


class MeanLandmark(Variant):
    """HSA without the chunk encoder."""

    def change(self) -> None:
        self.encoder = MeanEncoder(self.config)


class OneQuery(HSA):
    """Attention's queries also choose the chunks: R = D, and there is no separate retrieval query.

    NOTE: in MoBA and Landmark Attention every query head chooses chunks of its own. Here the G
    heads that share a key/value head choose together, as everywhere in this package.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        del self.retrieval_q, self.retrieval_norm

    def _queries(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q = self.q(x).unflatten(-1, (-1, self.config.hsa_head_dim))
        return q, mean_query(self.q_norm(q), self.config.hsa_kv_heads).to(dtype)


class MeanKey(Concatenated):
    """As in MoBA: a chunk's landmark is its mean key, attention's query scores it, and one softmax
    covers the tokens of all chosen chunks.
    """

    def change(self) -> None:
        self.encoder = MeanKeyEncoder(self.config)
        for block in self.upper:
            if block.hsa is not None:
                block.hsa = OneQuery(self.config)


class GroupedHSA(OneQuery):
    """Landmarks weigh their chunks in one softmax with the token's own key; see `grouped_gates`.

    NOTE: in Landmark Attention this softmax includes every token of the unfinished block. Here the
    sliding window has already read these tokens into x, so x's own key and value represent them.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.own_k = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.own_v = nn.Linear(config.width, config.hsa_kv_heads * config.hsa_head_dim, bias=False)
        self.own_norm = RMSNorm(config.hsa_head_dim, eps=config.norm_eps)

    def forward(self, x, source, **options):
        J = self.config.hsa_kv_heads
        D = self.config.hsa_head_dim
        own_k = self.own_k(x).unflatten(-1, (J, D))
        own_v = self.own_v(x).unflatten(-1, (J, D))

        def gated(q, indices, weights):
            near, far = grouped_gates(
                mean_query(q, J), source.landmarks, self.own_norm(own_k), indices
            )
            # [B, T, J, D] -> [B, T, H, D]
            own = (near.to(own_v.dtype) * own_v).repeat_interleave(q.shape[2] // J, dim=2)
            return source.attend(q, indices, far) + own

        return super().forward(x, OtherChunks(source.landmarks, gated), **options)


class GroupedSoftmax(Variant):
    """As in Landmark Attention: landmarks are keys, and compete with the token's own key."""

    def change(self) -> None:
        for block in self.upper:
            if block.hsa is not None:
                block.hsa = GroupedHSA(self.config)


class WithoutQKNorm(Variant):
    """No norm on queries and keys: in the window, the encoder and HSA."""

    def change(self) -> None:
        self.encoder.register_module("k_norm", nn.Identity())
        for module in self.modules():
            if isinstance(module, QKV):
                module.register_module("q_norm", nn.Identity())
                module.register_module("k_norm", nn.Identity())
            elif isinstance(module, HSA):
                module.register_module("q_norm", nn.Identity())
