"""`consolidate`: make the model of a training run from the parts that its processes saved."""

import argparse
from pathlib import Path


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "consolidate",
        help="make a model from the state of a training run",
        description="Make a model from the newest whole state of a training run, or from one of "
        "its states, whether one process saved it or many. The weights keep their precision.",
    )
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its step-N")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder for the model")
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.checkpoint.weights import INDEX, WEIGHTS
    from hsa_mini.files.whole_file import check_writable
    from hsa_mini.files.whole_folder import check_replaceable
    from hsa_mini.training.parallel.consolidate import read_trained

    check_writable("out", arguments.out, folder=True)
    check_replaceable(arguments.out, {WEIGHTS, INDEX})
    trained = read_trained(arguments.run)
    trained.model.save_pretrained(arguments.out, texts=trained.texts)
    print(f"the model after {trained.step} steps is in {arguments.out}")
    return 0
