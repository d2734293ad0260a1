"""`lab`: train and measure the laboratory's arms, and judge the paper's claims by them."""

import argparse
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_JOBS,
    MAX_SEED,
    MAX_STEPS,
    add_device,
    check_choices,
    choose_device,
    integer,
)
from hsa_mini.files.whole_file import check_writable
from hsa_mini.paths import results_dir


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
        help="lab; or tiny, whose runs take seconds on a CPU, for a first try (default lab)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="one line of JSON per run (default lab.jsonl in data/results of a checkout)",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.lab.arms import ARMS
    from hsa_mini.lab.claims import format_findings, judge
    from hsa_mini.lab.harness import run_missing
    from hsa_mini.lab.records import read_records
    from hsa_mini.lab.scales import SCALES

    arms = list(dict.fromkeys(arguments.arms or ARMS))
    check_choices("--arms", arms, ARMS)
    check_choices("--scale", [arguments.scale], SCALES)
    path = arguments.out or results_dir() / "lab.jsonl"
    check_writable("--out", path)
    device = choose_device(arguments.device)
    jobs = arguments.jobs or (3 if device.type == "cuda" else 1)
    count = run_missing(
        arms,
        dict.fromkeys(arguments.seeds),
        path=path,
        device=device,
        scale=arguments.scale,
        steps=arguments.steps,
        jobs=jobs,
    )
    print(f"{count} runs were missing and are now in {path}")
    if arguments.scale == "lab" and arguments.steps is None:
        print(format_findings(judge(read_records(path))))
    return 0
