"""training_state: TODO."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from hsa_mini.checkpoint.folder import verified_folder, write_folder

STATE = "state.safetensors"
PROGRESS = "progress.json"


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
