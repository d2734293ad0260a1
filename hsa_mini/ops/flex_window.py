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


@lru_cache(maxsize=64)
def block_mask(tokens: int, cached: int, window: int, device: torch.device) -> BlockMask:
    """Which blocks of keys each block of queries sees in part, and which in full.

    Query i has the index `cached + i` among keys.
    """

    def visible(b, h, i, j):
        return (j <= i + cached) & (j > i + cached - window)

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
    seen = (j >= first[:, None]) & (j <= last[:, None])
    full = (j >= first_full[:, None]) & (j <= last_full[:, None])

    def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many key blocks a query block sees [1, 1, Q]; all key blocks, visible ones first."""
        order = mask.int().argsort(dim=-1, descending=True, stable=True).int()
        return mask.sum(-1, dtype=torch.int32)[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, cached + tokens),
    )


@lru_cache(maxsize=1)
def _compiled():
    # dynamic, because segments and their tails differ in length
    return torch.compile(flex_attention, dynamic=True)


def sliding_window_attention(q, k, v, *, window):
    """`reference.sliding_window_attention`. The first call compiles, which takes some seconds."""
    check_sliding_window(q, k, v, window)
    tokens = q.shape[1]
    cached = min(k.shape[1] - tokens, window - 1)
    k, v = (x[:, x.shape[1] - tokens - cached :] for x in (k, v))
    mask = block_mask(tokens, cached, window, q.device)
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    out = attend(
        *(x.transpose(1, 2) for x in (q, k, v)),
        block_mask=mask,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)
