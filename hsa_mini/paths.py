"""The folders of shipped data and of the user's cache."""

import os
from pathlib import Path

from hsa_mini.checks import quoted

RANKS_FILE = "tokenizer.tiktoken"  # every data folder has it


def data_dir() -> Path:
    """The folder with tokenizer ranks, checkpoints and results.

    The environment variable `HSA_MINI_DATA` overrides it. Raises FileNotFoundError if the folder
    has no tokenizer ranks, and ValueError for a relative path.
    """
    folder = _given("HSA_MINI_DATA") or Path(__file__).resolve().parent.parent / "data"
    if not (folder / RANKS_FILE).is_file():
        raise FileNotFoundError(
            f"HSA_MINI_DATA: {folder} has no {RANKS_FILE}; set it to the data/ folder of a checkout"
        )
    return folder


def cache_dir() -> Path:
    """The folder for downloaded archives and encoded corpora.

    It is `HSA_MINI_CACHE`, or hsa-mini in `XDG_CACHE_HOME` or in ~/.cache. Raises ValueError for a
    relative `HSA_MINI_CACHE`, and if there is no home folder.
    """
    if given := _given("HSA_MINI_CACHE"):
        return given
    # The XDG specification: an empty or relative value is ignored.
    for folder in (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"):
        if os.path.isabs(folder := os.path.expanduser(folder)):
            return Path(folder, "hsa-mini")
    raise ValueError("HSA_MINI_CACHE: not set, and there is no home folder; set it to a folder")


def _given(variable: str) -> Path | None:
    """The folder that an environment variable names, or None if the variable is empty or not set.

    A relative path would mean another folder in every working directory, so it is refused.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    folder = Path(os.path.expanduser(value))
    if not folder.is_absolute():
        raise ValueError(f"{variable}: got {quoted(value)}, accepted is an absolute path, or ~/...")
    return folder
