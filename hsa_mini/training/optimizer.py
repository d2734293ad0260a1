"""The optimizer of a training run, and the float32 weights behind a model in bfloat16."""

import torch
from torch import nn

from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.muon import MuonAndAdamW
from hsa_mini.training.recipes import Recipe

# Not under Muon: a row of the embedding is a token's own, and a router has few rows.
OUTSIDE_MUON = {"embedding", "head", "router"}


def make_optimizer(model: HSAModel, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, or Muon for the matrices of blocks if the recipe says so. Weight decay acts on
    matrices only, not on norm gains or [CLS].

    The learning rate of each parameter group is a tensor [] on the model's device. `train_step`
    writes the rate of each step into it, and a CUDA graph reads it from there.
    """
    named = dict(model.named_parameters())
    device = model.embedding.weight.device

    def rate() -> torch.Tensor:
        return torch.full((), recipe.learning_rate, device=device)

    muon = {
        name: p
        for name, p in named.items()
        if recipe.muon and p.dim() >= 2 and not OUTSIDE_MUON & {*name.split(".")}
    }
    others = [p for name, p in named.items() if name not in muon]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["lr"] = rate()
    on_gpu = device.type == "cuda"
    adamw = torch.optim.AdamW(groups, betas=recipe.betas, fused=on_gpu, capturable=on_gpu)
    if not muon:
        return adamw
    matrices = list(muon.values())
    options = {"scale": recipe.muon, "weight_decay": recipe.weight_decay}
    return MuonAndAdamW(matrices, adamw, lr=rate(), **options)


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
