"""The folders of shipped data and of the user's cache, and how a single file is written."""

import os
import tempfile
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


def check_writable(name: str, path: Path, *, folder: bool = False) -> None:
    """Raise ValueError, which names the argument `name`, if nothing can be written to `path`.

    `path` is a file, or with `folder` a folder for files. The check leaves nothing behind.
    """
    try:
        if path.exists() and path.is_dir() != folder:
            raise OSError(0, "it is a file" if folder else "it is a folder")
        nearest = path if folder else path.absolute().parent
        while not nearest.exists():
            nearest = nearest.absolute().parent
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        kind = "folder to write into" if folder else "file that can be written"
        raise ValueError(f"{name}: got {path} ({error.strerror}), accepted is a {kind}") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears with all of its content or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, fresh = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(fresh, 0o644)
        os.replace(fresh, path)
    except BaseException:
        os.unlink(fresh)
        raise
