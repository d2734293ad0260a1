"""Other ways to read the chunks that were chosen than Eq. (2), as functions of tensors.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension, N chunks, S chunk size, K kept.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def concatenated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """One softmax over all tokens of the kept chunks, as NSA (arXiv 2502.11089) and MoBA (arXiv 2502.13189) read them.

    q [B, T, H, D], k and v [B, N, S, J, D], indices [B, T, J, K] (-1: empty slot) -> [B, T, H, D]; 0 where all slots are
    empty. Scores of chunks are no part of it, so what chose them gets no gradient. Holds a mask [B, J, T, N*S].
    """
    H = q.shape[2]
    N, S, J = k.shape[1:4]
    if N == 0:
        return torch.zeros_like(q)
    kept = torch.zeros(*indices.shape[:3], N + 1, dtype=torch.bool, device=q.device)
    kept = kept.scatter_(3, indices.long() + 1, True)[..., 1:].transpose(1, 2)  # [B, J, T, N]
    blind = ~kept.any(-1, keepdim=True)
    seen = (kept | blind).repeat_interleave(
        S, dim=-1
    )  # a softmax over nothing would be NaN: what a blind token sees is dropped
    rows = (
        x.flatten(1, 2).transpose(1, 2).repeat_interleave(H // J, dim=1) for x in (k, v)
    )  # [B, H, N*S, D]
    if J > 1:
        seen, blind = (x.repeat_interleave(H // J, dim=1) for x in (seen, blind))
    return (
        scaled_dot_product_attention(q.transpose(1, 2), *rows, attn_mask=seen)
        .masked_fill(blind, 0.0)
        .transpose(1, 2)
    )


def mean_query(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean of the G query heads that share a key/value head: q [B, T, H, D] -> [B, T, J, D]."""
    return q.unflatten(2, (kv_heads, -1)).mean(dim=3)


def grouped_gates(
    query: torch.Tensor, landmarks: torch.Tensor, own: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax in which the landmarks of the kept chunks compete with a token's own key (Landmark Attention, arXiv 2305.16300).

    query and own [B, T, J, D], landmarks [B, N, J, D], indices [B, T, J, K] -> gates of the token itself [B, T, J, 1] and of
    the chunks [B, T, J, K], 0 where a slot is empty; float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, landmarks, own = (x.to(wide) for x in (query, landmarks, own))
    far = torch.einsum("btjd,bnjd->btjn", query, landmarks)
    scores = torch.cat(((query * own).sum(-1, keepdim=True), far), dim=-1) * query.shape[-1] ** -0.5
    kept = scores.gather(-1, indices.long() + 1).masked_fill(indices < 0, float("-inf"))
    gates = torch.cat((scores[..., :1], kept), dim=-1).softmax(dim=-1)
    return gates[..., :1], gates[..., 1:]
