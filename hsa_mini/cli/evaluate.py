"""`eval`: ask many questions of a retrieval task, by length of the text and depth of the needle."""

import argparse
from functools import partial
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_DISTRACTORS,
    MAX_JOBS,
    MAX_SEED,
    TASKS,
    add_device,
    choose_device,
    integer,
    results_path,
)
from hsa_mini.cli.models import check_length, checkpoint_folder, read_model
from hsa_mini.config import MAX_TOKENS


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser("eval", help="ask many questions of a task by length and depth")
    command.add_argument("checkpoint", help="a shipped model (mini) or a folder")
    command.add_argument("--task", default="s_niah", choices=TASKS, help="default s_niah")
    command.add_argument(
        "--lengths",
        type=integer(1, MAX_TOKENS),
        nargs="+",
        metavar="TOKENS",
        help="lengths of the text (default: those of the paper's Figure 4)",
    )
    command.add_argument(
        "--samples", type=integer(1, 10**6), default=10, help="questions per depth (default 10)"
    )
    command.add_argument(
        "--distractors",
        type=integer(0, MAX_DISTRACTORS),
        default=0,
        metavar="N",
        help="number of further sentences of the same form (default 0)",
    )
    command.add_argument(
        "--border",
        action="store_true",
        help="place every sentence across the border of two chunks",
    )
    command.add_argument(
        "--jobs",
        type=integer(1, MAX_JOBS),
        default=1,
        metavar="N",
        help="number of lengths to evaluate at once, each in its own process (default 1)",
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=1, help="seed of the questions (default 1)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: data/results/CHECKPOINT_TASK[_N_distractors][_border].json",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.evaluation.results import LENGTHS
    from hsa_mini.evaluation.runner import evaluate, evaluate_side_by_side
    from hsa_mini.files.whole_folder import fingerprint
    from hsa_mini.provenance import write_results

    lengths = arguments.lengths or LENGTHS
    form = {"distractors": arguments.distractors, "border": arguments.border}
    path = results_path(arguments.out, _results_name(arguments))
    device = choose_device(arguments.device)
    model = read_model("checkpoint", arguments.checkpoint, device)
    measured = fingerprint(checkpoint_folder(arguments.checkpoint))
    for tokens in lengths:
        check_length("--lengths", tokens, model.config, arguments.task, **form)
    options = {**form, "lengths": lengths, "samples": arguments.samples, "seed": arguments.seed}
    if arguments.jobs == 1:
        rows, controls = evaluate(model, arguments.task, **options)
    else:
        del model  # each process loads its own
        load = partial(read_model, "checkpoint", arguments.checkpoint, device)
        rows, controls = evaluate_side_by_side(load, arguments.task, jobs=arguments.jobs, **options)
    _print_rows(rows, controls)
    write_results(path, device, checkpoint=measured, rows=rows, control_rows=controls)
    print(f"written to {path}")
    return 0


def _results_name(arguments: argparse.Namespace) -> str:
    """The name of the results file without its ending."""
    name = f"{Path(arguments.checkpoint).name}_{arguments.task}"
    if arguments.distractors:
        name += f"_{arguments.distractors}_distractors"
    if arguments.border:
        name += "_border"
    return name


def _print_rows(rows, controls) -> None:
    """Print one line per length and one per control."""
    from hsa_mini.evaluation.results import CONTROLS
    from hsa_mini.evaluation.statistics import by_length

    print(
        f"{'tokens':>12} {'right':>9} {'accuracy':>9} {'95% interval':>16} {'retrieved':>10}"
        "   wrong by depth"
    )
    for entry in by_length(rows):
        wrong = [
            f"{row.depth:.2f}: {row.samples - row.correct}"
            for row in rows
            if row.tokens == entry["tokens"] and row.correct < row.samples
        ]
        print(
            f"{entry['tokens']:>12,} {entry['correct']:>4}/{entry['samples']:<4} "
            f"{entry['accuracy']:>9.1%} {entry['low']:>7.1%} to {entry['high']:>6.1%} "
            f"{entry['retrieved']:>5}/{entry['samples']:<4}  {', '.join(wrong) or 'none'}"
        )
    for control, meaning in CONTROLS.items():
        same = [row for row in controls if row.control == control]
        correct = sum(row.correct for row in same)
        print(f"control: {correct} of {sum(row.samples for row in same)} right where {meaning}")
