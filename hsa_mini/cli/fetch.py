"""`fetch`: download the corpora into the cache and count their tokens."""

import argparse
import sys


def add_parser(commands) -> argparse.ArgumentParser:
    """Add the command, which has no arguments; returns its parser."""
    return commands.add_parser(
        "fetch", help="fetch the corpora (plays and poems, code, documentation) into the cache"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from hsa_mini.data.archives import fetch_archives
    from hsa_mini.data.corpus import SPLITS, load_corpus

    try:
        fetch_archives()
    except OSError as error:  # without archives, other text serves, and a warning says so
        print(error, file=sys.stderr)
    for split in SPLITS:
        print(f"{split:>10}: {len(load_corpus(split)):,} tokens")
    return 0
