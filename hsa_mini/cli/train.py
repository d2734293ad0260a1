"""`train`: train a model from random weights, or continue a run that was cut off."""

import argparse
import json
import logging
import signal
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from hsa_mini.cli.arguments import (
    MAX_SEED,
    MAX_STEPS,
    add_device,
    add_model,
    choose_device,
    chosen_model,
    integer,
    number,
)
from hsa_mini.files.whole_file import check_writable

if TYPE_CHECKING:
    from hsa_mini.training.parallel.mesh import MeshSizes

MAX_BATCH = 1 << 16  # sequences; more is a typing error


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "train",
        help="train a model from random weights, or continue a run that was cut off",
        description="Train a model from random weights, or continue a run that was cut off. Ctrl-C "
        "and SIGTERM save the state and stop; a second Ctrl-C stops without saving.",
    )
    add_model(command, "nano, mini, mini_moe, mini_any, mini_any_moe or small_moe")
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
    add_text(command)
    add_recipe(command)
    command.add_argument(
        "--mesh",
        metavar="dp=A,cp=B,ep=C",
        help="train on the A x B x C processes that torchrun has started: the rows of a batch are "
        "divided by A and C, each row by B, the experts by C (a size left out is 1)",
    )
    command.add_argument(
        "--tensorboard", action="store_true", help="write curves for TensorBoard to DIR/tensorboard"
    )
    command.add_argument(
        "--restart",
        action="store_true",
        help="remove the states that the folder holds, and begin at step 0",
    )
    add_device(command)
    return command


def add_text(command: argparse.ArgumentParser) -> None:
    """Add the arguments that say what to train on."""
    command.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="train on these files, folders and patterns ('x/*.txt'): text, .jsonl and .parquet "
        "with a column `text`, or .bin with token ids (default: the course's text)",
    )
    command.add_argument(
        "--tokenizer", metavar="FILE", help="ranks of tiktoken, or a tokenizer.json (with --data)"
    )


def add_recipe(command: argparse.ArgumentParser) -> None:
    """Add the arguments that replace values of the recipe."""
    command.add_argument("--learning-rate", type=number(0, 1000), help="the largest one")
    command.add_argument("--batch", type=integer(1, MAX_BATCH), help="sequences read at once")
    command.add_argument(
        "--accumulate",
        type=integer(1, MAX_BATCH),
        metavar="N",
        help="add the gradients of N batches in one step",
    )
    command.add_argument(
        "--eval-every",
        type=integer(0, MAX_STEPS),
        metavar="N",
        help="measure the loss on held-out text every N steps (default 0: never)",
    )
    command.add_argument(
        "--set",
        type=change,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="replace any value: model.FIELD, train.FIELD, data.FIELD, stage.FIELD in every stage, "
        "or stage.N.FIELD in one, counted from 0; VALUE is JSON or a plain word",
    )


def change(text: str) -> tuple[str, Any]:
    """The argparse type of `--set`: NAME=VALUE -> the name and the value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, accepted is NAME=VALUE")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def changes(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """The values that the arguments replace, in the order in which they are replaced."""
    given = {
        "data.files": arguments.data,
        "data.tokenizer": arguments.tokenizer,
        "train.learning_rate": arguments.learning_rate,
        "stage.batch": arguments.batch,
        "train.accumulate": arguments.accumulate,
        "train.eval_every": arguments.eval_every,
    }
    return [*((name, x) for name, x in given.items() if x is not None), *arguments.set]


def chosen_mesh(arguments: argparse.Namespace) -> "MeshSizes | None":
    """The mesh that was asked for. Raises ValueError, also if torchrun started several processes
    and there is none.
    """
    from hsa_mini.training.parallel.mesh import MeshSizes
    from hsa_mini.training.parallel.processes import started_processes

    started = started_processes()
    if arguments.mesh is None and started > 1:
        raise ValueError(
            f"--mesh: got none for the {started} processes started, accepted are sizes of dp, cp "
            f"and ep whose product is {started}, such as dp={started}"
        )
    return None if arguments.mesh is None else MeshSizes.parse(arguments.mesh)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status.

    SIGTERM saves the state and ends with status 0, Ctrl-C saves it and raises KeyboardInterrupt.
    """
    with StopSignals() as stop, ExitStack() as stack:
        from hsa_mini.training.own.settings import load_settings
        from hsa_mini.training.own.tensorboard import tensorboard
        from hsa_mini.training.parallel.processes import own_device, process_rank
        from hsa_mini.training.run import train

        device = choose_device(arguments.device)
        settings = load_settings(chosen_model(arguments), changes(arguments))
        folder = arguments.run or Path("runs") / settings.name
        check_writable("--run", folder, folder=True)
        options = {}
        mesh = chosen_mesh(arguments)
        first = mesh is None or process_rank() == 0
        if not first:  # the first process says what concerns all
            logging.getLogger("hsa_mini").setLevel(logging.ERROR)
        # FSDP warns of in-place changes to views that modules return. Nothing here makes any.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        if arguments.tensorboard and first:
            options["on_log"] = stack.enter_context(tensorboard(folder / "tensorboard"))
        train(
            settings,
            run=folder,
            device=device if mesh is None else own_device(device),
            mesh=mesh,
            steps=arguments.steps,
            seed=arguments.seed,
            restart=arguments.restart,
            stop=stop,
            on_stop=stop.stopped,
            **options,
        )
    if stop.stopped_after is not None:
        if first:
            print(f"stopped after step {stop.stopped_after}; the same command goes on from there")
        if stop.received == signal.SIGINT:
            raise KeyboardInterrupt
    elif first:
        print(f"the model is in {folder / 'final'}, the log in {folder / 'log.csv'}")
    return 0


class StopSignals:
    """SIGTERM and Ctrl-C as an answer to the question whether training should stop.

    Before the first question nothing has to be saved: SIGTERM raises SystemExit(0), and Ctrl-C
    raises KeyboardInterrupt. Later the first signal is the answer. A second SIGTERM changes
    nothing; a second Ctrl-C raises KeyboardInterrupt, also while the state is being saved.

    received: the first signal, of this process or of another one of its mesh. stopped_after: the
    step after which the run stopped.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped_after: int | None = None
        self._asked = False

    def __call__(self, step: int) -> int:
        self._asked = True
        return self.received or 0

    def stopped(self, step: int, received: int) -> None:
        """Note that a run has stopped after `step` because of a signal."""
        self.stopped_after = step
        self.received = received

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as for a job of `nohup`
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for received, handler in self._before.items():
            signal.signal(received, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        second = self.received is not None
        self.received = self.received or number
        if number == signal.SIGINT and (second or not self._asked):
            raise KeyboardInterrupt
        if number == signal.SIGTERM and not self._asked:
            raise SystemExit(0)
