"""The steps that every writer shares: temporary names, what a killed writer left behind, folders,
modes and owners, and waiting for the disk.

A writer holds a lock on its temporary file or folder while it lives. So the next writer of the same
path can tell what a killed writer left behind, and removes it.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"  # temporary files and folders have names that start so
NO_FOLDER_SYNC = {errno.EACCES, errno.EINVAL, errno.EBADF, errno.ENOTSUP}
NO_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV, errno.EBUSY}


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, has reached the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # not every folder can be read, and not every file system syncs one
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, if they are missing, so that they survive a power loss."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def temporary_sibling(path: Path, *, folder: bool) -> Iterator[Path]:
    """An empty temporary file or folder next to `path`, on the same file system.

    What a killed writer of the same path left is removed first. Whatever has the temporary name at
    the end is removed: the new content after a failure, the old content after an exchange. If
    `path` exists, only this user can read the temporary file or folder (see `copy_access`);
    otherwise the umask decides.
    """
    private = os.path.lexists(path)
    prefix = _temporary_prefix(path)
    for left in path.parent.glob(prefix + "*"):
        _remove_if_abandoned(left)
    handle = -1
    while handle < 0:
        fresh = path.parent / f"{prefix}{secrets.token_hex(4)}"
        if folder:
            fresh.mkdir(0o700 if private else 0o777)
        else:
            fresh.touch(0o600 if private else 0o666, exist_ok=False)
        handle = _locked_handle(fresh)
    try:
        yield fresh
    finally:
        remove(fresh)
        os.close(handle)


def copy_access(source: Path, target: Path) -> None:
    """Give `target` the mode of `source`, and its owner and group as far as this user may.

    Nothing happens if `source` is missing.
    """
    if not source.exists():
        return
    status = source.stat()
    with contextlib.suppress(OSError):
        os.chown(target, status.st_uid, status.st_gid)
    os.chmod(target, status.st_mode & 0o7777)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchange the names of two files or folders in one step.

    Returns False where the platform or the file system cannot do this.
    """
    library = ctypes.CDLL(None, use_errno=True)
    here = ctypes.c_int(-100 if sys.platform == "linux" else -2)  # AT_FDCWD
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
    names = {"linux": "renameat2", "darwin": "renameatx_np"}
    rename = getattr(library, names.get(sys.platform, ""), None)
    if rename is None:
        return False
    if not rename(here, os.fsencode(first), here, os.fsencode(second), swap):
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def is_mount_point(path: Path) -> bool:
    """Whether a file or a folder is a mount point, and so cannot be renamed. `path` is resolved."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # a platform without this file
        return os.path.ismount(path)
    return str(path) in {mount_point(line.split()[4]) for line in lines}


def mount_point(field: str) -> str:
    """A mount point as /proc/self/mountinfo writes it (white space as octal numbers) as a path."""
    return re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field)


def may_rename(path: Path) -> bool:
    """Whether this user may put another file or folder in the place of `path`, which is resolved.

    A mount point cannot be renamed. In a sticky folder (/tmp), only the owners may rename.
    """
    folder = path.parent
    if not path.exists():
        return True
    if is_mount_point(path) or not has_access(folder, os.W_OK | os.X_OK):
        return False
    status = folder.stat()
    owners = (0, status.st_uid, path.stat().st_uid)
    return not status.st_mode & stat.S_ISVTX or os.geteuid() in owners


def has_access(path: Path, mode: int) -> bool:
    """What `os.access` says for the effective user."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _temporary_prefix(path: Path) -> str:
    """The start of the temporary names for `path`: short, however long the name of `path` is."""
    return f"{TEMPORARY}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"


def _locked_handle(path: Path) -> int:
    """A handle that locks a file or folder just made, or -1 if another writer has removed it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.fstat(handle).st_nlink and path.exists():
        return handle
    os.close(handle)
    return -1


def _remove_if_abandoned(path: Path) -> None:
    """Remove a temporary file or folder unless a living writer holds it."""
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(path)
        finally:
            os.close(handle)
