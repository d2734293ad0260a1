"""The float32 weights behind a model in bfloat16."""

import torch
from torch import nn

from hsa_mini.hsa_model import HSAModel


class MasterWeights:
    """A model whose weights and gradients are bfloat16, and the float32 weights that the optimizer
    changes. bfloat16 alone would round most steps of the optimizer away.

    masters: the parameters of the given model. model: its copy in bfloat16, which shares the
    buffers (the router's bias).
    """

    def __init__(self, model: HSAModel) -> None:
        self.masters = list(model.parameters())
        self.model = type(model)(model.config, device="meta").train(model.training)
        copies = {p: nn.Parameter(p.detach().bfloat16()) for p in self.masters}
        state = model.state_dict(keep_vars=True)
        self.model.load_state_dict({n: copies.get(x, x) for n, x in state.items()}, assign=True)
        self._copies = list(copies.values())

    def take_gradients(self) -> None:
        """Add the gradients of the copy to those of the masters, in float32, and clear them."""
        for master, copy in zip(self.masters, self._copies):
            if copy.grad is not None:
                grad = copy.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                copy.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the copy."""
        for master, copy in zip(self.masters, self._copies):
            copy.copy_(master)
