"""The training loss: one mean per part of a batch (text, copy, answer), then their sum."""

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from hsa_mini.training.mixture import ANSWER, COPY, TEXT

Loss = tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]


def mixture_loss(
    logits: torch.Tensor,
    targets: torch.Tensor,
    parts: torch.Tensor,
    *,
    text_weight: float = 1.0,
    counts: torch.Tensor | None = None,
) -> Loss:
    """The loss of logits [B, T, V] for targets int64 [B, T] with parts int8 [B, T].

    Returns three things, scalars in float32:
    - the loss: text_weight * mean over text tokens + mean over copy tokens + mean over answer
      tokens;
    - these three means (0 for a part that the batch does not contain), without a gradient;
    - the share of answer tokens that the model predicts correctly.

    Each part has a mean of its own. So the seven digits of an answer weigh as much as a thousand
    tokens of plain text. counts: the numbers [3] that the sums of the parts are divided by, if the
    batch is one of several that make up a step (`part_counts` of the whole; None: of this batch).
    """
    return _sum_of_means(*_token_losses(logits, targets), parts, text_weight, counts)


def mixture_loss_in_pieces(
    head: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    parts: torch.Tensor,
    *,
    tokens: int,
    text_weight: float = 1.0,
    counts: torch.Tensor | None = None,
) -> Loss:
    """`mixture_loss` of the logits that `head` makes of hidden [B, T, C], for `tokens` tokens at a
    time.

    The logits of a whole batch are never held: the backward pass makes them again, piece by piece.
    """

    def of_piece(hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _token_losses(head(hidden), targets)

    pieces = zip(hidden.flatten(0, 1).split(tokens), targets.flatten().split(tokens))
    found = [
        checkpoint(of_piece, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in pieces
    ]
    losses, correct = (torch.cat(column) for column in zip(*found))
    return _sum_of_means(losses, correct, parts, text_weight, counts)


def part_counts(parts: torch.Tensor) -> torch.Tensor:
    """The numbers float32 [3] of text, copy and answer tokens among parts."""
    return torch.stack([(parts == part).float().sum() for part in (TEXT, COPY, ANSWER)])


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every token, and 1 where its most likely prediction is right: float32 [M]."""
    losses = cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    correct = (logits.detach().argmax(dim=-1).flatten() == targets.flatten()).float()
    return losses, correct


def _sum_of_means(
    losses: torch.Tensor,
    correct: torch.Tensor,
    parts: torch.Tensor,
    text_weight: float,
    counts: torch.Tensor | None,
) -> Loss:
    parts = parts.flatten()
    counts = (part_counts(parts) if counts is None else counts).clamp(min=1)
    masks = [(parts == part).float() for part in (TEXT, COPY, ANSWER)]
    means = [(losses * mask).sum() / count for mask, count in zip(masks, counts)]
    accuracy = (correct * masks[2]).sum() / counts[2]
    loss = text_weight * means[0] + means[1] + means[2]
    return loss, tuple(mean.detach() for mean in means), accuracy
