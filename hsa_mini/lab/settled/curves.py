"""Curves of learning: how the perplexity of one arm compares with that of another, against the
tokens that both have seen.

The two arms read the same texts. So the ratio of their perplexities is known more exactly than
either of them, and its interval comes from the differences of their losses, text by text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hsa_mini.lab.records import current

RESAMPLES = 2000
# What is compared with full attention: the arm, and the arm with full attention.
RATIOS = (
    ("text_window_4x", "text_full_rope"),
    ("text_window_4x", "text_full_rope_paper"),
    ("text_window_4x", "text_full_rope_same_mlp"),
    ("text", "text_full_rope"),
    ("text_hils", "text_full_rope"),
    ("text_dash_attention", "text_full_rope"),
)


@dataclass(frozen=True)
class Ratio:
    """The perplexity of one arm over that of another, and the 95% interval of this ratio.

    seen: the training tokens so far. tokens: the length of the texts.
    """

    seen: int
    tokens: int
    ratio: float
    low: float
    high: float


def ratio_interval(
    losses: np.ndarray, others: np.ndarray, seed: int = 0
) -> tuple[float, float, float]:
    """The ratio of two perplexities, and the bounds of its 95% interval.

    losses [seeds, texts], others [other seeds, texts], in nats per token: those of the same texts.
    The interval is a bootstrap: texts are drawn again, and so are the seeds of either arm.
    """
    rng = np.random.default_rng(seed)
    texts = losses.shape[1]

    def drawn(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        seeds = rng.integers(len(values), size=(RESAMPLES, len(values)))
        return values[seeds[:, :, None], chosen[:, None]].mean(axis=(1, 2))

    chosen = rng.integers(texts, size=(RESAMPLES, texts))
    differences = drawn(losses, chosen) - drawn(others, chosen)
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(np.exp(losses.mean() - others.mean())), float(np.exp(low)), float(np.exp(high))


def ratio_curve(records: Sequence[dict], others: Sequence[dict], tokens: int) -> list[Ratio]:
    """The ratio at every point of the curve, in texts of this length.

    records: the runs of one arm. others: those of the arm that it is compared with. A point at
    which a loss is not finite, because training diverged, is left out.
    """
    curve = []
    for points in zip(*(record["learning"] for record in (*records, *others))):
        losses = [_losses(point["rows"], tokens) for point in points]
        if any(None in of_run for of_run in losses):
            continue
        mine = np.array(losses[: len(records)])
        theirs = np.array(losses[len(records) :])
        curve.append(Ratio(points[0]["seen"], tokens, *ratio_interval(mine, theirs)))
    return curve


def _losses(rows: Iterable[dict], tokens: int) -> list[float | None]:
    return next(row["losses"] for row in rows if row["tokens"] == tokens)


def ratio_curves(records: Iterable[dict]) -> dict[tuple[str, str], dict[int, list[Ratio]]]:
    """The curves of `RATIOS` by length, from the records of the scale "settled"; pairs without runs
    are left out.
    """
    runs: dict[str, list[dict]] = {}
    for (arm, _), record in sorted(current(records, "settled").items()):
        runs.setdefault(arm, []).append(record)
    found = {}
    for one, other in RATIOS:
        if one in runs and other in runs:
            lengths = [row["tokens"] for row in runs[one][0]["learning"][0]["rows"]]
            found[one, other] = {n: ratio_curve(runs[one], runs[other], n) for n in lengths}
    return found


def format_curves(records: Iterable[dict]) -> str:
    """For a terminal: every ratio with its interval, against the tokens seen."""
    lines = ["perplexity over that of full attention (95% interval by text and seed)"]
    for (one, other), curves in ratio_curves(records).items():
        for tokens, curve in curves.items():
            lines.append(f"{one} / {other}, texts of {tokens:,} tokens")
            lines += [
                f"  {point.seen / 1e6:8.1f} M tokens seen  {point.ratio:.3f}"
                f"  ({point.low:.3f} to {point.high:.3f})"
                for point in curve
            ]
    return "\n".join(lines)
