"""The tensors of several processes in safetensors files, one a process.

`torch.distributed.checkpoint` plans which process writes and reads what. Its usual format holds a
pickle; here the header of every file says which parts of which tensors it holds, and nothing is
pickled. A file of whole tensors is read in the same way. So what one number of processes has
written, any other number reads.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hsa_mini.checks import quoted

SUFFIX = ".safetensors"


def shard_files(processes: int) -> list[str]:
    """The names of the files that `write_shards` writes."""
    return [f"shard-{i:05}-model-00001-of-00001{SUFFIX}" for i in range(1, processes + 1)]


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to `folder`, which all processes must see, each process its part.

    A tensor that is no `DTensor` is the same on every process, and one of them writes it. Each
    process needs host memory for its part, twice. Raises OSError on every process if one fails.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    _together(lambda: save(tensors, storage_writer=writer), folder)


class Shards:
    """Tensors in the files of one folder. tensors: name -> a tensor on the meta device, with the
    shape and dtype of the whole one.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """files: what was written together, verified. Raises ValueError if they do not make whole
        tensors.
        """
        self.folder = files[0].parent
        self.reader = HuggingFaceStorageReader(str(self.folder))
        self.reader.fs = _Files(files)
        try:
            metadata = self.reader.read_metadata().state_dict_metadata
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"path: {self.folder} cannot be read ({quoted(error)})") from None
        found = {n: x for n, x in metadata.items() if isinstance(x, TensorStorageMetadata)}
        self.tensors = {
            name: torch.empty(x.size, dtype=x.properties.dtype, device="meta")
            for name, x in found.items()
        }
        for name, x in found.items():
            if sum(math.prod(part.sizes) for part in x.chunks) != math.prod(x.size):
                raise ValueError(
                    f"path: {self.folder} holds parts of {quoted(name)}, accepted are all of them"
                )

    def read(self, tensors: dict[str, torch.Tensor], *, alone: bool = False) -> None:
        """Fill tensors, by name; of a `DTensor` each process fills its own part. alone: no other
        process reads. Raises ValueError on every process if one of them cannot read.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # one process alone is no mistake
                _together(
                    lambda: load(tensors, storage_reader=self.reader, no_dist=alone), self.folder
                )
        except OSError as error:
            raise ValueError(f"path: {error}") from None

    def read_whole(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """The whole tensors whose names begin with `prefix`."""
        tensors = {
            name: torch.empty_like(x, device="cpu")
            for name, x in self.tensors.items()
            if name.startswith(prefix)
        }
        self.read(tensors, alone=True)
        return tensors


class _Files(FileSystem):
    """Of the files in a folder, the verified ones."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = [str(path) for path in files]

    def ls(self, path: str) -> list[str]:
        return self.files


def _together(work: Callable[[], object], folder: Path) -> None:
    """Do what all processes do; raise OSError, which names one that has failed, on each of them."""
    try:
        work()
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{folder}: process {rank} failed ({quoted(cause)})") from None
