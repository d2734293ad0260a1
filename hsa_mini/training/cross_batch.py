"""Training in a crowd: a sequence has to find its chunks among those of its whole batch, and of batches before it.

Retrieved chunks have no positions, so chunks of other texts in front of a sequence are its distant past. A sequence of 1,024
tokens has 16 chunks; in a crowd of thousands it learns what it needs among the hundred thousands of a long text.

Dimensions: B batch, N chunks a sequence, M chunks of the past, C width, T tokens, H query heads, J key/value heads, K slots.
"""

import torch

from hsa_mini import ops
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.chunk_encoder import ChunkEncoder


class Past:
    """The newest `size` (M) chunks of earlier batches, as they were encoded then: k, v [M, S, J, D] and [CLS] [M, C].

    They have no gradient: an encoder that moves slowly leaves them good enough to get in the way. Only their landmarks are
    made anew, by the projection of now: otherwise it grows without end, since what is larger than in the past stands out.
    """

    def __init__(self, size: int) -> None:
        """Raises ValueError for a size below 0."""
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"size: got {size!r}, accepted is an integer of at least 0")
        self.size = size
        self.stores: tuple[torch.Tensor, ...] | None = None  # None before the first batch

    def push(self, memory: ChunkMemory, encoder: ChunkEncoder, rows: torch.Tensor) -> None:
        """Take in the chunks of some rows (int64) of the batch that was just read in training, and let go of the oldest.

        Missing ones are zeros at first.
        """
        fresh = tuple(x.detach()[rows].flatten(0, 1) for x in (memory.k, memory.v, encoder.seen))
        if self.stores is None:
            self.stores = tuple(x.new_zeros(self.size, *x.shape[1:]) for x in fresh)
        for store, x in zip(
            self.stores, fresh
        ):  # in place: a recorded step finds them where they were
            store.copy_(torch.cat((store, x))[len(x) :])


class Crowd:
    """What the HSA layers of a batch look into: `landmarks` [B, M + B*N, J_r, R].

    Sequence b meets the past first, then the sequences that follow it in the batch, going round, and last its own chunks:
    `in_front` tokens come before these. The first `alone` sequences meet their own chunks first, so they see no others.
    """

    def __init__(
        self, memory: ChunkMemory, encoder: ChunkEncoder, past: Past, alone: int = 0
    ) -> None:
        B = memory.batch
        N = memory.chunks
        self.batch_chunks = B * N
        self.first = (
            torch.arange(1, B + 1, device=memory.k.device)[:, None, None, None] * N
        )  # of sequence b + 1
        self.past = 0 if past.stores is None else past.size
        before = self.past + (B - 1) * N  # chunks in front of a sequence's own
        self.in_front = before * memory.config.chunk_size
        k, v, landmarks = (x.flatten(0, 1) for x in (memory.k, memory.v, memory.landmarks))
        # window b + 1 of B*N landmarks in a row, twice written down: [B, J_r, R, B*N] -> [B, B*N, J_r, R]
        self.landmarks = torch.cat((landmarks, landmarks)).unfold(0, B * N, N)[1:].movedim(-1, 1)
        if self.past:
            old_k, old_v, summaries = past.stores
            k = torch.cat((old_k, k))
            v = torch.cat((old_v, v))
            old = encoder.landmarks(summaries[None]).to(landmarks.dtype).expand(B, -1, -1, -1)
            self.landmarks = torch.cat((old, self.landmarks), dim=1)
        self.skipped = None  # chunks that an index does not count, of each sequence
        if alone:
            self.landmarks = torch.cat(
                (self.landmarks[:alone].roll(N, dims=1), self.landmarks[alone:])
            )
            crowded = torch.arange(B, device=memory.k.device) >= alone
            self.in_front = crowded * self.in_front
            self.skipped = (~crowded * before)[:, None, None, None]
        # [1, M + B*N, S, J, D]: one copy for all
        self.k = k[None]
        self.v = v[None]

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`ops.chunk_attention` for q [B, T, H, D] and a choice among `landmarks`; the batch is one long sequence there."""
        if self.skipped is not None:
            indices = torch.where(indices < 0, indices, indices + self.skipped)
        among = self.past + (self.first + indices - self.past) % self.batch_chunks
        places = torch.where(indices < self.past, indices, among).int()  # an empty slot stays -1
        rows, places, weights = (x.flatten(0, 1)[None] for x in (q, places, weights))
        return ops.chunk_attention(rows, self.k, self.v, places, weights).view(q.shape)
