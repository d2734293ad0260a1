"""Which chunks matter to each token, and how much: Eq. (1), §2.2.

Dimensions: B batch, T tokens, J retrieval heads, R retrieval dimension, N chunks, K chunks kept.
"""

import torch

from hsa_mini.reference.checks import check_retrieve
from hsa_mini.reference.noise import gumbel_noise


def retrieve(
    retrieval_q: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    chunk_size: int,
    top_k: int,
    offset: int | torch.Tensor = 0,
    weighting: str = "softmax",
    gumbel_seed: int | torch.Tensor | None = None,
    exclude_window: int = 0,
    query_block: int = 1,
    document_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `top_k` best visible chunks of every token and weigh them. Eq. (1).

    retrieval_q [B, T, J, R], landmarks [B, N, J, R] -> indices int32 [B, T, J, K] (-1: empty slot)
    and weights [B, T, J, K] (0 where empty; float64 for float64, else float32; with a gradient).

    offset: position of token 0, an int or an int tensor [B].
    weighting: "softmax" over the kept scores, or "stick_breaking" (slots are then ordered from the
    newest chunk to the oldest).
    gumbel_seed: seed of noise that is added for the choice alone; an int or an int64 tensor [].
    exclude_window: chunks that lie wholly inside this many last tokens are not visible.
    query_block: this many tokens share the choice and the weights of the first.
    document_starts: int [B, T], the position where each token's document begins; chunks that begin
    before it are not visible. Ties go to the newest chunk; NaN is the largest score. ValueError:
    wrong shapes, dtypes, devices or ranges.

    NOTE: differs from the paper because its condition `i <= floor(t/S)`, read with indices from 0,
    would show a token the chunk that holds its own future. Here chunk i is visible from token
    (i+1)*S on, when it is complete.
    """
    check_retrieve(
        retrieval_q, landmarks, chunk_size, top_k, offset, weighting, gumbel_seed, exclude_window,
        query_block, document_starts,
    )  # fmt: skip
    B, T, J, R = retrieval_q.shape
    N = landmarks.shape[1]
    dtype = torch.promote_types(retrieval_q.dtype, torch.float32)
    steps = torch.arange(0, T, query_block, device=retrieval_q.device)
    positions = shifted(steps, offset).expand(B, -1)
    chooser = retrieval_q[:, ::query_block].to(dtype)
    scores = torch.einsum("btjr,bnjr->btjn", chooser, landmarks.to(dtype)) / R**0.5
    starts = None if document_starts is None else document_starts[:, ::query_block]
    visible = visible_chunks(positions, N, chunk_size, exclude_window, starts)
    scores = scores.masked_fill(~visible[:, :, None], float("-inf"))
    with torch.no_grad():
        noise = None if gumbel_seed is None else gumbel_noise(gumbel_seed, positions, J, N)
        choice = scores if noise is None else scores + noise
        indices = newest_top_k(choice, min(top_k, N))
        if weighting == "stick_breaking":
            indices = indices.sort(dim=-1, descending=True).values
    weights = weigh(scores.gather(-1, indices.clamp(min=0)), indices < 0, weighting)
    indices = torch.nn.functional.pad(indices, (0, top_k - indices.shape[-1]), value=-1).int()
    weights = torch.nn.functional.pad(weights, (0, top_k - weights.shape[-1]))
    if query_block > 1:
        indices, weights = (
            x.repeat_interleave(query_block, dim=1)[:, :T] for x in (indices, weights)
        )
    return indices, weights


def shifted(steps: torch.Tensor, offset: int | torch.Tensor) -> torch.Tensor:
    """steps [T] plus an offset, an int or [B] -> positions [T] or [B, T]."""
    # An int offset stays an int: a tensor would have to be copied to the GPU, which waits for all
    # work in front of it.
    return steps + (offset.reshape(-1, 1) if isinstance(offset, torch.Tensor) else offset)


def visible_chunks(
    positions: torch.Tensor, chunks: int, chunk_size: int, exclude_window: int = 0,
    document_starts: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """positions [..., T] -> bool [..., T, N]: complete, outside of the window, in the document."""
    start = torch.arange(chunks, device=positions.device) * chunk_size
    complete = start + chunk_size <= positions[..., None]
    seen = complete & (start <= positions[..., None] - exclude_window)
    return seen if document_starts is None else seen & (start >= document_starts[..., None])


def newest_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Indices int64 [..., k] of the k largest, NaN first; ties go to the newest chunk; -1 for
    -inf.
    """
    chunks = scores.shape[-1]
    if k == 0:
        return scores.new_empty(*scores.shape[:-1], 0, dtype=torch.int64)
    # torch.topk does not define the order of ties, so it only finds the k-th value. Scores above
    # this value are kept first, then scores equal to it, from the newest chunk on.
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    index = torch.arange(chunks, device=scores.device)
    above = (scores > threshold) | scores.isnan()  # torch.topk, too, takes NaN as the largest
    rank = torch.where(above, index + chunks, torch.where(scores == threshold, index, -1))
    chosen = rank.topk(k, dim=-1).values % chunks
    return chosen.masked_fill(scores.gather(-1, chosen) == float("-inf"), -1)


def weigh(scores: torch.Tensor, empty: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weights of the kept scores along the last axis; 0 in `empty` slots."""
    kept = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
    return (
        torch.softmax(kept, dim=-1) if weighting == "softmax" else stick_breaking(kept)
    ).masked_fill(empty, 0.0)


def stick_breaking(scores: torch.Tensor) -> torch.Tensor:
    """exp(s_i - sum_{j<=i} softplus(s_j)): each weight takes a share of what is left."""
    return torch.exp(scores - torch.nn.functional.softplus(scores).cumsum(-1))
