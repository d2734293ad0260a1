"""The model: lower decoder -> chunk memory -> upper decoder (§2.2, §2.3).

Dimensions: B batch, T tokens, C width, S chunk size, N chunks.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.chunk_encoder import ChunkEncoder
from hsa_mini.model.hsa import HSA, Retrieval
from hsa_mini.model.mlp import MLP
from hsa_mini.model.moe import MoE
from hsa_mini.model.norm import RMSNorm
from hsa_mini.model.rope import rope_table
from hsa_mini.model.swa import SlidingWindowAttention
from hsa_mini.training.cross_batch import Crowd, Past


@dataclass(frozen=True)
class Aux:
    """What a forward pass can be asked about: the retrieval of every HSA layer, lowest first."""

    retrievals: tuple[Retrieval, ...]


class Output(NamedTuple):
    """logits [B, T, vocabulary], the memory to pass with the next segment, and `Aux`."""

    logits: torch.Tensor
    memory: ChunkMemory
    aux: Aux


class Block(nn.Module):
    """Window attention, HSA in the first block of a group, MLP or experts; each normed before, each added."""

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

    def forward(self, x: torch.Tensor, rope, cache, ask=None):
        """`ask(hsa, x)` -> what HSA adds. Returns x [B, T, C] and the window cache to keep."""
        near, cache = self.swa(self.swa_norm(x), rope, cache)
        x = x + near
        seen = x
        if self.hsa is not None:
            seen = x + ask(self.hsa, self.hsa_norm(x))
            x = x if self.bypass else seen
        return x + self.mlp(self.mlp_norm(seen)), cache


class HSACore(nn.Module):
    """A causal language model that reads nearby tokens through a window and all others through retrieved chunks."""

    def __init__(
        self,
        config: HSAConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Random weights from torch's generator; `device="meta"` makes a model of any size without memory."""
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.lower = nn.ModuleList(
                Block(config, with_hsa=False, with_experts=bool(config.experts) and i > 0)
                for i in range(config.lower_layers)
            )
            self.encoder = ChunkEncoder(config)
            self.upper = nn.ModuleList(
                Block(
                    config,
                    with_hsa=i % config.layers_per_group == 0,
                    with_experts=bool(config.experts),
                )
                for i in range(config.upper_layers)
            )
            self.norm = RMSNorm(config.width, eps=config.norm_eps)
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise()
        if dtype is not None:
            self.to(dtype)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Normal weights of variance 1/fan-in; what writes into the residual stream is smaller with depth."""
        depth = self.config.lower_layers + self.config.upper_layers
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1 and name != "encoder.cls":
                continue  # the norms' gains stay at 1
            fan_in = parameter.shape[-2] if parameter.dim() == 3 else parameter.shape[-1]
            std = (
                self.config.embedding_std
                if name in ("embedding.weight", "encoder.cls")
                else fan_in**-0.5
            )
            if name.endswith(("out.weight", "down.weight", ".down")):
                std *= (2 * depth) ** -0.5
            parameter.normal_(0.0, std)

    def forward(
        self,
        ids: torch.Tensor,
        memory: ChunkMemory | None = None,
        *,
        past: Past | None = None,
        alone: int = 0,
        explore: bool = True,
        gumbel_seed: int | torch.Tensor | None = None,
    ) -> Output:
        """ids int64 [B, T] -> `Output`; T of at least 1. The memory given is updated in place, or not at all, and returned.

        past: chunks of earlier batches; if given, each sequence but the first `alone` looks for its chunks among these, those
        of the whole batch and its own (`Crowd`). explore: add the exploration noise, in training mode alone. gumbel_seed: an
        int or an int64 tensor []; drawn from torch's generator if None.
        Raises ValueError for a wrong shape, dtype, ids outside the vocabulary or a memory of another batch or model.
        """
        self.check_ids(ids, memory, wait=False)
        if memory is not None and memory.batch is not None and not torch.is_grad_enabled():
            memory.grow(
                memory.position + ids.shape[1]
            )  # before the branch, which would keep what moves
        reader = ChunkMemory(self.config) if memory is None else memory.branch()
        position = reader.position
        hidden = self.read(ids, reader)
        hidden, retrievals = self.look_up(
            hidden,
            position,
            reader,
            past=past,
            alone=alone,
            explore=explore,
            gumbel_seed=gumbel_seed,
        )
        logits = self.predict(hidden)
        if memory is None:
            return Output(logits, reader, Aux(retrievals))
        memory.adopt(reader)
        return Output(logits, memory, Aux(retrievals))

    def read(self, ids: torch.Tensor, memory: ChunkMemory) -> torch.Tensor:
        """The lower decoder over ids [B, T], and the chunks it completes into `memory` -> hidden [B, T, C]."""
        memory.unroll()
        hidden = self.lower_decoder(ids, memory)
        self.remember(hidden, memory)
        memory.position += ids.shape[1]
        return hidden

    def lower_decoder(self, ids: torch.Tensor, memory: ChunkMemory) -> torch.Tensor:
        """ids [B, T] at `memory.position` -> hidden [B, T, C]; moves the lower window caches on, nothing else."""
        rope = self._rope(memory.position, ids.shape[1], ids.device)
        x = self.embedding(ids)
        for i, block in enumerate(self.lower):
            x, memory.lower[i] = block(x, rope, memory.lower[i])
        return x

    def remember(self, hidden: torch.Tensor, memory: ChunkMemory) -> None:
        """Encode the chunks that hidden [B, T, C] completes; what is left over waits in the memory."""
        S = self.config.chunk_size
        waiting = hidden if memory.partial is None else torch.cat((memory.partial, hidden), dim=1)
        complete = waiting.shape[1] // S
        if complete or memory.batch is None:
            memory.append(*self.encoder(waiting[:, : complete * S].unflatten(1, (complete, S))))
        # a copy: a view would keep the whole segment alive
        memory.partial = waiting[:, complete * S :].clone()

    def look_up(
        self,
        hidden: torch.Tensor,
        position: int,
        memory: ChunkMemory,
        *,
        past: Past | None = None,
        alone: int = 0,
        explore: bool = True,
        gumbel_seed: int | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[Retrieval, ...]]:
        """The upper decoder over hidden [B, T, C], whose first token stands at `position` -> [B, T, C], retrievals."""
        if not (self.training and self.config.exploration and explore):
            gumbel_seed = None
        elif gumbel_seed is None:
            gumbel_seed = int(torch.randint(1 << 31, ()))
        rope = self._rope(position, hidden.shape[1], hidden.device)
        retrievals: dict[int, Retrieval] = {}  # by group
        chunks = memory
        in_front = 0
        if past is not None:
            chunks = Crowd(memory, self.encoder, past, alone)
            in_front = chunks.in_front

        def ask(group: int, hsa: HSA, x: torch.Tensor) -> torch.Tensor:
            out, retrievals[group], memory.block_queries[group] = hsa(
                x,
                chunks.landmarks,
                chunks.attend,
                position=position,
                in_front=in_front,
                block_query=memory.block_queries[group],
                gumbel_seed=None
                if gumbel_seed is None
                else gumbel_seed * self.config.groups + group,
            )
            return out

        for i, block in enumerate(self.upper):
            # by number: a block that is computed again for its gradients asks again
            asking = partial(ask, i // self.config.layers_per_group)
            hidden, memory.upper[i] = block(hidden, rope, memory.upper[i], asking)
        return hidden, tuple(retrievals.values())

    def predict(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, C] -> logits [B, T, vocabulary]."""
        return self.head(self.norm(hidden))

    def _rope(self, position: int, tokens: int, device: torch.device):
        positions = torch.arange(position, position + tokens, device=device)
        return rope_table(positions, self.config.head_dim, self.config.rope_base)

    def check_ids(
        self, ids: torch.Tensor, memory: ChunkMemory | None, *, wait: bool = True
    ) -> None:
        """Raise ValueError for ids that this model and this memory cannot take.

        To look at values waits for a GPU: there, without `wait`, the embedding's own range check stops a wrong id.
        """
        if (
            not isinstance(ids, torch.Tensor)
            or ids.dim() != 2
            or ids.dtype != torch.int64
            or 0 in ids.shape
        ):
            got = (
                f"{list(ids.shape)} {ids.dtype}"
                if isinstance(ids, torch.Tensor)
                else type(ids).__name__
            )
            raise ValueError(
                f"ids: got {got}, accepted is an int64 tensor [B, T] with at least one token"
            )
        if (wait or ids.device.type == "cpu") and not 0 <= int(ids.min()) <= int(
            ids.max()
        ) < self.config.vocab_size:
            raise ValueError(
                f"ids: got {int(ids.min())} to {int(ids.max())}, accepted are 0 to {self.config.vocab_size - 1}"
            )
        if memory is None:
            return
        if memory.config != self.config:
            raise ValueError(
                "memory: got one of another configuration, accepted is one that this model made"
            )
        if memory.batch is None:
            return
        if memory.batch != ids.shape[0]:
            raise ValueError(
                f"memory: got a batch of {memory.batch}, accepted is that of ids ({ids.shape[0]})"
            )
        got = memory.landmarks
        dtype = self.memory_dtype(ids.device)
        if (got.dtype, got.device) != (dtype, ids.device):
            raise ValueError(
                f"memory: got {got.dtype} on {got.device}, accepted is {dtype} on {ids.device}"
            )

    def memory_dtype(self, device: torch.device) -> torch.dtype:
        """Of the chunks that this model encodes: that of its weights, or of autocast."""
        autocast = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if autocast else self.norm.weight.dtype
