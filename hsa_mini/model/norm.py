"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

import torch
from torch import nn


class RMSNorm(nn.RMSNorm):
    """x [..., size] -> [..., size] in x's dtype.

    Under autocast the gains are float32 and x may be bfloat16. torch's fused kernel takes only one
    dtype, so the gains are cast to that of x.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
