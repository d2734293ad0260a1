"""Which experts a token asks, and the order in which all tokens are handed to them: a sigmoid router (DeepSeek-V3, §2.1.2).

Dimensions: M tokens, E experts, A experts active.
"""

import torch


def route(
    scores: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router's scores [M, E] -> chosen experts int64 [M, A] and their gates float32 [M, A], which sum to 1.

    `bias` [E] moves the choice alone, never the gates.
    """
    affinity = scores.float().sigmoid()
    chosen = (affinity + bias).topk(active, dim=-1).indices
    gates = affinity.gather(-1, chosen)
    return chosen, gates / gates.sum(dim=-1, keepdim=True)


def dispatch(
    scores: torch.Tensor, bias: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`route`, and the M*A rows that it makes, those of expert 0 first.

    -> ends int32 [E], the number of rows up to each expert's last; the token int64 [M*A] of each row; where the rows of each
    token are, int64 [M, A], and their gates float32 [M, A].
    """
    chosen, gates = route(scores, bias, active)
    experts, order = chosen.flatten().sort(stable=True)
    # not by counting, for which the host has to wait, and which no CUDA graph can hold
    ends = torch.searchsorted(
        experts, torch.arange(len(bias), device=bias.device), right=True, out_int32=True
    )
    return ends, order // active, order.argsort().unflatten(0, (-1, active)), gates
