"""`tasks`: RULER's tasks, stories, threads and notes in texts of any length."""

import argparse
from pathlib import Path

from hsa_mini.cli.arguments import (
    MAX_SEED,
    add_device,
    add_texts,
    check_choices,
    choose_device,
    integer,
    results_path,
)
from hsa_mini.cli.models import read_model
from hsa_mini.config import MAX_TOKENS
from hsa_mini.paths import checkpoint_folder

MIN_TOKENS = 2048  # `evaluation/long/run.py`


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "tasks", help="ask RULER's tasks (extra: eval), stories, threads and notes in long texts"
    )
    command.add_argument("checkpoint", help="a shipped model (mini) or a folder")
    command.add_argument(
        "--tasks",
        metavar="NAME,NAME...",
        help="default: all, that is niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, "
        "niah_multiquery, vt, cwe, fwe, qa1 to 3, thread_2, _4, _8, note_2, _4, _8",
    )
    command.add_argument(
        "--lengths",
        type=integer(MIN_TOKENS, MAX_TOKENS),
        nargs="+",
        default=[4096],
        metavar="TOKENS",
        help="lengths of the texts (default 4096)",
    )
    add_texts(command)
    command.add_argument(
        "--questions",
        type=integer(1, 10**4),
        default=5,
        help="questions of a task about each text, where a text answers so many (default 5)",
    )
    command.add_argument(
        "--seed",
        type=integer(0, MAX_SEED - 1),
        default=1,
        help="seed of texts and questions (default 1)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: CHECKPOINT_tasks.json, in data/results for a shipped model, else in the "
        "current folder; until the run is complete, finished texts are kept in FILE.unfinished, "
        "and the same command goes on after them",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.data.corpus import load_corpus
    from hsa_mini.evaluation.long.rows import TextRow, summarise
    from hsa_mini.evaluation.long.run import LONG_TASKS, Plan, evaluate
    from hsa_mini.evaluation.results import check_replaceable
    from hsa_mini.evaluation.unfinished import Unfinished, describe_run
    from hsa_mini.files.whole_folder import fingerprint
    from hsa_mini.provenance import write_results
    from hsa_mini.tasks.long.ruler import IN_TEXT, WHOLE
    from hsa_mini.tasks.long.ruler_words import listed

    names = list(dict.fromkeys((arguments.tasks or ",".join(LONG_TASKS)).split(",")))
    check_choices("--tasks", names, LONG_TASKS)
    lengths = list(dict.fromkeys(arguments.lengths))
    path = results_path(arguments.out, arguments.checkpoint, "tasks")
    device = choose_device(arguments.device)
    if {*names} & {*WHOLE, *IN_TEXT}:
        listed()  # refuses if the package of RULER's words is missing
    corpus = load_corpus("validation", longer=arguments.longer)
    folder = checkpoint_folder(arguments.checkpoint)
    model = read_model("checkpoint", folder, device)
    measured = fingerprint(folder)
    check_replaceable("--out", path, measured)
    origin = {"checkpoint": measured, "corpus": corpus.identity}
    options = {key: getattr(arguments, key) for key in ("texts", "questions", "seed")}
    run = describe_run(device, **origin, **options, tasks=names, lengths=lengths)
    unfinished = Unfinished("--out", path, run)
    for tokens in lengths:
        kept = [row for row in unfinished.rows("rows", TextRow) if row.tokens == tokens]

        def keep(row: TextRow, kept=kept, tokens=tokens) -> None:
            kept.append(row)
            unfinished.add(tokens, rows=kept)

        rows = evaluate(
            model, corpus, Plan(tokens, **options), names, finished=list(kept), report=keep
        )
        unfinished.add(tokens, rows=rows)
        _print(summarise(rows))
    rows = unfinished.rows("rows", TextRow)
    write_results(path, device, **origin, **options, rows=rows, summary=summarise(rows))
    unfinished.remove()
    print(f"written to {path}")
    return 0


def _print(summaries: list[dict]) -> None:
    """Print one line per task."""
    print(
        f"{'tokens':>11}  {'task':<16} {'right':>9} {'accuracy':>8} {'95% interval':>15} "
        f"{'by text':>15} {'score':>6}  whole     controls"
    )
    for x in summaries:
        whole = f"{x['whole_right']}/{x['whole']}" if x["whole"] else ""
        controls = [f"{x[f'{name}_right']}/{x[name]} {name}" for name in ("absent", "shuffled")]
        print(
            f"{x['tokens']:>11,}  {x['task']:<16} {x['right']:>4}/{x['questions']:<4} "
            f"{x['accuracy']:>8.1%} {x['low']:>7.1%} {x['high']:>7.1%} "
            f"{x['cluster_low']:>7.1%} {x['cluster_high']:>7.1%} {x['score']:>6.3f}  {whole:<9} "
            f"{', '.join(controls)}",
            flush=True,
        )
