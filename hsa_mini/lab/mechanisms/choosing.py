"""Choosing chunks by any score, as functions of tensors.

`ops.retrieve` scores a chunk by the product of a query and a landmark. The mechanisms here score in
other ways.

Dimensions: B batch, T tokens, J key/value heads, N chunks, S chunk size, K kept, D head dimension.
"""

import torch

from hsa_mini.reference.noise import gumbel_noise
from hsa_mini.reference.retrieval import newest_top_k, visible_chunks

HIDDEN = float("-inf")  # the score of a chunk that a token does not see
CHUNK_LOGITS = 1 << 28  # numbers that `log_masses` may hold at once


def visible(scores: torch.Tensor, position: int, chunk_size: int) -> torch.Tensor:
    """bool [T, 1..., N] for scores [B, T, ..., N] of tokens from `position` on: complete chunks."""
    T = scores.shape[1]
    positions = torch.arange(position, position + T, device=scores.device)
    seen = visible_chunks(positions, scores.shape[-1], chunk_size)
    return seen.view(T, *(1 for _ in scores.shape[2:-1]), -1)


@torch.no_grad()
def best_chunks(
    scores: torch.Tensor, top_k: int, position: int, gumbel_seed: int | torch.Tensor | None = None
) -> torch.Tensor:
    """The K = min(top_k, N) best chunks of every token: int64 [B, T, J, K], -1 for a hidden one.

    scores [B, T, J, N]. gumbel_seed: as in `ops.retrieve`.
    """
    B, T, J, N = scores.shape
    if gumbel_seed is not None:
        positions = torch.arange(position, position + T, device=scores.device).expand(B, -1)
        scores = scores + gumbel_noise(gumbel_seed, positions, J, N)
    return newest_top_k(scores, min(top_k, N))


def kept(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The scores [..., N] of the chunks `indices` [..., K]; those of empty slots are hidden."""
    return scores.gather(-1, indices.clamp(min=0)).masked_fill(indices < 0, HIDDEN)


def log_masses(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The logarithm of the attention that every chunk gets before it is normed.

    It is the logsumexp of a chunk's logits q.k / sqrt(D). q [B, T, H, D], k [B, N, S, J, D] ->
    [B, T, H, N]. The logits are held for a block of tokens at a time.
    """
    N, S, J, D = k.shape[1:]
    B, T, H = q.shape[:3]
    rows = k.permute(0, 3, 4, 1, 2).flatten(3)  # [B, N, S, J, D] -> [B, J, D, N*S]
    block = max(CHUNK_LOGITS // max(B * H * N * S, 1), 1)
    parts = [
        torch.einsum("btjgd,bjdl->btjgl", part.unflatten(2, (J, H // J)), rows)
        .mul(D**-0.5)
        .unflatten(-1, (N, S))
        .logsumexp(-1)
        for part in q.split(block, dim=1)
    ]
    return torch.cat(parts, dim=1).flatten(2, 3)
