"""`train`: train a model from random weights, or continue a run that was cut off."""

import argparse
from pathlib import Path

from hsa_mini.cli.arguments import MAX_SEED, MAX_STEPS, add_device, choose_device, integer
from hsa_mini.files.whole_file import check_writable


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "train", help="train a model from random weights, or continue a run that was cut off"
    )
    command.add_argument("preset", help="which model: nano, mini, mini_moe or small_moe")
    command.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="folder for states, log and final model (default runs/PRESET)",
    )
    command.add_argument(
        "--steps", type=integer(1, MAX_STEPS), help="number of steps (default: the recipe's)"
    )
    command.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="seed of weights and data (default 0)"
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.training.trainer import train

    folder = arguments.run or Path("runs") / arguments.preset
    check_writable("--run", folder, folder=True)
    device = choose_device(arguments.device)
    train(arguments.preset, run=folder, device=device, steps=arguments.steps, seed=arguments.seed)
    print(f"the model is in {folder / 'final'}, the log in {folder / 'log.csv'}")
    return 0
