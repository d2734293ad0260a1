"""Chunks whose K and V lie in host memory: only the chosen ones cross the bus to the GPU.

Dimensions: B batch, T tokens, L tokens of a block, H query heads, J key/value heads, D head
dimension, N chunks, S chunk size, K chunks kept, M chunks fetched, R retrieval dimension.
"""

from typing import NamedTuple

import torch

from hsa_mini import ops

FETCH_BYTES = 1 << 30  # K and V that a block of tokens may fetch; two blocks are held at once


class HostChunks(NamedTuple):
    """k, v [B, N, S, J, D] in host memory (pinned where there is a GPU), landmarks [B, N, J_r, R]
    on the device.
    """

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    position_offset: int = 0

    def visible_from(self, document_starts: torch.Tensor) -> torch.Tensor:
        return document_starts

    def attend(self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return chunk_attention(q, self.k, self.v, indices, weights)

    def decode(self, retrieval_q: torch.Tensor, q: torch.Tensor, **options) -> torch.Tensor:
        """Retrieve and attend for one new token per sequence; see `reference.decode`."""
        if ops.in_kernel(
            q, self.k
        ):  # the kernel reads the chosen chunks from host memory by itself
            return ops.decode(retrieval_q, self.landmarks, q, self.k, self.v, **options)
        return self.attend(q, *ops.retrieve(retrieval_q, self.landmarks, **options))


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`ops.chunk_attention` with k and v in host memory and everything else on the device. It has
    no gradient.

    The tokens are cut into blocks. While a GPU attends for one block, a second CUDA stream copies
    the chunks of the next block.
    """
    B, T, J, K = indices.shape
    if 0 in (k.shape[1], q.numel()):
        return torch.zeros_like(q)
    chunk_bytes = 2 * k.element_size() * k.shape[2:].numel()
    block = max(FETCH_BYTES // (B * J * K * chunk_bytes), 1)
    blocks = [slice(start, start + block) for start in range(0, T, block)]
    streams = None
    if q.is_cuda and len(blocks) > 1:
        streams = torch.cuda.current_stream(), torch.cuda.Stream()  # to compute on, to fetch on
    out = []
    fetched = _fetch(k, v, indices[:, blocks[0]])
    for tokens, following in zip(blocks, [*blocks[1:], None]):
        # The next fetch waits for all attention but this block's, so that no more than two blocks
        # are held.
        earlier = streams[0].record_event() if streams else None
        # The B sequences of L tokens attend as one sequence of B*L tokens; the indices name chunks
        # among the fetched.
        fetched_k, fetched_v, local_indices = (part[None] for part in fetched)
        rows = q[:, tokens].flatten(0, 1)[None]
        row_weights = weights[:, tokens].flatten(0, 1)[None]
        part = ops.chunk_attention(
            rows, fetched_k, fetched_v, local_indices.flatten(1, 2), row_weights, scale=scale
        )
        out.append(part[0].unflatten(0, (B, -1)))
        if following is None:
            break
        if streams is None or earlier is None:
            fetched = _fetch(k, v, indices[:, following])
        else:
            compute_stream, fetch_stream = streams
            with torch.cuda.stream(fetch_stream):
                fetch_stream.wait_event(earlier)
                fetched = _fetch(k, v, indices[:, following])
            compute_stream.wait_stream(fetch_stream)
            for tensor in fetched:
                tensor.record_stream(compute_stream)
    return torch.cat(out, dim=1)


def _fetch(
    k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fetch the chunks that indices [B, L, J, K] name: k and v [M, S, J, D], and the indices among
    these M chunks.
    """
    # Chunks from the start of one sequence to the start of the next, empty capacity included.
    capacity = k.stride(0) // k.stride(1) if len(k) > 1 else 0
    first = torch.arange(len(k), device=indices.device)[:, None, None, None] * capacity
    names = indices.clamp(min=0) + first
    if indices.shape[1] == 1:
        # For one token it is cheaper to fetch a chunk twice than to wait until the GPU has counted
        # the distinct ones.
        chosen = names.flatten()
        local_indices = torch.arange(names.numel(), device=names.device).view_as(names)
    else:
        chosen, local_indices = torch.unique(names, return_inverse=True)
    rows = (len(k) - 1) * capacity + k.shape[1]
    fetched_k, fetched_v = (
        ops.fetch(part.as_strided((rows, *part.shape[2:]), part.stride()[1:]), chosen)
        for part in (k, v)
    )
    return fetched_k, fetched_v, local_indices.masked_fill(indices < 0, -1).int()
