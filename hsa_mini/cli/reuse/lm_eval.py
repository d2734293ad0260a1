"""`lm-eval`: tasks of lm-eval that need no download, RULER's at any length of the text."""

import argparse
import logging
import os
from collections.abc import Collection
from pathlib import Path

from hsa_mini.cli.arguments import MAX_SEED, add_device, choose_device, integer, results_path
from hsa_mini.cli.models import read_model
from hsa_mini.paths import checkpoint_folder

MIN_TOKENS = 1024  # with fewer, some texts of RULER have no room for their sentences
MAX_TOKENS = 1 << 22  # with more, the samples of a length do not fit into one table of strings


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "lm-eval", help="run tasks of lm-eval that need no download (extra: eval)"
    )
    command.add_argument("checkpoint", help="a shipped model (mini) or a folder")
    command.add_argument(
        "--tasks",
        required=True,
        metavar="NAME,NAME...",
        help="niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe, ruler_fwe, or "
        "tasks of --include-path",
    )
    command.add_argument(
        "--include-path",
        "--include_path",
        type=Path,
        metavar="DIR",
        help="a folder with YAML files of your own tasks, whose texts are local files",
    )
    command.add_argument(
        "--lengths",
        type=integer(MIN_TOKENS, MAX_TOKENS),
        nargs="+",
        metavar="TOKENS",
        help="lengths of RULER's texts (default 4096)",
    )
    command.add_argument(
        "--samples",
        type=integer(1, 10**6),
        default=50,
        help="number of texts of each task, at each length (default 50)",
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=1, help="seed of RULER's texts (default 1)"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: CHECKPOINT_lm_eval.json, in data/results for a shipped model, else in the "
        "current folder; until the run is complete, finished tasks are kept in FILE.unfinished, "
        "and the same command goes on after them",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # read by the next imports
    from hsa_mini.evaluation.results import check_replaceable
    from hsa_mini.evaluation.unfinished import Unfinished, describe_run
    from hsa_mini.files.whole_folder import fingerprint
    from hsa_mini.integrations import tasks
    from hsa_mini.integrations.lm_eval import HSALM
    from hsa_mini.provenance import write_results
    from hsa_mini.tasks.long.ruler_words import listed

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are for authors of tasks
    names = list(dict.fromkeys(arguments.tasks.split(",")))
    parts = _parts(names, tasks.RULER, arguments.lengths)
    path = results_path(arguments.out, arguments.checkpoint, "lm_eval")
    device = choose_device(arguments.device)
    own = tasks.own_tasks(parts[0], arguments.include_path)
    if len(own) < len(names):
        listed()  # refuses if the package of RULER's words is missing
    folder = checkpoint_folder(arguments.checkpoint)
    model = read_model("checkpoint", folder, device)
    measured = fingerprint(folder)
    check_replaceable("--out", path, measured)
    options = {"samples": arguments.samples, "seed": arguments.seed}
    origin = {
        "checkpoint": measured,
        "libraries": tasks.libraries(),
        "texts": {name: tasks.digest(task) for name, task in own.items()},
    }
    run = describe_run(device, **origin, **options, tasks=names, lengths=list(parts))
    unfinished = Unfinished("--out", path, run)
    rows = unfinished.rows("rows", tasks.TaskRow)
    _print_rows(rows)
    lm = HSALM(model)
    for tokens, of_length in parts.items():
        kept = [row for row in rows if row.tokens == tokens]
        for name in of_length:
            if name in {row.task for row in kept}:
                continue
            task = own.get(name) or tasks.ruler_task(name, tokens, **options)
            made = tasks.measure(lm, task, tokens=tokens, **options)
            _print_rows(made)
            kept += made
            unfinished.add(tokens, rows=kept)
    write_results(path, device, **origin, rows=unfinished.rows("rows", tasks.TaskRow))
    unfinished.remove()
    print(f"written to {path}")
    return 0


def _parts(
    names: list[str], ruler: Collection[str], lengths: list[int] | None
) -> dict[int, tuple[str, ...]]:
    """The tasks to run at each length, those with texts of their own at length 0."""
    own = tuple(name for name in names if name not in ruler)
    if lengths and len(own) == len(names):
        raise ValueError(
            f"--lengths: got {lengths[0]}, accepted are lengths for tasks of RULER only"
        )
    others = tuple(name for name in names if name in ruler)
    return {0: own} | dict.fromkeys(lengths or (4096,), others)


def _print_rows(rows) -> None:
    """Print one line per metric as soon as it is there."""
    for row in rows:
        length = f"{row.tokens:,} tokens" if row.tokens else "own texts"
        error = "" if row.stderr is None else f" ± {row.stderr:.4f}"
        print(
            f"{length:>16}  {row.task:<16} {row.metric} {row.value:.4f}{error}  "
            f"({row.samples} samples, the longest of {row.longest:,} tokens)",
            flush=True,
        )
