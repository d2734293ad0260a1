"""Ways to read the chosen chunks other than Eq. (2) of the paper, as functions of tensors.

Dimensions: B batch, T tokens, H query heads, J key/value heads, G = H/J, D head dimension,
N chunks, S chunk size, K kept.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def concatenated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """One softmax over all tokens of the kept chunks.

    NSA (arXiv 2502.11089) and MoBA (arXiv 2502.13189) read chunks in this way. It does not use the
    scores of the chunks, so retrieval gets no gradient. It needs a mask of size [B, J, T, N*S].

        q        [B, T, H, D]
        k, v     [B, N, S, J, D]
        indices  [B, T, J, K]    -1: no chunk
        returns  [B, T, H, D]    0 for a token without any chunk
    """
    H = q.shape[2]
    N, S, J = k.shape[1:4]
    if N == 0:
        return torch.zeros_like(q)
    kept = torch.zeros(*indices.shape[:3], N + 1, dtype=torch.bool, device=q.device)
    kept = kept.scatter_(3, indices.long() + 1, True)[..., 1:].transpose(1, 2)  # [B, J, T, N]
    blind = ~kept.any(-1, keepdim=True)
    # A softmax over nothing would be NaN, so a token without chunks attends to all; its result is
    # then set to 0.
    seen = (kept | blind).repeat_interleave(S, dim=-1)
    k = k.flatten(1, 2).transpose(1, 2).repeat_interleave(H // J, dim=1)  # [B, H, N*S, D]
    v = v.flatten(1, 2).transpose(1, 2).repeat_interleave(H // J, dim=1)
    if J > 1:
        seen = seen.repeat_interleave(H // J, dim=1)
        blind = blind.repeat_interleave(H // J, dim=1)
    out = scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=seen)  # [B, H, T, D]
    return out.masked_fill(blind, 0.0).transpose(1, 2)


def mean_query(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """The mean of the G query heads that share a key/value head: q [B, T, H, D] -> [B, T, J, D]."""
    return q.unflatten(2, (kv_heads, -1)).mean(dim=3)


def grouped_gates(
    query: torch.Tensor, landmarks: torch.Tensor, own: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights from one softmax over the token's own key and the landmarks of its chunks.

    This follows Landmark Attention (arXiv 2305.16300).

        query, own  [B, T, J, D]
        landmarks   [B, N, J, D]
        indices     [B, T, J, K]    -1: no chunk
        returns     [B, T, J, 1] for the token itself, [B, T, J, K] for its chunks (0: no chunk);
                    float32 (float64 for float64 queries)
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype)
    landmarks = landmarks.to(dtype)
    own = own.to(dtype)
    far = torch.einsum("btjd,bnjd->btjn", query, landmarks)
    near = (query * own).sum(-1, keepdim=True)
    scores = torch.cat((near, far), dim=-1) * query.shape[-1] ** -0.5  # [B, T, J, 1 + N]
    kept = scores.gather(-1, indices.long() + 1).masked_fill(indices < 0, float("-inf"))
    weights = torch.cat((scores[..., :1], kept), dim=-1).softmax(dim=-1)
    return weights[..., :1], weights[..., 1:]
