"""Attention inside each kept chunk, and the weighted sum of the results: Eq. (2), §2.2.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N
chunks, S chunk size, K kept.
"""

import torch

from hsa_mini.reference.checks import check_chunk_attention


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention over the tokens of each kept chunk alone, then the weighted sum. Eq. (2).

    q [B, T, H, D], k and v [B, N, S, J, D], indices [B, T, J, K] (-1: empty slot), weights [B, T,
    J, K] -> [B, T, H, D] in q's dtype. scale: D**-0.5 if None; the caller norms q and k. A token
    whose slots are all empty gets exactly 0. Computes in float32 (float64 for float64). Raises
    ValueError for wrong shapes, dtypes or devices.
    """
    check_chunk_attention(q, k, v, indices, weights)
    B = q.shape[0]
    H, D = q.shape[2:]
    N = k.shape[1]
    J = k.shape[3]
    if N == 0:
        return torch.zeros_like(q)
    dtype = torch.promote_types(q.dtype, torch.float32)
    kept = indices >= 0
    b = torch.arange(B, device=q.device)[:, None, None, None]
    j = torch.arange(J, device=q.device)[:, None]
    chunk = indices.clamp(min=0).long()
    if k.requires_grad or v.requires_grad:
        # Cast before the gather: the gather's backward pass would otherwise sum gradients in 16
        # bits.
        k = k.to(dtype)
        v = v.to(dtype)
    # [B, N, S, J, D] -> [B, T, J, K, S, D]: every token gets a copy of its chunks
    k_kept, v_kept = (x.transpose(2, 3)[b, chunk, j].to(dtype) for x in (k, v))
    q_grouped = q.to(dtype).unflatten(2, (J, H // J))  # [B, T, H, D] -> [B, T, J, G, D]

    scores = torch.einsum("btjgd,btjksd->btjgks", q_grouped, k_kept) * (
        D**-0.5 if scale is None else scale
    )
    out = torch.einsum("btjgks,btjksd->btjgkd", scores.softmax(dim=-1), v_kept)
    # An empty slot adds nothing, whatever chunk 0 holds.
    out = out.masked_fill(~kept[:, :, :, None, :, None], 0.0)
    return torch.einsum("btjgkd,btjk->btjgd", out, weights.to(dtype)).flatten(2, 3).to(q.dtype)
