"""The types of command-line arguments, and the checks that need more than the argument itself.

An argument that is refused ends the command with status 2 and one line on standard error, which
names the argument, what was given and what is accepted.
"""

import argparse
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from hsa_mini.cli.report import one_line
from hsa_mini.files.whole_file import check_writable
from hsa_mini.paths import results_dir, shipped_models

# Limits of other packages. The parser cannot import those, because they load torch; a test checks
# that the numbers are the same.
MIN_DEMO_TOKENS = 1024  # `evaluation/demo.py`
MIN_HAYSTACK = 64  # tokens; `evaluation/demo.py`
PERPLEXITY_TARGETS = 512  # `evaluation/perplexity.py`
MAX_DISTRACTORS = 10_000  # `tasks/forms.py`
TASKS = ("s_niah", "mq_niah", "vt")  # `tasks/forms.py`

MAX_SEED = (1 << 32) - 1
MAX_STEPS = 10**9
MAX_JOBS = 64


Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line, without the usage text. Options are not abbreviated,
    because an option that comes later must not change what an older command means.
    """

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str):
        message = one_line(message.removeprefix("argument "))
        self.exit(2, f"{self.prog}: error: {message}\n")


class Version(argparse.Action):
    """Prints the versions of this package, torch and Triton, without loading them, and exits."""

    def __init__(self, option_strings, dest, **options) -> None:
        super().__init__(option_strings, dest, nargs=0, **options)

    def __call__(self, parser, *_) -> None:
        from importlib.metadata import PackageNotFoundError, version

        found = []
        for name in ("hsa-mini", "torch", "triton"):
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                found.append(f"{name} (not installed)")
        print(", ".join(found))
        parser.exit()


def integer(least: int, most: int) -> Callable[[str], int]:
    """The argparse type of integers from `least` to `most`."""
    return _in_range(int, "an integer", least, most)


def number(least: float, most: float) -> Callable[[str], float]:
    """The argparse type of numbers from `least` to `most`."""
    return _in_range(float, "a number", least, most)


def _in_range(
    kind: Callable[[str], Number], accepted: str, least: float, most: float
) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text[:80]!r}, accepted is {accepted}") from None
        if not least <= value <= most:  # nan is in no range
            raise argparse.ArgumentTypeError(f"got {value}, accepted is {least} to {most}")
        return value

    return parse


def add_model(command: argparse.ArgumentParser, presets: str) -> None:
    """Add the name of a preset, and --config; `chosen_model` reads them."""
    command.add_argument(
        "preset", nargs="?", help=f"which model: {presets}, or a configuration file"
    )
    command.add_argument(
        "--config", metavar="FILE.json", help="a configuration file (see hsa_mini/README.md)"
    )


def chosen_model(arguments: argparse.Namespace) -> str:
    """The preset or the configuration file. Raises ValueError unless there is exactly one."""
    given = [x for x in (arguments.preset, arguments.config) if x is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise ValueError(f"preset: got {got[:80]}, accepted is one preset or configuration file")
    return given[0]


def add_device(command: argparse.ArgumentParser) -> None:
    """Add --device; `choose_device` checks it."""
    command.add_argument(
        "--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU if there is one)"
    )


def add_texts(command: argparse.ArgumentParser) -> None:
    """Add --texts and --longer: how many texts are read, and of which corpus."""
    command.add_argument(
        "--texts", type=integer(1, 10**4), default=20, help="texts of each length (default 20)"
    )
    command.add_argument(
        "--longer",
        action="store_true",
        help="take real text from the longer corpus (see fetch --longer)",
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Add --json; `check_json` checks it and `report.write_json` writes to it."""
    command.add_argument(
        "--json",
        metavar="PATH|-",
        help="write the result as JSON to a file, or to standard output (-)",
    )


def check_json(target: str | None) -> None:
    """Raise ValueError unless --json was left out, is standard output, or can be written."""
    if target not in (None, "-"):
        check_writable("--json", Path(target))


def check_choices(name: str, given: list[str], accepted: Collection[str]) -> None:
    """Raise ValueError for the first given word that is not an accepted one."""
    for word in given:
        if word not in accepted:
            raise ValueError(f"{name}: got {word[:80]!r}, accepted are {', '.join(accepted)}")


def results_path(out: Path | None, checkpoint: str, ending: str) -> Path:
    """The file for the results of a command on a checkpoint: `out`, if it is given.

    Otherwise NAME_ENDING.json: in `results_dir()` if `checkpoint` is the name of a shipped model,
    else in the current folder, where NAME is that of the checkpoint's folder, or of the run whose
    `final` it is. Raises ValueError if the file cannot be written.
    """
    path = out
    if path is None and checkpoint in shipped_models():
        path = results_dir() / f"{checkpoint}_{ending}.json"
    elif path is None:
        folder = Path(checkpoint).resolve()
        name = folder.parent.name if folder.name == "final" else folder.name
        path = Path(f"{name}_{ending}.json")
    check_writable("--out", path)
    return path


def choose_device(name: str):
    """The torch device with this name; "auto" is a GPU if there is one, else the CPU.

    Says so in one line on standard error if the kernels are not made for the GPU. Raises ValueError
    for a device that is not there or not supported.
    """
    import torch

    from hsa_mini.ops.choice import runs_kernels

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count()
    accepted = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in accepted:
        apple = "; Apple's GPUs are not supported" if name == "mps" else ""
        raise ValueError(f"--device: got {name!r}, accepted here are {', '.join(accepted)}{apple}")
    device = torch.device(name)
    if name != "cpu" and not runs_kernels(device):
        print(
            "the Triton kernels are for NVIDIA GPUs from Ampere on; on this GPU PyTorch does "
            "their work",
            file=sys.stderr,
        )
    return device
