"""statistics: TODO."""

import math

from hsa_mini.evaluation.results import Row


def wilson_interval(correct: int, samples: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a share (Wilson 1927)."""
    if samples == 0:
        return 0.0, 1.0
    share = correct / samples
    spread = z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / samples + spread / samples / 4)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def by_length(rows: list[Row]) -> list[dict]:
    """Rows of one length added up, the shortest first, with share and 95% interval."""
    table = []
    for tokens in sorted({row.tokens for row in rows}):
        same = [row for row in rows if row.tokens == tokens]
        samples, correct, retrieved = (
            sum(getattr(row, name) for row in same) for name in ("samples", "correct", "retrieved")
        )
        low, high = wilson_interval(correct, samples)
        entry = {"tokens": tokens, "samples": samples, "correct": correct, "retrieved": retrieved}
        table.append({**entry, "accuracy": correct / samples, "low": low, "high": high})
    return table
