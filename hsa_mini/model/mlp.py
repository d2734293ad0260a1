"""The gated feed-forward layer (SwiGLU, Shazeer, arXiv 2002.05202)."""

import torch
from torch import nn


class MLP(nn.Module):
    """x [..., C] -> [..., C] through `hidden` gated units."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_and_gate = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, gate = self.up_and_gate(x).chunk(2, dim=-1)
        return self.down(up * nn.functional.silu(gate))
