"""What `torchrun` starts in tests/test_torchtitan.py: torchtitan trains a mixture of experts on the
CPU, which it does not do by itself, and every process then trains the same model plainly.

Prints one line of JSON on process 0: the losses of both, and the largest difference of a weight.
"""

import dataclasses
import json
import sys
import types

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from hsa_mini import PRESETS, HSAModel
from hsa_mini.model.moe import MoE

EXPERTS = dict(experts=4, experts_active=2, expert_width=16)
PRESETS["debug"] = dataclasses.replace(
    PRESETS["debug"], vocab_size=4096, exploration=False, **EXPERTS
)


def on_cpu() -> None:
    """Let torchtitan take the CPU for an accelerator."""
    barrier = dist.barrier
    dist.barrier = lambda group=None, **_: barrier(group)
    torch._utils._get_available_device_type = lambda: "cpu"
    properties = types.SimpleNamespace(total_memory=1 << 34)
    torch.cpu.get_device_name = lambda device: "cpu"
    torch.cpu.get_device_properties = lambda device: properties
    torch.cpu.memory_stats = lambda device: {}
    torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None


def whole(model) -> dict[str, torch.Tensor]:
    """A copy of the weights and biases of the model inside, with all shares put together."""
    weights = model.hsa.state_dict()
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).clone()
        for name, x in weights.items()
    }


def train(trainer) -> tuple[list[float], list[float], list]:
    """Train; returns the loss and the learning rate of every step, and all batches."""
    losses = []
    rates = []
    batches = []
    log = trainer.metrics_processor.log
    step = trainer.train_step
    generate = trainer.batch_generator

    def train_step(iterator) -> None:
        rates.append(trainer.optimizers.optimizers[0].param_groups[0]["lr"])
        step(iterator)

    def batch_generator(loader):
        for batch in generate(loader):
            batches.append((batch[0]["input"].clone(), batch[1].clone()))
            yield batch

    trainer.metrics_processor.log = lambda number, mean, *rest, **more: (
        losses.append(mean),
        log(number, mean, *rest, **more),
    )
    trainer.train_step = train_step
    trainer.batch_generator = batch_generator
    trainer.train()
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, batches)
    joined = [[torch.cat(part) for part in zip(*of_step)] for of_step in zip(*every)]
    return losses, rates, joined


def train_plainly(weights: dict, rates: list[float], batches: list) -> tuple[list[float], HSAModel]:
    model = HSAModel(PRESETS["debug"]).train()
    model.load_state_dict(weights)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer in layers:
        layer.count_tokens()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for rate, (ids, labels) in zip(rates, batches, strict=True):
        loss = cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        for layer in layers:
            layer.update_bias(1e-3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, model


if __name__ == "__main__":
    on_cpu()
    from torchtitan.config import ConfigManager

    trainer = ConfigManager().parse_args(sys.argv[1:]).build()
    model = trainer.model_parts[0]
    before = whole(model)
    losses, rates, batches = train(trainer)
    plain_losses, plain = train_plainly(before, rates, batches)
    after = whole(model)
    differences = [float((after[n] - x).abs().max()) for n, x in plain.state_dict().items()]
    moved = [float((after[n] - x).abs().max()) for n, x in before.items()]
    result = dict(losses=losses, plain_losses=plain_losses, rates=rates)
    if dist.get_rank() == 0:
        print(json.dumps(result | dict(difference=max(differences), moved=min(moved))))
    trainer.close()
