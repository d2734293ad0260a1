"""Exact sliding-window attention, in quadratic time.

Dimensions: B batch, T tokens, P cached keys in front of the tokens, H query heads, J key/value
heads, G = H/J, D head dimension.
"""

import torch

from hsa_mini.reference.checks import check_sliding_window


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every token attends to the last `window` keys, its own included.

    q [B, T, H, D], k and v [B, P+T, J, D] with P cached keys in front -> [B, T, H, D] in q's dtype.
    document_starts: int [B, T], the index of the first key of each token's document (below 0 if it
    is no longer cached); no token attends to a key before it, and along a row it never falls.
    Computes in float32 (float64 for float64). Raises ValueError for wrong shapes, dtypes, devices
    or ranges.
    """
    check_sliding_window(q, k, v, window, document_starts)
    T, H, D = q.shape[1:]
    P = k.shape[1] - T
    J = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    own = torch.arange(T, device=q.device)[:, None] + P  # index of each token's own key
    key = torch.arange(P + T, device=q.device)
    seen = (key <= own) & (key > own - window)  # [T, P+T]
    if document_starts is not None:
        # [T, P+T] -> [B, 1, 1, T, P+T]
        seen = (seen & (key >= document_starts[..., None]))[:, None, None]
    q_grouped = q.to(dtype).unflatten(2, (J, H // J))  # [B, T, H, D] -> [B, T, J, G, D]
    scores = torch.einsum("btjgd,bpjd->bjgtp", q_grouped, k.to(dtype)) * D**-0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("bjgtp,bpjd->btjgd", weights, v.to(dtype)).flatten(2, 3).to(q.dtype)
