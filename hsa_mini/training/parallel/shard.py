"""Weights, gradients and the optimizer's state in shares, one per process (FSDP2).

The weights of a block are gathered just before it computes, and its gradients are added up and cut
just after. Processes that read another part of the rows, of the sequences, or hold other experts
all count as readers of other data: each has a share of all weights but those of the experts, which
are shared among the processes that hold the same experts.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.parallel.experts import moe_layers
from hsa_mini.training.parallel.mesh import Mesh


def shard_weights(model: HSAModel, mesh: Mesh, dtype: str) -> None:
    """Cut all parameters of `model` into shares, block by block. Gradients are added, not averaged.

    dtype: "bfloat16" gathers and computes in bfloat16, and keeps weights and gradients in float32;
    "float32" computes in the dtype of the weights.
    """
    policy = MixedPrecisionPolicy()
    if dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    width = model.config.width

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Experts [E, ...] are cut along the width: there may be fewer experts than processes."""
        matrices = parameter.dim() == 3
        return Shard(1 + list(parameter.shape[1:]).index(width)) if matrices else None

    options = {"mp_policy": policy, "shard_placement_fn": placement}
    parts = [*model.lower, model.encoder, *model.upper]
    for part in parts:
        if mesh.sizes.ep > 1:
            for layer in moe_layers(part):
                fully_shard([layer.shared, layer.router], mesh=mesh.device_mesh, **options)
                fully_shard(layer, mesh=mesh.expert_mesh["replicas"], **options)
        fully_shard(part, mesh=mesh.device_mesh, **options)
    fully_shard(model, mesh=mesh.device_mesh, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    for part, following in pairwise(parts):
        # Experts make the host wait, so it does not run ahead far enough by itself.
        part.set_modules_to_forward_prefetch([following])


def weight_bytes(model: HSAModel, mesh: Mesh, dtype: str) -> int:
    """Bytes that a process sends for weights and gradients in one forward and backward pass.

    It sends its share of a block's weights to all others, once before each pass, and for the sum of
    the gradients as much as its share to each. What lies outside of blocks is gathered once.
    """
    sent = 0
    for name, parameter in model.named_parameters():
        shared_experts = parameter.device_mesh.ndim > 1  # pyright: ignore
        processes = mesh.sizes.processes // (mesh.sizes.ep if shared_experts else 1)
        share = parameter.to_local()  # pyright: ignore
        width = 2 if dtype == "bfloat16" else share.element_size()
        gathers = 2 if name.startswith(("lower.", "encoder.", "upper.")) else 1
        sent += share.numel() * (processes - 1) * (gathers * width + share.element_size())
    return sent
