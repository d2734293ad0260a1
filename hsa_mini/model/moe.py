"""A mixture of experts: one shared expert, and A of E chosen by a sigmoid router for each token (DeepSeek-V3 style).

Dimensions: C width, E experts, A experts active, M = B*T tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.model.mlp import MLP


@dataclass(frozen=True)
class RouterStatistics:
    """How the router of a layer has spread tokens since the last `balance`.

    load float32 [E]: the share of each expert, 1/E if all are asked alike; bias float32 [E]: how far it has drifted from 0.
    """

    load: torch.Tensor
    bias: torch.Tensor

    @property
    def imbalance(self) -> torch.Tensor:
        """The largest load over the mean: 1 if all experts are asked alike, E if one alone is. NaN before any token."""
        return self.load.max() * self.load.numel()

    @property
    def entropy(self) -> torch.Tensor:
        """Of the load, in nats; log(E) if all experts are asked alike."""
        return -torch.xlogy(self.load, self.load).sum()


class MoE(nn.Module):
    """x [B, T, C] -> [B, T, C]. `bias` [E] moves the choice alone, never the gates: `balance` evens the load with it.

    In training `asked` int64 [E] counts the tokens of every expert since the last `balance`, None before any.
    """

    def __init__(self, width: int, hidden: int, experts: int, active: int) -> None:
        super().__init__()
        self.active = active
        self.shared = MLP(width, hidden)
        self.router = nn.Linear(width, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts))
        self.asked: torch.Tensor | None = None
        self.up_and_gate = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        # [M, C]; autocast knows linear maps, but no grouped ones
        tokens = x.flatten(0, -2)
        dtype = shared.dtype
        choice = ops.dispatch(self.router(tokens), self.bias, self.active)
        if self.training:
            ends = choice[0]
            counts = ends.long().diff(prepend=ends.new_zeros(1))
            self.asked = counts if self.asked is None else self.asked + counts
        weights = self.up_and_gate.to(dtype), self.down.to(dtype)
        return shared + ops.grouped_experts(tokens.to(dtype), *choice, *weights).reshape(x.shape)

    def statistics(self) -> RouterStatistics:
        asked = torch.zeros_like(self.bias) if self.asked is None else self.asked
        return RouterStatistics(asked / asked.sum(), self.bias.float().clone())

    @torch.no_grad()
    def balance(self, rate: float) -> RouterStatistics:
        """Move `bias` by `rate` towards experts that were asked less than the mean, and count anew. No loss term is needed
        (DeepSeek-V3, §2.1.2). Returns what was counted."""
        found = self.statistics()
        # 1/E is the mean of the load; NaN, before any token, moves nothing
        self.bias += rate * torch.sign(1 / len(self.bias) - found.load).nan_to_num(0.0)
        self.asked = None
        return found
