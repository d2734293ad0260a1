"""A checkpoint folder: safetensors and texts with a sha256 manifest, and nothing that is unpickled.

A new folder is written next to its final place under a temporary name, synced to the disk, and then
renamed. If the writer is killed, the previous folder stays as it was. Every file is compared with
the manifest before the folder is read, because a flipped bit in a weight would not show otherwise.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

MANIFEST = "manifest.json"
CONFIG = "config.json"


def write_folder(
    path: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    texts: dict[str, str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write tensor files, text files and their manifest as the folder `path`.

    A checkpoint that is already there is replaced. Floating-point tensors are cast to `dtype` if it
    is given, one file at a time, so that at most one file's copies are held in memory. Raises
    ValueError if `path` holds something other than a checkpoint: a user's own files are never
    deleted.
    """
    path = path.resolve()
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    try:
        for name, content in tensors.items():
            save_file({key: _stored(value, dtype) for key, value in content.items()}, fresh / name)
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        digests = {name: _digest(fresh / name) for name in (*tensors, *texts)}
        (fresh / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
        for file in fresh.iterdir():
            file.chmod(0o644)
            _sync(file)
        fresh.chmod(0o755)
        _sync(fresh)
        previous = _previous(path)
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(path, previous)
        os.rename(fresh, path)
        shutil.rmtree(previous, ignore_errors=True)
        _sync(path.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def verified_folder(path: Path, *names: str) -> Path:
    """The folder to read, after a check that it has the files `names` and matches its manifest.

    This is usually `path` itself (see `_existing_folder`). Raises ValueError that names the wrong
    file.
    """
    folder = _existing_folder(path)
    if not folder.is_dir():
        raise ValueError(f"path: got {path}, accepted is the folder of a checkpoint")
    expected = read_entries(folder, MANIFEST)
    for name in names:
        if name not in expected:
            raise ValueError(
                f"path: {folder / MANIFEST} does not name {name}; accepted is a whole checkpoint"
            )
    for name, digest in expected.items():
        if "/" in name or not (folder / name).is_file():
            raise ValueError(
                f"path: {folder} lacks {name}, which its {MANIFEST} names; "
                "accepted is a whole checkpoint"
            )
        if _digest(folder / name) != digest:
            raise ValueError(
                f"path: {folder / name} does not match its {MANIFEST}; "
                "accepted is an unaltered checkpoint"
            )
    return folder


def fingerprint(path: Path) -> str:
    """The sha256 of the manifest of a checkpoint, in hexadecimal.

    The manifest holds the sha256 of every other file, so this number identifies the whole
    checkpoint. Results store it to state which checkpoint was measured.
    """
    return _sha256(_existing_folder(path) / MANIFEST)


def read_entries(folder: Path, name: str, key: str | None = None) -> dict:
    """The JSON object in the file `name`, or the object under `key` in it.

    Raises ValueError if the file cannot be read or holds no such object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        return dict((content if key is None else content[key]).items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f"path: {folder} has no readable {name}; accepted is the folder of a checkpoint"
        ) from None


def _check_replaceable(path: Path) -> None:
    """Raise ValueError unless `path` is free, an empty folder or a checkpoint."""
    if not path.exists() or (path / MANIFEST).is_file():
        return
    if path.is_dir() and not any(path.iterdir()):
        return
    raise ValueError(
        f"path: got {path}, accepted is a new or empty folder, "
        "or the folder of a checkpoint, which is replaced"
    )


def _stored(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor as it is written: contiguous on the CPU, in `dtype` if it is floating-point."""
    return value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()


def _existing_folder(path: Path) -> Path:
    """The folder of a checkpoint, which has its temporary name if its writer died mid-replacement.

    `write_folder` renames the old folder away before it renames the new folder to `path`. A writer
    that dies between the two leaves only the old folder, under the name `_previous(path)`.
    """
    return path if path.is_dir() or not _previous(path).is_dir() else _previous(path)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _digest(path: Path) -> dict[str, str | int]:
    """The manifest's entry for a file: its sha256 and its size in bytes."""
    return {"sha256": _sha256(path), "bytes": path.stat().st_size}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
