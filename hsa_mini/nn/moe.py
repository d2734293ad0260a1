"""A mixture of experts: one shared expert, and A of E chosen by a sigmoid router for each token (DeepSeek-V3 style).

Dimensions: C width, E experts, A experts active, M = B*T tokens.
"""

import torch
from torch import nn
from torch.nn.functional import grouped_mm, silu

from .mlp import MLP


class MoE(nn.Module):
    """x [B, T, C] -> [B, T, C]. `bias` [E] moves the choice alone, never the gates: it balances the load."""

    def __init__(self, width: int, hidden: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.shared = MLP(width, hidden)
        self.router = nn.Linear(width, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts))
        self.up_and_gate = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)  # [M, C]
        chosen, gates = self.route(tokens)
        order = chosen.flatten().argsort(stable=True)  # [M*A], the tokens of expert 0 first
        ends = torch.bincount(chosen.flatten(), minlength=self.bias.numel()).cumsum(0).int()
        rows = tokens[order // self.active]
        up, gate = grouped_mm(rows, self.up_and_gate.to(rows.dtype), offs=ends).chunk(2, dim=-1)
        results = grouped_mm(up * silu(gate), self.down.to(rows.dtype), offs=ends)
        # gather back by the inverse order and sum: adding rows by index is slower on a GPU and not deterministic
        back = results[order.argsort()].unflatten(0, (-1, self.active))  # [M, A, C]
        mixed = torch.einsum("mac,ma->mc", back, gates.to(back.dtype))
        return self.shared(x) + mixed.reshape(x.shape)

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [M, C] -> chosen experts int64 [M, A] and their gates float32 [M, A], which sum to 1."""
        affinity = self.router(tokens).float().sigmoid()
        chosen = (affinity + self.bias).topk(self.active, dim=-1).indices
        gates = affinity.gather(-1, chosen)
        return chosen, gates / gates.sum(dim=-1, keepdim=True)
