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
    add_texts,
    choose_device,
    integer,
    results_path,
)
from hsa_mini.cli.models import check_length, read_model
from hsa_mini.config import MAX_TOKENS
from hsa_mini.paths import checkpoint_folder


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
    add_texts(command)
    command.add_argument(
        "--samples",
        type=integer(1, 10**6),
        default=1,
        help="questions in each tenth of every text (default 1)",
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
        help="default: CHECKPOINT_TASK[_N_distractors][_border].json, in data/results of a "
        "checkout for a shipped model, else in the current folder; until the run is complete, "
        "finished lengths are kept in FILE.unfinished, and the same command goes on after them",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.data.corpus import load_corpus
    from hsa_mini.evaluation.results import LENGTHS, ControlRow, RetrievalRow, check_replaceable
    from hsa_mini.evaluation.runner import evaluate, evaluate_side_by_side
    from hsa_mini.evaluation.unfinished import Unfinished, describe_run
    from hsa_mini.files.whole_folder import fingerprint
    from hsa_mini.provenance import write_results

    lengths = list(dict.fromkeys(arguments.lengths or LENGTHS))
    longer = arguments.longer
    form = {"distractors": arguments.distractors, "border": arguments.border}
    path = results_path(arguments.out, arguments.checkpoint, _ending(arguments))
    device = choose_device(arguments.device)
    folder = checkpoint_folder(arguments.checkpoint)
    model = read_model("checkpoint", folder, device)
    measured = fingerprint(folder)
    check_replaceable("--out", path, measured)
    for tokens in lengths:
        check_length("--lengths", tokens, model.config, arguments.task, **form)
    origin = {"checkpoint": measured, "corpus": load_corpus("validation", longer=longer).identity}
    given = {key: getattr(arguments, key) for key in ("texts", "samples", "seed")}
    options = {**form, **given, "longer": longer}
    known = {**origin, "task": arguments.task, "lengths": lengths, **form, **given}
    unfinished = Unfinished("--out", path, describe_run(device, **known))
    if unfinished.lengths:
        print(f"{len(unfinished.lengths)} of {len(lengths)} lengths were finished before")
    options["lengths"] = [tokens for tokens in lengths if tokens not in unfinished.lengths]
    options["report"] = lambda tokens, rows, controls: unfinished.add(
        tokens, rows=rows, control_rows=controls
    )
    if arguments.jobs == 1:
        evaluate(model, arguments.task, **options)
    else:
        del model  # each process loads its own
        load = partial(read_model, "checkpoint", folder, device)
        evaluate_side_by_side(load, arguments.task, jobs=arguments.jobs, **options)
    rows = unfinished.rows("rows", RetrievalRow)
    controls = unfinished.rows("control_rows", ControlRow)
    write_results(path, device, **origin, rows=rows, control_rows=controls)
    unfinished.remove()
    _print_rows(rows, controls)
    print(f"written to {path}")
    return 0


def _ending(arguments: argparse.Namespace) -> str:
    """What follows the name of the checkpoint in that of the results file."""
    ending = arguments.task
    if arguments.distractors:
        ending += f"_{arguments.distractors}_distractors"
    if arguments.border:
        ending += "_border"
    return ending


def _print_rows(rows, controls) -> None:
    """Print one line per length and one per control."""
    from hsa_mini.evaluation.results import CONTROLS
    from hsa_mini.evaluation.statistics import by_length

    print(
        f"{'tokens':>12} {'right':>9} {'accuracy':>9} {'95% interval':>16} {'retrieved':>10}"
        f" {'whole':>9} {'cut':>9}   wrong by depth"
    )
    for entry in by_length(rows):
        wrong = [
            f"{row.depth:.2f}: {row.samples - row.correct}"
            for row in rows
            if row.tokens == entry["tokens"] and row.correct < row.samples
        ]
        whole = f"{entry['whole_correct']}/{entry['whole']}"
        cut_right = entry["correct"] - entry["whole_correct"]
        cut = f"{cut_right}/{entry['samples'] - entry['whole']}"
        print(
            f"{entry['tokens']:>12,} {entry['correct']:>4}/{entry['samples']:<4} "
            f"{entry['accuracy']:>9.1%} {entry['low']:>7.1%} to {entry['high']:>6.1%} "
            f"{entry['retrieved']:>5}/{entry['samples']:<4} "
            f"{whole:>9} {cut:>9}   {', '.join(wrong) or 'none'}"
        )
    for control, meaning in CONTROLS.items():
        same = [row for row in controls if row.control == control]
        correct = sum(row.correct for row in same)
        print(f"control: {correct} of {sum(row.samples for row in same)} right where {meaning}")
