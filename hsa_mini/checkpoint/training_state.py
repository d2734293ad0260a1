"""The state of a training run: the folders `step-N` in the folder of the run.

A run that was cut off continues from its newest whole state. A state is whole if its files match
its manifest and all its numbers are finite.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hsa_mini.checkpoint.tensors import is_finite, tensor_file
from hsa_mini.files.disk import TEMPORARY, remove
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import read_folder, write_folder

STATE = "state.safetensors"
PROGRESS = "progress.json"
MAX_STATES = 2  # one alone could be damaged

log = logging.getLogger(__name__)


def save_progress(
    run: Path,
    step: int,
    tensors: dict[str, torch.Tensor],
    progress: dict,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write the state of a run after `step` training steps, and remove old states.

    progress: values that JSON can hold. texts: further files of the state, by name. The newest
    states stay, down to the second one that is whole.
    """
    files = {STATE: tensor_file(tensors), PROGRESS: json.dumps(progress).encode()}
    files |= {name: text.encode() for name, text in (texts or {}).items()}
    write_folder(state_folder(run, step), files, kind={STATE})
    _remove_old(run, step)


def load_progress(run: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest whole state of a run, as (tensors, progress), or None if it has no states.

    If newer states are damaged, a warning names them. Raises ValueError if no state is whole.
    """
    damaged = []
    for folder in reversed(state_folders(run)):
        try:
            state = read_folder(folder, (STATE, PROGRESS), _read)
        except (OSError, ValueError) as error:
            damaged.append(f"{folder.name} is damaged ({error})")
            continue
        if damaged:
            log.warning("run: %s; the run goes on from %s", "; ".join(damaged), folder)
        return state
    if damaged:
        raise ValueError(
            f"run: no state in {run} is whole: {'; '.join(damaged)}; "
            "accepted is --restart, which removes them and begins at step 0"
        )
    return None


def discard_progress(run: Path) -> None:
    """Remove all states of a run."""
    for folder in state_folders(run):
        remove(folder)


def clear_up(run: Path, step: int) -> None:
    """Clear up after runs that were killed. No other process may write to the folder meanwhile.

    step: that of the newest whole state, 0 without one. Temporary files and old states are removed.
    A newer state, which is damaged, is renamed, because the run will write a whole one.
    """
    for left in run.glob(f"{TEMPORARY}*"):
        remove(left)
    for folder in state_folders(run):
        if _step(folder) > step:
            aside = folder.with_name(f"{folder.name}.damaged")
            remove(aside)
            folder.rename(aside)
    _remove_old(run, step)


def state_folder(run: Path, step: int) -> Path:
    """The folder of the state after `step` steps."""
    return run / f"step-{step}"


def state_folders(run: Path) -> list[Path]:
    """The folders of states, oldest first. Everything with another name is left alone."""
    found = [path for path in run.glob("step-*") if re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _read(files: dict[str, Path]) -> tuple[dict[str, torch.Tensor], dict]:
    """The content of a state. Raises ValueError for values that training cannot go on from."""
    try:
        tensors = load_file(files[STATE])
    except SafetensorError as error:
        raise ValueError(f"path: {files[STATE]} cannot be read ({error})") from None
    if name := not_finite(tensors):
        raise ValueError(f"path: {files[STATE]} holds {name}, which is not finite")
    return tensors, read_json(files[PROGRESS])


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a tensor that holds NaN or infinity, or None. This waits for the device."""
    for name, value in tensors.items():
        if value.is_floating_point() and not is_finite(value):
            return name
    return None


def _remove_old(run: Path, step: int) -> None:
    """Remove the states that are older than the two newest whole ones; that of `step` is whole."""
    whole = 0
    for folder in reversed(state_folders(run)):
        if whole == MAX_STATES:
            remove(folder)
        elif _step(folder) == step or _matches_manifest(folder):
            whole += 1


def _matches_manifest(folder: Path) -> bool:
    try:
        read_folder(folder, (STATE, PROGRESS), lambda files: None)
    except (OSError, ValueError):
        return False
    return True
