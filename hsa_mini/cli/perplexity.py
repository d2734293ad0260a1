"""`perplexity`: predict the same held-out tokens after more and more text."""

import argparse
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_SEED,
    PERPLEXITY_TARGETS,
    add_device,
    choose_device,
    integer,
    results_path,
)
from hsa_mini.cli.models import read_model
from hsa_mini.config import MAX_TOKENS
from hsa_mini.paths import checkpoint_folder


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "perplexity", help="predict the same held-out tokens after more and more text"
    )
    command.add_argument("checkpoint", help="a shipped model (mini) or a folder")
    command.add_argument(
        "--lengths",
        type=integer(PERPLEXITY_TARGETS, MAX_TOKENS),
        nargs="+",
        metavar="TOKENS",
        help="numbers of tokens to read (default: 1K to 1M)",
    )
    command.add_argument(
        "--stretches",
        type=integer(1, 10**6),
        default=20,
        metavar="N",
        help="number of places in the held-out text (default 20)",
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=1, help="seed of the places (default 1)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: CHECKPOINT_perplexity.json, in data/results of a checkout for a shipped "
        "model, else in the current folder; until the run is complete, finished lengths are kept "
        "in FILE.unfinished, and the same command goes on after them",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.data.corpus import load_corpus
    from hsa_mini.evaluation.perplexity import LENGTHS, PerplexityRow, measure_perplexity
    from hsa_mini.evaluation.results import check_replaceable
    from hsa_mini.evaluation.unfinished import Unfinished, describe_run
    from hsa_mini.files.whole_folder import fingerprint
    from hsa_mini.provenance import write_results

    path = results_path(arguments.out, arguments.checkpoint, "perplexity")
    device = choose_device(arguments.device)
    folder = checkpoint_folder(arguments.checkpoint)
    model = read_model("checkpoint", folder, device)
    measured = fingerprint(folder)
    check_replaceable("--out", path, measured)
    lengths = sorted(set(arguments.lengths or LENGTHS))
    options = {"lengths": lengths, "stretches": arguments.stretches, "seed": arguments.seed}
    origin = {"checkpoint": measured, "corpus": load_corpus("validation").identity}
    unfinished = Unfinished("--out", path, describe_run(device, **origin, **options))
    if unfinished.lengths:
        print(f"{len(unfinished.lengths)} of {len(lengths)} lengths were finished before")
    finished = unfinished.rows("rows", PerplexityRow)

    def keep(row: PerplexityRow) -> None:
        unfinished.add(row.tokens, rows=[row])
        _print_row(row)

    for row in finished:
        _print_row(row)
    rows = measure_perplexity(model, finished=finished, report=keep, **options)
    write_results(path, device, **origin, rows=rows)
    unfinished.remove()
    print(f"written to {path}")
    return 0


def _print_row(row) -> None:
    """Print the result of one length as soon as it is there."""
    print(
        f"{row.tokens:>12,} tokens, the last {row.targets} predicted: "
        f"loss {row.loss:.4f} nats, perplexity {row.perplexity:.2f}",
        flush=True,
    )
