"""Statistics of right answers: their share, its confidence interval, and sums by length."""

import math
from collections.abc import Sequence

from hsa_mini.evaluation.results import RetrievalRow


def wilson_interval(correct: float, samples: float, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of the share correct/samples (Wilson 1927); z = 1.96 makes it the
    95% interval.

    Without samples it is 0 to 1.
    """
    if samples == 0:
        return 0.0, 1.0
    share = correct / samples
    spread = z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / samples / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def by_length(rows: Sequence[RetrievalRow]) -> list[dict]:
    """One summary per length, the shortest first: the counts of all depths, the share right and its
    95% interval, in which the questions about one text may be alike.

    Keys: tokens, samples, correct, retrieved, whole, whole_correct (counts); texts (0: unknown, and
    the interval is that of independent questions); accuracy, low, high (shares from 0 to 1).
    """
    lengths = sorted({row.tokens for row in rows})
    return [_summary(tokens, [row for row in rows if row.tokens == tokens]) for tokens in lengths]


def _summary(tokens: int, rows: Sequence[RetrievalRow]) -> dict:
    samples = sum(row.samples for row in rows)
    correct = sum(row.correct for row in rows)
    texts = [sum(some) for some in zip(*(row.correct_by_text for row in rows), strict=True)]
    clusters = [(right, samples // len(texts)) for right in texts] or [(correct, samples)]
    low, high = cluster_interval(clusters)
    return {
        "tokens": tokens,
        "samples": samples,
        "correct": correct,
        "retrieved": sum(row.retrieved for row in rows),
        "whole": sum(row.whole for row in rows),
        "whole_correct": sum(row.whole_correct for row in rows),
        "texts": len(texts),
        "accuracy": correct / samples,
        "low": low,
        "high": high,
    }


def cluster_interval(clusters: Sequence[tuple[int, int]], z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share over clusters (correct, samples) whose samples may be alike,
    as the questions about one text are.

    It is that of samples / d independent ones. The design effect d, at least 1, is the variance of
    the share as estimated between clusters over its variance if all samples were independent. From
    equal shares nothing can be estimated: then d is 1.
    """
    correct = sum(some for some, _ in clusters)
    samples = sum(some for _, some in clusters)
    effect = 1.0
    if 0 < correct < samples and len(clusters) > 1:
        share = correct / samples
        between = sum((right - share * size) ** 2 for right, size in clusters)
        between *= len(clusters) / (len(clusters) - 1) / samples**2
        effect = max(between / (share * (1 - share) / samples), 1.0)
    return wilson_interval(correct / effect, samples / effect, z)
