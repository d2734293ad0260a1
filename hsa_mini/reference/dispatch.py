"""A sigmoid router: the experts of each token, and all rows sorted by expert (DeepSeek-V3, §2.1.2).

Dimensions: M tokens, E experts, A = top_k experts chosen per token.
"""

import torch


def route(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of every token.

    The router's scores [M, E] -> chosen experts int64 [M, A] and their scores float32 [M, A], which
    sum to 1. `bias` [E] shifts the choice alone, never the scores.
    """
    affinity = scores.float().sigmoid()
    chosen = (affinity + bias).topk(top_k, dim=-1).indices
    topk_scores = affinity.gather(-1, chosen)
    return chosen, topk_scores / topk_scores.sum(dim=-1, keepdim=True)


def dispatch(
    scores: torch.Tensor, bias: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route`, then the M*A (token, expert) rows sorted by expert, then by token.

    scores [M, E], bias [E] -> expert_offsets int32 [E]: where each expert's rows end; token_indices
    int64 [M*A]: the token of each row; inverse_order int64 [M, A]: the row of each token's choices;
    topk_scores float32 [M, A].
    """
    chosen, topk_scores = route(scores, bias, top_k)
    experts, order = chosen.flatten().sort(stable=True)
    # By search, not by counting: a count would have to reach the CPU first, which no CUDA graph
    # allows.
    expert_offsets = torch.searchsorted(
        experts, torch.arange(len(bias), device=bias.device), right=True, out_int32=True
    )
    inverse_order = order.argsort().unflatten(0, (-1, top_k))
    return expert_offsets, order // top_k, inverse_order, topk_scores
