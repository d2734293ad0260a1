"""`train`: train a model from random weights, or continue a run that was cut off."""

import argparse
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Self

from hsa_mini.cli.arguments import MAX_SEED, MAX_STEPS, add_device, choose_device, integer
from hsa_mini.files.whole_file import check_writable


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "train",
        help="train a model from random weights, or continue a run that was cut off",
        description="Train a model from random weights, or continue a run that was cut off. Ctrl-C "
        "and SIGTERM save the state and stop; a second Ctrl-C stops without saving.",
    )
    command.add_argument(
        "preset", help="which model: nano, mini, mini_moe, mini_any, mini_any_moe, small_moe"
    )
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
    command.add_argument(
        "--restart",
        action="store_true",
        help="remove the states that the folder holds, and begin at step 0",
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    SIGTERM saves the state and ends with status 0, Ctrl-C saves it and raises KeyboardInterrupt.
    """
    folder = arguments.run or Path("runs") / arguments.preset
    with StopSignals() as stop:
        from hsa_mini.training.run import train

        check_writable("--run", folder, folder=True)
        train(
            arguments.preset,
            run=folder,
            device=choose_device(arguments.device),
            steps=arguments.steps,
            seed=arguments.seed,
            restart=arguments.restart,
            stop=stop,
        )
    if stop.stopped_after is not None:
        print(f"stopped after step {stop.stopped_after}; the same command goes on from there")
        if stop.received == signal.SIGINT:
            raise KeyboardInterrupt
        return 0
    print(f"the model is in {folder / 'final'}, the log in {folder / 'log.csv'}")
    return 0


class StopSignals:
    """SIGTERM and Ctrl-C as an answer to the question whether training should stop.

    Before the first question nothing has to be saved: SIGTERM raises SystemExit(0), and Ctrl-C
    raises KeyboardInterrupt. Later the first signal makes the answer True. A second SIGTERM changes
    nothing; a second Ctrl-C raises KeyboardInterrupt, also while the state is being saved.

    received: the first signal. stopped_after: the step at which the answer was True.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped_after: int | None = None
        self._asked = False

    def __call__(self, step: int) -> bool:
        self._asked = True
        if self.received is not None:
            self.stopped_after = step
        return self.received is not None

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job of `nohup`
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        second = self.received is not None
        self.received = self.received or number
        if number == signal.SIGINT and (second or not self._asked):
            raise KeyboardInterrupt
        if number == signal.SIGTERM and not self._asked:
            raise SystemExit(0)
