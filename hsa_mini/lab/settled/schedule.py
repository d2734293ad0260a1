"""How long the missing runs will take, from the runs that are recorded.

An arm that has not run yet is counted by the mean of those that have. A short run of every arm
(`--steps 40`) makes the schedule exact.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hsa_mini.lab.records import RunKey
from hsa_mini.lab.rounds import arms_of
from hsa_mini.lab.scales import SCALES, Scale

START_SECONDS = 45.0  # of one call: processes start, and kernels are compiled


@dataclass(frozen=True)
class Entry:
    """One arm: the seeds that are missing, and the seconds of one of them.

    measured: whether a run of this arm is recorded; otherwise the seconds are those of other arms.
    """

    arm: str
    seeds: tuple[int, ...]
    seconds: float
    measured: bool


def schedule(
    records: Iterable[dict], missing: Sequence[RunKey], scale: str, steps: int | None = None
) -> list[Entry]:
    """An entry for each arm that misses a run, in the order of `missing`.

    Raises ValueError if no recorded run has batches like those of this scale.
    """
    rates: dict[str, float] = {}  # seconds for each step
    evaluations: list[float] = []
    for record in records:
        if _comparable(record, SCALES[scale]):
            taken = sum(stage["steps"] for stage in record["settings"]["recipe"]["stages"])
            rates[record["arm"]] = record["seconds"]["training"] / taken
            evaluations.append(record["seconds"]["evaluation"])
    if not rates:
        raise ValueError(
            f"--plan: got no recorded run with batches as those of {scale}, accepted is a file with"
            " one: run an arm with --steps 40 first"
        )
    usual = sum(rates.values()) / len(rates)
    measuring = max(evaluations)
    entries = []
    for arm in dict.fromkeys(arm for arm, _ in missing):
        seeds = tuple(seed for other, seed in missing if other == arm)
        training = arms_of(scale)[arm].recipe(SCALES[scale], steps).steps * rates.get(arm, usual)
        entries.append(Entry(arm, seeds, training + measuring, arm in rates))
    return entries


def _comparable(record: dict, scale: Scale) -> bool:
    """Whether a step of a record is as large as one of the scale."""
    last = record["settings"].get("recipe", {"stages": [{}]})["stages"][-1]
    return (last.get("batch"), last.get("tokens")) == (scale.stage.batch, scale.stage.tokens)


def calls(entries: Iterable[Entry], jobs: int, minutes: float) -> int:
    """How many calls of so many minutes all runs take, `jobs` of them at once."""
    total = sum(len(entry.seeds) * entry.seconds for entry in entries)
    return math.ceil(total / (jobs * max(60 * minutes - START_SECONDS, 1.0)))


def format_schedule(
    records: Iterable[dict],
    missing: Sequence[RunKey],
    scale: str,
    steps: int | None,
    *,
    jobs: int,
    minutes: float,
) -> str:
    """For a terminal: a line for each arm, and how many calls all of them take."""
    if not missing:
        return "no run is missing"
    entries = schedule(records, missing, scale, steps)
    lines = []
    for entry in entries:
        source = "" if entry.measured else "  (as other arms)"
        each = f"{len(entry.seeds)} x {entry.seconds / 60:.1f} min"
        lines.append(f"  {entry.arm:<26} {each}{source}")
    total = sum(len(entry.seeds) * entry.seconds for entry in entries) / jobs
    count = calls(entries, jobs, minutes)
    lines.append(
        f"{len(missing)} runs are missing, {jobs} at once: {total / 60:.0f} min,"
        f" {count} calls of {minutes:g} min"
    )
    return "\n".join(lines)
