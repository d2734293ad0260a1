"""The state of a training run: the folders `step-N` in the folder of the run.

A run that was cut off continues from its newest complete state.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from hsa_mini.checkpoint.tensors import tensor_file
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import read_folder, write_folder

STATE = "state.safetensors"
PROGRESS = "progress.json"


def save_progress(run: Path, step: int, tensors: dict[str, torch.Tensor], progress: dict) -> None:
    """Write the state of a run after `step` training steps; delete all but the two newest states.

    progress: values that JSON can hold. Two states are kept because the newest one may be
    incomplete.
    """
    files = {STATE: tensor_file(tensors), PROGRESS: json.dumps(progress).encode()}
    write_folder(run / f"step-{step}", files, kind={STATE})
    for old in _steps(run)[:-2]:
        shutil.rmtree(old)


def load_progress(run: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest complete state of a run, as (tensors, progress), or None if there is none."""
    for folder in reversed(_steps(run)):
        try:
            return read_folder(
                folder,
                (STATE, PROGRESS),
                lambda files: (load_file(files[STATE]), read_json(files[PROGRESS])),
            )
        except ValueError:
            continue
    return None


def _steps(run: Path) -> list[Path]:
    """The folders of states, oldest first."""
    return sorted(run.glob("step-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
