"""Sliding-window attention on a GPU: PyTorch's FlexAttention with a block mask computed directly.

PyTorch's own `create_block_mask` would evaluate the mask for every pair of tokens.

Dimensions: B batch, T tokens, P cached keys, H query heads, J key/value heads, D head dimension, Q
blocks of queries.
"""

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hsa_mini.reference.checks import check_sliding_window

BLOCK = 128  # tokens per side of a block of the mask


def block_mask(
    tokens: int,
    cached: int,
    window: int,
    device: torch.device,
    document_starts: torch.Tensor | None = None,
) -> BlockMask:
    """Which blocks of keys each block of queries sees in part, and which in full.

    Query i has the index `cached + i` among keys. document_starts [B, T]: the first key that each
    query may see; along a row they never fall.
    """

    def visible(b, h, i, j):
        near = (j <= i + cached) & (j > i + cached - window)
        return near if document_starts is None else near & (j >= document_starts[b, i])

    blocks = -(-tokens // BLOCK)
    first_query = torch.arange(blocks, device=device) * BLOCK + cached
    last_query = (first_query + BLOCK).clamp(max=cached + tokens) - 1
    first = (first_query - window + 1).clamp(min=0) // BLOCK
    last = last_query // BLOCK
    # In full: from the first block that the last query sees entirely, to the last block that the
    # first query sees entirely.
    first_full = (last_query - window + BLOCK).clamp(min=0) // BLOCK
    last_full = (first_query + 1) // BLOCK - 1
    j = torch.arange(-(-(cached + tokens) // BLOCK), device=device)
    seen = ((j >= first[:, None]) & (j <= last[:, None]))[None, None]
    full = ((j >= first_full[:, None]) & (j <= last_full[:, None]))[None, None]
    if document_starts is not None:
        # The first query of a block has the earliest start, the last query the latest.
        earliest, latest = (
            document_starts[:, query - cached][:, None, :, None]
            for query in (first_query, last_query)
        )
        seen = seen & ((j + 1) * BLOCK > earliest)
        full = full & (j * BLOCK >= latest)

    def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks a query block sees [B or 1, 1, Q]; all key blocks, visible ones
        first.
        """
        order = mask.int().argsort(dim=-1, descending=True, stable=True).int()
        return mask.sum(-1, dtype=torch.int32), order

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, cached + tokens),
    )


_window_mask = lru_cache(maxsize=64)(block_mask)  # documents differ from batch to batch


@lru_cache(maxsize=1)
def _compiled():
    # dynamic, because segments and their tails differ in length
    return torch.compile(flex_attention, dynamic=True)


def sliding_window_attention(q, k, v, *, window, document_starts=None):
    """`reference.sliding_window_attention`. The first call compiles, which takes some seconds."""
    check_sliding_window(q, k, v, window, document_starts)
    tokens = q.shape[1]
    cached = min(k.shape[1] - tokens, window - 1)
    dropped = k.shape[1] - tokens - cached  # keys that no query sees
    k, v = (x[:, dropped:] for x in (k, v))
    if document_starts is None:
        mask = _window_mask(tokens, cached, window, q.device)
    else:
        mask = block_mask(tokens, cached, window, q.device, document_starts - dropped)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    out = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
