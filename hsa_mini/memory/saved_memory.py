"""A memory as a folder: its files, and what must agree in them.

    config.json          the configuration of the model
    position.json        position: tokens of the longest sequence; padding: by how many tokens each
                         sequence is shorter, [] if none is; weights: the fingerprint of the model
    memory.safetensors   chunks, windows and unfinished chunks; `_shapes` says which and how large

If all sequences are equally long, the file holds the windows in the order of time and the tail
without empty slots. Otherwise it holds both as they lie in memory.

Dimensions: B batch, N chunks, S chunk size, C width, W window, J key/value heads, D head dimension,
J_r retrieval heads, R retrieval dimension.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hsa_mini.checkpoint.tensors import is_finite, tensor_file
from hsa_mini.checks import quoted
from hsa_mini.config import MAX_TOKENS, HSAConfig
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import Content, read_folder, write_folder

CONFIG = "config.json"
POSITION = "position.json"
TENSORS = "memory.safetensors"
FILES = (TENSORS, CONFIG, POSITION)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SavedMemory:
    """What the folder holds. weights: None in a folder that an earlier version wrote."""

    config: HSAConfig
    position: int
    padding: list[int]
    weights: str | None
    tensors: dict[str, torch.Tensor]


def write_memory(path: Path, saved: SavedMemory, further: Mapping[str, Content]) -> None:
    """Write the folder `path`, with `further` files by name. Raises ValueError for a memory that
    `check_memory` refuses.
    """
    check_memory(saved)
    read = {"position": saved.position, "padding": saved.padding, "weights": saved.weights}
    files: dict[str, Content] = {CONFIG: saved.config.to_json().encode()}
    files[POSITION] = f"{json.dumps(read)}\n".encode()
    files |= {TENSORS: tensor_file(saved.tensors), **further}
    write_folder(path, files, kind={TENSORS})


def read_memory(path: Path | Mapping[str, Path]) -> SavedMemory:
    """The memory in the folder `path`, or in verified files by name (see `read_folder`); its
    tensors are mapped from the file.

    Raises ValueError that names the folder, and what is missing, altered or contradictory in it.
    """
    if isinstance(path, Path):
        return read_folder(path, FILES, read_memory)
    config = read_json(path[CONFIG])
    position = read_json(path[POSITION])
    fields: list[Any] = [position.get(name) for name in ("position", "padding", "weights")]
    try:
        with safe_open(path[TENSORS], framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        saved = SavedMemory(HSAConfig.from_dict(config), *fields, tensors=tensors)
        check_memory(saved)
    except (SafetensorError, ValueError) as error:
        folder = path[TENSORS].parent
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    return saved


def check_memory(saved: SavedMemory) -> None:
    """Raise ValueError unless all parts of a memory have their types, are finite and fit each other
    and the configuration.
    """
    position = saved.position
    fits = type(position) is int and 0 < position <= MAX_TOKENS
    _require(fits, f"position {quoted(position)}", f"is an integer of 1 to {MAX_TOKENS}")
    padding = saved.padding
    fits = type(padding) is list and all(type(shorter) is int for shorter in padding)
    fits = fits and (not padding or min(padding) == 0 < max(padding) < position)
    _require(
        fits, f"padding {quoted(padding)}", "is [], or 0 and larger numbers below the position"
    )
    weights = saved.weights
    fits = weights is None or (type(weights) is str and re.fullmatch("[0-9a-f]{64}", weights))
    _require(fits, f"weights {quoted(weights)}", "are 64 hexadecimal digits")
    tensors = saved.tensors
    k = torch.atleast_1d(tensors.get("k", torch.empty(0)))
    shapes = _shapes(saved.config, len(padding) or len(k), position, equal=not padding)
    for name in sorted(tensors.keys() ^ shapes.keys()):
        got = f"{'no' if name in shapes else 'a'} tensor {quoted(name)}"
        _require(False, got, "are those of its configuration")
    for name, shape in shapes.items():
        value = tensors[name]
        # Under autocast, what lies between matrix products stays in float32.
        wide = name not in ("k", "v", "landmarks") and k.dtype.itemsize == 2
        fits = value.dtype in ({k.dtype, torch.float32} if wide else {k.dtype})
        fits = fits and value.shape == shape and value.dtype in DTYPES
        got = f"{name} {list(value.shape)} {value.dtype}"
        _require(fits, got, f"is {list(shape)} of one floating dtype")
        _require(is_finite(value), f"{name} with NaN or infinite numbers", "are finite ones")


def _require(fits: object, got: str, accepted: str) -> None:
    if not fits:
        raise ValueError(f"memory: got {got:.100}, accepted {accepted}")


def _shapes(c: HSAConfig, batch: int, position: int, *, equal: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, by name, after `position` tokens of the longest sequence."""
    chunks = (batch, position // c.chunk_size)
    kv = (*chunks, c.chunk_size, c.hsa_kv_heads, c.hsa_head_dim)  # [B, N, S, J, D]
    query = (c.retrieval_heads, c.retrieval_dim)
    waiting = position % c.chunk_size if equal else c.chunk_size
    shapes = {
        "k": kv,
        "v": kv,
        "landmarks": (*chunks, *query),
        "partial": (batch, waiting, c.width),
    }
    cached = min(position, c.window - 1) if equal else c.window
    for name, layers in (("lower", c.lower_layers), ("upper", c.upper_layers)):
        for i in range(layers):
            pair = (f"{name}.{i}.k", f"{name}.{i}.v")
            shapes |= dict.fromkeys(pair, (batch, cached, c.kv_heads, c.head_dim))
    if c.query_block > 1 and (position % c.query_block or not equal):
        shapes |= {f"block_queries.{i}": (batch, 1, *query) for i in range(c.groups)}
    return shapes
