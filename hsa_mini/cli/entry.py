"""The parser of all commands.

Each command is a module with `add_parser(commands)` and `run(arguments)`. Building the parser
imports no torch; a command imports what it needs when it runs.
"""

from hsa_mini.cli import demo, evaluate, fetch, generate, lab, perplexity, plan, train
from hsa_mini.cli.arguments import Parser, Version
from hsa_mini.cli.measure import tasks
from hsa_mini.cli.own_text import ask, index
from hsa_mini.cli.reuse import consolidate, convert, lm_eval

COMMANDS = (
    demo,
    generate,
    index,
    ask,
    train,
    consolidate,
    convert,
    evaluate,
    perplexity,
    tasks,
    lm_eval,
    lab,
    plan,
    fetch,
)  # in the order of --help


def build_parser() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="hsa-mini",
        description=(
            "Hierarchical Sparse Attention: find needles, continue a text, ask about it, train, "
            "evaluate, plan."
        ),
    )
    parser.add_argument("--version", action=Version, help="show the versions in use and exit")
    commands = parser.add_subparsers(
        dest="name",
        required=True,
        metavar="demo|generate|index|ask|train|consolidate|convert|eval|perplexity|tasks|lm-eval|lab|"
        "plan|fetch",
    )
    for module in COMMANDS:
        command = module.add_parser(commands)
        command.set_defaults(command=module.run)
    return parser
