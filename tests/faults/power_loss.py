"""Power is lost at every moment of every writer: its reader sees the old version or the new one."""

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from faults.disk import Recorder, Tree, materialise, states
from faults.processes import in_child
from faults.report import Progress, Report
from faults.writers import WRITERS, Writer, tiny_preset

SECONDS = 900  # for all states of one writer


def attack(
    count: int, seed: int, progress: Progress, writers: Sequence[Writer] = WRITERS
) -> Report:
    """At most `count` states of every writer, new and replaced."""
    report = Report("power_loss")
    with tiny_preset():
        for writer in writers:
            for first in (False, True) if writer.replaces else (False,):
                subject = f"{writer.name}, {'replaced' if first else 'new'}"
                outcome = in_child(lambda: all_states(writer, first, count, seed), seconds=SECONDS)
                if outcome.kind == "returned":
                    tried, faults = outcome.value
                    report.tried += tried
                    for what in faults:
                        report.fault(subject, what)
                else:
                    report.fault(subject, f"the writer: {outcome}")
                progress(1)
    return report


def all_states(writer: Writer, replaces: bool, count: int, seed: int) -> tuple[int, list[str]]:
    """How many states were read, and what was wrong with them."""
    rng = random.Random(f"{seed} {writer.name} {replaces}")
    with TemporaryDirectory() as scratch:
        root = Path(scratch, "written")
        root.mkdir()
        writer.prepare(root)
        if replaces:
            writer.write(root, 1)
        old, new = (1, 2) if replaces else (None, 1)
        recorder = Recorder(root)
        with recorder.recording():
            writer.write(root, new)
        cases = _cases(recorder, rng)
        assert len(cases) > 1, "nothing was recorded"
        if len(cases) > count:
            kept = sorted(rng.sample(range(len(cases)), count))
            cases = [cases[i] for i in kept]
        read = Path(scratch, "read")
        read.mkdir()
        faults = []
        for tree, call, returned in cases:
            materialise(tree, read)
            allowed = {new} if returned else {old, new}
            if what := _misread(writer, read, allowed):
                when = "the writer had returned" if returned else f"after {call}"
                faults.append(f"power lost {when}: {what}; files: {_names(tree)}")
        return len(cases), faults


def _cases(recorder: Recorder, rng: random.Random) -> list[tuple[Tree, str, bool]]:
    """Different trees, each with the call after which it may be found.

    The last element says whether the writer had returned.
    """
    cases: dict[tuple, tuple[Tree, str, bool]] = {}
    for moment in recorder.moments:
        returned = moment is recorder.moments[-1]
        for tree in states(moment, recorder.top, rng):
            key = (returned, *tree.items())
            cases.setdefault(key, (tree, moment.call, returned))
    return list(cases.values())


def _misread(writer: Writer, folder: Path, allowed: set[int | None]) -> str | None:
    """What is wrong with what the reader sees, or nothing."""
    try:
        found = writer.read(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if found in allowed else f"version {found}, allowed is {allowed}"


def _names(tree: Tree) -> str:
    return ", ".join(
        name if content is None else f"{name} ({len(content)})" for name, content in tree.items()
    )
