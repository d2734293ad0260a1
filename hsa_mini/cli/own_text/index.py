"""`index`: read a book, or a folder of text and code, once, so that `ask` can ask about it."""

import argparse
import sys
import time
from pathlib import Path

from hsa_mini.cli.arguments import add_device, choose_device
from hsa_mini.cli.models import read_model
from hsa_mini.files.whole_file import check_writable
from hsa_mini.paths import checkpoint_folder, shipped_models


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its arguments; returns its parser."""
    command = commands.add_parser(
        "index",
        help="read a book or a folder of text and code once, for `ask`",
        description="Read a UTF-8 text file, or all text files in a folder, into the index DIR. "
        "The same command goes on after Ctrl-C or a crash, and reads only what is new if text was "
        "added at the end. Hidden files, links and binary files are skipped.",
    )
    command.add_argument("text", metavar="TEXT", help="a UTF-8 text file, or a folder")
    command.add_argument(
        "folder", type=Path, metavar="DIR", help="the index: new, or to be completed"
    )
    command.add_argument(
        "--checkpoint", default="mini", help="a shipped model or a folder (default mini)"
    )
    command.add_argument(
        "--restart", action="store_true", help="read everything anew, and replace the index"
    )
    add_device(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.index.build import build_index
    from hsa_mini.index.stored import check_folder

    folder = arguments.folder
    if not arguments.text:  # as a path, it would be the current folder
        raise ValueError("TEXT: got '', accepted is a UTF-8 text file, or a folder")
    check_writable("DIR", folder, folder=True)
    check_folder(folder)
    model = read_model("--checkpoint", arguments.checkpoint, choose_device(arguments.device))
    name = arguments.checkpoint
    if name not in shipped_models():
        name = str(checkpoint_folder(name).resolve())
    began = time.perf_counter()
    try:
        index, read, skipped = build_index(
            model, Path(arguments.text), folder, checkpoint=name, restart=arguments.restart
        )
    except KeyboardInterrupt:
        print("\nwhat was read is kept: the same command goes on from there", file=sys.stderr)
        raise
    seconds = time.perf_counter() - began
    files = len(index.text.names)
    rest = f"; {skipped} binary files, links or devices were skipped" if skipped else ""
    print(
        f"{folder} holds {len(index.text):,} tokens of {files} file{'s' * (files != 1)}{rest}\n"
        f"read {read:,} tokens in {seconds:.1f} s ({read / seconds:,.0f} tokens/s)"
    )
    return 0
