"""Weights on disk: safetensors with a sha256 manifest, written whole or not at all, never unpickled.

A folder is written beside its place under a temporary name, synced, and renamed: whoever kills the writer leaves the
folder as it was. Reading checks every file against the manifest first: a flipped bit would load without a sound.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .config import HSAConfig
from .model import HSAModel

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
STATE, PROGRESS = "state.safetensors", "progress.json"


def write_folder(path: Path, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str]) -> None:
    """Write files of tensors and of text, and their manifest, as the folder `path`, replacing the checkpoint there.

    Raises ValueError if something else stands there: nobody's own files are deleted.
    """
    path = path.resolve()
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"path: got {path}, accepted is a new or empty folder, or that of a checkpoint, which is replaced")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".tmp-", dir=path.parent))
    try:
        for name, content in tensors.items():
            save_file({key: value.detach().contiguous().cpu() for key, value in content.items()}, fresh / name)
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
    folder = path if path.is_dir() or not _previous(path).is_dir() else _previous(path)  # the writer died between renames
    if not folder.is_dir():
        raise ValueError(f"path: got {path}, accepted is the folder of a checkpoint")
    try:
        expected = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"path: {folder} has no readable {MANIFEST}; accepted is the folder of a checkpoint") from None
    for name in names:
        if name not in expected:
            raise ValueError(f"path: {folder / MANIFEST} does not name {name}; accepted is a whole checkpoint")
    for name, digest in expected.items():
        if "/" in name or not (folder / name).is_file():
            raise ValueError(f"path: {folder} lacks {name}, which its {MANIFEST} names; accepted is a whole checkpoint")
        if _digest(folder / name) != digest:
            raise ValueError(f"path: {folder / name} does not match its {MANIFEST}; accepted is an unaltered checkpoint")
    return folder


def save_model(model: HSAModel, path: Path, *, dtype: torch.dtype | None = None, texts: dict[str, str] | None = None) -> None:
    """Write `model` (floating weights in `dtype` if given) and further `texts` as a checkpoint folder."""
    tensors = {
        name: value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in model.state_dict().items()
        if not (model.config.tied and name == "head.weight")
    }
    write_folder(path, {WEIGHTS: tensors}, {CONFIG: model.config.to_json(), **(texts or {})})


def load_model(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> HSAModel:
    """The model of a checkpoint folder, in evaluation mode.

    dtype None: bfloat16 on a GPU, float32 elsewhere. Raises ValueError for a folder that is missing, incomplete or altered.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = verified_folder(path, CONFIG, WEIGHTS)
    try:
        config = HSAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS, device=str(device))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    model = HSAModel(config, device="meta")
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    if config.tied and "embedding.weight" in tensors:
        tensors["head.weight"] = tensors["embedding.weight"]
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"path: the weights in {folder} do not fit its {CONFIG} ({str(error).splitlines()[-1].strip()})") from None
    if config.tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def save_progress(run: Path, step: int, tensors: dict[str, torch.Tensor], progress: dict) -> None:
    """Write the state of a training run after `step` steps; the two newest states are kept."""
    write_folder(run / f"step-{step}", {STATE: tensors}, {PROGRESS: json.dumps(progress)})
    for old in _steps(run)[:-2]:
        shutil.rmtree(old)


def load_progress(run: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest state of a run that is whole, or None."""
    for folder in reversed(_steps(run)):
        try:
            folder = verified_folder(folder, STATE, PROGRESS)
        except ValueError:
            continue
        return load_file(folder / STATE), json.loads((folder / PROGRESS).read_text())
    return None


def _steps(run: Path) -> list[Path]:
    return sorted(run.glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _digest(path: Path) -> dict[str, str | int]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
