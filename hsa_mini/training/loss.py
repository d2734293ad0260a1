"""The training loss: one mean per part of a batch (text, copy, answer), then their sum."""

import torch
from torch.nn.functional import cross_entropy

from hsa_mini.training.mixture import ANSWER, COPY, TEXT


def mixture_loss(
    logits: torch.Tensor, targets: torch.Tensor, parts: torch.Tensor, *, text_weight: float = 1.0
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """The loss of logits [B, T, V] for targets int64 [B, T] with parts int8 [B, T].

    Returns three things, scalars in float32:
    - the loss: text_weight * mean over text tokens + mean over copy tokens + mean over answer
      tokens;
    - these three means (0 for a part that the batch does not contain), without a gradient;
    - the share of answer tokens that the model predicts correctly.

    Each part has a mean of its own. So the seven digits of an answer weigh as much as a thousand
    tokens of plain text.
    """
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    parts = parts.flatten()
    masks = [(parts == part).float() for part in (TEXT, COPY, ANSWER)]
    means = [(losses * mask).sum() / mask.sum().clamp(min=1) for mask in masks]
    correct = (logits.detach().argmax(dim=-1).flatten() == targets.flatten()).float()
    accuracy = (correct * masks[2]).sum() / masks[2].sum().clamp(min=1)
    loss = text_weight * means[0] + means[1] + means[2]
    return loss, tuple(mean.detach() for mean in means), accuracy
