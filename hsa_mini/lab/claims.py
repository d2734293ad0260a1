"""What became of the paper's claims: measured numbers by arm, and a verdict by one rule.

A comparison states that one arm is better than another by one measure. With three seeds of both
arms it is

    reproduced            every seed of the better arm beats every seed of the other arm,
                          and the means differ by the margin
    different in small    small models show the opposite: the same with the two arms exchanged
    not reproduced        anything else

A claim is "reproduced" if all its comparisons are. It is "different in small" if one of its
comparisons is. It is "not yet run" if a seed is missing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.records import current

SEEDS = 3  # a verdict needs this many
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
DIFFERENT = "different in small"
NOT_RUN = "not yet run"
# Lengths of evaluation, as multiples of the training length.
NEAR = 1
FAR = 64
TEXTS = tuple(name for name in ARMS if name.startswith("text"))  # arms trained on plain text only


@dataclass(frozen=True)
class Measure:
    """One number of a run: what was measured, at which multiple of the training length.

    what: "perplexity"; or a task or "copy", which are measured by accuracy.
    """

    what: str
    multiple: int

    @property
    def margin(self) -> float:
        """The smallest difference of two means that counts.

        It is a difference of accuracies, or of logarithms of perplexities.
        """
        return 0.01 if self.what == "perplexity" else 0.1

    def read(self, record: dict) -> float:
        """The number in a record; infinite if a perplexity was not finite."""
        tokens = self.multiple * record["settings"]["evaluation"]["lengths"][0]
        row = next(row for row in record["found"][self.what] if row["tokens"] == tokens)
        value = row["perplexity" if self.what == "perplexity" else "accuracy"]
        return math.inf if value is None else value

    def goodness(self, value: float) -> float:
        """A number that is larger for a better value."""
        return -math.log(value) if self.what == "perplexity" else value

    def __str__(self) -> str:
        return f"{self.what} at {self.multiple}x"


@dataclass(frozen=True)
class Comparison:
    """Arm `better` should beat arm `worse` by this measure."""

    better: str
    worse: str
    by: Measure


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the comparisons that decide about it.

    other_arms, other_measures: shown for information only; they do not enter the verdict.
    """

    name: str
    statement: str
    comparisons: tuple[Comparison, ...]
    other_arms: tuple[str, ...] = ()
    other_measures: tuple[Measure, ...] = ()

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms, each once: those compared, then the others."""
        compared = [arm for c in self.comparisons for arm in (c.better, c.worse)]
        return tuple(dict.fromkeys((*compared, *self.other_arms)))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All measures, each once: those that decide, then the others."""
        deciding = [c.by for c in self.comparisons]
        return tuple(dict.fromkeys((*deciding, *self.other_measures)))


@dataclass(frozen=True)
class Spread:
    """One measure of one arm: a value per seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True)
class ClaimFinding:
    """A claim, its numbers by measure and arm (only arms that were run), and the verdict."""

    claim: Claim
    numbers: dict[Measure, dict[str, Spread]]
    verdict: str


def make_claim(
    name: str, statement: str, *comparisons: tuple[str, str, Measure], **others
) -> Claim:
    """A claim whose comparisons are (better arm, worse arm, measure)."""
    return Claim(name, statement, tuple(Comparison(*c) for c in comparisons), **others)


_S = Measure("s_niah", FAR)
_MQ = Measure("mq_niah", FAR)
_VT = Measure("vt", FAR)
_S_NEAR = Measure("s_niah", NEAR)
_VT_NEAR = Measure("vt", NEAR)
_PERPLEXITY = Measure("perplexity", NEAR)
CLAIMS = (
    make_claim(
        "positions",
        "without positions on far tokens, retrieval works beyond the training length;"
        " with RoPE it does not",
        ("hsa", "hsa_rope", _S), ("hsa", "full_rope", _S),
        other_arms=TEXTS, other_measures=(_S_NEAR, _PERPLEXITY, Measure("perplexity", FAR)),
    ),
    make_claim(
        "fusion",
        "chunks fused by their scores beat chunks that are selected and then concatenated",
        ("hsa", "concatenated", _MQ), ("hsa", "mean_key", _MQ),
        other_arms=("grouped_softmax",), other_measures=(_S,),
    ),
    make_claim(
        "encoder", "a landmark from an encoder beats a landmark from the mean of a chunk",
        ("hsa", "mean_landmark", _MQ), other_measures=(_S,),
    ),
    make_claim(
        "warm-up",
        "both warm-ups teach retrieval; with self-copies it reaches further, with a short window"
        " and every chunk kept the model predicts better",
        ("warmup_self_copy", "warmup_none", _MQ),
        ("warmup_short_window", "warmup_none", _MQ),
        ("warmup_self_copy", "warmup_short_window", _MQ),
        ("warmup_short_window", "warmup_self_copy", _PERPLEXITY),
    ),
    make_claim(
        "seesaw",
        "a window as long as the copy distance prevents the model from learning retrieval",
        ("hsa", "window_8x", _S), ("hsa", "window_16x", _S),
        other_arms=("window_4x",), other_measures=(_S_NEAR, _PERPLEXITY),
    ),
    make_claim(
        "effective context", "data with a short context teach no retrieval beyond that context",
        ("hsa", "data_short", _S), other_measures=(_S_NEAR,),
    ),
    make_claim(
        "sparse training",
        "retrieval survives sparsity in evaluation only if the model was trained sparse",
        ("hsa", "full_k", _S), other_arms=("no_noise",), other_measures=(_S_NEAR,),
    ),
    make_claim(
        "QK norm", "training needs a norm on queries and keys",
        ("hsa", "no_qk_norm", _PERPLEXITY), other_measures=(_S,),
    ),
    make_claim(
        "scale", "experts help where an answer takes several steps (VT)",
        ("moe_chains", "dense_chains", _VT_NEAR), other_measures=(_VT,),
    ),
    make_claim(
        "blindness", "a window alone does not see a needle beyond its edge",
        ("hsa", "window", _S_NEAR), other_measures=(_PERPLEXITY,),
    ),
)  # fmt: skip


def judge(
    records: Iterable[dict], claims: Iterable[Claim] = CLAIMS, scale: str = "lab"
) -> list[ClaimFinding]:
    """A finding for every claim, from the records of full runs at this scale with the settings
    declared now.
    """
    runs: dict[str, list[dict]] = {}
    for (arm, _), record in sorted(current(records, scale).items()):
        runs.setdefault(arm, []).append(record)
    return [_judge(claim, runs) for claim in claims]


def _judge(claim: Claim, runs: dict[str, list[dict]]) -> ClaimFinding:
    numbers = {
        measure: {
            arm: Spread(tuple(measure.read(record) for record in runs[arm]))
            for arm in claim.arms
            if arm in runs
        }
        for measure in claim.measures
    }
    verdicts = {
        verdict(c.by, numbers[c.by].get(c.better), numbers[c.by].get(c.worse))
        for c in claim.comparisons
    }
    for found in (NOT_RUN, DIFFERENT, NOT_REPRODUCED):
        if found in verdicts:
            return ClaimFinding(claim, numbers, found)
    return ClaimFinding(claim, numbers, REPRODUCED)


def verdict(measure: Measure, better: Spread | None, worse: Spread | None) -> str:
    """Applies the rule at the top of this file to one comparison; None: the arm was not run."""
    if better is None or worse is None:
        return NOT_RUN
    if min(len(better.values), len(worse.values)) < SEEDS:
        return NOT_RUN
    expected_better = _goodness(measure, better)
    expected_worse = _goodness(measure, worse)
    if _beats(measure, expected_better, expected_worse):
        return REPRODUCED
    if _beats(measure, expected_worse, expected_better):
        return DIFFERENT
    return NOT_REPRODUCED


def _goodness(measure: Measure, spread: Spread) -> Spread:
    return Spread(tuple(map(measure.goodness, spread.values)))


def _beats(measure: Measure, one: Spread, other: Spread) -> bool:
    return one.low > other.high and one.mean - other.mean >= measure.margin


def format_findings(findings: Iterable[ClaimFinding]) -> str:
    """For a terminal: every verdict, and the mean (lowest to highest) of every measure and arm."""
    lines = []
    for finding in findings:
        claim = finding.claim
        lines += ["", f"{claim.name}: {finding.verdict}", f"  {claim.statement}"]
        for measure, spreads in finding.numbers.items():
            lines += [_format_spread(measure, arm, spread) for arm, spread in spreads.items()]
    return "\n".join(lines)


def _format_spread(measure: Measure, arm: str, spread: Spread) -> str:
    style = ".2f" if measure.what == "perplexity" else ".1%"
    mean = format(spread.mean, style)
    low = format(spread.low, style)
    high = format(spread.high, style)
    seeds = len(spread.values)
    return f"  {measure!s:<20} {arm:<20} {mean:>8}  ({low} to {high}, {seeds} seeds)"
