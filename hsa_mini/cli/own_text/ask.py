"""`ask`: ask an index one question, or one after the other."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from hsa_mini.cli.arguments import add_device, add_json, check_json, choose_device, integer
from hsa_mini.cli.models import read_model
from hsa_mini.cli.report import write_json

MAX_CHUNKS = 64
NOTE = (
    "note: the model was trained on questions such as `What is the secret code of QXZB?`; "
    "what it says to any other is a likely text, not an answer (see --retrieve-only)"
)


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "ask",
        help="ask about a text that `index` has read",
        description="Ask about a text that `index` has read. Without QUESTION, questions are read "
        "line by line from the terminal or from standard input; Ctrl-D ends this.",
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="an index")
    command.add_argument("question", nargs="?", metavar="QUESTION")
    command.add_argument(
        "--retrieve-only", action="store_true", help="only show the chunks that a phrase finds"
    )
    command.add_argument(
        "--chunks",
        type=integer(0, MAX_CHUNKS),
        default=3,
        metavar="N",
        help="how many retrieved chunks to show (default 3)",
    )
    command.add_argument(
        "--checkpoint", help="a shipped model or a folder (default: the one that made the index)"
    )
    add_json(command)
    add_device(command)
    command.parse_known_args = partial(_with_late_question, command.parse_known_args)
    return command


def _with_late_question(parse: Callable, *arguments) -> tuple[argparse.Namespace, list[str]]:
    """What `parse` finds, with QUESTION also behind an option, where argparse of Python 3.11 and
    3.12 does not take it.
    """
    found, rest = parse(*arguments)
    if rest and found.question is None and not rest[0].startswith("-"):
        found.question = rest.pop(0)
    return found, rest


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.index.ask import ask, check_question, find
    from hsa_mini.index.stored import check_model, read_index, to_read

    folder = arguments.folder
    check_json(arguments.json)
    if arguments.question is not None:
        check_question(arguments.question)
    elif arguments.json not in (None, "-"):
        raise ValueError("--json: got a file without QUESTION, accepted is -")
    index = read_index(folder, choose_device(arguments.device))
    if not index.complete:
        raise ValueError(
            f"DIR: {folder} has read {index.memory.position:,} of {to_read(index.text):,} tokens; "
            "accepted is a complete index, which the same `hsa-mini index` makes of it"
        )
    landmarks = index.memory.chunks.landmarks
    given = arguments.checkpoint or index.checkpoint
    model = read_model("--checkpoint", given, landmarks.device, dtype=landmarks.dtype)
    check_model(index, model, folder)
    look = find if arguments.retrieve_only else ask
    for question in [arguments.question] if arguments.question else _questions():
        reply = look(model, index, question, chunks=arguments.chunks)
        if arguments.json != "-":
            _show(reply)
        write_json(arguments.json, reply.to_json())
    return 0


def _questions() -> Iterator[str]:
    """Questions from the terminal, with line editing, or the lines of standard input.

    Empty lines are left out. On a terminal, one that is refused can be asked again.
    """
    from hsa_mini.index.ask import MAX_CHARACTERS, check_question

    if not sys.stdin.isatty():
        while line := sys.stdin.readline(MAX_CHARACTERS + 2):
            if line.strip():
                yield line.strip()
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # `input` edits lines with it
    while True:
        try:
            line = input("? ").strip()
        except EOFError:
            print()
            return
        try:
            if line:
                check_question(line)
                yield line
        except ValueError as error:
            print(error, file=sys.stderr)


def _show(reply) -> None:
    """Print an answer and its chunks."""
    if reply.answer is not None:
        print(f"answer     {reply.answer}")
    for chunk in reply.chunks:
        lines = f"{chunk.line}" + f"-{chunk.last_line}" * (chunk.last_line > chunk.line)
        text = chunk.text.strip("\n").replace("\n", "\n  ")
        print(f"\n{chunk.file}:{lines}   score {chunk.score:.3f}, chunk {chunk.chunk}\n  {text}")
    print(f"\n{reply.seconds:.2f} s")
    if reply.answer is not None and not reply.trained:
        print(NOTE, file=sys.stderr)
