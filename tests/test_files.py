"""Files and folders: what a write may touch, what is left when it fails, and what a reader sees."""

import contextlib
import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hsa_mini.files import disk, whole_file, whole_folder
from hsa_mini.files.lock import LOCK, locked
from hsa_mini.files.reading import read_bytes, read_json
from hsa_mini.files.whole_file import check_writable, write_file
from hsa_mini.files.whole_folder import (
    MANIFEST,
    NEW,
    check_replaceable,
    fingerprint,
    read_folder,
    write_folder,
)

KIND = {"a.txt"}
OLD = {"a.txt": b"old", "b.txt": b"old", "gone.txt": b"old"}
FRESH = {"a.txt": b"new", "b.txt": b"new", "more.txt": b"new"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def contents(folder: Path) -> dict[str, bytes]:
    """What a reader of the folder gets, by name."""
    return read_folder(
        folder, KIND, lambda files: {name: file.read_bytes() for name, file in files.items()}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextlib.contextmanager
def umask(value: int):
    before = os.umask(value)
    yield
    os.umask(before)


def as_nobody(work) -> None:
    """Call `work` in a child process of the user 65534; the assertions in it count."""
    pid = os.fork()
    if pid == 0:
        os.setegid(65534)
        os.seteuid(65534)
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# Single files


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "dangling").symlink_to("deep/missing")
    for link, target in (("link", "target"), ("dangling", "deep/missing")):
        check_writable("--out", tmp_path / link)
        write_file(tmp_path / link, b"new")
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
        assert not (tmp_path / target).is_symlink()


def test_a_pipe_gets_the_content_and_stays_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    check_writable("--json", tmp_path / "pipe")
    write_file(tmp_path / "pipe", b"content")
    reader.join()
    assert got == [b"content"] and (tmp_path / "pipe").is_fifo()


@as_root
def test_a_device_stays_a_device(tmp_path):
    node = tmp_path / "null"  # a node of its own, so that a fault harms nothing
    os.mknod(node, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    check_writable("--json", node)
    write_file(node, b"content")
    assert node.is_char_device()


def test_an_open_descriptor_is_appended_to(tmp_path):
    """`command --json /dev/stdout > file` adds to what the command prints there."""
    (tmp_path / "file").write_text("printed\n")
    with (tmp_path / "file").open("a") as file:
        path = Path(f"/dev/fd/{file.fileno()}")
        if not path.exists():
            pytest.skip("this platform has no /dev/fd")
        write_file(path, b"content\n")
    assert (tmp_path / "file").read_text() == "printed\ncontent\n"


def test_a_mount_point_is_written_in_place(tmp_path, monkeypatch):
    """A file that is bound into a container cannot be renamed: os.replace fails with EBUSY."""
    path = tmp_path / "mounted"
    path.write_text("old and longer")
    inode = path.stat().st_ino
    monkeypatch.setattr(disk, "is_mount_point", lambda given: given == path)
    check_writable("--out", path)
    write_file(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_ino == inode


@as_root
def test_mount_points_are_recognised(tmp_path):
    """In a mount namespace of its own, so that nothing stays mounted."""
    code = """
import sys; from pathlib import Path; from hsa_mini.files.disk import is_mount_point
from hsa_mini.files.whole_file import write_file
folder = Path(sys.argv[1])
print(*(is_mount_point(folder / name) for name in ("a b", "dir", "other")))
write_file(folder / "a b", b"new")
print((folder / "source").read_text())
"""
    for name in ("a b", "source", "other"):
        (tmp_path / name).write_text("old")
    for name in ("dir", "dir2"):
        (tmp_path / name).mkdir()
    script = (
        'cd "$1" && mount --bind source "a b" && mount --bind dir2 dir && exec "$2" -c "$3" "$1"'
    )
    words = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path), sys.executable, code]
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(words, capture_output=True, text=True, cwd=root)
    if "unshare" in run.stderr or "mount" in run.stderr:
        pytest.skip("this machine allows no mount namespace")
    assert run.stdout.split() == ["True", "True", "False", "new"], run.stderr


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path):
    for mask, expected in ((0o077, 0o600), (0o022, 0o644), (0o002, 0o664)):
        with umask(mask):
            write_file(tmp_path / f"{mask}", b"x")
            assert mode(tmp_path / f"{mask}") == expected
    for kept in (0o600, 0o640, 0o444, 0o755):
        (tmp_path / f"{mask}").chmod(kept)
        write_file(tmp_path / f"{mask}", b"y")
        assert mode(tmp_path / f"{mask}") == kept


def test_nobody_else_can_read_a_private_file_while_it_is_written(tmp_path, monkeypatch):
    path = tmp_path / "private"
    path.write_text("old")
    path.chmod(0o600)
    seen = []
    monkeypatch.setattr(
        whole_file,
        "copy_access",
        lambda *_: seen.extend(mode(file) for file in tmp_path.iterdir()),
    )
    write_file(path, b"new")
    assert len(seen) == 2 and not any(found & 0o077 for found in seen)


@as_root
def test_the_owner_of_a_file_stays(tmp_path):
    (tmp_path / "theirs").write_text("old")
    os.chown(tmp_path / "theirs", 65534, 65534)
    write_file(tmp_path / "theirs", b"new")
    status = (tmp_path / "theirs").stat()
    assert (status.st_uid, status.st_gid) == (65534, 65534)


@as_root
@pytest.mark.parametrize("folder_mode", [0o1777, 0o555], ids=["sticky", "read-only"])
def test_a_file_that_may_be_written_but_not_renamed_is_written_in_place(folder_mode, tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(folder, folder.stat().st_mode | 0o755)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old and longer")
    (folder / "file").chmod(0o666)
    if folder_mode == 0o555:
        os.chown(folder / "file", 65534, 65534)
    folder.chmod(folder_mode)

    def work():
        check_writable("--out", folder / "file")
        write_file(folder / "file", b"new")
        assert (folder / "file").read_bytes() == b"new"

    as_nobody(work)
    assert names(folder) == ["file"]


@as_root
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:3]):
        os.chmod(folder, folder.stat().st_mode | 0o755)
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir(0o755)
    os.mkfifo(tmp_path / "pipe", 0o600)
    cases = ["file", "pipe", "new", "folder", "folder/new", "file/new", "x" * 300, "\0"]

    def work():
        for name in cases:
            with contextlib.suppress(ValueError):
                check_writable("--out", tmp_path / name)
                raise AssertionError(name)

    as_nobody(work)
    assert names(tmp_path) == ["file", "folder", "pipe"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one_alone(tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_the_next_writer_removes_what_a_killed_one_left_and_no_more(tmp_path):
    """A living writer holds a lock on its temporary file."""
    pid = os.fork()
    if pid == 0:
        with disk.temporary_sibling(tmp_path / "file", folder=False):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert len(names(tmp_path)) == 1
    (tmp_path / ".tmp-mine").write_text("not ours")
    with disk.temporary_sibling(tmp_path / "file", folder=False) as other:
        write_file(tmp_path / "file", b"new")
        assert names(tmp_path) == sorted([".tmp-mine", other.name, "file"])
    assert names(tmp_path) == [".tmp-mine", "file"]


# Folders

in_place_too = pytest.mark.parametrize("in_place", [False, True], ids=["exchanged", "in place"])


def without_exchange(monkeypatch, in_place: bool) -> None:
    """Make a file system that cannot exchange two names, if `in_place`."""
    if in_place:
        monkeypatch.setattr(whole_folder, "exchange", lambda *_: False)


@in_place_too
def test_a_folder_is_replaced_by_all_of_another(tmp_path, monkeypatch, in_place):
    without_exchange(monkeypatch, in_place)
    for files in (OLD, FRESH, OLD):
        write_folder(tmp_path / "x", files, kind=KIND)
        assert contents(tmp_path / "x") == files
        assert names(tmp_path / "x") == sorted([*files, MANIFEST])
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("in_place", [False, True], ids=["rename", "in place"])
def test_a_new_folder_may_be_empty_or_a_mounted_volume(tmp_path, monkeypatch, in_place):
    monkeypatch.setattr(disk, "is_mount_point", lambda given: in_place)
    (tmp_path / "x").mkdir()
    if in_place:
        (tmp_path / "x" / "lost+found").mkdir()
    inode = (tmp_path / "x").stat().st_ino
    write_folder(tmp_path / "x", OLD, kind=KIND)
    write_folder(tmp_path / "x", FRESH, kind=KIND)
    assert contents(tmp_path / "x") == FRESH
    if in_place:
        assert (tmp_path / "x").stat().st_ino == inode
        assert "lost+found" in names(tmp_path / "x")


def test_only_what_a_manifest_of_the_same_kind_names_is_replaced(tmp_path):
    """A stranger's files are never deleted, and a memory never takes the place of a model."""
    digest = {"sha256": "0" * 64, "bytes": 1}
    cases = {
        "extension": {MANIFEST: b'{"name": "a browser extension", "version": "1"}'},
        "thesis": {**OLD, MANIFEST: None, "thesis.tex": b"years of work"},
        "subfolder": {**OLD, MANIFEST: None, "figures/1.png": b"years of work"},
        "other kind": {"model.bin": b"weights", MANIFEST: {"model.bin": digest}},
        "no manifest": {"a.txt": b"mine"},
        "empty manifest": {"thesis.tex": b"years of work", MANIFEST: b"{}"},
        "nothing but an empty manifest": {MANIFEST: b"{}"},
        "broken": {"a.txt": b"mine", MANIFEST: b"["},
        "hidden": {".git/HEAD": b"ref", "a.txt": b"mine"},
    }
    for name, files in cases.items():
        folder = tmp_path / name
        if MANIFEST in files and files[MANIFEST] is None:
            write_folder(folder, OLD, kind=KIND)
        for file, content in files.items():
            if content is not None:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                given = content if isinstance(content, bytes) else json.dumps(content).encode()
                (folder / file).write_bytes(given)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for attempt in (check_replaceable, lambda path, kind: write_folder(path, OLD, kind=kind)):
            with pytest.raises(ValueError, match=r"^path: got .*; accepted is a new"):
                attempt(folder, KIND)
        assert {
            path: path.read_bytes() for path in folder.rglob("*") if path.is_file()
        } == before, name
    for name in ("thesis", "empty manifest"):
        assert "thesis.tex" in str(refusal(tmp_path / name))
    assert "figures" in str(refusal(tmp_path / "subfolder"))


def refusal(folder: Path) -> ValueError:
    with pytest.raises(ValueError) as caught:
        check_replaceable(folder, KIND)
    return caught.value


def test_folders_follow_the_umask_and_old_ones_keep_their_modes(tmp_path):
    """Files of a library that does not ask the umask follow it too."""

    def careless(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o666)

    files = {"a.txt": careless, "b.txt": b"x"}
    for mask, of_folder, of_file in ((0o077, 0o700, 0o600), (0o022, 0o755, 0o644)):
        with umask(mask):
            write_folder(tmp_path / f"{mask}", files, kind=KIND)
        assert mode(tmp_path / f"{mask}") == of_folder
        assert {mode(path) for path in (tmp_path / f"{mask}").iterdir()} == {of_file}
    private = tmp_path / f"{0o022}"
    private.chmod(0o700)
    (private / "a.txt").chmod(0o400)
    write_folder(private, files, kind=KIND)
    assert (mode(private), mode(private / "a.txt"), mode(private / "b.txt")) == (
        0o700,
        0o400,
        0o644,
    )


@in_place_too
def test_every_step_of_a_replacement_may_be_the_last(tmp_path, monkeypatch, in_place):
    """The writer ends before its n-th step on the disk, for every n.

    A reader sees the old folder or the new one, and the next writer leaves no debris.
    """
    without_exchange(monkeypatch, in_place)
    steps = [(os, name) for name in "rename replace fsync unlink rmdir mkdir chmod".split()]
    if not in_place:
        steps.append((whole_folder, "exchange"))
    seen = set()
    for n in range(200):
        write_folder(tmp_path / "x", OLD, kind=KIND)
        assert names(tmp_path) == ["x"], n
        assert names(tmp_path / "x") == sorted([*OLD, MANIFEST]), n
        pid = os.fork()
        if pid == 0:
            end_before_step(n, steps)
            write_folder(tmp_path / "x", FRESH, kind=KIND)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = contents(tmp_path / "x")
        assert found in (OLD, FRESH), n
        seen.add(found == FRESH)
        if status == 0:
            break
    assert n > 15 and found == FRESH and seen == {False, True}


def end_before_step(n: int, steps: list[tuple]) -> None:
    """End this process at the n-th call of one of the functions."""
    left = [n]

    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return function(*arguments, **options)

        return call

    for owner, name in steps:
        setattr(owner, name, counted(getattr(owner, name)))


@in_place_too
def test_a_reader_beside_a_writer_never_sees_a_mixture(tmp_path, monkeypatch, in_place):
    without_exchange(monkeypatch, in_place)
    generations = [{"a.txt": b"%d" % i, "b.txt": b"%d" % i} for i in range(60)]
    write_folder(tmp_path / "x", generations[0], kind=KIND)

    def write() -> None:
        for files in generations:
            write_folder(tmp_path / "x", files, kind=KIND)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    while writer.is_alive():
        found = contents(tmp_path / "x")
        assert len(set(found.values())) == 1
        seen.add(found["a.txt"])
    writer.join()
    assert len(seen) > 1


def test_a_file_that_is_replaced_after_it_was_verified_is_read_again(tmp_path):
    write_folder(tmp_path / "x", OLD, kind=KIND)
    calls = []

    def read(files):
        calls.append(files)
        if len(calls) == 1:
            write_folder(tmp_path / "x", FRESH, kind=KIND)
        return {name: file.read_bytes() for name, file in files.items() if file.exists()}

    assert read_folder(tmp_path / "x", KIND, read) == FRESH and len(calls) == 2


def test_a_folder_that_was_deleted_stays_deleted(tmp_path):
    """What a killed writer left is never taken for the folder itself."""
    write_folder(tmp_path / "x", OLD, kind=KIND)
    for left in (".x.previous", ".tmp-x"):
        shutil.copytree(tmp_path / "x", tmp_path / left)
    shutil.rmtree(tmp_path / "x")
    with pytest.raises(ValueError, match="accepted is the folder of a checkpoint"):
        contents(tmp_path / "x")


def test_fingerprints_tell_folders_apart(tmp_path):
    write_folder(tmp_path / "x", OLD, kind=KIND)
    write_folder(tmp_path / "y", OLD, kind=KIND)
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "y")
    write_folder(tmp_path / "y", FRESH, kind=KIND)
    assert fingerprint(tmp_path / "x") != fingerprint(tmp_path / "y")


# Reading


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long").write_bytes(b"x" * 11)
    (tmp_path / "loop").symlink_to("loop")
    assert read_bytes(tmp_path / "long", max_bytes=11) == b"x" * 11
    for name in ("pipe", "long", "loop", "missing", "."):
        with pytest.raises((ValueError, OSError)):
            read_bytes(tmp_path / name, max_bytes=10)
    with pytest.raises(ValueError, match="regular file"):
        read_bytes(Path("/dev/zero"), max_bytes=10)


def test_hostile_json_is_refused_by_the_name_of_its_file(tmp_path):
    digits = b'{"a": 1' + b"0" * 10**4 + b"}"  # more than Python accepts
    hostile = [b"[" * 10**6, b'{"a":' * 10**5, b"[]", b"\xff", b"", digits]
    for content in hostile:
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^path: .*x\.json is not readable; accepted is"):
            read_json(tmp_path / "x.json")


def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path):
    write_folder(tmp_path / "x", OLD, kind=KIND)
    entry = json.loads((tmp_path / "x" / MANIFEST).read_text())["a.txt"]
    for name in ("../x/a.txt", "/etc/hostname", "", ".", "..", "a\0b", MANIFEST):
        (tmp_path / "x" / MANIFEST).write_text(json.dumps({"a.txt": entry, name: entry}))
        with pytest.raises(ValueError, match=r"^path: .*manifest"):
            contents(tmp_path / "x")


# Locks


def test_a_folder_is_held_by_one_process_and_freed_however_it_ends(tmp_path):
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        with locked(tmp_path / "run", "--run"):
            os.write(ready[1], b".")
            os.read(done[0], 1)
            os.kill(os.getpid(), 9)
    os.read(ready[0], 1)
    refused = rf"^--run: .*run is in use by process {pid}, accepted is"
    with pytest.raises(ValueError, match=refused), locked(tmp_path / "run", "--run"):
        pass
    os.write(done[1], b".")
    os.waitpid(pid, 0)
    with locked(tmp_path / "run", "--run"):
        assert names(tmp_path / "run") == [LOCK]
    assert names(tmp_path / "run") == []
    assert not (tmp_path / "run" / NEW).exists()
