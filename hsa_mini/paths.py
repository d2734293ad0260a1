"""The folders of shipped data and of the user's cache."""

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder with tokenizer ranks, checkpoints and results.

    The environment variable `HSA_MINI_DATA` overrides it. Raises FileNotFoundError if the folder
    does not exist.
    """
    folder = Path(os.environ.get("HSA_MINI_DATA", Path(__file__).resolve().parent.parent / "data"))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"HSA_MINI_DATA: no folder {folder}; set it to the data/ folder of a checkout"
        )
    return folder


def cache_dir() -> Path:
    """The folder for downloaded archives and encoded corpora (`HSA_MINI_CACHE` overrides it)."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hsa-mini"
    return Path(os.environ.get("HSA_MINI_CACHE", default))
