"""The state of a training run: the folders `step-N` in the folder of the run.

A run that was cut off continues from its newest whole state. A state is whole if its files match
its manifest and all its numbers are finite. A run of one process writes its tensors as one file, a
run of several processes as one file each (see `hsa_mini.checkpoint.shards`).
"""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hsa_mini.checkpoint.tensors import is_finite, tensor_file
from hsa_mini.files.disk import TEMPORARY, remove
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import Content, read_folder, write_folder

STATE = "state.safetensors"
PROGRESS = "progress.json"
MAX_STATES = 2  # one alone could be damaged

log = logging.getLogger(__name__)

Result = TypeVar("Result")


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
    save_files(run, step, {STATE: tensor_file(tensors)}, progress, texts)


def save_files(
    run: Path,
    step: int,
    tensors: Mapping[str, Content],
    progress: dict,
    texts: Mapping[str, str] | None = None,
) -> None:
    """`save_progress` with the files that hold the tensors, by name."""
    files = {**tensors, PROGRESS: json.dumps(progress).encode()}
    files |= {name: text.encode() for name, text in (texts or {}).items()}
    write_folder(state_folder(run, step), files, kind={PROGRESS})
    _remove_old(run, step)


def load_progress(run: Path) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest whole state of a run, as (tensors, progress), or None if it has no states.

    If newer states are damaged, a warning names them. Raises ValueError if no state is whole.
    """
    return newest_state(run, _read)


def newest_state(run: Path, read: Callable[[dict[str, Path]], Result]) -> Result | None:
    """What `read` returns for the verified files, by name, of the newest whole state of a run; see
    `load_progress`. A state for which `read` raises ValueError is damaged.
    """
    damaged = []
    for folder in reversed(state_folders(run)):
        try:
            state = read_state(folder, read)
        except (OSError, ValueError) as error:
            damaged.append(f"{folder.name} is damaged ({error})")
            continue
        if damaged:
            log.warning("run: %s; the run goes on from %s", "; ".join(damaged), folder)
        return state
    if damaged:
        raise ValueError(
            f"run: no state in {run} is whole: {'; '.join(damaged)}; "
            "accepted is a whole one, or `train --restart`, which removes them and begins at step 0"
        )
    return None


def read_state(folder: Path, read: Callable[[dict[str, Path]], Result]) -> Result:
    """What `read` returns for the verified files of one state, by name.

    Raises ValueError unless the state is whole, and what `read` raises.
    """

    def checked(files: dict[str, Path]) -> Result:
        if not tensor_files(files):
            raise ValueError(f"path: {folder} holds no tensors; accepted is a whole checkpoint")
        return read(files)

    return read_folder(folder, (PROGRESS,), checked)


def tensor_files(files: Mapping[str, Path]) -> list[Path]:
    """Those of a state's files that hold tensors."""
    return [path for name, path in files.items() if name.endswith(".safetensors")]


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
    tensors = whole_tensors(files)
    if name := not_finite(tensors):
        folder = files[PROGRESS].parent
        raise ValueError(f"path: {files.get(STATE, folder)} holds {name}, which is not finite")
    return tensors, read_json(files[PROGRESS])


def whole_tensors(files: Mapping[str, Path]) -> dict[str, torch.Tensor]:
    """The tensors of a state, by name. Raises ValueError if they cannot be read."""
    if STATE not in files:
        # A late import, because it takes half a second.
        from hsa_mini.checkpoint.shards import Shards

        return Shards(tensor_files(files)).read_whole()
    try:
        return load_file(files[STATE])
    except SafetensorError as error:
        raise ValueError(f"path: {files[STATE]} cannot be read ({error})") from None


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
        read_state(folder, lambda files: None)
    except (OSError, ValueError):
        return False
    return True
