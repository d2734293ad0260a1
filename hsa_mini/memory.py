"""What a model keeps of everything it has read: the chunks' K, V and landmarks, and the little that is unfinished.

Dimensions: B batch, N chunks, S chunk size, J key/value heads, D head dimension, R retrieval dimension, C width.
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch

from . import offload, ops
from .config import HSAConfig
from .nn.swa import WindowCache
from .room import check_room

SPARE = 64  # chunks of room that a memory which grows makes at least


class ChunkMemory:
    """The state between two segments of the same sequences; `HSAModel` updates it in place.

    position: tokens read. k, v [B, N, S, J, D] and landmarks [B, N, J_r, R] of the complete chunks; `partial`
    [B, < S, C], the lower decoder's output for the unfinished one; a window cache for every block.
    """

    def __init__(self, config: HSAConfig, *, reserve_tokens: int = 0, offload: bool = False) -> None:
        """`reserve_tokens`: room made at the first append, so that a long prefill never copies what it holds.

        `offload`: K and V live in host memory, pinned where the model is on a GPU; landmarks and all else stay on the
        model's device, and tokens fetch the chunks that they choose: the same numbers. For reading, not for training.
        """
        self.config = config
        self.offload = offload
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
        return None if self._stores is None or not self.position + self.chunks else len(self._stores[0])

    @property
    def attention(self) -> Callable[..., torch.Tensor]:
        """`chunk_attention` for the place where K and V lie."""
        return (offload if self.offload else ops).chunk_attention

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device: everything held, room included, but K and V of a memory with `offload`.

        While tokens are read, `offload.FETCH_BYTES` come on top twice.
        """
        stores = () if self._stores is None else self._stores[2 if self.offload else 0 :]
        caches = [part for cache in (*self.lower, *self.upper) if cache is not None for part in (cache.k, cache.v)]
        others = [x for x in (self.partial, *self.block_queries) if x is not None]
        return sum(tensor.nbytes for tensor in (*stores, *caches, *others))

    def make_room(self, tokens: int, *, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Have room for `tokens` tokens of every sequence, those already read included.

        Raises MemoryError that says how many fit, before anything is allocated. What is held moves store by store, so
        that never more than one of them is held twice.
        """
        c, chunks = self.config, -(-tokens // self.config.chunk_size)
        held = [] if self.batch is None else list(self._stores)
        capacity = min((store.shape[1] for store in held), default=0)
        if chunks <= capacity:
            return
        shapes = (*((c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim),) * 2, (c.retrieval_heads, c.retrieval_dim))
        places = [torch.device("cpu") if self.offload else device] * 2 + [device]
        sizes = [batch * math.prod(shape) * dtype.itemsize for shape in shapes]  # of one chunk
        needed = dict.fromkeys(places, 0)
        needed[places[0]] = capacity * sizes[0]  # K, while it moves
        for place, size in zip(places, sizes):
            needed[place] += (chunks - capacity) * size
        check_room(chunks * c.chunk_size, needed)
        self._stores = None  # else what has moved would stay
        try:
            for i, (shape, place) in enumerate(zip(shapes, places)):
                pinned = place != device and device.type == "cuda"
                room = torch.zeros(batch, chunks, *shape, dtype=dtype, device=place, pin_memory=pinned)
                if capacity:
                    room[:, :capacity] = held[i][:, :capacity]
                held[i : i + 1] = [room]
                del room
        finally:
            self._stores = tuple(held) if capacity or len(held) == len(shapes) else None

    def append(self, *fresh: torch.Tensor) -> None:
        """Add complete chunks: k, v [B, n, S, J, D] and landmarks [B, n, J_r, R]."""
        total = self.chunks + fresh[0].shape[1]
        first = self._stores is None and total >= self._reserve and not (self.offload and fresh[2].is_cuda)
        if first or any(part.requires_grad for part in fresh):
            # a first append needs no copy, and training must not write into what autograd has saved
            held = (self.k, self.v, self.landmarks) if self.chunks else None
            self._stores = tuple(torch.cat(pair, dim=1) for pair in zip(held, fresh)) if held else fresh
        else:
            if self._stores is None or total > min(store.shape[1] for store in self._stores):
                room = max(total, self._reserve, self.chunks * 9 // 8, self.chunks + SPARE) * self.config.chunk_size
                self.make_room(room, batch=len(fresh[2]), dtype=fresh[2].dtype, device=fresh[2].device)
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

    def adopt(self, branch: "ChunkMemory") -> None:
        """Become what a branch has become."""
        vars(self).update(vars(branch))

    def branch(self) -> "ChunkMemory":
        """A memory that goes on from here. It shares the chunks' storage: let one branch at a time grow."""
        twin = copy.copy(self)
        twin.lower, twin.upper, twin.block_queries = list(self.lower), list(self.upper), list(self.block_queries)
        return twin

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order: rows int64 [B'], repeats allowed, as beam search needs."""
        if rows.dtype != torch.int64 or rows.dim() != 1 or not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < (self.batch or 0):
            raise ValueError(f"rows: got {rows.tolist()} {rows.dtype}, accepted are int64 [B'] of 0 to {(self.batch or 0) - 1}")
        self._stores = tuple(_selected(store, rows) for store in self._stores)
        self.partial = self.partial[rows]
        for caches in (self.lower, self.upper):
            caches[:] = [cache and WindowCache(cache.k[rows], cache.v[rows]) for cache in caches]
        self.block_queries = [query if query is None else query[rows] for query in self.block_queries]

    def save(self, path: Path | str) -> None:
        """Write this memory as a folder; see `hsa_mini.checkpoint.save_memory`."""
        from .checkpoint import save_memory

        save_memory(self, Path(path))

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu", offload: bool = False) -> "ChunkMemory":
        """A memory that was saved, mapped from the file; see `hsa_mini.checkpoint.load_memory`."""
        from .checkpoint import load_memory

        return load_memory(Path(path), device=device, offload=offload)


def _selected(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store[rows], pinned if the store is."""
    out = torch.empty(len(rows), *store.shape[1:], dtype=store.dtype, device=store.device, pin_memory=store.is_pinned())
    return torch.index_select(store, 0, rows.to(store.device), out=out)
