"""The folders of shipped data, of results and of the user's cache, and the shipped models by name.

The data lies in `data/` of a checkout. A wheel holds a part of it, as `hsa_mini/shipped/`.
"""

import logging
import os
from pathlib import Path

from hsa_mini.checks import quoted

log = logging.getLogger(__name__)

RANKS_FILE = "tokenizer.tiktoken"  # every data folder has it
TOKENIZER_FILE = "tokenizer.json"  # of Hugging Face
TOKENIZER_CONFIG = "tokenizer_config.json"  # which goes with it
INSTALLED = "shipped"  # the data folder inside the package of a wheel


def data_dir() -> Path:
    """The folder with tokenizer ranks and checkpoints.

    The environment variable `HSA_MINI_DATA` overrides it. Otherwise it is inside the package if a
    wheel has put it there, and `data/` of the checkout if not: `data/` beside an installed package
    belongs to somebody else. Raises FileNotFoundError if the folder has no tokenizer ranks, and
    ValueError for a relative path.
    """
    folder = _given("HSA_MINI_DATA") or _installed() or _package().parent / "data"
    if not (folder / RANKS_FILE).is_file():
        raise FileNotFoundError(
            f"HSA_MINI_DATA: {folder} has no {RANKS_FILE}; set it to the data/ folder of a checkout"
        )
    return folder


def results_dir() -> Path:
    """The folder for results of shipped models: `results/` of the data folder, or the current
    folder if the data folder belongs to an installed package. Raises as `data_dir`.
    """
    folder = data_dir()
    return Path() if folder == _installed() else folder / "results"


def shipped_models() -> dict[str, Path]:
    """The folders of the models that come with the package, by name. Raises as `data_dir`."""
    home = data_dir() / "checkpoints"
    if not home.is_dir():
        return {}
    return {path.name: path for path in sorted(home.iterdir()) if path.is_dir()}


def checkpoint_folder(given: str | Path) -> Path:
    """The folder of a model that is given by its name or by its path.

    A string that is exactly the name of a shipped model means that model, whatever the current
    folder holds; a warning is logged if this holds something of the same name. Every other string,
    such as "./mini", and every `Path` is a path.
    """
    if isinstance(given, Path) or given != Path(given).name:
        return Path(given)
    folder = shipped_models().get(given)
    if folder and Path(given).exists():
        log.warning("%s is the shipped model; write ./%s for the folder that is here", given, given)
    return folder or Path(given)


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


def _package() -> Path:
    """The folder of this package."""
    return Path(__file__).resolve().parent


def _installed() -> Path | None:
    """The data folder that a wheel has put inside the package, or None in a checkout."""
    folder = _package() / INSTALLED
    return folder if folder.is_dir() else None


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
