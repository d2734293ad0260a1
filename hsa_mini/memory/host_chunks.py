"""The operations of `ops` that read K and V, for chunks in host memory: only chosen ones cross the bus.

Dimensions: B batch, T tokens, L tokens of a block, H query heads, J key/value heads, D head dimension, N chunks, S chunk size,
K kept, M fetched.
"""

from contextlib import nullcontext

import torch

from hsa_mini import ops

FETCH_BYTES = 1 << 30  # of K and V that a block of tokens may fetch; two blocks are held at once


def chunk_attention(q, k, v, indices, weights, *, scale=None):
    """`ops.chunk_attention` with k and v in host memory (pinned where there is a GPU), the rest on a device. No gradient.

    Tokens go in blocks. While a GPU attends for one, the chunks of the next are on their way, on a stream of their own.
    """
    B, T, J, K = indices.shape
    if 0 in (k.shape[1], q.numel()):
        return torch.zeros_like(q)
    chunk_bytes = 2 * k.element_size() * k.shape[2:].numel()
    block = max(FETCH_BYTES // (B * J * K * chunk_bytes), 1)
    blocks = [slice(start, start + block) for start in range(0, T, block)]
    main, side = (
        (torch.cuda.current_stream(), torch.cuda.Stream())
        if q.is_cuda and len(blocks) > 1
        else (None, None)
    )
    out = []
    fetched = _fetch(k, v, indices[:, blocks[0]])
    for tokens, following in zip(blocks, [*blocks[1:], None]):
        before = (
            main and main.record_event()
        )  # all attention but this block's: no more than two are held
        # B sequences of L tokens attend as one of B*L: whose chunks are whose, the places say
        fetched_k, fetched_v, places = (part[None] for part in fetched)
        rows = q[:, tokens].flatten(0, 1)[None]
        shares = weights[:, tokens].flatten(0, 1)[None]
        part = ops.chunk_attention(
            rows, fetched_k, fetched_v, places.flatten(1, 2), shares, scale=scale
        )
        out.append(part[0].unflatten(0, (B, -1)))
        if following is None:
            break
        with torch.cuda.stream(side) if side else nullcontext():
            if side:
                side.wait_event(before)
            fetched = _fetch(k, v, indices[:, following])
        if side:
            main.wait_stream(side)
            for tensor in fetched:
                tensor.record_stream(main)
    return torch.cat(out, dim=1)


def decode(retrieval_q, landmarks, q, k, v, *, chunk_size, top_k, offset, scale=None):
    """`ops.decode` with k and v in host memory: where its kernel runs, it reads the chosen chunks there by itself."""
    options = dict(chunk_size=chunk_size, top_k=top_k, offset=offset)
    if ops.in_kernel(q, k):
        return ops.decode(retrieval_q, landmarks, q, k, v, **options, scale=scale)
    return chunk_attention(q, k, v, *ops.retrieve(retrieval_q, landmarks, **options), scale=scale)


def _fetch(
    k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v [M, S, J, D] of the chunks that indices [B, L, J, K] name, each once, and the place of each among them."""
    room = (
        k.stride(0) // k.stride(1) if len(k) > 1 else 0
    )  # chunks from one sequence to the next, empty room included
    first = torch.arange(len(k), device=indices.device)[:, None, None, None] * room
    names = indices.clamp(min=0) + first
    if (
        indices.shape[1] == 1
    ):  # one token: fetching a chunk twice costs less than waiting for a GPU to say how many there are
        chosen = names.flatten()
        places = torch.arange(names.numel(), device=names.device).view_as(names)
    else:
        chosen, places = torch.unique(names, return_inverse=True)
    rows = (len(k) - 1) * room + k.shape[1]
    flat = (store.as_strided((rows, *store.shape[2:]), store.stride()[1:]) for store in (k, v))
    return *(ops.fetch(store, chosen) for store in flat), places.masked_fill(indices < 0, -1).int()
