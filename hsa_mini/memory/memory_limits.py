"""What this process may still allocate under the limits that Linux sets it: those of its control
groups (cgroups v1 and v2) and of its own address space.

A container is a control group. The kernel kills a process that exceeds the limit of its group, or
of a group around it, however much memory the machine has.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from hsa_mini.files.disk import mount_point

# By file system: the file of the bytes in use, the files of the limits, and the prefix of the
# counters in `memory.stat` that include the groups inside.
GROUP_FILES = {
    "cgroup": ("memory.usage_in_bytes", ("memory.limit_in_bytes",), "total_"),
    "cgroup2": ("memory.current", ("memory.max", "memory.high"), ""),
}
# By line of `/proc/self/limits`: the field of `/proc/self/statm` with the pages that it counts.
PROCESS_LIMITS = {"Max address space": 0, "Max data size": 5}


def bytes_within_limits(root: Path = Path("/")) -> list[int]:
    """The bytes that are left under each limit that is set, in no particular order.

    root: the folder in which `proc` and `sys` are found. Files that are missing or unreadable, as
    on other systems than Linux, set no limit.
    """
    return [*_within_groups(root), *_within_process(root)]


def _within_groups(root: Path) -> Iterator[int]:
    """For the group of this process and every group around it: what is left, and what the kernel
    would give back of the group's file cache.
    """
    for kind, group in _groups(root):
        usage, limits, prefix = GROUP_FILES[kind]
        with suppress(OSError, ValueError):
            used = int((group / usage).read_text())
            counters = dict(line.split() for line in _lines(group / "memory.stat"))
            for cache in ("active_file", "inactive_file"):
                used -= int(counters.get(prefix + cache, 0))
            for limit in limits:
                with suppress(OSError, ValueError):  # "max" is no number: no limit
                    yield int((group / limit).read_text()) - used


def _groups(root: Path) -> Iterator[tuple[str, Path]]:
    """The memory groups that this process is in, as (file system, folder), the outermost first."""
    with suppress(OSError, ValueError):
        own = {}  # file system -> the path of the process's group
        for line in _lines(root / "proc/self/cgroup"):
            number, controllers, path = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                own["cgroup2" if number == "0" else "cgroup"] = path
        for line in _lines(root / "proc/self/mountinfo"):
            mount, _, file_system = line.partition(" - ")
            kind, _, options = file_system.split(" ", 2)
            if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
                continue
            top, place = mount.split(" ")[3:5]
            parts = PurePosixPath(own[kind]).parts
            above = PurePosixPath(top).parts
            # A mount may show only groups from `top` down. If the process's path is not below it,
            # as in a container without a namespace of its own, the mount point is its group.
            inside = parts[len(above) :] if parts[: len(above)] == above else ()
            for depth in range(len(inside) + 1 if ".." not in inside else 1):
                yield kind, root.joinpath(mount_point(place).lstrip("/"), *inside[:depth])


def _within_process(root: Path) -> Iterator[int]:
    """What is left of the address space (`ulimit -v`) and of the data (`ulimit -d`)."""
    with suppress(OSError):
        pages = (root / "proc/self/statm").read_text().split()
        for line in _lines(root / "proc/self/limits"):
            for name, field in PROCESS_LIMITS.items():
                with suppress(ValueError):  # "unlimited"
                    if line.startswith(name):
                        soft = int(line.removeprefix(name).split()[0])
                        yield soft - int(pages[field]) * os.sysconf("SC_PAGE_SIZE")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
