"""What a model keeps of everything it has read: the chunks' K, V and landmarks, and the little that is unfinished.

Dimensions: B batch, N chunks, S chunk size, J key/value heads, D head dimension, R retrieval dimension, C width.
"""

import copy
import math
from pathlib import Path
from types import ModuleType

import torch

from hsa_mini import ops
from hsa_mini.config import HSAConfig
from hsa_mini.memory import host_chunks as offload
from hsa_mini.memory.memory_budget import check_room
from hsa_mini.memory.window_cache import Clock, WindowRing
from hsa_mini.model.swa import WindowCache

SPARE = 64  # chunks of room that a memory which grows makes at least


class ChunkMemory:
    """The state between two segments of the same sequences; `HSAModel` updates it in place.

    position: tokens read, of the longest sequence; `padding`: how many fewer of each, all 0 unless their lengths differ.
    k, v [B, N, S, J, D] and landmarks [B, N, J_r, R] of the complete chunks; `partial` [B, < S, C], the lower decoder's
    output for the unfinished one; a window cache for every block.

    While sequences take one token at a time, or if their lengths differ, the memory is rolled: it has a `clock`, window caches
    are rings, and `partial` [B, S, C] has a slot for every token of a chunk.
    """

    def __init__(
        self, config: HSAConfig, *, reserve_tokens: int = 0, offload: bool = False
    ) -> None:
        """`reserve_tokens`: room made at the first append, so that a long prefill never copies what it holds.

        `offload`: K and V live in host memory, pinned where the model is on a GPU; landmarks and all else stay on the
        model's device, and tokens fetch the chunks that they choose: the same numbers. For reading, not for training.
        """
        self.config = config
        self.offload = offload
        self.position = 0
        self.padding: tuple[int, ...] = ()
        self.clock: Clock | None = None
        self.chunks = 0
        self.partial: torch.Tensor | None = None
        self.lower: list[WindowCache | WindowRing | None] = [None] * config.lower_layers
        self.upper: list[WindowCache | WindowRing | None] = [None] * config.upper_layers
        self.block_queries: list[torch.Tensor | None] = [None] * config.groups
        self._reserve = reserve_tokens // config.chunk_size
        self._stores: tuple[torch.Tensor, ...] | None = (
            None  # k, v, landmarks, with room behind the last chunk
        )

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
        return (
            None
            if self._stores is None or not self.position + self.chunks
            else len(self._stores[0])
        )

    @property
    def positions(self) -> list[int]:
        """Tokens read of every sequence."""
        return [self.position - shorter for shorter in self.padding or [0] * (self.batch or 0)]

    @property
    def stores(self) -> tuple[torch.Tensor, ...]:
        """k, v and landmarks with the room behind them, which holds 0 or what a branch left there."""
        return self._stores

    @property
    def operations(self) -> ModuleType:
        """`ops`, or what stands for it if K and V lie in host memory."""
        return offload if self.offload else ops

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device: everything held, room included, but K and V of a memory with `offload`.

        While tokens are read, `offload.FETCH_BYTES` come on top twice.
        """
        stores = () if self._stores is None else self._stores[2 if self.offload else 0 :]
        caches = [
            part
            for cache in (*self.lower, *self.upper)
            if cache is not None
            for part in (cache.k, cache.v)
        ]
        others = [x for x in (self.partial, *self.block_queries) if x is not None]
        return sum(tensor.nbytes for tensor in (*stores, *caches, *others))

    def make_room(
        self, tokens: int, *, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Have room for the chunks that `tokens` tokens of a sequence complete, those already read included.

        Raises MemoryError that says how many fit, before anything is allocated. What is held moves store by store, so
        that never more than one of them is held twice.
        """
        c = self.config
        chunks = tokens // self.config.chunk_size
        made = self._stores and (
            len(self._stores[2]),
            self._stores[2].dtype,
            self._stores[2].device,
        )
        # room that was made for others, and in which nothing stands, goes
        held = (
            list(self._stores) if self.batch is not None or made == (batch, dtype, device) else []
        )
        capacity = min((store.shape[1] for store in held), default=0)
        if held and chunks <= capacity:
            return
        shapes = (
            *((c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim),) * 2,
            (c.retrieval_heads, c.retrieval_dim),
        )
        places = [torch.device("cpu") if self.offload else device] * 2 + [device]
        sizes = [batch * math.prod(shape) * dtype.itemsize for shape in shapes]  # of one chunk
        for place in dict.fromkeys(places):
            each = sum(size for size, where in zip(sizes, places) if where == place)
            moved = capacity * max(size for size, where in zip(sizes, places) if where == place)
            check_room(
                place,
                chunks=chunks,
                held=capacity,
                chunk_bytes=each,
                moved_bytes=moved,
                chunk_size=c.chunk_size,
            )
        self._stores = None  # else what has moved would stay
        try:
            for i, (shape, place) in enumerate(zip(shapes, places)):
                pinned = place != device and device.type == "cuda"
                room = torch.zeros(
                    batch, chunks, *shape, dtype=dtype, device=place, pin_memory=pinned
                )
                if capacity:
                    room[:, :capacity] = held[i][:, :capacity]
                held[i : i + 1] = [room]
                del room
        finally:
            self._stores = tuple(held) if capacity or len(held) == len(shapes) else None

    def grow(self, tokens: int) -> None:
        """`make_room` for at least so many tokens, and for an eighth more, so that a memory that grows seldom moves."""
        if tokens // self.config.chunk_size > min(store.shape[1] for store in self._stores):
            chunks = max(self.chunks * 9 // 8, self.chunks + SPARE)
            like = {name: getattr(self._stores[2], name) for name in ("dtype", "device")}
            self.make_room(
                max(tokens, chunks * self.config.chunk_size), batch=len(self._stores[2]), **like
            )

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`ops.chunk_attention` with the chunks held."""
        return self.operations.chunk_attention(q, self.k, self.v, indices, weights)

    def append(self, *fresh: torch.Tensor) -> None:
        """Add complete chunks: k, v [B, n, S, J, D] and landmarks [B, n, J_r, R]."""
        total = self.chunks + fresh[0].shape[1]
        first = (
            self._stores is None
            and total >= self._reserve
            and not (self.offload and fresh[2].is_cuda)
        )
        if first or any(part.requires_grad for part in fresh):
            # a first append needs no copy, and training must not write into what autograd has saved
            held = (self.k, self.v, self.landmarks) if self.chunks else None
            self._stores = (
                tuple(torch.cat(pair, dim=1) for pair in zip(held, fresh)) if held else fresh
            )
        else:
            S = self.config.chunk_size
            like = fresh[2]
            if self._stores is None:
                self.make_room(
                    max(total, self._reserve) * S,
                    batch=len(like),
                    dtype=like.dtype,
                    device=like.device,
                )
            self.grow(total * S)
            for store, part in zip(self._stores, fresh):
                store[:, self.chunks : total] = part
        self.chunks = total

    def append_to(self, rows: list[int], *fresh: torch.Tensor) -> None:
        """Put the chunk that each of these sequences has just completed into its room: k, v [B', 1, S, J, D], landmarks."""
        S = self.config.chunk_size
        places = [self.positions[row] // S - 1 for row in rows]
        for store, part in zip(self._stores, fresh):
            store[rows, places] = part[:, 0].to(store)
        self.chunks = self.position // S

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
        twin.lower = list(self.lower)
        twin.upper = list(self.upper)
        twin.block_queries = list(self.block_queries)
        if self.clock is not None:  # what steps change in place
            twin._keep(list(range(self.batch)))
        return twin

    def row(self, b: int) -> "ChunkMemory":
        """One sequence as a memory of its own, which goes on in the room of this one; see `gather`."""
        twin = copy.copy(self)
        twin._stores = tuple(store[b : b + 1] for store in self._stores)
        twin._keep([b])
        twin.unroll()
        return twin

    def gather(self, rows: list["ChunkMemory"]) -> None:
        """Take back what became of every `row`; their lengths may now differ."""
        for row in rows:
            row.roll()
        self.position = max(row.position for row in rows)
        self.chunks = max(row.chunks for row in rows)
        self.padding = tuple(self.position - row.position for row in rows)
        self.clock = Clock(torch.cat([row.clock.positions for row in rows]), self.config.window)
        self.partial = torch.cat([row.partial for row in rows])
        for half in ("lower", "upper"):
            layers = zip(*(getattr(row, half) for row in rows))
            pairs = (
                (torch.cat([ring.k for ring in rings]), torch.cat([ring.v for ring in rings]))
                for rings in layers
            )
            setattr(self, half, [WindowRing(k, v, self.clock) for k, v in pairs])
        if self.config.query_block > 1:
            self.block_queries = [
                torch.cat(queries) for queries in zip(*(row.block_queries for row in rows))
            ]
        if not any(self.padding):
            self.unroll()

    def select(self, rows: torch.Tensor) -> None:
        """Keep these sequences of the batch, in this order: rows int64 [B'], repeats allowed, as beam search needs."""
        fits = rows.dtype == torch.int64 and rows.dim() == 1 and len(rows)
        if not fits or not 0 <= int(rows.min()) <= int(rows.max()) < (self.batch or 0):
            raise ValueError(
                f"rows: got {rows.tolist()} {rows.dtype}, accepted are int64 [B'] of 0 to {(self.batch or 0) - 1}"
            )
        self._stores = tuple(_selected(store, rows) for store in self._stores)
        self._keep(rows.tolist())

    def _keep(self, rows: list[int]) -> None:
        """Copy what these sequences have beside chunks."""
        if self.clock is not None:
            self.clock = Clock(self.clock.positions[rows], self.config.window)

        def kept(cache):
            if cache is None:
                return None
            parts = cache.k[rows], cache.v[rows]
            return WindowCache(*parts) if self.clock is None else WindowRing(*parts, self.clock)

        self.lower, self.upper = (
            [kept(cache) for cache in caches] for caches in (self.lower, self.upper)
        )
        self.block_queries = [
            query if query is None else query[rows] for query in self.block_queries
        ]
        self.partial = self.partial if self.partial is None else self.partial[rows]
        if self.padding:
            shorter = [self.padding[row] for row in rows]
            self.position -= min(shorter)
            self.padding = tuple(x - min(shorter) for x in shorter)
            self.chunks = self.position // self.config.chunk_size

    def roll(self) -> None:
        """Be ready to take one token at a time; does nothing if it is."""
        if self.clock is not None:
            return
        config = self.config
        device = self.partial.device
        self.clock = Clock(torch.tensor(self.positions, device=device), config.window)
        for caches in (self.lower, self.upper):
            caches[:] = [
                WindowRing.of(cache, self.position, config.window, self.clock) for cache in caches
            ]
        slots = self.partial.new_zeros(len(self.partial), config.chunk_size, config.width)
        slots[:, : self.partial.shape[1]] = self.partial
        self.partial = slots
        if config.query_block > 1:
            fresh = self._stores[2].new_zeros(
                len(slots), 1, config.retrieval_heads, config.retrieval_dim
            )
            self.block_queries = [
                fresh.clone() if query is None else query.clone() for query in self.block_queries
            ]

    def unroll(self) -> None:
        """Be ready to take segments; does nothing if it is. Raises ValueError for sequences of different lengths."""
        if self.clock is None:
            return
        if any(self.padding):
            raise ValueError(
                f"memory: got sequences of {self.positions} tokens, accepted are equal lengths; `prefill` takes any"
            )
        for caches in (self.lower, self.upper):
            caches[:] = [ring.ordered(self.position) for ring in caches]
        self.partial = self.partial[:, : self.position % self.config.chunk_size].clone()
        self.clock = None
        self.padding = ()

    def save(self, path: Path | str) -> None:
        """Write this memory as a folder; see `hsa_mini.checkpoint.memory_file.save_memory`."""
        from hsa_mini.checkpoint.memory_file import save_memory

        save_memory(self, Path(path))

    @classmethod
    def load(
        cls, path: Path | str, *, device: torch.device | str = "cpu", offload: bool = False
    ) -> "ChunkMemory":
        """A memory that was saved, mapped from the file; see `hsa_mini.checkpoint.memory_file.load_memory`."""
        from hsa_mini.checkpoint.memory_file import load_memory

        return load_memory(Path(path), device=device, offload=offload)


def _selected(store: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """store[rows], pinned if the store is."""
    selected = store[rows.to(store.device)]
    return selected.pin_memory() if store.is_pinned() else selected
