"""Records of runs: one file of JSON lines, to which every finished run adds one.

For each new line the file is replaced by a longer one. So an interrupted command loses no finished
run, and leaves no part of an unfinished one.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from hsa_mini.files.whole_file import write_file
from hsa_mini.lab.rounds import arms_of
from hsa_mini.lab.scales import SCALES

RunKey = tuple[str, int]  # name of the arm, seed


def read_records(path: Path) -> list[dict]:
    """The records in a file; none if there is no regular file. Raises ValueError for a line that is
    no record.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            for key, kind in (("arm", str), ("seed", int), ("settings", dict)):
                if not isinstance(record[key], kind):
                    raise TypeError(key)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError(
                f"path: line {number} of {path} is no record of a run, accepted is a file of them"
            ) from None
        records.append(record)
    return records


def append_record(path: Path, record: dict) -> None:
    """Add one line, complete or not at all. Several commands may write to the same file."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        write_file(path, (path.read_bytes() if path.is_file() else b"") + line)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from writing to this folder meanwhile."""
    import fcntl  # Unix only; without it records can still be read

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def current(
    records: Iterable[dict], scale: str = "lab", steps: int | None = None
) -> dict[RunKey, dict]:
    """The newest record of each arm and seed whose settings equal those declared now.

    Records of other settings, another scale or another number of steps are left out.
    """
    arms = arms_of(scale)

    @cache
    def declared(arm: str) -> dict:
        return json.loads(json.dumps(arms[arm].settings(SCALES[scale], steps)))

    return {
        (record["arm"], record["seed"]): record
        for record in records
        if record["arm"] in arms
        and record["settings"].get("scale", scale) == scale
        and _agrees(record["settings"], declared(record["arm"]))
    }


def _agrees(recorded, declared) -> bool:
    """Whether recorded settings equal the declared ones.

    Options that were added after the record are ignored, because the run did not use them.
    """
    if isinstance(recorded, dict) and isinstance(declared, dict):
        return all(
            name in declared and _agrees(value, declared[name]) for name, value in recorded.items()
        )
    if isinstance(recorded, list) and isinstance(declared, list):
        return len(recorded) == len(declared) and all(map(_agrees, recorded, declared))
    return recorded == declared
