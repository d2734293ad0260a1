"""What a model keeps of everything it has read: the chunks' K, V and landmarks, and the little that is unfinished.

Dimensions: B batch, N chunks, S chunk size, J key/value heads, D head dimension, R retrieval dimension, C width.
"""

import copy
from pathlib import Path

import torch

from . import ops
from .config import HSAConfig
from .nn.swa import WindowCache


class ChunkMemory:
    """The state between two segments of the same sequences; `HSAModel` updates it in place.

    position: tokens read. k, v [B, N, S, J, D] and landmarks [B, N, J_r, R] of the complete chunks; `partial`
    [B, < S, C], the lower decoder's output for the unfinished one; a window cache for every block.
    """

    def __init__(self, config: HSAConfig, *, reserve_tokens: int = 0) -> None:
        """`reserve_tokens`: room made at the first append, so that a long prefill never copies what it holds."""
        self.config = config
        self.position = 0
        self.chunks = 0
        self.partial: torch.Tensor | None = None
        self.lower: list[WindowCache | None] = [None] * config.lower_layers
        self.upper: list[WindowCache | None] = [None] * config.upper_layers
        self.block_queries: list[torch.Tensor | None] = [None] * config.groups
        self._reserve = reserve_tokens // config.chunk_size
        self._stores: tuple[torch.Tensor, ...] | None = None  # k, v, landmarks, with room behind the last chunk

    @property
    def k(self) -> torch.Tensor:
        return self._stores[0][:, : self.chunks]

    @property
    def v(self) -> torch.Tensor:
        return self._stores[1][:, : self.chunks]

    @property
    def landmarks(self) -> torch.Tensor:
        return self._stores[2][:, : self.chunks]

    @property
    def batch(self) -> int | None:
        """Sequences held; None before the first token."""
        return None if self._stores is None else self._stores[0].shape[0]

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`ops.chunk_attention` with the chunks held."""
        return ops.chunk_attention(q, self.k, self.v, indices, weights)

    def append(self, *fresh: torch.Tensor) -> None:
        """Add complete chunks: k, v [B, n, S, J, D] and landmarks [B, n, J_r, R]."""
        total = self.chunks + fresh[0].shape[1]
        if self._stores is None or any(part.requires_grad for part in fresh):
            # a first append needs no copy, and training must not write into what autograd has saved
            held = (self.k, self.v, self.landmarks) if self.chunks else None
            self._stores = tuple(torch.cat(pair, dim=1) for pair in zip(held, fresh)) if held else fresh
            if self._reserve > total:
                self._grow(self._reserve)
        else:
            if total > self._stores[0].shape[1]:
                self._grow(max(total, self.chunks * 3 // 2))
            for store, part in zip(self._stores, fresh):
                store[:, self.chunks : total] = part
        self.chunks = total

    def replace(self, first: int, *fresh: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Overwrite the chunks from `first` on with k, v and landmarks; returns what stood there."""
        rows = slice(first, first + fresh[0].shape[1])
        before = tuple(store[:, rows].clone() for store in self._stores)
        for store, part in zip(self._stores, fresh):
            store[:, rows] = part
        return before

    def branch(self) -> "ChunkMemory":
        """A memory that goes on from here. It shares the chunks' storage: let one branch at a time grow."""
        twin = copy.copy(self)
        twin.lower, twin.upper, twin.block_queries = list(self.lower), list(self.upper), list(self.block_queries)
        return twin

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order: rows int64 [B'], repeats allowed, as beam search needs."""
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < (self.batch or 0):
            raise ValueError(f"rows: got {rows.tolist()} {rows.dtype}, accepted are int64 [B'] of 0 to {(self.batch or 0) - 1}")
        self._stores = tuple(store[rows] for store in self._stores)
        self.partial = self.partial[rows]
        for caches in (self.lower, self.upper):
            caches[:] = [cache and WindowCache(cache.k[rows], cache.v[rows]) for cache in caches]
        self.block_queries = [query if query is None else query[rows] for query in self.block_queries]

    def save(self, path: Path | str) -> None:
        """Write this memory as a folder; see `hsa_mini.checkpoint.save_memory`."""
        from .checkpoint import save_memory

        save_memory(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu") -> "ChunkMemory":
        """A memory that was saved, mapped from the file; see `hsa_mini.checkpoint.load_memory`."""
        from .checkpoint import load_memory

        return load_memory(Path(path), device=device)

    def _grow(self, capacity: int) -> None:
        grown = []
        for store in self._stores:
            room = store.new_empty(store.shape[0], capacity, *store.shape[2:])
            room[:, : store.shape[1]] = store
            grown.append(room)
        self._stores = tuple(grown)
