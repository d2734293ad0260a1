"""One training step: forward, loss, backward, optimizer, chunk queue, router biases.

Nothing here synchronises with the CPU, so a whole step can be recorded as a CUDA graph.

Dimensions: B batch, T tokens; ids and parts have T+1 tokens (inputs and targets overlap).
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.core import Output
from hsa_mini.model.moe import MoE
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import mixture_loss
from hsa_mini.training.recipes import Recipe, Stage


class StepFigures(NamedTuple):
    """What one step measured: tensors [] on the device."""

    loss: torch.Tensor
    text: torch.Tensor  # mean loss of plain text, in nats per token
    copy: torch.Tensor  # mean loss of copied tokens
    answer: torch.Tensor  # mean loss of answer tokens
    answer_accuracy: torch.Tensor
    gradient_norm: torch.Tensor  # before clipping
    max_over_mean_load: torch.Tensor  # of the worst MoE layer; 1 for a model without MoE

    def numbers(self) -> dict[str, float]:
        """The figures as numbers, by name. This waits for the device."""
        return {name: float(value) for name, value in self._asdict().items()}


def train_step(
    model: HSAModel,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    stage: Stage,
    queue: ChunkQueue,
    ids: torch.Tensor,
    parts: torch.Tensor,
    rate: torch.Tensor,
    noise: torch.Tensor,
) -> StepFigures:
    """Train `model` on one batch of `stage`; returns the figures of the step, still on the device.

    ids int64 and parts int8 are [B, T+1]. The learning rate `rate` and the noise seed `noise` are
    tensors [].
    """
    for group in optimizer.param_groups:
        group["lr"].copy_(rate)
    output = forward_with_queue(
        model, stage, queue, ids[:, :-1], gumbel_noise=stage.gumbel_noise, gumbel_seed=noise
    )
    loss, (text, copy, answer), accuracy = mixture_loss(
        output.logits, ids[:, 1:], parts[:, 1:], text_weight=stage.text_weight
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if queue.size:
        fill_queue(queue, output)
    load = balance_experts(model, recipe.balance_rate, ids.device)
    return StepFigures(loss.detach(), text, copy, answer, accuracy, norm, load)


def forward_with_queue(
    model: HSAModel, stage: Stage, queue: ChunkQueue, ids: torch.Tensor, **options
) -> Output:
    """Forward pass over ids [B, T], with the queue if the stage uses one; bfloat16 on a GPU."""
    source = None
    if stage.queue_chunks is not None:
        source = partial(
            CrossBatchChunks, encoder=model.encoder, queue=queue, isolated=stage.isolated
        )
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(ids, chunk_source=source, **options)


def fill_queue(queue: ChunkQueue, output: Output) -> None:
    """Put the chunks of the first third of the batch into the queue.

    They are rows of every kind. A queue of plain text alone would never teach the model to tell a
    needle from thousands of other needles.
    """
    encoded = output.aux.encoded
    assert encoded is not None, "only a model in training mode returns the encoded chunks"
    B = len(encoded.k)
    queue.push(encoded, torch.arange(B // 3, device=encoded.k.device))


def balance_experts(model: HSAModel, rate: float, device: torch.device) -> torch.Tensor:
    """Update all router biases; returns the largest max-over-mean load [] (1 without MoE)."""
    loads = [
        layer.update_bias(rate).max_over_mean_load
        for layer in model.modules()
        if isinstance(layer, MoE)
    ]
    return torch.stack(loads).max() if loads else torch.ones((), device=device)


@torch.no_grad()
def max_over_mean_loads(
    model: HSAModel, stage: Stage, queue: ChunkQueue, batches: Iterable[torch.Tensor]
) -> list[float]:
    """The max-over-mean load of every MoE layer over all batches [B, T+1], without training.

    `model` must be fresh: it has counted no tokens yet.
    """
    for ids in batches:
        forward_with_queue(model, stage, queue, ids[:, :-1], gumbel_noise=False)
    return [
        round(layer.statistics().max_over_mean_load.item(), 3)
        for layer in model.modules()
        if isinstance(layer, MoE)
    ]


def noise_seed(seed: int, step: int) -> int:
    """The seed of the Gumbel noise at `step` of run `seed`, as a signed 64-bit integer."""
    return (seed << 32 | step) - (seed >> 31 << 64)
