"""Reading what others may have written: regular files only, of bounded size, and JSON objects."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path

MAX_JSON_BYTES = 16 << 20


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError, and ValueError for what is not a regular file.

    A pipe or a device is refused before it is opened, because opening it could wait for ever.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"path: got {path}, accepted is a regular file")
    return path.open("rb")


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes. Raises OSError and ValueError."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"path: {path} is larger than {max_bytes} bytes")
    return content


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError, which names the file, if there is none."""
    try:
        value = json.loads(read_bytes(path, max_bytes=MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"path: {path} is not readable; accepted is a file with a JSON object")
    return value
