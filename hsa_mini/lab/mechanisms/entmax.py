"""alpha-entmax for alpha = 1.5 (Peters, Niculae and Martins 2019, arXiv 1905.05702): like softmax,
but small scores get a weight of exactly 0.

The weights are max(z/2 - tau, 0)^2, where tau makes their sum 1.
"""

import torch


def entmax15(scores: torch.Tensor) -> torch.Tensor:
    """Weights along the last axis, [..., N] -> [..., N]; -inf gets 0, a row of only -inf gets 0."""
    weights: torch.Tensor = _Entmax15.apply(scores)
    return weights


class _Entmax15(torch.autograd.Function):
    """The gradient of autograd itself would be NaN: the threshold contains a square root that is 0
    for scores outside of the support.
    """

    @staticmethod
    def forward(ctx, scores):
        if not scores.shape[-1]:
            ctx.save_for_backward(scores)
            return scores.clone()
        z = scores / 2
        z = z - z.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        # With fewer than -1 a score is outside of the support, because the largest is 0.
        ordered = z.clamp(min=-2).sort(dim=-1, descending=True).values
        count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        mean = ordered.cumsum(-1) / count
        spread = ordered.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
        size = (tau <= ordered).sum(-1, keepdim=True)  # of the support
        root = (z - tau.gather(-1, size - 1)).clamp(min=0)
        ctx.save_for_backward(root)
        return root.square()

    @staticmethod
    def backward(ctx, gradient):
        (root,) = ctx.saved_tensors  # the square root of the weights
        product = gradient * root
        total = root.sum(-1, keepdim=True).clamp(min=torch.finfo(root.dtype).tiny)
        return product - root * product.sum(-1, keepdim=True) / total
