"""Random command lines and calls, in a private mount namespace with a /dev of its own.

No call ends with a traceback, hangs, leaves a half-written file, changes a file that it was not
told to write, or changes a device.
"""

import contextlib
import importlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from faults import sandbox
from faults.calls import Call, random_call
from faults.processes import Outcome, in_child
from faults.report import Progress, Report
from faults.world import World
from faults.writers import tiny_preset
from hsa_mini.model.cost_estimate import estimate_cost

SECONDS = 60  # for a call that should be short, on a busy machine too
SECONDS_OF_LONG_CALLS = 2  # until a call that may be long is interrupted
MAX_LINE = 1000  # characters of an error
BATCH = 50  # calls between two messages of the sandboxed process


def attack(count: int, seed: int, progress: Progress) -> Report:
    """`count` random calls, in one sandbox a processor."""
    report = Report("fuzz")
    report.skipped = sandbox.unavailable() or ""
    if report.skipped:
        return report
    # What takes long to import is imported here, once for all children.
    estimate_cost("nano", 1)
    slow = ("hsa_mini.integrations.tasks", "torch.utils.tensorboard")
    for module in slow:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    batches = [range(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        outcomes = workers.map(lambda batch: _sandboxed(batch, seed), batches)
        for batch, outcome in zip(batches, outcomes, strict=True):
            faults = outcome.value if outcome.kind == "returned" else [("sandbox", str(outcome))]
            for subject, what in faults:
                report.fault(subject, what)
            report.tried += len(batch)
            progress(len(batch))
    return report


def _sandboxed(numbers: range, seed: int) -> Outcome:
    """What did not hold in these calls, from a process whose first statement enters a sandbox."""
    with TemporaryDirectory() as scratch:
        return in_child(
            lambda: _in_sandbox(Path(scratch), numbers, seed),
            seconds=BATCH * SECONDS,
            limited=False,
        )


def _in_sandbox(scratch: Path, numbers: range, seed: int) -> list[tuple[str, str]]:
    """What did not hold in these calls."""
    sandbox.enter(scratch)
    world = World(scratch)
    pipe = os.open(world.folder / "fifo", os.O_RDWR)  # a writer to it need not wait for a reader
    faults = []
    offline = mock.patch("hsa_mini.data.archives.fetch_archives", side_effect=OSError("offline"))
    with tiny_preset(), offline:
        for number in numbers:
            call = random_call(random.Random(f"{seed} {number}"))
            if what := _misbehaves(call, world):
                faults.append((call.subject, f"{call}: {what}"))
            if world.changed():
                os.close(pipe)
                world.restore()
                pipe = os.open(world.folder / "fifo", os.O_RDWR)
    return faults


def _misbehaves(call: Call, world: World) -> str | None:
    """What is wrong with how a call ended and with what it left, or nothing."""
    outcome = in_child(
        _with_input(call.work),
        seconds=SECONDS_OF_LONG_CALLS if call.long else SECONDS,
        interrupt=call.long,
    )
    if what := _ended_badly(outcome, call):
        return what
    if changed := sandbox.changed_devices():
        sandbox.make_devices()
        return f"a device was changed: {', '.join(changed)}"
    given = {os.path.realpath(path) for path in call.paths if "\0" not in path}
    for name in world.changed():
        if what := world.wrong(name, given):
            return what
    return None


def _with_input(work: Callable[[], object]) -> Callable[[], object]:
    """The call with a short text as its standard input."""

    def call() -> object:
        text = os.memfd_create("input")
        os.write(text, b"a text that stands on standard input\n" * 20)
        os.lseek(text, 0, os.SEEK_SET)
        os.dup2(text, 0)
        return work()

    return call


def _ended_badly(outcome: Outcome, call: Call) -> str | None:
    if call.command:
        if "\x1b" in outcome.errors:
            return f"an escape sequence: {outcome.errors[-200:]!r}"
        if outcome.kind not in ("returned", "exited") or outcome.value not in (0, 2, 130):
            return str(outcome)
        last = (outcome.errors.splitlines() or [""])[-1]
        if outcome.value == 2 and not 0 < len(last) <= MAX_LINE:
            return f"an error of {len(last)} characters: {last[:200]}"
        if "Traceback" in outcome.errors:
            return str(outcome)
        return None
    accepted = (ValueError, OSError, MemoryError, FloatingPointError)
    if call.long:
        accepted += (KeyboardInterrupt,)
    if outcome.kind != "returned" and not (
        outcome.kind == "raised" and isinstance(outcome.value, accepted)
    ):
        return str(outcome)
    message = str(outcome.value)
    too_long = outcome.kind == "raised" and len(message) > MAX_LINE
    return f"an error of {len(message)} characters: {message[:200]}" if too_long else None
