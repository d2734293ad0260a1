"""What is free: the least of what the machine has and of what every limit allows.

The limits of control groups are read from files that a test writes; those of the address space are
set for real.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hsa_mini.memory.memory_budget import free_bytes

GB = 10**9
AVAILABLE = 16 << 30
V1 = "cgroup cgroup rw,memory"
V2 = "cgroup2 cgroup2 rw"
UNLIMITED_V1 = 9223372036854771712


def machine(root: Path, *, own: str, mounts: list[tuple[str, str, str]], groups: dict) -> Path:
    """A folder with the files of `proc` and `sys` of a Linux machine with 16 GiB free.

    own: /proc/self/cgroup. mounts: (the mounted group, where, file system). groups: folder -> file
    -> content.
    """
    lines = [f"31 23 0:28 {top} {place} rw shared:9 - {kind}" for top, place, kind in mounts]
    files = {
        "proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {AVAILABLE // 1024} kB\n",
        "proc/self/cgroup": own,
        "proc/self/mountinfo": "\n".join(["20 1 8:1 / / rw - ext4 /dev/sda rw", *lines]),
    }
    files |= {
        f"{folder.lstrip('/')}/{name}": f"{content}\n"
        for folder, inside in groups.items()
        for name, content in inside.items()
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def v1(limit: int, used: int = 0, cache: int = 0) -> dict:
    return {
        "memory.limit_in_bytes": limit,
        "memory.usage_in_bytes": used,
        # the counters without "total_" leave out the groups inside
        "memory.stat": f"active_file 7\ntotal_inactive_file {cache}\ntotal_active_file 0",
    }


def v2(limit: int | str, used: int = 0, cache: int = 0, high: int | str = "max") -> dict:
    return {
        "memory.max": limit,
        "memory.high": high,
        "memory.current": used,
        "memory.stat": f"anon 5\ninactive_file 0\nactive_file {cache}",
    }


SYS = "/sys/fs/cgroup"
MACHINES = {
    "no groups at all": ("", [], {}, AVAILABLE),
    "v1": (
        "5:cpu:/\n4:memory,hugetlb:/a\n0::/",
        [("/", f"{SYS}/cpu", "cgroup cgroup rw,cpu"), ("/", f"{SYS}/memory", V1)],
        {f"{SYS}/memory": v1(UNLIMITED_V1), f"{SYS}/memory/a": v1(2 * GB, 3 * GB // 2, GB // 2)},
        GB,
    ),
    "v1 without a limit": (
        "4:memory:/a",
        [("/", f"{SYS}/memory", V1)],
        {f"{SYS}/memory/a": v1(UNLIMITED_V1, GB)},
        AVAILABLE,
    ),
    "v1, a container without a namespace": (
        "4:memory:/docker/1a",
        [("/docker/1a", f"{SYS}/memory", V1)],
        {f"{SYS}/memory": v1(2 * GB, GB)},
        GB,
    ),
    "v1, a group inside such a container": (
        "4:memory:/docker/1a/job",
        [("/docker/1a", f"{SYS}/memory", V1)],
        {f"{SYS}/memory": v1(4 * GB, GB), f"{SYS}/memory/job": v1(2 * GB, GB)},
        GB,
    ),
    "v1, a mount that shows a group elsewhere": (
        "4:memory:/docker/1ab",
        [("/docker/1a", f"{SYS}/memory", V1)],
        {f"{SYS}/memory": v1(4 * GB, GB)},
        3 * GB,
    ),
    "v2 in a namespace": (
        "0::/",
        [("/", SYS, V2)],
        {SYS: v2(2 * GB, GB, GB // 2)},
        3 * GB // 2,
    ),
    "v2, a namespace that the process has left": (
        "0::/../other",
        [("/", SYS, V2)],
        {SYS: v2(2 * GB), "/sys/fs/other": v2(1)},
        2 * GB,
    ),
    "v2, the group around is tighter": (
        "0::/user.slice/a: b/c",
        [("/", SYS, V2)],
        {
            f"{SYS}/user.slice": v2("max", 9 * GB),
            f"{SYS}/user.slice/a: b": v2(3 * GB, 2 * GB),
            f"{SYS}/user.slice/a: b/c": v2("max", GB),
        },
        GB,
    ),
    "v2, throttled before it is killed": (
        "0::/a",
        [("/", SYS, V2)],
        {f"{SYS}/a": v2(4 * GB, GB, high=3 * GB)},
        2 * GB,
    ),
    "v2 above its limit": ("0::/a", [("/", SYS, V2)], {f"{SYS}/a": v2(GB, 2 * GB)}, 0),
    "both, limits in v1": (
        "4:memory:/a\n0::/a",
        [("/", f"{SYS}/memory", V1), ("/", f"{SYS}/unified", V2)],
        {f"{SYS}/memory/a": v1(GB), f"{SYS}/unified/a": {"cgroup.procs": 1}},
        GB,
    ),
    "a mount point with a space": (
        "0::/",
        [("/", "/my\\040groups", V2)],
        {"/my groups": v2(GB)},
        GB,
    ),
    "unreadable": ("0:\nx", [("/", SYS, "cgroup2")], {SYS: v2("many")}, AVAILABLE),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_tightest_group_limits_what_is_free(tmp_path, name):
    own, mounts, groups, want = MACHINES[name]
    root = machine(tmp_path, own=own, mounts=mounts, groups=groups)
    assert free_bytes(torch.device("cpu"), root) == want


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="only Linux has these files")
def test_a_text_beyond_a_limit_of_the_process_is_refused_and_what_fits_is_read():
    code = """
import os, resource, torch
from pathlib import Path
from hsa_mini import PRESETS, ChunkMemory
sizes = dict(batch=1, dtype=torch.float32, device=torch.device("cpu"))
for kind, field in ((resource.RLIMIT_DATA, 5), (resource.RLIMIT_AS, 0)):
    memory = ChunkMemory(PRESETS["debug"])
    memory.reserve(4, **sizes)
    pages = int(Path("/proc/self/statm").read_text().split()[field])
    before = resource.getrlimit(kind)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 28)
    resource.setrlimit(kind, (limit, before[1]))
    try:
        memory.reserve(1 << 23, **sizes)
    except MemoryError as error:
        fits = int(str(error).split("up to ")[1].split()[0].replace(",", ""))
        memory.reserve(fits * 9 // 10, **sizes)  # what surrounds the buffers takes a little too
        print(fits)
    resource.setrlimit(kind, before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-300:]
    # Bytes of a token: K and V of 2 heads * 8 numbers, and a quarter of a landmark of 2 * 16.
    found = [int(line) * 160 / (1 << 28) for line in run.stdout.split()]
    assert len(found) == 2 and all(0.9 < part < 1.01 for part in found), found
