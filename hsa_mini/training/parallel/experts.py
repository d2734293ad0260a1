"""Expert parallelism: each process of a group holds an equal share of the experts of every MoE
layer, and tokens travel to the experts that they chose, and back.

Dimensions: M tokens of this process, C width, E experts, A experts per token, P processes of the
group, n rows that this process receives.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from hsa_mini import ops
from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.moe import MoE
from hsa_mini.training.parallel.collectives import all_to_all
from hsa_mini.training.parallel.mesh import Mesh

EXPERT_WEIGHTS = ("up_and_gate", "down")


def moe_layers(model: nn.Module) -> list[MoE]:
    """All MoE layers, in order."""
    return [layer for layer in model.modules() if isinstance(layer, MoE)]


def share_experts(model: HSAModel, mesh: Mesh) -> None:
    """Keep only this process's experts in every MoE layer of `model`, which holds the same weights
    on every process. Does nothing if no two processes share experts.

    The weights become `DTensor`s, of whose first dimension [E] this process holds its share.
    """
    if mesh.sizes.ep == 1:
        return
    for layer in moe_layers(model):
        for name in EXPERT_WEIGHTS:
            own = getattr(layer, name).detach().chunk(mesh.sizes.ep)[mesh.ep].clone()
            shared = DTensor.from_local(own, mesh.expert_mesh["experts"], [Shard(0)])
            setattr(layer, name, nn.Parameter(shared))
        layer.run_experts = partial(_run_experts, layer, mesh.experts)  # pyright: ignore


def _run_experts(
    layer: MoE,
    group: dist.ProcessGroup,
    tokens: torch.Tensor,
    expert_offsets: torch.Tensor,
    token_indices: torch.Tensor,
    inverse_order: torch.Tensor,
    topk_scores: torch.Tensor,
) -> torch.Tensor:
    """`MoE.run_experts`, where the experts lie on all processes of `group`.

    The host waits for the device once, because it must know how many rows travel.
    """
    P = dist.get_world_size(group)
    ends = expert_offsets.long()
    counts = ends.diff(prepend=ends.new_zeros(1))  # [E]
    asked = torch.empty_like(counts)
    dist.all_to_all_single(asked, counts, group=group)
    asked = asked.view(P, -1)  # [P, E/P]: the rows of each process for each expert of this one
    sent, received = torch.stack((counts.view(P, -1).sum(1), asked.sum(1))).tolist()
    rows = all_to_all(tokens[token_indices], sent, received, group)  # [M*A, C] -> [n, C]
    # The rows of a process come by expert. [P, E/P] -> [n]: the expert of each row
    expert = torch.arange(asked.shape[1], device=asked.device).repeat(P)
    expert = expert.repeat_interleave(asked.flatten(), output_size=sum(received))
    order = expert.argsort(stable=True)
    done = ops.grouped_experts(
        rows,
        asked.sum(0).cumsum(0).int(),
        order,
        order.argsort()[:, None],
        rows.new_ones(len(rows), 1),
        *(getattr(layer, name).to_local().to(rows.dtype) for name in EXPERT_WEIGHTS),
    )
    back = all_to_all(done, received, sent, group)  # [n, C] -> [M*A, C]
    return torch.einsum("mac,ma->mc", back[inverse_order], topk_scores.to(back.dtype))
