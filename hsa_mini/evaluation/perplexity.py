"""Held-out perplexity by context: the same tokens are predicted several times, each time after more
of the text.

The text is read in segments. Only the chunk memory grows with the length of the text.
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

LENGTHS = tuple(1 << n for n in range(10, 21, 2))  # from 1K, a training sequence, to 1M
# At the shortest length, 1K, even the first target has 512 tokens in front of it: four windows of
# `mini`.
TARGETS = 512


@dataclass(frozen=True)
class PerplexityRow:
    """The loss of the last `targets` tokens of several stretches of text, each `tokens` long.

    loss: nats per target, the mean over all stretches. losses: the loss of each stretch, in the
    same order at every length.
    """

    tokens: int
    stretches: int
    targets: int
    loss: float
    perplexity: float
    losses: tuple[float, ...]
    seed: int


def measure_perplexity(
    model: HSAModel,
    *,
    lengths: Iterable[int] = LENGTHS,
    stretches: int = 20,
    targets: int = TARGETS,
    seed: int = 1,
    finished: Iterable[PerplexityRow] = (),
    report: Callable[[PerplexityRow], None] | None = None,
) -> list[PerplexityRow]:
    """One row per length, the shortest first, for stretches that end at random places of the
    validation split.

    The documents of the split are read one after another. The places depend on the seed and on the
    longest length, because every stretch must have that many tokens in front of it. No text is
    repeated: otherwise the model would already have read what it must predict. `report` is called
    with each new row.
    finished: rows that the same call returned for some of the lengths; they are not measured again.
    Raises ValueError for a length below `targets` or not below the number of tokens of the split.
    """
    corpus = load_corpus("validation").tokens
    lengths = sorted(set(lengths))
    for tokens in lengths:
        if not targets <= tokens < len(corpus):
            raise ValueError(
                f"lengths: got {tokens}, accepted is {targets} to {len(corpus) - 1}"
                " (of the validation split)"
            )
    rng = np.random.default_rng((EVALUATION, seed))
    ends = rng.integers(lengths[-1], len(corpus), stretches)  # the last target of each stretch
    rows = {row.tokens: row for row in finished}
    for tokens in lengths:
        if tokens in rows:
            continue
        losses = _losses(model, corpus, ends, tokens, targets)
        loss = sum(losses) / stretches
        row = PerplexityRow(tokens, stretches, targets, loss, math.exp(loss), losses, seed)
        rows[tokens] = row
        if report:
            report(row)
    return [rows[tokens] for tokens in lengths]


def _losses(
    model: HSAModel, corpus: np.ndarray, ends: np.ndarray, tokens: int, targets: int
) -> tuple[float, ...]:
    """The loss of each stretch, read from `tokens` tokens before its last target."""
    device = next(model.parameters()).device
    losses = []
    with tqdm(
        total=tokens * len(ends),
        desc=f"{tokens:,} tokens",
        unit=" tokens",
        unit_scale=True,
        mininterval=0.5,
    ) as bar:
        for end in ends:
            text = torch.from_numpy(corpus[end - tokens : end + 1].astype(np.int64)).to(device)
            losses.append(loss_of_last(model, text, targets, progress=bar.update))
    return tuple(losses)


def loss_of_last(
    model: HSAModel,
    text: torch.Tensor,
    targets: int,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Mean loss, in nats, of the last `targets` tokens of text int64 [T + 1], each predicted from
    all tokens before it.
    """
    logits = prefill(model, text[None, :-1], last=targets, progress=progress).logits[0]
    return cross_entropy(logits.double(), text[-targets:]).item()
