"""The optimizer of a training run."""

import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.optimizers.muon import MuonAndAdamW
from hsa_mini.training.recipes import Recipe

# Not under Muon: a row of the embedding is a token's own, and a router and `recency` have few rows.
OUTSIDE_MUON = {"embedding", "head", "router", "recency"}


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
