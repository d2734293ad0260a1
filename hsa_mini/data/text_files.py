"""Which files of a folder are read as text: those that are regular, not hidden and hold UTF-8
without null bytes. An index and training follow this one rule.
"""

import codecs
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from hsa_mini.files.reading import open_regular

BLOCK = 1 << 20  # bytes


def walk_files(folder: Path, *, without: Path | None = None) -> Iterator[Path]:
    """Every file, link, pipe and device below `folder` that is not hidden; links to folders are not
    followed, and the folder `without` is left out. Raises OSError for what cannot be listed.
    """
    left_out = without and os.path.realpath(without)

    def fail(error: OSError):
        raise error

    for top, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(top, name)) != left_out
        ]
        yield from (Path(top, name) for name in names if not name.startswith("."))


def is_regular(path: Path) -> bool:
    """Whether a path is a regular file and no link. Raises OSError."""
    return stat.S_ISREG(path.lstat().st_mode)


def is_text(path: Path) -> bool:
    """Whether a file is UTF-8 without null bytes. Raises OSError."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_regular(path) as file:
        try:
            while block := file.read(BLOCK):
                if b"\0" in block:
                    return False
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return False
    return True
