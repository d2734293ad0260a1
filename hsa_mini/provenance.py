"""Where a measured number comes from: hardware, versions, commit, command. Written into every result."""

import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hsa_mini.paths import write_whole


def hardware(device: torch.device) -> str:
    """ "one NVIDIA H200", or the processor and the threads in use."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    names = [
        line.split(":", 1)[1].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    threads = torch.get_num_threads()
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "tiktoken"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def commit() -> str:
    """The commit of the checkout ("+changes" if it has any), from git or from `HSA_MINI_COMMIT`; else "unknown"."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return os.environ.get("HSA_MINI_COMMIT") or git("rev-parse", "HEAD") + (
            "+changes" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line as a person would type it."""
    ours = Path(sys.argv[0]).name == "hsa-mini" or Path(sys.argv[0]).parts[-2:] == (
        "hsa_mini",
        "__main__.py",
    )
    return shlex.join(["python", *(["-m", "hsa_mini", *sys.argv[1:]] if ours else sys.argv)])


def record(device: torch.device) -> dict:
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }


def write_results(path: Path, device: torch.device, **values) -> None:
    """Values (rows may be dataclasses), and where they come from, as JSON; the file appears whole or not at all."""
    write_whole(path, (json.dumps(record(device) | values, indent=1, default=vars) + "\n").encode())


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
