"""The command line: `python -m hsa_mini COMMAND`, one module per command."""

from hsa_mini.cli.entry import main

__all__ = ["main"]
