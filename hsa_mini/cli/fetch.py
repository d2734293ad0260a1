"""`fetch`: download the corpora into the cache and count their tokens."""

import argparse
import sys


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command and its argument; returns its parser."""
    command = commands.add_parser(
        "fetch", help="fetch the corpora (plays and poems, code, documentation) into the cache"
    )
    command.add_argument(
        "--longer",
        action="store_true",
        help="also the longer corpus: code and documentation of 32 packages (303 MB)",
    )
    return command


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.data.archives import fetch_archives
    from hsa_mini.data.corpus import SPLITS, load_corpus
    from hsa_mini.data.longer_archives import LONGER

    try:
        fetch_archives()
        if arguments.longer:
            fetch_archives((*LONGER["train"], *LONGER["validation"]))
    except OSError as error:  # without archives, other text serves, and a warning says so
        print(error, file=sys.stderr)
    for split in SPLITS:
        print(f"{split:>10}: {len(load_corpus(split)):,} tokens")
    if arguments.longer:
        for split in SPLITS:
            tokens = len(load_corpus(split, longer=True))
            print(f"{split:>10}: {tokens:,} tokens of the longer corpus")
    return 0
