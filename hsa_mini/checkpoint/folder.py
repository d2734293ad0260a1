"""Weights and memories on disk: safetensors with a sha256 manifest, written whole or not at all, never unpickled.

A folder is written beside its place under a temporary name, synced, and renamed: whoever kills the writer leaves the
folder as it was. Reading checks every file against the manifest first: a flipped bit would load without a sound.
Weights are cast one file at a time when written and one tensor at a time when read: never are two copies of all held.
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
    """Write files of tensors and of text, and their manifest, as the folder `path`, replacing the checkpoint there.

    Floating tensors are cast to `dtype` if given, one file at a time. Raises ValueError if something else stands there:
    nobody's own files are deleted.
    """
    path = path.resolve()
    if (
        path.exists()
        and not (path / MANIFEST).is_file()
        and not (path.is_dir() and not any(path.iterdir()))
    ):
        raise ValueError(
            f"path: got {path}, accepted is a new or empty folder, or that of a checkpoint, which is replaced"
        )
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
    """The folder to read, once it has `names` and every file matches its manifest. Raises ValueError that names the file."""
    folder = _folder(path)
    if not folder.is_dir():
        raise ValueError(f"path: got {path}, accepted is the folder of a checkpoint")
    expected = _entries(folder, MANIFEST)
    for name in names:
        if name not in expected:
            raise ValueError(
                f"path: {folder / MANIFEST} does not name {name}; accepted is a whole checkpoint"
            )
    for name, digest in expected.items():
        if "/" in name or not (folder / name).is_file():
            raise ValueError(
                f"path: {folder} lacks {name}, which its {MANIFEST} names; accepted is a whole checkpoint"
            )
        if _digest(folder / name) != digest:
            raise ValueError(
                f"path: {folder / name} does not match its {MANIFEST}; accepted is an unaltered checkpoint"
            )
    return folder


def fingerprint(path: Path) -> str:
    """The sha256 of a checkpoint's manifest, which holds that of every file: by it a result says what was measured."""
    return _digest(_folder(path) / MANIFEST)["sha256"]


def _stored(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()


def _entries(folder: Path, name: str, key: str | None = None) -> dict:
    """The JSON object in a file, or the one below `key` in it."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        return dict((content if key is None else content[key]).items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(
            f"path: {folder} has no readable {name}; accepted is the folder of a checkpoint"
        ) from None


def _folder(path: Path) -> Path:
    """Where a checkpoint is: elsewhere if its writer died between two renames."""
    return path if path.is_dir() or not _previous(path).is_dir() else _previous(path)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _digest(path: Path) -> dict[str, str | int]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        return {
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
