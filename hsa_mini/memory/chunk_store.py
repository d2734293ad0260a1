"""The chunks of everything a model has read: K, V and landmarks, appended to buffers that have
spare capacity.

    buffer   [ chunk 0 | chunk 1 | ... | chunk n-1 |  spare capacity  ]
                                       length n ^            capacity ^

There are three buffers: one for K, one for V, one for landmarks.

Two stores can share their buffers (`fork`): each has its own length, and only one of them may
append.

Dimensions: B batch, N chunks, S chunk size, J key/value heads, D head dimension, R retrieval
dimension.
"""

import copy
import math

import torch

from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_source import DeviceChunks
from hsa_mini.memory.host_chunks import HostChunks
from hsa_mini.memory.memory_budget import check_fits

SPARE = 64  # a growing store adds capacity for at least this many chunks


class ChunkStore:
    """k, v [B, N, S, J, D] and landmarks [B, N, J_r, R] of complete chunks.

    buffers: k, v and landmarks with their spare capacity; empty before the first chunk. The spare
    capacity holds 0 or chunks that another store wrote there. offload: K and V lie in host memory,
    pinned where the model is on a GPU.
    """

    def __init__(
        self, config: HSAConfig, *, reserve_tokens: int = 0, offload: bool = False
    ) -> None:
        """reserve_tokens: capacity that the first append makes, so that a long text is never copied
        while it is read.
        """
        self.config = config
        self.offload = offload
        self.length = 0
        self.buffers: tuple[torch.Tensor, ...] = ()
        self._first_capacity = reserve_tokens // config.chunk_size

    def __len__(self) -> int:
        return self.length

    @property
    def k(self) -> torch.Tensor:
        return self.buffers[0][:, : self.length]

    @property
    def v(self) -> torch.Tensor:
        return self.buffers[1][:, : self.length]

    @property
    def landmarks(self) -> torch.Tensor:
        return self.buffers[2][:, : self.length]

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers that lie on the model's device."""
        return sum(buffer.nbytes for buffer in self.buffers[2 if self.offload else 0 :])

    def source(self, *, whole_buffers: bool = False) -> DeviceChunks | HostChunks:
        """The chunks that an HSA layer reads, or the whole buffers with their spare capacity.

        A CUDA graph needs fixed shapes, so it receives the whole buffers. A token sees only the
        chunks that are complete at its position.
        """
        k, v, landmarks = self.buffers if whole_buffers else (self.k, self.v, self.landmarks)
        kind = HostChunks if self.offload else DeviceChunks
        return kind(k, v, landmarks)

    def reserve(
        self,
        chunks: int,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        spare: int = 0,
    ) -> None:
        """Make capacity for `chunks` chunks of every sequence, those already held included; if the
        buffers have to move for this, for `spare` more.

        Raises MemoryError that says how many tokens fit, before anything is allocated. Buffers move
        one after the other, so that never more than one of them is held twice.
        """
        c = self.config
        # Buffers of another batch size, dtype or device are dropped if they hold no chunks yet.
        made_for = self.buffers and (
            len(self.buffers[2]),
            self.buffers[2].dtype,
            self.buffers[2].device,
        )
        held = list(self.buffers) if self.length or made_for == (batch, dtype, device) else []
        capacity = min((buffer.shape[1] for buffer in held), default=0)
        if held and chunks <= capacity:
            return
        chunks += spare
        kv_shape = (c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim)
        shapes = (kv_shape, kv_shape, (c.retrieval_heads, c.retrieval_dim))
        kv_place = torch.device("cpu") if self.offload else device
        places = (kv_place, kv_place, device)
        self._check_fits(chunks, capacity, batch * dtype.itemsize, shapes, places)
        self.buffers = ()  # a second reference would keep each old buffer alive
        try:
            for i, (shape, place) in enumerate(zip(shapes, places)):
                pinned = place != device and device.type == "cuda"
                buffer = torch.zeros(
                    batch, chunks, *shape, dtype=dtype, device=place, pin_memory=pinned
                )
                if capacity:
                    buffer[:, :capacity] = held[i][:, :capacity]
                held[i : i + 1] = [buffer]
                del buffer
        finally:
            self.buffers = tuple(held) if capacity or len(held) == len(shapes) else ()

    def ensure_capacity(self, chunks: int) -> None:
        """Make capacity for `chunks` chunks if there is less. Buffers grow by an eighth or more, so
        that they are seldom copied.
        """
        if chunks > min(buffer.shape[1] for buffer in self.buffers):
            ample = max(self.length * 9 // 8, self.length + SPARE)
            like = self.buffers[2]
            self.reserve(max(chunks, ample), batch=len(like), dtype=like.dtype, device=like.device)

    def append(self, *chunks: torch.Tensor) -> None:
        """Add complete chunks to every sequence: k, v [B, n, S, J, D], landmarks [B, n, J_r, R]."""
        length = self.length + chunks[0].shape[1]
        landmarks = chunks[2]
        in_place = self.offload and landmarks.is_cuda
        first = not self.buffers and length >= self._first_capacity and not in_place
        if first or any(part.requires_grad for part in chunks):
            # A first append needs no copy. In training, autograd has saved the buffers, so they
            # must not be overwritten.
            held = (self.k, self.v, self.landmarks) if self.length else None
            self.buffers = (
                tuple(torch.cat(pair, dim=1) for pair in zip(held, chunks)) if held else chunks
            )
        else:
            if not self.buffers:
                self.reserve(
                    max(length, self._first_capacity),
                    batch=len(landmarks),
                    dtype=landmarks.dtype,
                    device=landmarks.device,
                )
            self.ensure_capacity(length)
            for buffer, part in zip(self.buffers, chunks):
                buffer[:, self.length : length] = part
        self.length = length

    def write(self, rows: list[int], places: list[int], *chunks: torch.Tensor) -> None:
        """Write k, v [len(rows), 1, S, J, D] and landmarks, one chunk for each sequence in `rows`:
        chunk places[i] of sequence rows[i].
        """
        for buffer, part in zip(self.buffers, chunks):
            buffer[rows, places] = part[:, 0].to(buffer)
        self.length = max(self.length, *(place + 1 for place in places))

    def copy(self, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """A copy of k, v and landmarks of the chunks [first, last)."""
        return tuple(buffer[:, first:last].clone() for buffer in self.buffers)

    def replace(self, first: int, *chunks: torch.Tensor) -> None:
        """Overwrite the chunks from `first` on with k, v and landmarks."""
        for buffer, part in zip(self.buffers, chunks):
            buffer[:, first : first + part.shape[1]] = part

    def fork(self) -> "ChunkStore":
        """A store that shares the buffers and goes on from here: let only one of the two append."""
        return copy.copy(self)

    def view_row(self, row: int, length: int) -> "ChunkStore":
        """One sequence, which has `length` chunks, as a store of its own. It writes into the
        buffers of this one.
        """
        view = self.fork()
        view.length = length
        view.buffers = tuple(buffer[row : row + 1] for buffer in self.buffers)
        return view

    def reorder(self, rows: torch.Tensor, length: int) -> None:
        """Keep these sequences (int64 [B'], repeats allowed), in this order; the longest has
        `length` chunks.
        """
        self.buffers = tuple(_reordered(buffer, rows) for buffer in self.buffers)
        self.length = length

    def _check_fits(self, chunks: int, capacity: int, unit: int, shapes, places) -> None:
        """Raise MemoryError if buffers of these shapes and places cannot grow from `capacity` to
        `chunks` chunks.

        unit: the bytes that one number takes for all sequences together.
        """
        sizes = [unit * math.prod(shape) for shape in shapes]  # bytes of one chunk
        for place in dict.fromkeys(places):
            here = [size for size, where in zip(sizes, places) if where == place]
            check_fits(
                place,
                chunks=chunks,
                held=capacity,
                chunk_bytes=sum(here),
                moved_bytes=capacity * max(here),
                chunk_size=self.config.chunk_size,
            )


def _reordered(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """buffer[rows], pinned if the buffer is."""
    reordered = buffer[rows.to(buffer.device)]
    return reordered.pin_memory() if buffer.is_pinned() else reordered
