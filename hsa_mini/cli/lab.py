"""`lab`: train and measure the laboratory's arms, and judge the paper's claims by them."""

import argparse
import math
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_JOBS,
    MAX_SEED,
    MAX_STEPS,
    add_device,
    check_choices,
    choose_device,
    integer,
    number,
)
from hsa_mini.files.whole_file import check_writable
from hsa_mini.paths import results_dir

MAX_MINUTES = 10**6
CALL_MINUTES = 9.0  # of one call, in a plan
JOBS_ON_GPU = 3
OUT = {"settled": "lab_settled.jsonl", "capacity": "lab_capacity.jsonl"}  # by scale


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "lab",
        help="train and measure variants of the mechanism, and judge the paper's claims; "
        "continues where it was stopped",
    )
    command.add_argument("--arms", nargs="+", metavar="ARM", help="which variants (default: all)")
    command.add_argument(
        "--seeds",
        type=integer(0, MAX_SEED),
        nargs="+",
        default=[0, 1, 2],
        metavar="SEED",
        help="every arm runs once per seed (default 0 1 2)",
    )
    command.add_argument(
        "--steps",
        type=integer(1, MAX_STEPS),
        help="number of steps (default: the recipe's; shorter runs are no evidence for a claim)",
    )
    command.add_argument(
        "--jobs",
        type=integer(1, MAX_JOBS),
        help="number of runs at the same time (default: 3 on a GPU, which they share, else 1)",
    )
    command.add_argument(
        "--scale",
        default="lab",
        help="lab; settled (longer runs and more arms); capacity (how many needles a chunk holds); "
        "or tiny, whose runs take seconds on a CPU, for a first try (default lab)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="one line of JSON per run (default lab.jsonl in data/results of a checkout, "
        "lab_settled.jsonl and lab_capacity.jsonl for these scales)",
    )
    command.add_argument(
        "--minutes",
        type=number(0, MAX_MINUTES),
        help="save all states and end after this time; the same command goes on from there "
        "(default: no limit)",
    )
    command.add_argument(
        "--plan",
        action="store_true",
        help="only say how long each arm will take, by the runs in the file, and in how many "
        "calls of --minutes (default 9)",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.lab.harness import missing_runs, run_missing
    from hsa_mini.lab.records import read_records
    from hsa_mini.lab.rounds import arms_of
    from hsa_mini.lab.scales import SCALES
    from hsa_mini.lab.settled.schedule import format_schedule

    check_choices("--scale", [arguments.scale], SCALES)
    known = arms_of(arguments.scale)
    arms = list(dict.fromkeys(arguments.arms or known))
    check_choices("--arms", arms, known)
    path = arguments.out or results_dir() / OUT.get(arguments.scale, "lab.jsonl")
    check_writable("--out", path)
    seeds = dict.fromkeys(arguments.seeds)
    runs = {"path": path, "scale": arguments.scale, "steps": arguments.steps}
    if arguments.plan:
        missing = missing_runs(arms, seeds, **runs)
        jobs = arguments.jobs or JOBS_ON_GPU
        calls = {"jobs": jobs, "minutes": arguments.minutes or CALL_MINUTES}
        known_runs = [*read_records(results_dir() / "lab.jsonl"), *read_records(path)]
        print(format_schedule(known_runs, missing, arguments.scale, arguments.steps, **calls))
        return 0
    device = choose_device(arguments.device)
    jobs = arguments.jobs or (JOBS_ON_GPU if device.type == "cuda" else 1)
    minutes = math.inf if arguments.minutes is None else arguments.minutes
    count, left = run_missing(arms, seeds, device=device, jobs=jobs, minutes=minutes, **runs)
    if left:
        print(
            f"{count} runs were missing, {count - left} are now in {path};"
            f" the same command goes on with the other {left}"
        )
        return 0
    print(f"{count} runs were missing and are now in {path}")
    if arguments.steps is None:
        print(_findings(arguments.scale, read_records(path)), end="")
    return 0


def _findings(scale: str, records: list[dict]) -> str:
    """What the records of a scale show, for a terminal."""
    from hsa_mini.lab.capacity.law import format_law
    from hsa_mini.lab.claims import format_findings, judge
    from hsa_mini.lab.settled.claims import MORE_SEEDS, SETTLED_CLAIMS, touching
    from hsa_mini.lab.settled.curves import format_curves

    if scale == "lab":
        return format_findings(judge(records)) + "\n"
    if scale == "settled":
        found = judge(records, SETTLED_CLAIMS, scale)
        more = ", ".join(touching(found)) or "none"
        seeds = f"arms that need {MORE_SEEDS} seeds, because they overlap: {more}"
        return f"{format_findings(found)}\n\n{seeds}\n\n{format_curves(records)}\n"
    return format_law(records) + "\n" if scale == "capacity" else ""
