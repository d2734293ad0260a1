"""A formula for the capacity of landmarks, fitted to the measured answers.

    logit(share of right answers) = a + b_n ln n + b_S ln S + b_R ln R + b_K ln K + b_M ln M

n is the mean number of needles in a chunk. The coefficients maximise the likelihood of the answers
(logistic regression). Solved for n, the law says how many needles a chunk may hold:

    n(p) = exp((logit p - a - b_S ln S - b_R ln R - b_K ln K - b_M ln M) / b_n)

Dimensions: S chunk size, R retrieval dimension, K chunks kept, M landmarks of a chunk.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hsa_mini.lab.records import current

NAMES = ("a", "n", "S", "R", "K", "M")
RIDGE = 1e-3  # keeps coefficients finite where every answer is right
ROUNDS = 50  # of Newton's method


@dataclass(frozen=True)
class Point:
    """One row of one model: how many answers were right under these sizes."""

    n: float
    S: int
    R: int
    K: int
    M: int
    correct: int
    samples: int

    @property
    def features(self) -> tuple[float, ...]:
        return (1.0, *np.log((self.n, self.S, self.R, self.K, self.M)))


@dataclass(frozen=True)
class Law:
    """The coefficients, in the order of `NAMES`, and their standard errors."""

    coefficients: tuple[float, ...]
    errors: tuple[float, ...]

    def accuracy(self, n: float, S: int, R: int, K: int, M: int) -> float:
        """The share of right answers that the law expects."""
        features = Point(n, S, R, K, M, 0, 0).features
        return float(1 / (1 + np.exp(-np.dot(self.coefficients, features))))

    def capacity(self, S: int, R: int, K: int, M: int, accuracy: float = 0.9) -> float:
        """The needles in a chunk at which the law expects this share of right answers."""
        rest = np.dot(self.coefficients, Point(1.0, S, R, K, M, 0, 0).features)
        return float(np.exp((np.log(accuracy / (1 - accuracy)) - rest) / self.coefficients[1]))


def points(records: Iterable[dict]) -> list[Point]:
    """All rows of the current runs of the scale "capacity"."""
    found = []
    for (arm, _), record in sorted(current(records, "capacity").items()):
        sizes = re.fullmatch(r"s(\d+)_r(\d+)_m(\d+)", arm)
        assert sizes is not None, arm
        S, R, M = map(int, sizes.groups())
        for row in record["found"]["capacity"]:
            n = row["needles"] * S / row["tokens"]
            found.append(Point(n, S, R, row["top_k"], M, row["correct"], row["samples"]))
    return found


def fit(measured: Iterable[Point]) -> Law:
    """The law of these points. A size that does not vary gets a coefficient near 0.

    Raises ValueError without a point.
    """
    measured = list(measured)
    if not measured:
        raise ValueError("measured: got no point, accepted is at least one")
    X = np.array([point.features for point in measured])
    correct = np.array([point.correct for point in measured])
    samples = np.array([point.samples for point in measured])
    ridge = RIDGE * np.eye(X.shape[1])
    b = np.zeros(X.shape[1])
    curvature = ridge
    for _ in range(ROUNDS):
        p = 1 / (1 + np.exp(-(X @ b)))
        curvature = X.T @ (X * (samples * p * (1 - p))[:, None]) + ridge
        step = np.linalg.solve(curvature, X.T @ (correct - samples * p) - ridge @ b)
        b = b + step * min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
    errors = np.sqrt(np.diag(np.linalg.inv(curvature)))
    return Law(tuple(map(float, b)), tuple(map(float, errors)))


def format_law(records: Iterable[dict]) -> str:
    """For a terminal: the coefficients, and the capacity of every model that was run."""
    measured = points(records)
    if not measured:
        return "no run of the grid yet"
    law = fit(measured)
    terms = zip(NAMES, law.coefficients, law.errors)
    lines = [
        f"{len(measured)} points; logit of the share of right answers:",
        *(f"  {name:<3} {value:8.3f} +- {1.96 * error:.3f}" for name, value, error in terms),
        "needles in a chunk at which 90% of the answers are right:",
    ]
    if law.coefficients[1] < 0:
        for S, R, K, M in sorted({(p.S, p.R, p.K, p.M) for p in measured}):
            lines.append(f"  S {S:<3} R {R:<4} K {K:<3} M {M}  {law.capacity(S, R, K, M):8.2f}")
    else:
        lines.append("  none: more needles do not make answers worse in these runs")
    return "\n".join(lines)
