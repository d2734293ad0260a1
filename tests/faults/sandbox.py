"""A private mount namespace, in which nothing real can be written.

Every mount is made read-only there, except one scratch folder in memory and a /dev in memory with
nodes of its own. Other processes see nothing of it, and it ends with the process.
"""

import ctypes
import os
import stat
import sys
from pathlib import Path

NEW_MOUNTS, NEW_NETWORK = 0x00020000, 0x40000000  # CLONE_NEWNS, CLONE_NEWNET
READ_ONLY, NO_SETUID, NO_DEVICES, NO_PROGRAMS = 1, 2, 4, 8
REMOUNT, BIND, RECURSIVE, PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
OPTIONS = {"nosuid": NO_SETUID, "nodev": NO_DEVICES, "noexec": NO_PROGRAMS}
NODES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}  # minor numbers of major 1
LINKS = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}


def unavailable() -> str | None:
    """Why there can be no sandbox here, or nothing."""
    if sys.platform != "linux":
        return "mount namespaces need Linux"
    if os.geteuid():
        return "mount namespaces and device nodes need root"
    child = os.fork()
    if child == 0:
        try:
            enter(Path("/tmp"))
        except BaseException:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        return "this system allows no private mount namespace with device nodes"
    return None


def enter(scratch: Path) -> None:
    """Move this process into a sandbox whose only writable folder is `scratch`, which is emptied.

    The folder must exist. Raises OSError, and RuntimeError unless the namespace is another one than
    the parent's and nothing but the scratch folder can be written.
    """
    parent = os.readlink(f"/proc/{os.getppid()}/ns/mnt")
    _system("unshare", NEW_MOUNTS | NEW_NETWORK)
    if os.readlink("/proc/self/ns/mnt") == parent:
        raise RuntimeError("this process is not in a private mount namespace")
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    for point, options in _mounts():
        # REMOUNT with BIND changes this mount alone and not the file system behind it.
        kept = sum(flag for name, flag in OPTIONS.items() if name in options)
        try:
            _mount(None, point, None, REMOUNT | BIND | READ_ONLY | kept)
        except (FileNotFoundError, PermissionError, OSError):
            continue  # a mount that another one hides; what is seen is checked below
    _mount("tmpfs", str(scratch), "tmpfs", 0, "size=2g,mode=755")
    _mount("tmpfs", "/dev", "tmpfs", 0, "size=16m,mode=755")
    _check(scratch)
    os.mkdir("/dev/shm")
    make_devices()


def make_devices() -> None:
    """Fill the /dev of the sandbox, after what it held was removed, except folders."""
    for entry in os.scandir("/dev"):
        if not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
    for name, minor in NODES.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(1, minor))
    for name, target in LINKS.items():
        os.symlink(f"/proc/self/{target}", f"/dev/{name}")


def mount(source: Path, target: Path) -> None:
    """Mount a file or a folder of the sandbox at a second place in it."""
    _mount(str(source), str(target), None, BIND)


def mount_memory(target: Path, size: str, files: dict[str, str] | None = None) -> None:
    """Mount a folder in memory of this size; with `files` it holds them and is read-only."""
    _mount("tmpfs", str(target), "tmpfs", 0, f"size={size}")
    for name, text in (files or {}).items():
        (target / name).write_text(text)
    if files:
        _mount(None, str(target), None, REMOUNT | BIND | READ_ONLY)


def changed_devices() -> list[str]:
    """The names of devices and links in /dev that are gone, or no longer what they were."""
    changed = []
    for name in (*NODES, *LINKS):
        try:
            status = os.lstat(f"/dev/{name}")
        except FileNotFoundError:
            changed.append(name)
            continue
        device = stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(
            1, NODES.get(name, 0)
        )
        link = stat.S_ISLNK(status.st_mode)
        if not (device if name in NODES else link):
            changed.append(name)
    return changed


def _check(scratch: Path) -> None:
    """Raise RuntimeError unless the scratch folder and /dev alone can be written."""
    seen = [point for point, options in _mounts() if "ro" not in options]
    allowed = {str(scratch.resolve()), "/dev"}
    writable = [point for point in seen if point not in allowed and not point.startswith("/dev/")]
    if writable:
        raise RuntimeError(f"{writable[0]} can still be written")
    for folder in (Path("/"), Path.home(), Path(__file__).parent, Path("/tmp")):
        if folder.resolve() != scratch.resolve() and os.access(folder, os.W_OK):
            raise RuntimeError(f"{folder} can still be written")


def _mounts() -> list[tuple[str, list[str]]]:
    """Path and options of every mount of this process."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    fields = [line.split() for line in lines]
    return [(line[4].replace("\\040", " "), line[5].split(",")) for line in fields]


def _mount(source, target: str, kind, flags: int, data: str | None = None) -> None:
    texts = [None if x is None else x.encode() for x in (source, target, kind)]
    _system("mount", *texts, ctypes.c_ulong(flags), None if data is None else data.encode())


def _system(name: str, *arguments) -> None:
    """Call a function of the C library. Raises OSError."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
