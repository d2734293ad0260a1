"""What the HSA layers do with every token of a question and its answer, read out of one forward
pass.

Dimensions: T tokens, N chunks, S chunk size, K chunks kept, H query heads, J key/value heads, J_r
retrieval heads, D head dimension, R retrieval dimension, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.chunk_source import DeviceChunks
from hsa_mini.memory.host_chunks import HostChunks
from hsa_mini.reference.retrieval import visible_chunks


@dataclass(frozen=True)
class LayerTrace:
    """One HSA layer; all arrays float32, but for indices.

    scores [T, J, N]: of all landmarks, -inf where the token cannot see the chunk. indices int32
    [T, J, K] (-1: empty slot) and weights [T, J, K] of the kept chunks. attention [T, H, K, S]: the
    shares inside each kept chunk, 0 in empty slots. blend [T, H, D]: the output of the layer before
    its projection.
    """

    scores: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    attention: np.ndarray
    blend: np.ndarray


@dataclass(frozen=True)
class Trace:
    """The HSA layers, the lowest first, and the logits float32 [T, V] of the next tokens."""

    layers: list[LayerTrace]
    logits: np.ndarray


@dataclass(frozen=True)
class RecordedChunks:
    """A chunk source that keeps what every HSA layer asks of it, and gets."""

    chunks: DeviceChunks | HostChunks
    queries: list[torch.Tensor] = field(default_factory=list)  # [B, T, H, D], normed
    blends: list[torch.Tensor] = field(default_factory=list)  # [B, T, H, D]

    @property
    def landmarks(self) -> torch.Tensor:
        return self.chunks.landmarks

    @property
    def position_offset(self) -> int:
        return self.chunks.position_offset

    @property
    def visible_from(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self.chunks.visible_from

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.queries.append(q)
        self.blends.append(self.chunks.attend(q, indices, weights))
        return self.blends[-1]


@torch.no_grad()
def trace(model: HSAModel, memory: ChunkMemory, ids: torch.Tensor) -> Trace:
    """Read ids int64 [1, T] on top of `memory`, which has then read them, and keep what the HSA
    layers did.
    """
    position = memory.position
    earlier = list(memory.block_queries)
    sources: list[RecordedChunks] = []

    def record(store) -> RecordedChunks:
        sources.append(RecordedChunks(store.source()))
        return sources[0]

    output = model(ids, memory, chunk_source=record, gumbel_noise=False)
    (source,) = sources
    layers = [
        LayerTrace(
            scores=_array(
                landmark_scores(
                    model.config, retrieval.queries, block_query, source.landmarks, position
                )
            ),
            indices=retrieval.indices[0].cpu().numpy(),
            weights=_array(retrieval.weights[0]),
            attention=_array(attention_inside(q[0], source.chunks.k[0], retrieval.indices[0])),
            blend=_array(blend[0]),
        )
        for retrieval, block_query, q, blend in zip(
            output.aux.retrievals, earlier, source.queries, source.blends
        )
    ]
    return Trace(layers, _array(output.logits[0]))


def attention_inside(q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The shares whose weighted sum of values `chunk_attention` returns for each kept chunk.

    q [T, H, D], k [N, S, J, D], indices [T, J, K] -> float32 [T, H, K, S], 0 in empty slots.
    """
    H, D = q.shape[1:]
    S, J = k.shape[1:3]
    if not len(k):
        return torch.zeros(len(q), H, indices.shape[2], S)
    head = torch.arange(J, device=k.device)[:, None]
    rows = []
    for query, kept in zip(q.float(), indices):  # one token at a time: each copies its chunks
        keys = k[kept.clamp(min=0).long().to(k.device), :, head].float().to(q.device)  # [J,K,S,D]
        scores = torch.einsum("jgd,jksd->jgks", query.unflatten(0, (J, H // J)), keys) * D**-0.5
        shares = scores.softmax(dim=-1).masked_fill((kept < 0)[:, None, :, None], 0.0)
        rows.append(shares.flatten(0, 1))
    return torch.stack(rows)


def landmark_scores(
    config: HSAConfig,
    queries: torch.Tensor,
    block_query: torch.Tensor | None,
    landmarks: torch.Tensor,
    position: int,
) -> torch.Tensor:
    """The scores of all landmarks [1, N, J_r, R] by which the layer chose: float32 [T, J, N].

    queries [1, T, J_r, R]: of the tokens from `position` on. Tokens of a query block choose by the
    query of its first one; block_query: of the block that had begun before.
    """
    T = queries.shape[1]
    late = position % config.query_block
    if late and block_query is not None:
        queries = torch.cat((block_query.expand(-1, late, -1, -1), queries), dim=1)
    first = torch.arange(late, late + T, device=queries.device)
    first -= first % config.query_block
    scores = torch.einsum("tjr,njr->tjn", queries[0, first].float(), landmarks[0].float())
    scores /= queries.shape[-1] ** 0.5
    hidden = config.window if config.exclude_window else 0
    positions = first + position - late
    visible = visible_chunks(positions, landmarks.shape[1], config.chunk_size, hidden)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.expand(-1, config.hsa_kv_heads, -1)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
