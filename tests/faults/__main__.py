"""`python tests/faults [--quick] [--seed N] [ATTACK ...]`: attack the project, and print a table.

Exit status 1 if anything did not hold.
"""

import os

# Before torch, Triton and tqdm are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRITON_INTERPRET": "1"}

import importlib
import logging
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from hsa_mini.cli.arguments import MAX_SEED, Parser, check_choices, integer  # noqa: E402

# Cases of the long and of the quick form: states of every writer, calls of every writer, and the
# number of kills, corruptions and fuzzed calls.
COUNTS = {
    "power_loss": (2000, 12),
    "crash_points": (1000, 2),
    "kills": (1000, 8),
    "mesh_kills": (50, 2),
    "corruption": (2000, 60),
    "fuzz": (10_000, 60),
}


def main() -> int:
    """Run the attacks that the command line names; returns the exit status."""
    parser = Parser(prog="python tests/faults", description=__doc__)
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=f"of {', '.join(COUNTS)}")
    parser.add_argument("--quick", action="store_true", help="few cases of each: about a minute")
    parser.add_argument("--seed", type=integer(0, MAX_SEED), default=0, help="default 0")
    arguments = parser.parse_args()
    try:
        check_choices("ATTACK", arguments.attacks, COUNTS)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)  # children are forked, and threads do not survive it
    reports = []
    for name in arguments.attacks or COUNTS:
        attack = importlib.import_module(f"faults.{name}").attack
        count = COUNTS[name][arguments.quick]
        began = time.monotonic()
        with tqdm(desc=name, unit="case", disable=False, mininterval=1, miniters=1) as bar:
            report = attack(count, arguments.seed, bar.update)
        reports.append((report, time.monotonic() - began))
    print(f"\n{'attack':<14}{'cases':>8}{'faults':>8}{'seconds':>9}")
    for report, seconds in reports:
        print(report.row(seconds))
    for report, _ in reports:
        print(*report.examples(), sep="\n", end="\n" * bool(report.faults))
    return int(any(report.faults for report, _ in reports))


if __name__ == "__main__":
    sys.exit(main())
