"""The state of a model between two segments of the same sequences: everything it keeps of what it
has read.

    chunks          ChunkStore       K, V and landmarks of every complete chunk
    tail            [B, S, C]        hidden states of the unfinished chunk; position p in slot p % S
    lower, upper    RollingKVCache   one per block: K and V of the window; position p in slot p % W
    block_queries   [B, 1, J_r, R]   one per HSA layer, if tokens retrieve in blocks: the query
                                     that chose for the block
    lengths         int              one per sequence: the tokens that it has read
    origin          Origin           the model that made all this, or the fingerprint of its weights

There is one layout for segments and for single tokens. A segment replaces tensors and never writes
into them; a decode step (`inference/decode_step.py`) writes in place, after it has made copies of
its own.

Dimensions: B batch, S chunk size, C width, W window, J_r retrieval heads, R retrieval dimension.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from hsa_mini.config import HSAConfig
from hsa_mini.files.whole_folder import Content
from hsa_mini.memory.chunk_store import SPARE, ChunkStore
from hsa_mini.memory.origin import Origin, fingerprint
from hsa_mini.memory.rolling_cache import RollingKVCache
from hsa_mini.memory.saved_memory import SavedMemory, read_memory, write_memory

log = logging.getLogger(__name__)


class ChunkMemory:
    """The state of B sequences. `HSAModel` updates it in place, or not at all if it fails."""

    def __init__(
        self, config: HSAConfig, *, reserve_tokens: int = 0, offload: bool = False
    ) -> None:
        """reserve_tokens: capacity for the chunks of this many tokens, made at the first append.

        offload: K and V of the chunks live in host memory, pinned where the model is on a GPU.
        Landmarks and all else stay on the model's device, and tokens fetch the chunks that they
        choose. Results are the same. It works for reading, not for training.
        """
        self.config = config
        self.chunks = ChunkStore(config, reserve_tokens=reserve_tokens, offload=offload)
        self.lengths: tuple[int, ...] = ()
        self.tail: torch.Tensor | None = None
        self.lower: list[RollingKVCache | None] = [None] * config.lower_layers
        self.upper: list[RollingKVCache | None] = [None] * config.upper_layers
        self.block_queries: list[torch.Tensor | None] = [None] * config.groups
        self.origin: Origin = None

    @property
    def batch(self) -> int | None:
        """The number of sequences; None before the first token."""
        return len(self.lengths) or None

    @property
    def position(self) -> int:
        """Tokens that the longest sequence has read."""
        return max(self.lengths, default=0)

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device: all that is held, spare capacity included, but not K and V
        in host memory.

        With `offload`, reading takes up to twice `host_chunks.FETCH_BYTES` on top.
        """
        caches = [part for cache in (*self.lower, *self.upper) if cache for part in cache]
        others = [x for x in (self.tail, *self.block_queries) if x is not None]
        return self.chunks.device_bytes + sum(tensor.nbytes for tensor in (*caches, *others))

    # Capacity

    def reserve(self, tokens: int, *, spare: int = 0, **sizes: Any) -> None:
        """Make capacity for the chunks of `tokens` tokens of every sequence, and for `spare` tokens
        more if the chunks have to move for this; for the sizes see `ChunkStore.reserve`.
        """
        S = self.config.chunk_size
        self.chunks.reserve(tokens // S, spare=spare // S, **sizes)

    def ensure_capacity(self, tokens: int) -> None:
        """Make capacity for the chunks of `tokens` tokens if there is less; see
        `ChunkStore.ensure_capacity`.
        """
        self.chunks.ensure_capacity(tokens // self.config.chunk_size)

    # Reading on

    def resume(self, unfinished: torch.Tensor, position: int) -> None:
        """Continue after `position` tokens of every sequence. unfinished [B, position % S, C]: the
        hidden states of the incomplete last chunk.
        """
        self.tail = pad(unfinished, (0, 0, 0, self.config.chunk_size - unfinished.shape[1]))
        self.lengths = (position,) * len(unfinished)

    def drop_upper_caches(self) -> None:
        """Empty the upper decoder's caches, because it has not read the tokens just before."""
        self.upper = [None] * len(self.upper)
        self.block_queries = [None] * len(self.block_queries)

    # Other memories

    def draft(self, position: int | None = None) -> "ChunkMemory":
        """A memory that shares every tensor with this one: for segments, which replace tensors.
        This memory stays unchanged until `commit`.

        position: continue after this many tokens of every sequence instead, with empty caches.
        """
        draft = copy.copy(self)
        draft.chunks = self.chunks.fork()
        draft.lower = list(self.lower)
        draft.upper = list(self.upper)
        draft.block_queries = list(self.block_queries)
        if position is not None:
            draft.lengths = (position,) * len(self.lengths)
            draft.lower = [None] * len(self.lower)
            draft.drop_upper_caches()
        return draft

    def fork(self) -> "ChunkMemory":
        """A memory that goes on from here by itself. The two share the chunks' buffers: let only
        one of them read on.
        """
        fork = self.draft()
        if self.tail is not None:
            fork._keep(list(range(len(self.lengths))))
        return fork

    def commit(self, draft: "ChunkMemory") -> None:
        """Take over the state of a draft of this memory."""
        self.chunks = draft.chunks
        self.lengths = draft.lengths
        self.tail = draft.tail
        self.lower = draft.lower
        self.upper = draft.upper
        self.block_queries = draft.block_queries
        self.origin = draft.origin

    # Sequences

    def view_row(self, row: int) -> "ChunkMemory":
        """One sequence as a memory of its own, which writes its chunks into the buffers of this
        one; see `stack`.
        """
        view = self.draft()
        length = self.lengths[row] if self.lengths else 0
        view.lengths = self.lengths[row : row + 1]
        view.chunks = self.chunks.view_row(row, length // self.config.chunk_size)
        if self.tail is not None:
            view._keep([row])
        return view

    def stack(self, rows: list["ChunkMemory"]) -> None:
        """Take over the state of every row's view (`view_row`). The sequences may now differ in
        length.
        """
        self.chunks.length = max(len(row.chunks) for row in rows)
        self.lengths = tuple(row.position for row in rows)
        self.tail = torch.cat([row.tail for row in rows if row.tail is not None])
        self.lower = [_stacked(caches) for caches in zip(*(row.lower for row in rows))]
        self.upper = [_stacked(caches) for caches in zip(*(row.upper for row in rows))]
        if self.config.query_block > 1:
            queries = zip(*(row.block_queries for row in rows))
            self.block_queries = [torch.cat(of_layer) for of_layer in queries]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep these sequences, in this order: rows int64 [B'], repeats allowed, as beam search
        needs.

        Raises ValueError for a wrong dtype or shape, and for a sequence that does not exist.
        """
        batch = self.batch or 0
        fits = rows.dtype == torch.int64 and rows.dim() == 1 and len(rows)
        if not fits or not 0 <= int(rows.min()) <= int(rows.max()) < batch:
            raise ValueError(
                f"rows: got {rows.tolist()} {rows.dtype}, "
                f"accepted are int64 [B'] of 0 to {batch - 1}"
            )
        self.lengths = tuple(self.lengths[row] for row in rows.tolist())
        self.chunks.reorder(rows, self.position // self.config.chunk_size)
        self._keep(rows.tolist())

    def _keep(self, rows: list[int]) -> None:
        """Copy the tail, the caches and the queries of these sequences. No other memory then shares
        them.
        """

        def kept(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part[rows]

        def kept_cache(cache: RollingKVCache | None) -> RollingKVCache | None:
            return None if cache is None else RollingKVCache(cache.k[rows], cache.v[rows])

        self.tail = kept(self.tail)
        self.lower = [kept_cache(cache) for cache in self.lower]
        self.upper = [kept_cache(cache) for cache in self.upper]
        self.block_queries = [kept(query) for query in self.block_queries]

    # Files

    def save(self, path: Path | str, *, files: Mapping[str, Content] | None = None) -> None:
        """Write this memory as a verified folder, with further `files` by name, so that a text need
        not be read again. Spare capacity is left out. The folder names the weights of the model
        that made the memory, by their fingerprint.

        Raises ValueError for a memory that has read nothing, and for one with NaN or infinite
        numbers.
        """
        if self.batch is None or self.tail is None:
            raise ValueError("memory: got an empty one, accepted is one that has read a token")
        position = self.position
        equal = len(set(self.lengths)) == 1
        tail = self.tail[:, : position % self.config.chunk_size] if equal else self.tail
        tensors = {
            "k": self.chunks.k,
            "v": self.chunks.v,
            "landmarks": self.chunks.landmarks,
            "partial": tail,
        }
        for name, caches in (("lower", self.lower), ("upper", self.upper)):
            for i, cache in enumerate(caches):
                if cache is not None:
                    k, v = cache.in_order(position) if equal else cache
                    tensors |= {f"{name}.{i}.k": k, f"{name}.{i}.v": v}
        if position % self.config.query_block or not equal:
            queries = {f"block_queries.{i}": query for i, query in enumerate(self.block_queries)}
            tensors |= {name: query for name, query in queries.items() if query is not None}
        padding = [] if equal else [position - length for length in self.lengths]
        weights = fingerprint(self.origin)
        saved = SavedMemory(self.config, position, padding, weights, tensors)
        write_memory(Path(path), saved, files or {})

    @classmethod
    def load(
        cls,
        path: Path | str | Mapping[str, Path],
        *,
        device: torch.device | str = "cpu",
        offload: bool = False,
    ) -> "ChunkMemory":
        """The memory of a folder that `save` wrote (or of its verified files, by name), for the
        model that made it; `offload`: see the constructor. Its forks share its spare capacity, an
        eighth and 64 chunks. A model of other weights refuses it. An older folder without a
        fingerprint is taken by any model of its configuration, as the log says.

        All is copied: what happens to the folder later changes nothing. But while `load` runs, the
        file is mapped. If another program truncates it then, or the disk fails, the system may end
        this process (SIGBUS). `save` never truncates.

        Raises ValueError for a folder that is missing, altered or contradicts itself; MemoryError.
        """
        saved = read_memory(Path(path) if isinstance(path, str) else path)
        if saved.weights is None:
            log.warning("%s does not say which weights made it: they are not compared", path)
        tokens = saved.position * 9 // 8 + SPARE * saved.config.chunk_size
        memory = cls(saved.config, reserve_tokens=tokens, offload=offload)
        memory._fill(saved, torch.device(device))
        return memory

    def _fill(self, saved: SavedMemory, device: torch.device) -> None:
        """Take a copy of the tensors of a saved memory."""
        tensors = {
            name: value if name in ("k", "v") else value.to(device, copy=True)
            for name, value in saved.tensors.items()
        }
        self.chunks.append(*(tensors[name] for name in ("k", "v", "landmarks")))
        if saved.padding:
            self.tail = tensors["partial"]
            self.lengths = tuple(saved.position - shorter for shorter in saved.padding)
        else:
            self.resume(tensors["partial"], saved.position)
        for name, caches in (("lower", self.lower), ("upper", self.upper)):
            for i in range(len(caches)):
                pair = tensors[f"{name}.{i}.k"], tensors[f"{name}.{i}.v"]
                in_order = (saved.position, self.config.window)
                caches[i] = (
                    RollingKVCache(*pair)
                    if saved.padding
                    else RollingKVCache.from_order(*pair, *in_order)
                )
        if self.config.query_block > 1:
            shape = (len(self.lengths), 1, self.config.retrieval_heads, self.config.retrieval_dim)
            self.block_queries = [
                tensors.get(f"block_queries.{i}", self.chunks.landmarks.new_zeros(shape))
                for i in range(len(self.block_queries))
            ]
        self.origin = saved.weights


def _stacked(caches: tuple[RollingKVCache, ...]) -> RollingKVCache:
    """The caches of several sequences as one."""
    return RollingKVCache(*(torch.cat(parts) for parts in zip(*caches)))
