"""Training among the chunks of other sequences: those of the whole batch, and a queue of chunks
from earlier batches.

Retrieved chunks have no positions, so chunks of other texts in front of a sequence serve as its
distant past. A sequence of 1,024 tokens has 16 chunks of its own. Among thousands of others it
learns what it needs among the hundred thousands of chunks of a long text.

Dimensions: B batch, N chunks of a sequence, M chunks in the queue, C width, T tokens, H query
heads, J key/value heads, J_r retrieval heads, R retrieval dimension, K chunks kept.
"""

import torch

from hsa_mini import ops
from hsa_mini.checks import check_integer
from hsa_mini.memory.chunk_store import ChunkStore
from hsa_mini.model.chunk_encoder import ChunkEncoder, EncodedChunks


class ChunkQueue:
    """The newest `size` (M) chunks of earlier batches, as they were encoded then.

    stores: k, v [M, S, J, D] and [CLS] states [M, C]; None before the first batch, then 0 where
    chunks are still missing. They are detached: they serve only as distractors, so their age does
    no harm. Their landmarks are re-projected with the current weights. Otherwise the landmark norm
    would grow without bound.
    """

    def __init__(self, size: int) -> None:
        """Raises ValueError for a size below 0."""
        check_integer("size", size, 0)
        self.size = size
        self.stores: tuple[torch.Tensor, ...] | None = None

    def push(self, encoded: EncodedChunks, rows: torch.Tensor) -> None:
        """Append the chunks of some rows (int64) of a batch, and drop the oldest."""
        assert encoded.cls_states is not None, "the encoder has no [CLS]"
        fresh = tuple(
            part.detach()[rows].flatten(0, 1) for part in (encoded.k, encoded.v, encoded.cls_states)
        )
        if self.stores is None:
            self.stores = tuple(part.new_zeros(self.size, *part.shape[1:]) for part in fresh)
        for store, part in zip(self.stores, fresh):
            # In place: a CUDA graph finds the stores where they were recorded.
            store.copy_(torch.cat((store, part))[len(part) :])


class CrossBatchChunks:
    """The source of chunks for a whole batch: landmarks [B, M + B*N, J_r, R], position_offset an
    int or int64 [B].

    Order for sequence b: the queue, then the other sequences cyclically from b+1, then its own
    chunks. Order for the first `isolated` sequences: their own chunks first, so that they see no
    others. A sequence that sees others also sees earlier documents of its own row, which are other
    texts like them.

        sequence 1 of 3:    | queue: M | sequence 2: N | sequence 0: N | sequence 1: N |
    """

    def __init__(
        self,
        chunks: ChunkStore | EncodedChunks,
        encoder: ChunkEncoder,
        queue: ChunkQueue,
        isolated: int = 0,
    ) -> None:
        B, N = chunks.k.shape[:2]
        device = chunks.k.device
        self.batch_chunks = B * N
        stores = queue.stores if queue.size else None
        self.queued = 0 if stores is None else queue.size
        # The place of the first chunk of sequence b + 1 in the batch, for every b.
        self.next_sequence = torch.arange(1, B + 1, device=device)[:, None, None, None] * N
        in_front = self.queued + (B - 1) * N  # chunks in front of a sequence's own
        self.position_offset: int | torch.Tensor = in_front * encoder.config.chunk_size
        k = chunks.k.flatten(0, 1)
        v = chunks.v.flatten(0, 1)
        landmarks = chunks.landmarks.flatten(0, 1)  # [B*N, J_r, R]
        # If the landmarks of the batch are repeated once, the cyclic order of every sequence is a
        # window of B*N in them: [2*B*N, J_r, R] -> [B, J_r, R, B*N] -> [B, B*N, J_r, R]
        twice = torch.cat((landmarks, landmarks))
        self.landmarks = twice.unfold(0, B * N, N)[1:].movedim(-1, 1)
        if stores is not None:
            queued_k, queued_v, cls_states = stores
            k = torch.cat((queued_k, k))
            v = torch.cat((queued_v, v))
            queued = encoder.landmarks(cls_states[None]).to(landmarks.dtype).expand(B, -1, -1, -1)
            self.landmarks = torch.cat((queued, self.landmarks), dim=1)
        self.isolated = isolated
        self.skipped = None  # shift of an isolated sequence's indices: the chunks in front
        if isolated:
            own_first = self.landmarks[:isolated].roll(N, dims=1)
            self.landmarks = torch.cat((own_first, self.landmarks[isolated:]))
            sees_others = torch.arange(B, device=device) >= isolated
            self.position_offset = sees_others * self.position_offset
            self.skipped = (~sees_others * in_front)[:, None, None, None]
        self.k = k[None]  # [1, M + B*N, S, J, D]: one copy for all sequences
        self.v = v[None]

    def visible_from(self, document_starts: torch.Tensor) -> torch.Tensor:
        """0 for the sequences that see others. See `memory.chunk_source`."""
        isolated = torch.arange(len(document_starts), device=document_starts.device) < self.isolated
        return document_starts * isolated[:, None]

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`ops.chunk_attention` for q [B, T, H, D], indices into `landmarks` and weights [B, T, J,
        K] -> [B, T, H, D].

        The batch attends as one sequence of B*T tokens, since all share one copy of the chunks.
        """
        if self.skipped is not None:
            indices = torch.where(indices < 0, indices, indices + self.skipped)
        in_batch = (self.next_sequence + indices - self.queued) % self.batch_chunks
        places = torch.where(indices < self.queued, indices, self.queued + in_batch)
        rows, places, weights = (x.flatten(0, 1)[None] for x in (q, places.int(), weights))
        return ops.chunk_attention(rows, self.k, self.v, places, weights).view(q.shape)
