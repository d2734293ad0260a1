"""The weights of a model in a checkpoint folder: one file, or several files with an index.

Layout and names are those of Hugging Face. Weights are cast one file at a time when they are
written and one tensor at a time when they are read, so that two copies of all weights never exist.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hsa_mini.checkpoint.tensors import is_finite, stored_dtype, tensor_file
from hsa_mini.checks import check_integer, quoted
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import MANIFEST, write_folder

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


def save_weights(
    tensors: dict[str, torch.Tensor],
    path: Path,
    *,
    texts: dict[str, str],
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights by name, and text files by name, as a checkpoint folder.

    dtype: the stored dtype of parameters; buffers keep their own, and with None all do.

    Weights of more than `shard_bytes` bytes are split over files
    `model-00001-of-0000N.safetensors`, in the order of `tensors`, with an index. Each file holds at
    most `shard_bytes` bytes, or a single larger tensor. Raises ValueError for shard_bytes below 1
    and for what `write_folder` refuses.
    """
    check_integer("shard_bytes", shard_bytes, 1)
    sizes = {
        name: value.numel() * stored_dtype(value, dtype).itemsize for name, value in tensors.items()
    }
    shards = _split(tensors, sizes, shard_bytes)
    files = {WEIGHTS: shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{i:05}-of-{len(shards):05}.safetensors": shard
            for i, shard in enumerate(shards, 1)
        }
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, shard in files.items() for name in shard},
        }
        texts = {**texts, INDEX: json.dumps(index, indent=1) + "\n"}
    contents = {name: tensor_file(shard, dtype) for name, shard in files.items()}
    contents |= {name: text.encode() for name, text in texts.items()}
    write_folder(path, contents, kind={WEIGHTS, INDEX})


def load_weights(
    files: dict[str, Path],
    expected: dict[str, torch.Tensor],
    *,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """The weights in the verified files of a folder, by name, on `device`.

    files: see `read_folder`. expected: tensors with the names and shapes to find and the dtypes to
    return; they may be on the meta device. Raises ValueError if the files and the index disagree,
    if a name or a shape is not the expected one, and for NaN or infinite numbers.
    """
    try:
        return dict(_read(files, expected, device))
    except SafetensorError as error:
        reason = quoted(str(error))
        raise ValueError(f"path: {files[CONFIG].parent} cannot be read ({reason})") from None


def _split(
    tensors: dict[str, torch.Tensor], sizes: dict[str, int], shard_bytes: int
) -> list[dict[str, torch.Tensor]]:
    """Tensors by file, in order; a new file begins where the next tensor would not fit."""
    shards = []
    free = -1
    for name, value in tensors.items():
        if sizes[name] > free:
            shards.append({})
            free = shard_bytes
        shards[-1][name] = value
        free = free - sizes[name]
    return shards


def _read(
    files: dict[str, Path], expected: dict[str, torch.Tensor], device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a folder one by one, as (name, tensor), file by file."""
    misfit = f"path: the weights in {files[CONFIG].parent} do not fit its {CONFIG}"
    file_of = _files_by_name(files)
    if different := sorted(file_of.keys() ^ expected.keys()):
        what = "missing" if different[0] in expected else "too many"
        raise ValueError(f"{misfit} ({quoted(different[0])} is {what})")

    def fitting(name: str, value: torch.Tensor) -> torch.Tensor:
        wanted = expected[name]
        if not value.is_floating_point() or value.shape != wanted.shape:
            raise ValueError(
                f"{misfit} ({name}: got {list(value.shape)} {value.dtype}, "
                f"accepted is {list(wanted.shape)} of a floating dtype)"
            )
        value = value.to(wanted.dtype)
        if not is_finite(value):
            raise ValueError(
                f"path: {name} in {files[file_of[name]]} holds NaN or infinite numbers "
                f"in {wanted.dtype}; accepted are finite numbers"
            )
        return value

    for file in sorted(set(file_of.values())):
        with safe_open(files[file], framework="pt", device=str(device)) as shard:
            for name in shard.keys():  # `safe_open` is not a mapping
                yield name, fitting(name, shard.get_tensor(name))


def _files_by_name(files: dict[str, Path]) -> dict[str, str]:
    """The file that holds each tensor, by the tensor's name.

    Raises ValueError unless index and files agree.
    """
    folder = files[CONFIG].parent
    if WEIGHTS not in files and INDEX not in files:
        raise ValueError(
            f"path: {folder / MANIFEST} does not name {WEIGHTS} or {INDEX}; "
            "accepted is a whole checkpoint"
        )
    found: dict[str, str] = {}
    for file in sorted(name for name in files if name.endswith(".safetensors")):
        with safe_open(files[file], framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    if INDEX in files:
        indexed = read_json(files[INDEX]).get("weight_map")
        if not isinstance(indexed, dict):
            raise ValueError(f"path: {files[INDEX]} has no weight_map; accepted is an index")
    else:
        indexed = dict.fromkeys(found, WEIGHTS)
    for name in sorted(found.keys() | indexed.keys()):
        if indexed.get(name) != found.get(name):
            by_index, by_file = (
                quoted(x[name]) if name in x else "no file" for x in (indexed, found)
            )
            raise ValueError(
                f"path: {folder}: {quoted(name)} is in {by_index} by the index, "
                f"in {by_file} by the files themselves; accepted is a whole checkpoint"
            )
    return found
