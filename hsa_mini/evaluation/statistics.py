"""Statistics of right answers: their share, its confidence interval, and sums by length."""

import math
from collections.abc import Sequence

from hsa_mini.evaluation.results import RetrievalRow


def wilson_interval(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
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
    95% interval.

    Keys: tokens, samples, correct, retrieved (counts); accuracy, low, high (shares from 0 to 1).
    """
    lengths = sorted({row.tokens for row in rows})
    return [_summary(tokens, [row for row in rows if row.tokens == tokens]) for tokens in lengths]


def _summary(tokens: int, rows: Sequence[RetrievalRow]) -> dict:
    samples = sum(row.samples for row in rows)
    correct = sum(row.correct for row in rows)
    low, high = wilson_interval(correct, samples)
    return {
        "tokens": tokens,
        "samples": samples,
        "correct": correct,
        "retrieved": sum(row.retrieved for row in rows),
        "accuracy": correct / samples,
        "low": low,
        "high": high,
    }
