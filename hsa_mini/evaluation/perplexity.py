"""Held-out perplexity by context: the same tokens are predicted again and again, with more of the text in front of them.

Text is read in a stream: memory grows with the chunks that are kept, and with nothing else.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hsa_mini.data.corpus import load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.prefill import prefill
from hsa_mini.tasks.sentences import EVALUATION

LENGTHS = tuple(1 << n for n in range(10, 21, 2))  # from a sequence in training, 1K, to 1M
TARGETS = (
    512  # so that the first of them has as many in front at a length of 1K, four windows of `mini`
)


@dataclass(frozen=True)
class Row:
    """The last `targets` tokens of each stretch of text, predicted by a model that has read `tokens` of it.

    loss: nats a target. losses: of each stretch, in the same order at every length.
    """

    tokens: int
    stretches: int
    targets: int
    loss: float
    perplexity: float
    losses: tuple[float, ...]
    seed: int


def measure(
    model: HSAModel,
    *,
    lengths: Iterable[int] = LENGTHS,
    stretches: int = 20,
    targets: int = TARGETS,
    seed: int = 1,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """A row for each length, the shortest first, over random places of the validation split, its documents end to end.

    The places depend on the seed and on the longest length, which is read from every one of them. No text is repeated:
    what is predicted would have been read. Raises ValueError for a length outside `targets` to the split's tokens - 1.
    """
    device = next(model.parameters()).device
    corpus = load_corpus("validation").tokens
    lengths = sorted(set(lengths))
    for tokens in lengths:
        if not targets <= tokens < len(corpus):
            raise ValueError(
                f"lengths: got {tokens}, accepted is {targets} to {len(corpus) - 1} (of the validation split)"
            )
    ends = np.random.default_rng((EVALUATION, seed)).integers(
        lengths[-1], len(corpus), stretches
    )  # the last target of each
    rows = []
    for tokens in lengths:
        losses = []
        with tqdm(
            total=tokens * stretches,
            desc=f"{tokens:,} tokens",
            unit=" tokens",
            unit_scale=True,
            mininterval=0.5,
        ) as bar:
            for end in ends:
                text = torch.from_numpy(corpus[end - tokens : end + 1].astype(np.int64)).to(device)
                losses.append(loss_of_last(model, text, targets, progress=bar.update))
        loss = sum(losses) / stretches
        rows.append(Row(tokens, stretches, targets, loss, math.exp(loss), tuple(losses), seed))
        if report:
            report(rows[-1])
    return rows


def loss_of_last(
    model: HSAModel, text: torch.Tensor, targets: int, progress: Callable[[int], None] | None = None
) -> float:
    """Mean loss, in nats, of the last `targets` tokens of text int64 [T + 1], each predicted from all in front of it."""
    logits = prefill(model, text[None, :-1], last=targets, progress=progress).logits[0]
    return cross_entropy(logits.double(), text[-targets:]).item()
