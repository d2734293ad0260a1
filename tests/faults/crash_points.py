"""Every file-changing call of every writer is the last one, or fails.

Afterwards the reader sees the old version or the new one, and the next write leaves no debris.
"""

import errno
import functools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from faults.file_calls import watched
from faults.processes import Outcome, in_child
from faults.report import Progress, Report
from faults.writers import WRITERS, Writer, names_in, tiny_preset

SECONDS = 60
ENDS = ("end", "ENOSPC", "EIO")  # of the process, or the error with which the call fails
DEAD = 9  # exit status of a process that ends at a call


def attack(
    count: int,
    seed: int,
    progress: Progress,
    writers: Sequence[Writer] = WRITERS,
    ends: Sequence[str] = ENDS,
) -> Report:
    """At most `count` calls of every writer, new and replaced, with each of the ends."""
    report = Report("crash_points")
    with tiny_preset():
        for writer in writers:
            for old in (None, 1) if writer.replaces else (None,):
                for end in ends:
                    _crash(writer, old, end, count, seed, report)
                    progress(1)
    return report


def _crash(
    writer: Writer, old: int | None, end: str, count: int, seed: int, report: Report
) -> None:
    new = (old or 0) + 1
    names = functools.cache(writer.names)
    subject = f"{writer.name}, {'replaced' if old else 'new'}, {end}"
    calls = _calls(writer, old)
    points = list(range(calls))
    for point in sorted(random.Random(f"{seed} {subject}").sample(points, min(count, calls))):
        with TemporaryDirectory() as scratch:
            folder = Path(scratch)
            writer.prepare(folder)
            if old:
                writer.write(folder, old)
            outcome = in_child(lambda: _until(writer, folder, new, point, end), seconds=SECONDS)
            report.tried += 1
            when = f"{end} at call {point} of {calls}"
            allowed = _allowed(outcome, old, new)
            if allowed is None:
                report.fault(subject, f"{when}: the writer: {outcome}")
            elif what := _after(writer, folder, allowed, names):
                report.fault(subject, f"{when}: {what}")


def _calls(writer: Writer, old: int | None) -> int:
    """How many times the writer changes files, counted before and after every call."""
    with TemporaryDirectory() as scratch:
        writer.prepare(Path(scratch))
        if old:
            writer.write(Path(scratch), old)
        seen = []
        with watched(lambda name, done: seen.append(name)):
            writer.write(Path(scratch), (old or 0) + 1)
    return len(seen)


def _until(writer: Writer, folder: Path, version: int, point: int, end: str) -> None:
    """Write, but end the process or fail at one call."""
    left = point

    def watcher(name: str, done: bool) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            return
        if end == "end":
            os._exit(DEAD)
        if left == -1 and not done:
            code = getattr(errno, end)
            raise OSError(code, os.strerror(code))

    with watched(watcher):
        writer.write(folder, version)


def _allowed(outcome: Outcome, old: int | None, new: int) -> set[int | None] | None:
    """Which versions may be found, or None if the writer ended in a way that it may not."""
    if outcome.kind == "returned":
        return {new}
    if (outcome.kind, outcome.value) == ("exited", DEAD):
        return {old, new}
    # Writers that refuse a damaged file raise ValueError.
    if outcome.kind == "raised" and isinstance(outcome.value, OSError | ValueError):
        return {old, new}
    return None


def _after(
    writer: Writer, folder: Path, allowed: set[int | None], names: Callable[[int], list[str]]
) -> str | None:
    """What is wrong with what is found, or with the next write; nothing if all is well."""
    try:
        found = writer.read(folder)
        if found not in allowed:
            return f"version {found}, allowed is {allowed}; files: {names_in(folder)}"
        following = (found or 0) + 1 if writer.replaces else 1
        writer.write(folder, following)
        if (found := writer.read(folder)) != following:
            return f"the next write left version {found} and not {following}"
    except Exception as error:
        return f"{type(error).__name__}: {error}; files: {names_in(folder)}"
    if surplus := sorted(set(names_in(folder)) ^ set(names(following))):
        return f"the next write left {surplus}"
    return None
