"""The state of a run on a mesh: `step-N` in the folder of the run, as for one process, but with one
file of tensors from each process. It goes on on any mesh, and in one process.

All processes must see the folder of the run.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hsa_mini.checkpoint.shards import Shards, shard_files, write_shards
from hsa_mini.checkpoint.training_state import PROGRESS, newest_state, save_files, tensor_files
from hsa_mini.files.reading import read_json
from hsa_mini.training.parallel.trainer import MeshTrainer
from hsa_mini.training.state_check import check_numbers, check_progress

Result = TypeVar("Result")


def save_sharded(
    trainer: MeshTrainer, run: Path, progress: dict, texts: Mapping[str, str] | None = None
) -> None:
    """Write the state of a run, each process its part, and remove old states; see `save_progress`.

    Every process calls it. The first one gives the state its name when it has read back what all
    have written. Raises the same ValueError or OSError on every process if one fails; the earlier
    states then stay.
    """
    tensors = trainer.own_state()
    if dist.get_rank():
        if (folder := _from_first(None)) is not None:
            with contextlib.suppress(OSError):  # the first process says what has failed
                write_shards(folder, tensors)
        error = _from_first(None)
    else:
        begun = []

        def write(path: Path) -> None:
            begun.append(_from_first(path.parent))
            write_shards(path.parent, tensors)

        first, *others = shard_files(dist.get_world_size())
        files = {first: write, **dict.fromkeys(others, lambda path: None)}
        error = _error_of(lambda: save_files(run, trainer.step, files, progress, texts))
        if not begun:
            _from_first(None)
        _from_first(error)
    if error is not None:
        raise error


def load_sharded(
    trainer: MeshTrainer, run: Path, check: Callable[[dict], object] = lambda progress: None
) -> dict | None:
    """Go on from the newest whole state of a run, whatever mesh wrote it; returns its progress, or
    None if the run has no state. Every process calls it.

    check: called with the progress before any tensor is read; it raises ValueError if the state is
    not one to go on from. The errors and warnings are those of `load_progress` and
    `Trainer.load_state_dict`, the same on every process.
    """

    def read(files: dict[str, Path]) -> tuple[list[Path], dict]:
        Shards(tensor_files(files))  # raises ValueError if they do not make whole tensors
        return tensor_files(files), read_json(files[PROGRESS])

    found = _from_first(_together(lambda: None if dist.get_rank() else newest_state(run, read)))
    if found is None:
        return None
    files, progress = found

    def open_files() -> Shards:
        check_progress(progress, steps=trainer.recipe.steps)
        check(progress)
        shards = Shards(files)
        trainer.check_layout(shards.tensors, progress["step"])
        return shards

    shards = _together(open_files)
    tensors = trainer.empty_state(shards.tensors)
    shards.read(tensors)
    own = {n: x.to_local() if isinstance(x, DTensor) else x for n, x in tensors.items()}
    _together(lambda: check_numbers(own, progress["step"]))
    trainer.take_over(tensors, progress["step"])
    return progress


def _from_first(value: Any) -> Any:
    """The value that the first process gives."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _together(work: Callable[[], Result]) -> Result:
    """What `work` returns. If it raises ValueError or OSError on one process, all raise it."""
    results: list[Result] = []
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, _error_of(lambda: results.append(work())))
    for error in errors:
        if error is not None:
            raise error
    return results[0]


def _error_of(work: Callable[[], object]) -> Exception | None:
    try:
        work()
    except (OSError, ValueError) as error:
        return error
    return None
