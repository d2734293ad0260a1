"""A mixture of experts: one shared expert, and A of E routed experts that a sigmoid router chooses
(DeepSeek-V3 style).

Dimensions: C width, E experts, A experts per token, M = B*T tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hsa_mini import ops
from hsa_mini.model.mlp import MLP


@dataclass(frozen=True)
class RouterStatistics:
    """How the router of a layer has distributed tokens since the last `update_bias`.

    load float32 [E]: the share of the tokens that each expert received, 1/E if balanced; bias
    float32 [E]: the bias of the router.
    """

    load: torch.Tensor
    bias: torch.Tensor

    @property
    def max_over_mean_load(self) -> torch.Tensor:
        """The largest load over the mean load: 1 if balanced, E if one expert receives every token;
        NaN before any token.
        """
        return self.load.max() * self.load.numel()

    @property
    def entropy(self) -> torch.Tensor:
        """The entropy of the load in nats; log(E) if balanced."""
        return -torch.xlogy(self.load, self.load).sum()


class MoE(nn.Module):
    """x [B, T, C] -> [B, T, C].

    bias float32 [E] affects only which experts are chosen, never their gates. `update_bias` changes
    it to balance the load. It stays float32 whatever the dtype of the weights, because bfloat16
    would round its small steps away.
    tokens_per_expert int64 [E]: tokens that each expert has received in training since the last
    `update_bias`; None as long as `count_tokens` was not called.
    """

    bias: torch.Tensor

    def __init__(self, width: int, hidden: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.shared = MLP(width, hidden)
        self.router = nn.Linear(width, experts, bias=False)
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.tokens_per_expert: torch.Tensor | None = None
        self.up_and_gate = nn.Parameter(torch.empty(experts, width, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def _apply(self, fn, recurse=True):
        """Every change of device or dtype (`to`, `half`, `bfloat16`, ...): the bias takes part in
        that of the device alone.
        """
        bias = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared(x)
        tokens = x.flatten(0, -2)  # [B, T, C] -> [M, C]
        choice = ops.dispatch(self.router(tokens), self.bias, self.top_k)
        if self.training and self.tokens_per_expert is not None:
            ends = choice[0].long()
            self.tokens_per_expert += ends.diff(prepend=ends.new_zeros(1))
        # Autocast casts linear maps, but not grouped ones.
        return shared + self.run_experts(tokens.to(shared.dtype), *choice).reshape(x.shape)

    def run_experts(
        self,
        tokens: torch.Tensor,
        expert_offsets: torch.Tensor,
        token_indices: torch.Tensor,
        inverse_order: torch.Tensor,
        topk_scores: torch.Tensor,
    ) -> torch.Tensor:
        """tokens [M, C] and the results of `ops.dispatch` for them -> [M, C]."""
        return ops.grouped_experts(
            tokens,
            expert_offsets,
            token_indices,
            inverse_order,
            topk_scores,
            self.up_and_gate.to(tokens.dtype),
            self.down.to(tokens.dtype),
        )

    def count_tokens(self) -> None:
        """Start to count the tokens of every expert, from 0."""
        self.tokens_per_expert = torch.zeros_like(self.bias, dtype=torch.int64)

    def statistics(self) -> RouterStatistics:
        """The counts so far as shares, and a copy of the bias."""
        counts = self.tokens_per_expert
        if counts is None:
            counts = torch.zeros_like(self.bias)
        return RouterStatistics(counts / counts.sum(), self.bias.float().clone())

    @torch.no_grad()
    def update_bias(self, rate: float) -> RouterStatistics:
        """Move `bias` by `rate` towards the experts whose load is below the mean, and count from 0
        again.

        No auxiliary loss is needed (DeepSeek-V3, §2.1.2). Returns what was counted. Raises
        ValueError if `count_tokens` was not called.
        """
        if self.tokens_per_expert is None:
            raise ValueError(
                "tokens_per_expert: got None, accepted is a layer that counts (`count_tokens`)"
            )
        found = self.statistics()
        # The mean load is 1/E. Before any token the load is NaN, and nothing moves.
        self.bias += rate * torch.sign(1 / len(self.bias) - found.load).nan_to_num(0.0)
        self.tokens_per_expert.zero_()
        return found
