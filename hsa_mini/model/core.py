"""What the model computes: lower decoder -> chunk memory -> upper decoder (§2.2, §2.3).

Dimensions: B batch, T tokens, C width, S chunk size, N chunks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from hsa_mini.checks import quoted
from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.chunk_source import ChunkSource
from hsa_mini.memory.chunk_store import ChunkStore
from hsa_mini.model.block import Block
from hsa_mini.model.chunk_encoder import ChunkEncoder, EncodedChunks
from hsa_mini.model.hsa import HSA, Retrieval
from hsa_mini.model.inputs import check_document_starts, check_memory
from hsa_mini.model.moe import MoE
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.recency import START
from hsa_mini.ops.rope import rope_table


@dataclass(frozen=True)
class Aux:
    """By-products of a forward pass.

    retrievals: one per HSA layer, the lowest first. encoded: in training mode, the chunks that the
    pass completed.
    """

    retrievals: tuple[Retrieval, ...]
    encoded: EncodedChunks | None = None


class Output(NamedTuple):
    """logits [B, T, vocabulary], the memory to pass with the next segment, and `Aux`."""

    logits: torch.Tensor
    memory: ChunkMemory
    aux: Aux


class HSACore(nn.Module):
    """A causal language model that reads nearby tokens through a window and distant ones through
    retrieved chunks.

    can_decode_steps: whether `inference.decode_step` can run the model token by token.
    """

    can_decode_steps = True

    def __init__(
        self,
        config: HSAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Random weights from torch's generator; `device="meta"` makes a model of any size without
        memory.
        """
        super().__init__()
        self.config = config
        moe = bool(config.experts)
        with torch.device(device or "cpu"):
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.lower = nn.ModuleList(
                Block(config, with_hsa=False, with_experts=moe and i > 0)
                for i in range(config.lower_layers)
            )
            self.encoder = ChunkEncoder(config)
            self.upper = nn.ModuleList(
                Block(config, with_hsa=i % config.layers_per_group == 0, with_experts=moe)
                for i in range(config.upper_layers)
            )
            self.norm = RMSNorm(config.width, eps=config.norm_eps)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.reset_parameters()
        if dtype is not None:
            self.to(dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer, also of a model that was made by `to_empty` from
        the meta device.

        Matrices are normal with variance 1/fan-in. Those that write into the residual stream are
        smaller in deeper models. Gains of norms are 1, the router's bias is 0, and a tied head is
        the embedding. The preference for newer chunks is the same for every token.
        """
        if self.config.tied:
            self.head.weight = self.embedding.weight
        depth = self.config.lower_layers + self.config.upper_layers
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 and name != "encoder.cls":
                parameter.fill_(START if name.endswith("recency.bias") else 1.0)  # a norm's gain: 1
                continue
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
            std = fan_in**-0.5
            if name in ("embedding.weight", "encoder.cls"):
                std = self.config.embedding_std
            if name.endswith("recency.weight"):
                std = 0.0
            if name.endswith(("out.weight", "down.weight", ".down")):
                std *= (2 * depth) ** -0.5
            parameter.normal_(0.0, std)
        for layer in self.modules():
            if isinstance(layer, MoE):
                layer.bias.zero_()

    def forward(
        self,
        ids: torch.Tensor,
        memory: ChunkMemory | None = None,
        *,
        document_starts: torch.Tensor | None = None,
        chunk_source: Callable[[ChunkStore], ChunkSource] | None = None,
        gumbel_noise: bool = True,
        gumbel_seed: int | torch.Tensor | None = None,
        with_logits: bool = True,
    ) -> Output:
        """ids int64 [B, T] -> `Output`; T of at least 1. The given memory is updated in place and
        returned. If the call fails, the memory is unchanged.

        document_starts: int [B, T], for rows of several documents: the position where each token's
        document begins, a multiple of the chunk size counted from the memory's first token. No
        token attends to or retrieves anything in front of it, so every document is read as if it
        stood alone. RoPE needs no new start, because only distances matter to it. Later segments
        need document_starts too. chunk_source: a function from the memory's chunks to the source
        that the HSA layers read (default: these chunks). gumbel_noise: add Gumbel noise to the
        choice, in training mode only. gumbel_seed: the seed of the noise, an int or an int64 tensor
        []; drawn from torch's generator if None. with_logits=False: in place of the logits, the
        output holds the hidden states [B, T, C] that `logits` takes, for a loss that makes logits
        piece by piece. Raises ValueError for a wrong shape, dtype, ids outside the vocabulary,
        wrong document starts or a memory of another batch or model.
        """
        self.check_ids(ids, memory, wait=False)
        if document_starts is not None:
            position = 0 if memory is None else memory.position
            check_document_starts(document_starts, ids, position, self.config.chunk_size)
        if memory is not None and memory.batch is not None and not torch.is_grad_enabled():
            # Before the draft is made: it would keep the old buffers alive beside the new ones.
            memory.ensure_capacity(memory.position + ids.shape[1])
        draft = ChunkMemory(self.config) if memory is None else memory.draft()
        hidden = self.lower_decoder(ids, draft, document_starts)
        encoded = self.append_chunks(hidden, draft)
        source = None if chunk_source is None else chunk_source(draft.chunks)
        hidden, retrievals = self.upper_decoder(
            hidden,
            draft,
            source=source,
            document_starts=document_starts,
            gumbel_noise=gumbel_noise,
            gumbel_seed=gumbel_seed,
        )
        logits = self.logits(hidden) if with_logits else hidden
        aux = Aux(retrievals, encoded if self.training else None)
        if memory is None:
            return Output(logits, draft, aux)
        memory.commit(draft)
        return Output(logits, memory, aux)

    def lower_decoder(
        self,
        ids: torch.Tensor,
        memory: ChunkMemory,
        document_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """ids [B, T] behind what the memory has read -> hidden [B, T, C]. It updates the lower
        window caches and nothing else. document_starts: as in `forward`.

        Raises ValueError for sequences of different lengths.
        """
        if len(set(memory.lengths)) > 1:
            raise ValueError(
                f"memory: got sequences of {quoted(list(memory.lengths))} tokens, "
                "accepted are equal lengths; `prefill` takes any"
            )
        position = memory.position
        rope = self._rope(position, ids.shape[1], ids.device)
        x = self.embedding(ids)
        for i, block in enumerate(self.lower):
            x, memory.lower[i] = block(
                x, rope, memory.lower[i], position, document_starts=document_starts
            )
        return x

    def append_chunks(self, hidden: torch.Tensor, memory: ChunkMemory) -> EncodedChunks | None:
        """Encode the chunks that hidden [B, T, C], the lower decoder's output, completes; the rest
        becomes the memory's tail.

        The memory has then read the T tokens. Returns the new chunks (None if there are none).
        """
        S = self.config.chunk_size
        position = memory.position + hidden.shape[1]
        if memory.tail is not None:
            hidden = torch.cat((memory.tail[:, : memory.position % S], hidden), dim=1)
        complete = hidden.shape[1] // S
        encoded = None
        if complete or memory.batch is None:
            encoded = self.encoder(hidden[:, : complete * S].unflatten(1, (complete, S)))
            memory.chunks.append(encoded.k, encoded.v, encoded.landmarks)
        memory.resume(hidden[:, complete * S :], position)
        memory.origin = self
        return encoded

    def upper_decoder(
        self,
        hidden: torch.Tensor,
        memory: ChunkMemory,
        *,
        source: ChunkSource | None = None,
        document_starts: torch.Tensor | None = None,
        gumbel_noise: bool = True,
        gumbel_seed: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[Retrieval, ...]]:
        """hidden [B, T, C], the lower decoder's output for the last T tokens read -> [B, T, C], and
        the retrievals.

        source: the chunks that the HSA layers read instead of the memory's chunks. document_starts:
        as in `forward`.
        """
        position = memory.position - hidden.shape[1]
        if not (self.training and self.config.exploration and gumbel_noise):
            gumbel_seed = None
        elif gumbel_seed is None:
            gumbel_seed = int(torch.randint(1 << 31, ()))
        rope = self._rope(position, hidden.shape[1], hidden.device)
        retrievals: dict[int, Retrieval] = {}  # by group

        def attend_chunks(group: int, hsa: HSA, x: torch.Tensor) -> torch.Tensor:
            out, retrievals[group], memory.block_queries[group] = hsa(
                x,
                source or self.default_source(memory, position),
                position=position,
                block_query=memory.block_queries[group],
                gumbel_seed=None
                if gumbel_seed is None
                else gumbel_seed * self.config.groups + group,
                document_starts=document_starts,
            )
            return out

        for i, block in enumerate(self.upper):
            # The group is bound here: activation checkpointing calls the block once more in the
            # backward pass.
            attend = partial(attend_chunks, i // self.config.layers_per_group)
            hidden, memory.upper[i] = block(
                hidden, rope, memory.upper[i], position, attend, document_starts
            )
        return hidden, tuple(retrievals.values())

    def default_source(self, memory: ChunkMemory, position: int) -> ChunkSource:
        """The chunks that the HSA layers read by default, for tokens from `position` on."""
        return memory.chunks.source()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, C] -> logits [B, T, vocabulary]."""
        return self.head(self.norm(hidden))

    def _rope(self, position: int, tokens: int, device: torch.device):
        positions = torch.arange(position, position + tokens, device=device)
        config = self.config
        return rope_table(positions, config.head_dim, config.rope_base, config.rope_factors)

    def check_ids(
        self, ids: torch.Tensor, memory: ChunkMemory | None, *, wait: bool = True
    ) -> None:
        """Raise ValueError for ids that this model and this memory cannot take.

        On a GPU, ids are compared with the vocabulary only if `wait` is true, because reading them
        waits for the GPU. Otherwise the embedding's own range check stops a wrong id.
        """
        is_tensor = isinstance(ids, torch.Tensor)
        if not is_tensor or ids.dim() != 2 or ids.dtype != torch.int64 or 0 in ids.shape:
            got = f"{list(ids.shape)} {ids.dtype}" if is_tensor else type(ids).__name__
            raise ValueError(
                f"ids: got {got}, accepted is an int64 tensor [B, T] with at least one token"
            )
        if wait or ids.device.type == "cpu":
            smallest = int(ids.min())
            largest = int(ids.max())
            if not 0 <= smallest <= largest < self.config.vocab_size:
                raise ValueError(
                    f"ids: got {smallest} to {largest}, "
                    f"accepted are 0 to {self.config.vocab_size - 1}"
                )
        if memory is not None:
            check_memory(memory, ids, self, self.config, self.memory_dtype(ids.device))

    def memory_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype of the chunks that this model encodes: that of its weights, or of autocast."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.norm.weight.dtype
