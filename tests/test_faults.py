"""Short forms of the attacks in `tests/faults`, and tests that the attacks find what is wrong.

`make test-faults` runs the long forms.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import crash_points, kills, power_loss, sandbox
from faults.corruption import SUBJECTS, Damage, corrupt
from faults.disk import Recorder, states
from faults.processes import in_child
from faults.report import Report
from faults.writers import BY_NAME, WRITERS, Writer

ATTACKS = ("power_loss", "crash_points", "kills", "mesh_kills", "corruption", "fuzz")
FAULTS = Path(__file__).parent / "faults"
SECONDS = 300


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_project_withstands_the_quick_form_of_every_attack(attack):
    run = subprocess.run(
        [sys.executable, FAULTS, "--quick", attack], capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert f"\n{attack} " in run.stdout


def tried(attack, writer: Writer) -> Report:
    return attack.attack(200, 0, lambda count: None, [writer])


def read(folder: Path) -> int | None:
    path = folder / "x"
    return len(json.loads(path.read_text())) if path.exists() else None


def written(
    folder: Path, version: int, *, sync_file: bool, sync_folder: bool, rename: bool
) -> None:
    """Write a list of `version` elements with more or less care."""
    fresh = folder / ("fresh" if rename else "x")
    with fresh.open("w") as file:
        json.dump([0] * version, file)
        if sync_file:
            file.flush()
            os.fsync(file)
    if rename:
        fresh.replace(folder / "x")
    if sync_folder:
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


@pytest.mark.parametrize("sync_file", [False, True])
@pytest.mark.parametrize("sync_folder", [False, True])
@pytest.mark.parametrize("rename", [False, True])
def test_power_loss_is_survived_only_by_a_synced_file_renamed_in_a_synced_folder(
    sync_file, sync_folder, rename
):
    careful = dict(sync_file=sync_file, sync_folder=sync_folder, rename=rename)
    writer = Writer("x", lambda folder, version: written(folder, version, **careful), read)
    assert bool(tried(power_loss, writer).faults) != (sync_file and sync_folder and rename)


def test_what_power_loss_may_leave_of_two_renames(tmp_path):
    """Either of two names may be lost, but not the first change of a name without the second."""
    for name in "ab":
        (tmp_path / name).write_text(name)
    recorder = Recorder(tmp_path)
    with recorder.recording():
        os.rename(tmp_path / "a", tmp_path / "c")
        os.rename(tmp_path / "c", tmp_path / "d")
        os.rename(tmp_path / "b", tmp_path / "e")
    found = states(recorder.moments[-1], recorder.top, random.Random(0))
    names = {"".join(sorted(tree)) for tree in found}
    assert names == {"ab", "bc", "bd", "ae", "ce", "de"}


def test_an_end_at_any_call_is_seen(tmp_path):
    """A writer that works in place is cut off, and one that never removes its debris is told."""
    in_place = Writer("x", lambda folder, n: (folder / "x").write_text(json.dumps([0] * n)), read)
    assert tried(crash_points, in_place).faults

    def careless(folder: Path, version: int) -> None:
        fresh = folder / f"fresh-{random.random()}"
        fresh.write_text(json.dumps([0] * version))
        fresh.replace(folder / "x")

    faults = tried(crash_points, Writer("x", careless, read)).faults
    assert faults and all("the next write left ['fresh-" in what for _, what in faults)


CHECKPOINTS = ("weights in shards", "training state")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_any_call_of_a_writer_of_checkpoints_may_be_the_last(name):
    report = crash_points.attack(12, 0, lambda count: None, [BY_NAME[name]], ["end"])
    assert report.faults == [] and report.tried == 24


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_writer_of_checkpoints_may_be_killed_at_any_moment(name):
    report = kills.attack(10, 0, lambda count: None, [f"saving: {name}"])
    assert report.faults == [] and report.tried >= 10


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.name)
def test_every_writer_changes_files_that_are_seen(writer, tmp_path):
    if writer.heavy:
        pytest.skip("the quick forms run it")
    recorder = Recorder(tmp_path)
    with recorder.recording():
        writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1
    trees = list(states(recorder.moments[-1], recorder.top, random.Random(0)))
    assert len(recorder.moments) > 4 and trees


def test_a_corruption_changes_the_files_that_it_names(tmp_path):
    subject = next(subject for subject in SUBJECTS if subject.name == "results")
    seen = set()
    for seed in range(200):
        folder = tmp_path / str(seed)
        folder.mkdir()
        subject.make(folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        damage = corrupt(folder, random.Random(seed))
        assert isinstance(damage, Damage) and set(damage.files) <= before.keys()
        for name, content in before.items():
            path = folder / name
            regular = path.is_file() and not path.is_symlink()
            if name not in damage.files:
                assert regular and path.read_bytes() == content
        seen.add(damage.what.split()[0])
    assert len(seen) > 8


def test_a_child_says_how_it_ended():
    def fail() -> None:
        raise ValueError("x")

    def wait() -> None:
        time.sleep(60)

    returned = in_child(lambda: 3, seconds=20)
    assert (returned.kind, returned.value) == ("returned", 3)
    raised = in_child(fail, seconds=20)
    assert raised.kind == "raised" and str(raised.value) == "x" and "Traceback" in raised.errors
    assert in_child(lambda: os._exit(9), seconds=20).value == 9
    assert in_child(lambda: print("é"), seconds=20).output == "é\n"
    assert in_child(wait, seconds=0.2).kind == "hung"
    interrupted = in_child(wait, seconds=0.2, interrupt=True)
    assert isinstance(interrupted.value, KeyboardInterrupt) and interrupted.signalled
    killed = in_child(wait, seconds=20, kill_after=0.1)
    assert (killed.kind, killed.value, killed.signalled) == ("killed", "SIGKILL", True)


@pytest.mark.skipif(sandbox.unavailable() is not None, reason=str(sandbox.unavailable()))
def test_nothing_but_the_scratch_folder_can_be_written_in_the_sandbox(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def work() -> list[str]:
        sandbox.enter(scratch)
        (scratch / "x").write_text("x")
        Path("/dev/null").write_text("x")
        places = (tmp_path, Path("/"), Path("/tmp"), FAULTS, Path.home(), Path("/proc/sys/kernel"))
        written = []
        for place in places:
            try:
                (place / "written by a test").write_text("x")
                written.append(str(place))
            except OSError:
                continue
        assert sandbox.changed_devices() == []
        os.unlink("/dev/null")
        Path("/dev/null").write_text("no device")
        assert sandbox.changed_devices() == ["null"]
        sandbox.make_devices()
        assert sandbox.changed_devices() == []
        return written

    outcome = in_child(work, seconds=60)
    assert (outcome.kind, outcome.value) == ("returned", []), str(outcome)
    assert list(tmp_path.rglob("*")) == [scratch]
