"""What became of the paper's claims: measured numbers by arm, and a verdict by one rule.

A comparison says that one arm is better than another by one measure. With three seeds of both it is

    reproduced            every seed of the better arm is better than every seed of the other, and the means differ by the margin
    different in small    the same the other way round
    not reproduced        anything else

A claim is reproduced if all its comparisons are, different in small if one of them is, and not yet run if a seed is missing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.harness import current

SEEDS = 3  # that a verdict needs
REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
DIFFERENT = "different in small"
NOT_RUN = "not yet run"
# times the training length
NEAR = 1
FAR = 64
TEXTS = tuple(name for name in ARMS if name.startswith("text"))  # arms trained on plain text alone


@dataclass(frozen=True)
class Measure:
    """A row of what a run found: of a task or "copy" the accuracy, of "perplexity" that; at so many training lengths."""

    what: str
    multiple: int

    @property
    def margin(self) -> float:
        """Least difference of two means that counts: a share of questions, or of the logarithm of perplexity."""
        return 0.01 if self.what == "perplexity" else 0.1

    def read(self, record: dict) -> float:
        tokens = self.multiple * record["settings"]["evaluation"]["lengths"][0]
        row = next(row for row in record["found"][self.what] if row["tokens"] == tokens)
        value = row["perplexity" if self.what == "perplexity" else "accuracy"]
        return math.inf if value is None else value  # only a perplexity can be without bound

    def goodness(self, value: float) -> float:
        """The larger, the better."""
        return -math.log(value) if self.what == "perplexity" else value

    def __str__(self) -> str:
        return f"{self.what} at {self.multiple}x"


@dataclass(frozen=True)
class Comparison:
    better: str
    worse: str
    by: Measure


@dataclass(frozen=True)
class Claim:
    name: str
    says: str
    comparisons: tuple[Comparison, ...]
    beside: tuple[
        str, ...
    ] = ()  # arms whose numbers belong to the picture, without a say in the verdict
    shown: tuple[Measure, ...] = ()  # measures too

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(
            dict.fromkeys(
                (*(arm for c in self.comparisons for arm in (c.better, c.worse)), *self.beside)
            )
        )

    @property
    def measures(self) -> tuple[Measure, ...]:
        return tuple(dict.fromkeys((*(c.by for c in self.comparisons), *self.shown)))


@dataclass(frozen=True)
class Spread:
    """One measure of the seeds of an arm."""

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
class Finding:
    """numbers: by measure and arm, of the arms that have been run."""

    claim: Claim
    numbers: dict[Measure, dict[str, Spread]]
    verdict: str


def _claim(name: str, says: str, *comparisons: tuple[str, str, Measure], **more) -> Claim:
    return Claim(name, says, tuple(Comparison(*comparison) for comparison in comparisons), **more)


_S, _MQ, _VT = (Measure(task, FAR) for task in ("s_niah", "mq_niah", "vt"))
_S_NEAR = Measure("s_niah", NEAR)
_VT_NEAR = Measure("vt", NEAR)
_PERPLEXITY = Measure("perplexity", NEAR)
CLAIMS = (
    _claim(
        "positions", "without positions far away, retrieval goes on beyond the training length; with RoPE it does not",
        ("hsa", "hsa_rope", _S), ("hsa", "full_rope", _S), beside=TEXTS,
        shown=(_S_NEAR, _PERPLEXITY, Measure("perplexity", FAR)),
    ),
    _claim(
        "fusion", "chunks fused by their scores beat chunks that are selected, then concatenated",
        ("hsa", "concatenated", _MQ), ("hsa", "mean_key", _MQ), beside=("grouped_softmax",), shown=(_S,),
    ),
    _claim("encoder", "a landmark from an encoder beats one from the mean of a chunk", ("hsa", "mean_landmark", _MQ), shown=(_S,)),
    _claim(
        "warm-up", "both warm-ups teach retrieval; self-copy reaches further, a short window with every chunk predicts better",
        ("warmup_self_copy", "warmup_none", _MQ), ("warmup_short_window", "warmup_none", _MQ),
        ("warmup_self_copy", "warmup_short_window", _MQ), ("warmup_short_window", "warmup_self_copy", _PERPLEXITY),
    ),
    _claim(
        "seesaw", "a window as long as the copy distance keeps retrieval from being learnt",
        ("hsa", "window_8x", _S), ("hsa", "window_16x", _S), beside=("window_4x",), shown=(_S_NEAR, _PERPLEXITY),
    ),
    _claim(
        "effective context", "data whose context is short teach no retrieval beyond it",
        ("hsa", "data_short", _S), shown=(_S_NEAR,),
    ),
    _claim(
        "sparse training", "retrieval survives sparsity in evaluation only if it was trained sparse",
        ("hsa", "full_k", _S), beside=("no_noise",), shown=(_S_NEAR,),
    ),
    _claim("QK norm", "training needs a norm on queries and keys", ("hsa", "no_qk_norm", _PERPLEXITY), shown=(_S,)),
    _claim("scale", "experts help where an answer takes several steps (VT)", ("moe_chains", "dense_chains", _VT_NEAR), shown=(_VT,)),
    _claim("blindness", "a window alone does not see a needle behind it", ("hsa", "window", _S_NEAR), shown=(_PERPLEXITY,)),
)  # fmt: skip


def judge(records: Iterable[dict]) -> list[Finding]:
    """Every claim by the records of the arms as they are declared now, at scale "lab" and in full length."""
    runs: dict[str, list[dict]] = {}
    for (arm, _), record in sorted(current(records).items()):
        runs.setdefault(arm, []).append(record)
    return [_judge(claim, runs) for claim in CLAIMS]


def _judge(claim: Claim, runs: dict[str, list[dict]]) -> Finding:
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
            return Finding(claim, numbers, found)
    return Finding(claim, numbers, REPRODUCED)


def verdict(measure: Measure, better: Spread | None, worse: Spread | None) -> str:
    """The rule of a comparison, as it stands at the top of this file."""
    if any(spread is None or len(spread.values) < SEEDS for spread in (better, worse)):
        return NOT_RUN
    better, worse = (
        Spread(tuple(map(measure.goodness, spread.values))) for spread in (better, worse)
    )
    for one, other, found in ((better, worse, REPRODUCED), (worse, better, DIFFERENT)):
        if one.low > other.high and one.mean - other.mean >= measure.margin:
            return found
    return NOT_REPRODUCED


def table(findings: Iterable[Finding]) -> str:
    """For a terminal: verdicts, and mean (lowest to highest) of every measure and arm."""
    lines = []
    for finding in findings:
        lines += ["", f"{finding.claim.name}: {finding.verdict}", f"  {finding.claim.says}"]
        for measure, spreads in finding.numbers.items():
            for arm, spread in spreads.items():
                mean, low, high = (
                    f"{x:.2f}" if measure.what == "perplexity" else f"{x:.1%}"
                    for x in (spread.mean, spread.low, spread.high)
                )
                lines.append(
                    f"  {measure!s:<20} {arm:<20} {mean:>8}  ({low} to {high}, {len(spread.values)} seeds)"
                )
    return "\n".join(lines)
