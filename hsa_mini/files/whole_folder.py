"""A folder written as a whole, with a sha256 manifest, and verified when it is read.

A new folder is filled under a temporary name, synced, and renamed; an old one is exchanged for it
in one step. Where names cannot be exchanged (a mount point, some network file systems), the new
files are filled in inside the folder. Renaming the manifest is then the step from old to new, and a
reader finds files that have not reached their place yet in the folder `.new`.

The manifest is a JSON object: {file name: {"sha256": 64 hexadecimal digits, "bytes": size}}.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from hsa_mini.files.disk import (
    TEMPORARY,
    copy_access,
    exchange,
    make_folder,
    may_rename,
    remove,
    sync,
    temporary_sibling,
)
from hsa_mini.files.lock import LOCK, locked
from hsa_mini.files.reading import open_regular, read_bytes, read_json
from hsa_mini.files.whole_file import write_file

MANIFEST = "manifest.json"
NEW = ".new"  # inside a folder: the files of a replacement that is written in place
STALE = ".stale"  # inside NEW: the names of the old files that the replacement does not have
NOT_OURS_TO_JUDGE = {NEW, LOCK, "lost+found"}
MAX_READS = 20

Content = bytes | Callable[[Path], None]
Result = TypeVar("Result")


def write_folder(path: Path, files: Mapping[str, Content], *, kind: Collection[str]) -> None:
    """Write files by name, and their manifest, as the folder `path`: old or new, never a mixture.

    files: the content of each file, or a function that writes the file at the path it is given.
    kind: names of files that tell the kind of the folder; only a folder of the same kind is
    replaced, and only if it holds nothing but what its manifest names (see `check_replaceable`).
    A folder and files that are there keep their modes and owners; new ones have the modes that the
    umask gives. Symbolic links are followed. Raises ValueError and OSError.
    """
    path = Path(os.path.realpath(path))
    check_replaceable(path, kind)
    make_folder(path.parent)
    if may_rename(path):
        with temporary_sibling(path, folder=True) as fresh:
            _fill(fresh, files, path)
            copy_access(path, fresh)
            sync(fresh)
            if _put(fresh, path):
                sync(path.parent)
                return
    with locked(path, "path"):
        _replace_in_place(path, files)


def read_folder(
    path: Path, names: Collection[str], read: Callable[[dict[str, Path]], Result]
) -> Result:
    """What `read` returns for the verified files of a folder, given by name.

    Every file is compared with the manifest, which must name all of `names`. If a writer replaces
    the folder meanwhile, everything is read again, so that the result never mixes two folders.
    Raises ValueError that names the wrong file, and what `read` raises.
    """
    for _ in range(MAX_READS):
        before = _version(path)
        try:
            result = read(_verified_files(path, names))
        except Exception:
            if _version(path) == before:
                raise
        else:
            if _version(path) == before:
                return result
    raise ValueError(f"path: {path} was replaced {MAX_READS} times while it was read")


def fingerprint(path: Path) -> str:
    """The sha256 of the manifest of a folder, in hexadecimal.

    The manifest holds the sha256 of every other file, so this number identifies the whole folder.
    Results store it to state which checkpoint was measured.
    """
    return hashlib.sha256(read_bytes(path / MANIFEST, max_bytes=1 << 24)).hexdigest()


def check_replaceable(path: Path, kind: Collection[str]) -> None:
    """Raise ValueError unless `path` is free, an empty folder, or a folder of this kind that holds
    nothing but the files that its manifest names.
    """
    if not os.path.lexists(path):
        return
    accepted = f"accepted is a new or an empty folder, or one with {' or '.join(sorted(kind))}"
    if not path.is_dir():
        raise ValueError(f"path: got {path}, which is a file; {accepted}")
    found = {entry for entry in os.listdir(path) if not entry.startswith(TEMPORARY)}
    found -= NOT_OURS_TO_JUDGE
    if not found:
        return
    try:
        ours = read_manifest(path)
    except ValueError:
        ours = {}
    if not set(kind) & ours.keys():
        other = min(found - {MANIFEST}, default=MANIFEST)
        raise ValueError(f"path: got {path}, which holds {other}; {accepted}")
    foreign = found - ours.keys() - {MANIFEST, *_stale(path)}
    foreign |= {name for name in ours if (path / name).is_dir()}
    if foreign:
        raise ValueError(
            f"path: got {path}, whose {MANIFEST} does not name {min(foreign)}; {accepted}"
        )


def read_manifest(path: Path) -> dict[str, dict]:
    """The manifest of a folder: size and sha256 by file name. Raises ValueError if it has none."""
    entries = read_json(path / MANIFEST)
    for name, entry in entries.items():
        plain = name not in ("", ".", "..", MANIFEST) and "/" not in name and "\0" not in name
        if not plain or not isinstance(entry, dict) or entry.keys() != {"sha256", "bytes"}:
            raise ValueError(
                f"path: {path / MANIFEST} does not list files; accepted is a sha256 manifest"
            )
    return entries


def write_manifest(path: Path, names: Collection[str]) -> None:
    """Write the manifest of files that another library has written into the folder `path`.

    `read_folder` then verifies these files and ignores all others.
    """
    write_file(path / MANIFEST, _manifest({name: _entry(path / name) for name in names}))


def _manifest(entries: dict[str, dict[str, str | int]]) -> bytes:
    return (json.dumps(entries, indent=1) + "\n").encode()


def _fill(fresh: Path, files: Mapping[str, Content], old: Path) -> None:
    """Write all files and the manifest into the empty folder `fresh`, and sync each."""
    (fresh / MANIFEST).touch()
    usual_mode = (fresh / MANIFEST).stat().st_mode & 0o777
    for name, content in files.items():
        if isinstance(content, bytes):
            (fresh / name).write_bytes(content)
        else:
            content(fresh / name)
            (fresh / name).chmod(usual_mode)  # safetensors does not ask the umask
    with ThreadPoolExecutor() as pool:  # hashing large files takes minutes
        digests = dict(zip(files, pool.map(_entry, (fresh / name for name in files))))
    (fresh / MANIFEST).write_bytes(_manifest(digests))
    for name in (*files, MANIFEST):
        copy_access(old / name, fresh / name)
        sync(fresh / name)


def _put(fresh: Path, path: Path) -> bool:
    """Give the folder `fresh` the name `path`. If `path` holds files, `fresh` then names those.

    Returns False where the names cannot be exchanged.
    """
    try:
        os.rename(fresh, path)  # over nothing or over an empty folder
    except OSError:
        if not path.is_dir():
            raise
        return exchange(fresh, path)
    return True


def _replace_in_place(path: Path, files: Mapping[str, Content]) -> None:
    """Replace the files of a folder that keeps its own name."""
    _finish(path)
    fresh = path / f"{TEMPORARY}new"
    remove(fresh)
    fresh.mkdir(0o700)
    try:
        old = set(os.listdir(path)) - NOT_OURS_TO_JUDGE - {fresh.name}
        stale = {"names": sorted(old - files.keys() - {MANIFEST})}
        (fresh / STALE).write_text(json.dumps(stale), encoding="utf-8")
        sync(fresh / STALE)
        _fill(fresh, files, path)
        copy_access(path, fresh)
        sync(fresh)
        os.rename(fresh, path / NEW)
        sync(path)
        os.rename(path / NEW / MANIFEST, path / MANIFEST)  # from here on the folder is the new one
        sync(path / NEW)
        sync(path)
    finally:
        remove(fresh)
    _finish(path)


def _finish(path: Path) -> None:
    """Bring a replacement in place to its end, or remove it if it has not become valid yet."""
    new = path / NEW
    if not new.is_dir():
        return
    if not (new / MANIFEST).exists() and (new / STALE).exists():
        for name in read_manifest(path).keys() & set(os.listdir(new)):
            os.rename(new / name, path / name)
        for name in _stale(path):
            (path / name).unlink(missing_ok=True)
        sync(path)
    # Without STALE, a replacement that is half removed is not taken for a valid one.
    (new / STALE).unlink(missing_ok=True)
    sync(new)
    remove(new)
    sync(path)


def _stale(path: Path) -> list[str]:
    """The old files that an unfinished replacement in place leaves over."""
    stale = path / NEW / STALE
    return read_json(stale)["names"] if stale.is_file() else []


def _version(path: Path) -> tuple | None:
    """What changes whenever the folder is replaced or a replacement goes on; None without one."""
    try:
        status = os.stat(path / MANIFEST)
        waiting = os.listdir(path / NEW) if (path / NEW).is_dir() else []
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, sorted(waiting)


def _verified_files(path: Path, names: Collection[str]) -> dict[str, Path]:
    """The files of a folder by name, after a check of each against the manifest."""
    if not (path / MANIFEST).exists():
        raise ValueError(
            f"path: got {path} without a {MANIFEST}; accepted is the folder of a checkpoint"
        )
    manifest = read_manifest(path)
    for name in names:
        if name not in manifest:
            raise ValueError(
                f"path: {path / MANIFEST} does not name {name}; accepted is a whole checkpoint"
            )
    with ThreadPoolExecutor() as pool:
        files = pool.map(partial(_verified_file, path), *zip(*manifest.items()))
        return dict(zip(manifest, files))


def _verified_file(path: Path, name: str, expected: dict) -> Path:
    """The file with this content: in its place, or in NEW if its writer was stopped."""
    places = [file for file in (path / name, path / NEW / name) if file.is_file()]
    for file in places:
        if file.stat().st_size == expected["bytes"] and _entry(file) == expected:
            return file
    if not places:
        raise ValueError(
            f"path: {path} lacks {name}, which its {MANIFEST} names; accepted is a whole checkpoint"
        )
    raise ValueError(
        f"path: {places[0]} does not match its {MANIFEST}; accepted is an unaltered checkpoint"
    )


def _entry(path: Path) -> dict[str, str | int]:
    """The manifest's entry for a file: its sha256 and its size in bytes."""
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": digest, "bytes": file.tell()}
