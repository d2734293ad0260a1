"""HSA with other landmarks: several for each chunk, one for overlapping chunks, and landmarks of
length 1 with a temperature.

Dimensions: B batch, T tokens, C width, N chunks, S chunk size, J_r retrieval heads, R retrieval
dimension, M landmarks of a chunk.
"""

import dataclasses

import torch
from torch import nn
from torch.nn.functional import rms_norm

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.lab.mechanisms.choosing import HIDDEN, best_chunks, kept, visible
from hsa_mini.lab.variants import Variant
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.chunk_encoder import ChunkEncoder, EncodedChunks
from hsa_mini.model.hsa import HSA, Retrieval
from hsa_mini.reference.retrieval import weigh


def one_of(config: HSAConfig, count: int) -> HSAConfig:
    """The configuration of a single landmark. The memory keeps M of them in M*R numbers."""
    return dataclasses.replace(config, retrieval_dim=config.retrieval_dim // count)


class ManyEncoder(ChunkEncoder):
    """A chunk encoder with M [CLS] vectors, each of which becomes a landmark."""

    def __init__(self, config: HSAConfig, count: int) -> None:
        super().__init__(one_of(config, count))
        self.cls = nn.Parameter(torch.empty(count, config.width))

    def forward(self, hidden: torch.Tensor) -> EncodedChunks:
        B, N, S, C = hidden.shape
        cls = self.cls.to(hidden.dtype).expand(B * N, -1, C)
        mixed = self.mix(torch.cat((hidden.flatten(0, 1), cls), dim=1)).unflatten(0, (B, N))
        k, v = self.keys_and_values(mixed[:, :, :S])
        each = self.landmarks(mixed[:, :, S:])  # [B, N, M, J_r, R]
        # [B, N, M, J_r, R] -> [B, N, J_r, M*R]
        return EncodedChunks(k, v, each.transpose(2, 3).flatten(3).to(v.dtype), None)


class BestLandmark(HSA):
    """The score of a chunk is that of its best landmark."""

    def __init__(self, config: HSAConfig, count: int) -> None:
        super().__init__(one_of(config, count))

    def forward(self, x, source, *, position, gumbel_seed=None, document_starts=None, **_):
        assert document_starts is None, "the laboratory reads one document a row"
        config = self.config
        q, queries = self._queries(x, source.landmarks.dtype)
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(queries.dtype, torch.float32)
            R = config.retrieval_dim
            each = source.landmarks.unflatten(-1, (-1, R)).to(exact)  # [B, N, J_r, M, R]
            scores = torch.einsum("btjr,bnjmr->btjnm", queries.to(exact), each).amax(-1) / R**0.5
            scores = scores.masked_fill(~visible(scores, position, config.chunk_size), HIDDEN)
            indices = best_chunks(scores, config.top_k, position, gumbel_seed)
            weights = weigh(kept(scores, indices), indices < 0, "softmax")
            heads = (-1, -1, config.hsa_kv_heads, -1)
            indices = indices.int().expand(heads)
            weights = weights.expand(heads)
            out = source.attend(self.q_norm(q), indices, weights)
        return self.out(out.flatten(-2)), Retrieval(queries, indices, weights), None


class TwoLandmarks(Variant):
    """HSA with two landmarks for each chunk."""

    count = 2

    def change(self) -> None:
        self.encoder = ManyEncoder(self.config, self.count)
        for block in self.upper:
            if block.hsa is not None:
                block.hsa = BestLandmark(self.config, self.count)


class FourLandmarks(TwoLandmarks):
    """HSA with four landmarks for each chunk."""

    count = 4


class Overlapping(Variant):
    """Every chunk also holds the S tokens in front of it, so it is 2 S tokens long.

    The memory keeps each token once. A chunk is encoded together with the one in front of it, and
    its landmark is made of both. Whoever chooses it attends to the tokens of both in one softmax.
    The first chunk has S zeros in front, and is read alone.
    """

    def append_chunks(self, hidden: torch.Tensor, memory: ChunkMemory) -> EncodedChunks | None:
        """As `HSACore.append_chunks`; the tail [B, 2 S, C] holds the chunk in front too."""
        S = self.config.chunk_size
        position = memory.position + hidden.shape[1]
        if memory.tail is None:
            before = hidden.new_zeros(hidden.shape[0], S, hidden.shape[2])
        else:
            before = memory.tail[:, :S]
            hidden = torch.cat((memory.tail[:, S : S + memory.position % S], hidden), dim=1)
        complete = hidden.shape[1] // S
        chunks = hidden[:, : complete * S].unflatten(1, (complete, S))
        with_before = torch.cat((before[:, None], chunks), dim=1)  # [B, 1 + complete, S, C]
        encoded = None
        if complete or memory.batch is None:
            pairs = self.encoder(torch.cat((with_before[:, :-1], chunks), dim=2))
            encoded = EncodedChunks(
                pairs.k[:, :, S:], pairs.v[:, :, S:], pairs.landmarks, pairs.cls_states
            )
            memory.chunks.append(encoded.k, encoded.v, encoded.landmarks)
        memory.resume(hidden[:, complete * S :], position)
        assert memory.tail is not None
        memory.tail = torch.cat((with_before[:, -1], memory.tail), dim=1)
        memory.origin = self
        return encoded

    def attend(self, memory, position, q, indices, weights):
        k, v = (
            torch.cat((torch.cat((part[:, :1], part[:, :-1]), dim=1), part), dim=2)
            for part in (memory.chunks.k, memory.chunks.v)
        )
        return ops.chunk_attention(q, k, v, indices, weights)


class Unit(nn.Module):
    """x [..., R] -> the vector of the same direction whose length is sqrt(R)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:])


class TemperedHSA(HSA):
    """Queries and landmarks of one length, and one learned factor on the scores of each retrieval
    head. The factor starts at 1.
    """

    def __init__(self, config: HSAConfig) -> None:
        super().__init__(config)
        self.register_module("retrieval_norm", Unit())
        self.temperature = nn.Parameter(torch.ones(config.retrieval_heads))

    def _queries(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q, queries = super()._queries(x, dtype)
        return q, (queries * self.temperature[:, None]).to(dtype)


class Tempered(Variant):
    """HSA whose scores are cosines times a learned temperature."""

    def change(self) -> None:
        self.encoder.register_module("landmark_norm", Unit())
        for block in self.upper:
            if block.hsa is not None:
                block.hsa = TemperedHSA(self.config)
