"""A call in a forked child, with a time limit, a memory limit and captured output.

The parent has imported torch already, so that a child takes milliseconds. What a child does to its
memory, its signals or its working folder ends with it.
"""

import contextlib
import mmap
import os
import pickle
import resource
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

GRACE = 10.0  # seconds in which an interrupted child has to end
MEMORY = 6 << 30  # bytes that a child may take on top of its parent's


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    kind: "returned" (value), "raised" (value is the exception), "exited" (value is the status),
    "killed" (value is the signal) or "hung". signalled: it was running when the signal was sent
    that the caller wanted, or when its time was over.
    """

    kind: str
    value: Any
    output: str
    errors: str
    signalled: bool = False

    def __str__(self) -> str:
        value = (
            f"{type(self.value).__name__}: {self.value}" if self.kind == "raised" else self.value
        )
        return f"{self.kind} {value} {self.errors.strip()[-300:]}"


def in_child(
    work: Callable[[], Any],
    *,
    seconds: float,
    interrupt: bool = False,
    kill_after: float | None = None,
    kill_with: int = signal.SIGKILL,
    limited: bool = True,
) -> Outcome:
    """Call `work` in a forked child, which is killed after `seconds`.

    interrupt: it gets SIGINT first, and `GRACE` seconds. kill_after: send the signal `kill_with`
    this many seconds after the call began, if it is still running. limited: it may take `MEMORY`
    bytes more than this process.
    """
    reader, writer = os.pipe()
    output, errors = (os.memfd_create(name) for name in ("output", "errors"))
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        _be_child(work, writer, output, errors, limited)
    with contextlib.suppress(OSError):
        os.setpgid(child, child)  # whichever of the two comes first
    os.close(writer)
    try:
        os.read(reader, 1)  # the call begins
        signalled = kill_after is not None and not _wait(reader, kill_after)
        if signalled:
            os.kill(child, kill_with)
        hung = not _wait(reader, seconds)
        if hung and interrupt:
            signalled = True
            os.kill(child, signal.SIGINT)
            hung = not _wait(reader, GRACE)
        if hung:
            os.killpg(child, signal.SIGKILL)
        said = b"" if hung else _read_all(reader)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)  # what it started must not go on
        texts = (_content(handle) for handle in (output, errors))
        return Outcome(*_kind(said, status, hung), *texts, signalled)
    finally:
        for handle in (reader, output, errors):
            os.close(handle)


class Counter:
    """A number that a child changes and its parent reads, even if the child is killed."""

    def __init__(self) -> None:
        self._bytes = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int.from_bytes(self._bytes[:8], "little")

    @value.setter
    def value(self, number: int) -> None:
        self._bytes[:8] = number.to_bytes(8, "little")


def _be_child(
    work: Callable[[], Any], writer: int, output: int, errors: int, limited: bool
) -> None:
    """Run `work`, say how it went and end the process."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdout, sys.stderr = (
            os.fdopen(handle, "w", encoding="utf-8", errors="replace", closefd=False, buffering=1)
            for handle in (1, 2)
        )
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        # The parent's lock is shared by processes: a child that is killed would leave it locked.
        tqdm.set_lock(threading.RLock())
        if limited:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        said = _call(work, writer)
        sys.stdout.flush()
        with open(writer, "wb") as pipe:
            pipe.write(said)
        status = 0
    finally:
        os._exit(status)


def _call(work: Callable[[], Any], writer: int) -> bytes:
    """What the call returned or raised, pickled."""
    try:
        os.write(writer, b".")
        value = work()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return pickle.dumps(("returned", value))
    except SystemExit as error:
        return pickle.dumps(("exited", error.code))
    except BaseException as error:
        traceback.print_exc()
        try:
            said = pickle.dumps(("raised", error))
            pickle.loads(said)
            return said
        except Exception:
            return pickle.dumps(("raised", RuntimeError(f"{type(error).__name__}: {error}")))


def _wait(reader: int, seconds: float) -> bool:
    """Whether the child has said something, or has ended, within `seconds`."""
    deadline = time.monotonic() + seconds
    poll = select.poll()
    poll.register(reader, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(max(deadline - time.monotonic(), 0) * 1000))


def _read_all(reader: int) -> bytes:
    parts = []
    while part := os.read(reader, 1 << 20):
        parts.append(part)
    return b"".join(parts)


def _content(handle: int) -> str:
    return os.pread(handle, 1 << 20, 0).decode("utf-8", errors="replace")


def _kind(said: bytes, status: int, hung: bool) -> tuple[str, Any]:
    if hung:
        return "hung", None
    if said:
        return pickle.loads(said)
    code = os.waitstatus_to_exitcode(status)
    return ("killed", signal.Signals(-code).name) if code < 0 else ("exited", code)
