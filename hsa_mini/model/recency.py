"""Of several chunks that match, the newer one: a text may change what it said before.

HSA knows no positions, so chunks with equal scores have equal weights. No equation of the paper
tells them apart.
"""

import torch

START = 3.5  # the strength in a fresh model; training moves it little


def prefer_newer(
    indices: torch.Tensor, weights: torch.Tensor, strength: torch.Tensor
) -> torch.Tensor:
    """Weights float32 [B, T, J, K] of the chosen chunks, changed by their order in the text.

    A chunk's score falls by `strength` [B, T, J], times the weight of all newer chosen chunks. So
    nothing changes for a chunk that is chosen alone or whose newer ones hardly count, however many
    they are. strength 0: the weights as they are; negative: older chunks are preferred.
    indices int32 [B, T, J, K]: -1 in empty slots, whose weight is 0 and stays 0.
    """
    order = indices.argsort(dim=-1, descending=True)
    sorted_weights = weights.gather(-1, order)
    newer = torch.zeros_like(weights).scatter(-1, order, sorted_weights.cumsum(-1) - sorted_weights)
    change = -strength.to(weights.dtype)[..., None] * newer
    changed = weights * torch.exp(change - change.amax(dim=-1, keepdim=True))
    return changed / changed.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
