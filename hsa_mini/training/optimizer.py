"""The optimizer of a training run."""

import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.recipes import Recipe


def make_optimizer(model: HSAModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW. Weight decay acts on matrices only, not on norm gains or [CLS].

    The learning rate of each parameter group is a tensor [] on the model's device: `train_step`
    writes the rate of each step into it, and a CUDA graph reads it from there.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    device = matrices[0].device
    groups = [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr": torch.full((), recipe.learning_rate, device=device),
        }
        for parameters, decay in ((matrices, recipe.weight_decay), (vectors, 0.0))
    ]
    on_gpu = device.type == "cuda"
    return torch.optim.AdamW(groups, betas=recipe.betas, fused=on_gpu, capturable=on_gpu)
