"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024,
with the learning rate of Liu et al., arXiv 2502.16982).

An update of AdamW is dominated by few directions. Muon's moves a matrix in all directions alike, so
that what is rare in a batch is learned as quickly as what is frequent.
"""

from collections import defaultdict

import torch
from torch import nn

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5 in an iteration
ITERATIONS = 5


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for `matrices`, each [..., rows, columns], and `adamw` for its own parameters.

    lr: a tensor []. The updates of matrices are `scale` times as large as AdamW's are at this rate.
    `torch.optim.Muon` takes no stacked matrices of experts, and it reads the learning rate on the
    CPU, which a CUDA graph cannot.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: torch.Tensor,
        scale: float,
        weight_decay: float,
    ) -> None:
        group = {"params": matrices, "lr": lr, "scale": scale, "weight_decay": weight_decay}
        super().__init__([group], {})
        self.adamw = adamw
        self.param_groups += adamw.param_groups
        adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.adamw.__setstate__({"state": self.state, "param_groups": self.param_groups[1:]})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Change every parameter that has a gradient."""
        group = self.param_groups[0]
        by_shape = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape[matrix.shape].append(matrix)
        for matrices in by_shape.values():
            ahead = torch.stack([self._ahead(matrix) for matrix in matrices])
            size = group["scale"] * 0.2 * max(ahead.shape[-2:]) ** 0.5
            updates = orthogonal(ahead).to(ahead.dtype) * (group["lr"] * size)
            kept = 1 - group["lr"] * group["weight_decay"]
            for matrix, update in zip(matrices, updates):
                matrix.mul_(kept).sub_(update)
        self.adamw.step()

    def _ahead(self, matrix: nn.Parameter) -> torch.Tensor:
        """The gradient of a matrix, mixed with its momentum, which is brought up to date."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        assert matrix.grad is not None
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)  # as Nesterov: one step further


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Matrices [..., M, N] -> bfloat16 [..., M, N] with nearly the same singular vectors, and
    singular values of about 0.7 to 1.2 (Newton-Schulz iteration).
    """
    a, b, c = COEFFICIENTS
    shape = x.shape
    x = x.bfloat16().flatten(0, -3)
    tall = shape[-2] > shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(shape)
