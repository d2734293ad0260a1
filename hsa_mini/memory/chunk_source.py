"""The chunks that an HSA layer reads: landmarks to choose among, and a way to attend to the chosen
chunks.

Three sources exist: `DeviceChunks` (here), `HostChunks` (K and V in host memory, `host_chunks.py`)
and `CrossBatchChunks` (the chunks of a whole training batch and of batches before it,
`training/cross_batch.py`).

Dimensions: B batch, T tokens, N chunks, S chunk size, H query heads, J key/value heads, D head
dimension, R retrieval dimension, K chunks kept.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from hsa_mini import ops


class ChunkSource(Protocol):
    """Anything with these four attributes."""

    @property
    def landmarks(self) -> torch.Tensor:
        """[B, N, J_r, R]."""
        ...

    @property
    def position_offset(self) -> int | torch.Tensor:
        """Tokens in front of a sequence, an int or int64 [B]; a multiple of the chunk size."""
        ...

    @property
    def visible_from(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`visible_from(document_starts)` -> [B, T]: the position, with `position_offset`, from
        which on each token sees chunks. document_starts [B, T] are positions in the sequence.
        """
        ...

    @property
    def attend(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        """`attend(q, indices, weights)` -> [B, T, H, D], as `ops.chunk_attention`.

        q [B, T, H, D]; indices and weights [B, T, J, K] of the chosen chunks.
        """
        ...


class DeviceChunks(NamedTuple):
    """Chunks on the model's device: k, v [B, N, S, J, D] and landmarks [B, N, J_r, R]."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    position_offset: int = 0

    def visible_from(self, document_starts: torch.Tensor) -> torch.Tensor:
        return document_starts

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ops.chunk_attention(q, self.k, self.v, indices, weights)

    def decode(self, retrieval_q: torch.Tensor, q: torch.Tensor, **options) -> torch.Tensor:
        """Retrieve and attend for one new token per sequence; see `reference.decode`."""
        return ops.decode(retrieval_q, self.landmarks, q, self.k, self.v, **options)
