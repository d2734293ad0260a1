"""One process at a time in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from hsa_mini.files.disk import make_folder

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold a folder for this process; make it if it is missing.

    The lock ends with the process, however it ends. Raises ValueError, which names the argument
    `name` and the process that holds the folder.
    """
    make_folder(folder)
    path = folder / LOCK
    handle = -1
    while handle < 0:
        handle = _lock(path, name)
    try:
        os.pwrite(handle, f"{os.getpid():<20}\n".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path, name: str) -> int:
    """A handle that locks the file, or -1 if its holder has just removed it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace").strip()
        os.close(handle)
        raise ValueError(
            f"{name}: {path.parent} is in use by process {holder or 'unknown'}, "
            "accepted is a folder that no other process writes"
        ) from None
    except OSError:
        return handle  # a file system without locks
    if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
        return handle
    os.close(handle)
    return -1
