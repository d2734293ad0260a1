"""The command line `python -m hsa_mini COMMAND`: the parser of all commands, and `main`.

Each command is a module with `add_parser(commands)` and `run(arguments)`. Building the parser
imports no torch; a command imports what it needs when it runs.
"""

import logging
import sys

from hsa_mini.cli import demo, evaluate, fetch, generate, lab, perplexity, plan, train
from hsa_mini.cli.arguments import Parser

COMMANDS = (demo, generate, train, evaluate, perplexity, lab, plan, fetch)  # in the order of --help


def main(words: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 2: refused, with one line on standard error that says why. 130: interrupted by Ctrl-C.
    Other exceptions are faults of this package and are raised.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    arguments = build_parser().parse_args(words)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")  # escape what the terminal cannot show
    try:
        return arguments.command(arguments)
    except (
        ValueError,
        OSError,
        ImportError,
        FloatingPointError,
        MemoryError,
        RuntimeError,
    ) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of ours; torch reports a lack of memory as a RuntimeError too
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hsa-mini {arguments.name}: error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing half-written was left behind", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="hsa-mini",
        description=(
            "Hierarchical Sparse Attention: find needles, continue a text, train, evaluate, plan."
        ),
    )
    commands = parser.add_subparsers(
        dest="name", required=True, metavar="demo|generate|train|eval|perplexity|lab|plan|fetch"
    )
    for module in COMMANDS:
        command = module.add_parser(commands)
        command.set_defaults(command=module.run)
    return parser
