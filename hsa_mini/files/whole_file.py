"""A single file, written as a whole: a crash or a power loss leaves the old one or the new one.

The content is written under a temporary name, synced, and renamed. Three kinds of path cannot be
replaced by a rename: devices, pipes and other special files; mount points; and files in a folder
where this user may not rename them. They are written in place.
"""

import os
import stat
import tempfile
from pathlib import Path

from hsa_mini.files.disk import (
    copy_access,
    has_access,
    make_folder,
    may_rename,
    sync,
    temporary_sibling,
)


def write_file(path: Path, content: bytes) -> None:
    """Write a file. It appears with all of its content or not at all, if it can be renamed.

    Symbolic links are followed. A file that is there keeps its mode and owner; a new file has the
    mode that the umask gives. Missing folders are made. Raises OSError.
    """
    target, in_place = _destination(path)
    if in_place:
        _write_in_place(target, content)
        return
    make_folder(target.parent)
    with temporary_sibling(target, folder=False) as fresh:
        with fresh.open("wb") as file:
            file.write(content)
        copy_access(target, fresh)
        sync(fresh)
        os.replace(fresh, target)
        sync(target.parent)


def check_writable(name: str, path: Path, *, folder: bool = False) -> None:
    """Raise ValueError, which names the argument `name`, if nothing can be written to `path`.

    `path` is a file for `write_file`, or with `folder` a folder for files. The check leaves nothing
    behind.
    """
    try:
        if folder:
            _try_folder(path)
        else:
            _try_file(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        kind = "folder to write into" if folder else "file that can be written"
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{name}: got {path} ({reason}), accepted is a {kind}") from None


def _destination(path: Path) -> tuple[Path, bool]:
    """The file that is really written, and whether it is written in place."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path)), False
    if not stat.S_ISREG(status.st_mode) or _is_descriptor(path):
        return path, True
    target = Path(os.path.realpath(path))
    return target, not may_rename(target)


def _is_descriptor(path: Path) -> bool:
    """Whether the path leads to an open file of a process, as /dev/stdout does."""
    while path.is_symlink():
        folder = os.path.realpath(path.parent)
        if folder.startswith("/proc/"):
            return True
        path = Path(folder, os.readlink(path))
    return False


def _write_in_place(path: Path, content: bytes) -> None:
    """Write over what is there. An open file of a process (/dev/stdout) is appended to."""
    how = os.O_APPEND if _is_descriptor(path) else os.O_TRUNC
    handle = os.open(path, os.O_WRONLY | how)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.fsync(handle)


def _try_file(path: Path) -> None:
    """Do what `write_file` will do, as far as it leaves nothing behind; raise OSError."""
    target, in_place = _destination(path)
    if target.is_dir():
        raise OSError(0, "it is a folder")
    if not in_place:
        _try_folder(target.parent)
    elif not has_access(target, os.W_OK):
        raise OSError(0, "it cannot be written")
    elif target.is_file():
        os.close(os.open(target, os.O_WRONLY))


def _try_folder(path: Path) -> None:
    """Make a temporary file in the folder, or in its nearest parent that exists; raise OSError."""
    nearest = path.absolute()
    while not os.path.lexists(nearest):
        nearest = nearest.parent
    if not nearest.is_dir():
        raise OSError(0, "it is a file" if nearest == path.absolute() else f"{nearest} is a file")
    tempfile.TemporaryFile(dir=nearest).close()
