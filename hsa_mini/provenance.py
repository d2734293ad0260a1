"""Where a measured number comes from: hardware, versions, commit and command.

Every file of results holds this record.
"""

import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from hsa_mini.files.whole_file import write_file


def hardware(device: torch.device) -> str:
    """The GPU ("one NVIDIA H200"), or the processor and the number of threads in use."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    names = [
        line.split(":", 1)[1].strip()
        for line in _read("/proc/cpuinfo").splitlines()
        if line.startswith("model name")
    ]
    threads = torch.get_num_threads()
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, str]:
    """The versions of Python, torch and, where they are installed, Triton and tiktoken."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "tiktoken"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit of this checkout, with "+changes" if files were edited since.

    The environment variable `HSA_MINI_COMMIT` overrides it. It is "unknown" without git, and if
    this package does not lie at the top of a repository: one further up belongs to another project.
    """
    root = Path(__file__).resolve().parent.parent
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", f"--git-dir={root / '.git'}", *words],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        if given := os.environ.get("HSA_MINI_COMMIT"):
            return given
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code() -> str:
    """The sha256 of the source of this package and of its kernels, in hexadecimal."""
    digest = hashlib.sha256()
    for name in ("hsa_mini", "hsa_kernels"):
        spec = find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def command() -> str:
    """The command that is running, as a user would type it."""
    ours = Path(sys.argv[0]).name == "hsa-mini" or Path(sys.argv[0]).parts[-2:] == (
        "hsa_mini",
        "__main__.py",
    )
    return shlex.join(["python", *(["-m", "hsa_mini", *sys.argv[1:]] if ours else sys.argv)])


def record(device: torch.device) -> dict:
    """Hardware, versions, commit and command of this process."""
    return {
        "hardware": hardware(device),
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }


def write_results(path: Path, device: torch.device, **values) -> None:
    """Write values, and the record of where they come from, as a JSON file.

    Values may be lists of dataclasses. The file appears with all of its content or not at all.
    """
    write_file(path, (json.dumps(record(device) | values, indent=1, default=vars) + "\n").encode())


def _read(path: str) -> str:
    """The text of a file, or nothing if it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
