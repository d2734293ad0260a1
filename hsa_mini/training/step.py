"""One training step: forward, loss, backward, optimizer, chunk queue, router biases.

Nothing here synchronises with the CPU, so a whole step can be recorded as a CUDA graph.

Dimensions: B batch, T tokens; ids and parts have T+1 tokens (inputs and targets overlap).
"""

from collections.abc import Iterable
from functools import partial
from itertools import repeat
from typing import NamedTuple

import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.core import Output
from hsa_mini.model.moe import MoE
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.loss import Loss, mixture_loss, mixture_loss_in_pieces, part_counts
from hsa_mini.training.optimizers.master_weights import MasterWeights
from hsa_mini.training.parallel.ranks import ONE_PROCESS, OneProcess
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
    document_starts: torch.Tensor | None = None,
    *,
    master: MasterWeights | None = None,
    ranks: OneProcess = ONE_PROCESS,
) -> StepFigures:
    """Train `model` on one batch of `stage`; returns the figures of the step, still on the device.

    ids int64, parts int8 and document_starts, if rows hold several documents, are [B, T+1]. The
    part of a document's first token is NONE: no other document predicts it. The batch is read in
    `recipe.accumulate` parts of equal size, whose gradients are added. The learning rate `rate` and
    the noise seed `noise` of the first part are tensors []. master: the weights that `optimizer`
    changes, if they are not those of `model`. ranks: the processes of which each trains on a part
    of the batch.
    """
    for group in optimizer.param_groups:
        group["lr"].copy_(rate)
    counts = ranks.total(part_counts(parts[:, 1:]))
    starts = repeat(None) if document_starts is None else document_starts.chunk(recipe.accumulate)
    sums: list[torch.Tensor] = []
    micro_batches = zip(ids.chunk(recipe.accumulate), parts.chunk(recipe.accumulate), starts)
    for i, (some_ids, some_parts, some_starts) in enumerate(micro_batches):
        options = {"gumbel_noise": stage.gumbel_noise, "gumbel_seed": noise + i}
        output, (loss, means, accuracy) = forward_and_loss(
            model, recipe, stage, queue, some_ids, some_parts, some_starts, counts, **options
        )
        loss.backward()
        if master is not None:
            master.take_gradients()
        if queue.size:
            fill_queue(queue, output)
        found = (loss.detach(), *means, accuracy)
        sums = [a + b for a, b in zip(sums, found)] if sums else list(found)
    trained = model.parameters() if master is None else master.masters
    norm = ranks.clip_gradients(trained, recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if master is not None:
        master.write_back()
    load = balance_experts(model, recipe.balance_rate, ids.device, ranks)
    return StepFigures._make((*ranks.total(torch.stack(sums)), norm, load))


def forward_and_loss(
    model: HSAModel,
    recipe: Recipe,
    stage: Stage,
    queue: ChunkQueue,
    ids: torch.Tensor,
    parts: torch.Tensor,
    document_starts: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    **options,
) -> tuple[Output, Loss]:
    """The output for ids [B, T+1] without the last token, and the loss of the tokens that follow.

    counts: see `mixture_loss`. options: those of the model's forward pass.
    """
    if document_starts is not None:
        options["document_starts"] = document_starts[:, :-1]
    pieces = recipe.loss_tokens
    output = forward_with_queue(model, stage, queue, ids[:, :-1], with_logits=not pieces, **options)
    targets = ids[:, 1:]
    parts = parts[:, 1:]
    weights = {"text_weight": stage.text_weight, "counts": counts}
    if not pieces:
        return output, mixture_loss(output.logits, targets, parts, **weights)

    def head(hidden: torch.Tensor) -> torch.Tensor:
        with autocast(ids.device):
            return model.logits(hidden)

    hidden = output.logits
    return output, mixture_loss_in_pieces(head, hidden, targets, parts, tokens=pieces, **weights)


def forward_with_queue(
    model: HSAModel, stage: Stage, queue: ChunkQueue, ids: torch.Tensor, **options
) -> Output:
    """Forward pass over ids [B, T], with the queue if the stage uses one; bfloat16 on a GPU."""
    source = None
    if stage.queue_chunks is not None:
        source = partial(
            CrossBatchChunks, encoder=model.encoder, queue=queue, isolated=stage.isolated
        )
    with autocast(ids.device):
        return model(ids, chunk_source=source, **options)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; nothing elsewhere."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def fill_queue(queue: ChunkQueue, output: Output) -> None:
    """Put the chunks of the first third of the batch into the queue.

    They are rows of every kind. A queue of plain text alone would never teach the model to tell a
    needle from thousands of other needles.
    """
    encoded = output.aux.encoded
    assert encoded is not None, "only a model in training mode returns the encoded chunks"
    B = len(encoded.k)
    queue.push(encoded, torch.arange(B // 3, device=encoded.k.device))


def balance_experts(
    model: HSAModel, rate: float, device: torch.device, ranks: OneProcess = ONE_PROCESS
) -> torch.Tensor:
    """Update all router biases by the tokens of all processes; returns the largest max-over-mean
    load [] (1 without MoE).
    """
    layers = _counted_layers(model, ranks)
    loads = [layer.update_bias(rate).max_over_mean_load for layer in layers]
    return torch.stack(loads).max() if loads else torch.ones((), device=device)


@torch.no_grad()
def max_over_mean_loads(
    model: HSAModel,
    stage: Stage,
    queue: ChunkQueue,
    batches: Iterable[tuple[torch.Tensor, ...]],
    ranks: OneProcess = ONE_PROCESS,
) -> list[float]:
    """The max-over-mean load of every MoE layer over all batches (ids, parts) or (ids, parts,
    document_starts), without training.

    `model` must be fresh: it has counted no tokens yet.
    """
    for ids, _, *starts in batches:
        options = {"document_starts": starts[0][:, :-1]} if starts else {}
        forward_with_queue(model, stage, queue, ids[:, :-1], gumbel_noise=False, **options)
    return [
        round(layer.statistics().max_over_mean_load.item(), 3)
        for layer in _counted_layers(model, ranks)
    ]


def _counted_layers(model: HSAModel, ranks: OneProcess) -> list[MoE]:
    """All MoE layers. They have now counted the tokens of all processes."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    for layer in layers:
        if layer.tokens_per_expert is not None:
            ranks.total(layer.tokens_per_expert)
    return layers


def noise_seed(seed: int, step: int) -> int:
    """The seed of the Gumbel noise at `step` of run `seed`, as a signed 64-bit integer."""
    return (seed << 32 | step) - (seed >> 31 << 64)
