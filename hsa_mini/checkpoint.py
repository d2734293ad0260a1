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
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .config import HSAConfig
from .memory import ChunkMemory
from .model import HSAModel
from .nn.ring import Clock, WindowRing
from .nn.swa import WindowCache

MANIFEST = "manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG = "config.json"
STATE, PROGRESS = "state.safetensors", "progress.json"
MEMORY, POSITION = "memory.safetensors", "position.json"
SHARD_BYTES = 5 * 10**9


def write_folder(
    path: Path, tensors: dict[str, dict[str, torch.Tensor]], texts: dict[str, str], *, dtype: torch.dtype | None = None
) -> None:
    """Write files of tensors and of text, and their manifest, as the folder `path`, replacing the checkpoint there.

    Floating tensors are cast to `dtype` if given, one file at a time. Raises ValueError if something else stands there:
    nobody's own files are deleted.
    """
    path = path.resolve()
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"path: got {path}, accepted is a new or empty folder, or that of a checkpoint, which is replaced")
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
            raise ValueError(f"path: {folder / MANIFEST} does not name {name}; accepted is a whole checkpoint")
    for name, digest in expected.items():
        if "/" in name or not (folder / name).is_file():
            raise ValueError(f"path: {folder} lacks {name}, which its {MANIFEST} names; accepted is a whole checkpoint")
        if _digest(folder / name) != digest:
            raise ValueError(f"path: {folder / name} does not match its {MANIFEST}; accepted is an unaltered checkpoint")
    return folder


def fingerprint(path: Path) -> str:
    """The sha256 of a checkpoint's manifest, which holds that of every file: by it a result says what was measured."""
    return _digest(_folder(path) / MANIFEST)["sha256"]


def save_model(
    model: HSAModel,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    texts: dict[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` (floating weights in `dtype` if given) and further `texts` as a checkpoint folder.

    Weights of more than `shard_bytes` bytes are split over files `model-00001-of-0000N.safetensors` of at most as many
    (or of one larger tensor), with an index in the layout of Hugging Face. Raises ValueError for shard_bytes below 1.
    """
    if not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise ValueError(f"shard_bytes: got {shard_bytes!r}, accepted is an integer of at least 1")
    shards, size, room = [], 0, -1
    for name, value in _weights(model).items():
        nbytes = value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
        if nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        size, room = size + nbytes, room - nbytes
    texts = {CONFIG: model.config.to_json(), **(texts or {})}
    files = {WEIGHTS: shards[0]}
    if len(shards) > 1:
        files = {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, 1)}
        weight_map = {name: file for file, shard in files.items() for name in shard}
        texts[INDEX] = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1) + "\n"
    write_folder(path, files, texts, dtype=dtype)


def load_model(path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> HSAModel:
    """The model of a checkpoint folder, in evaluation mode.

    dtype None: bfloat16 on a GPU, float32 elsewhere. Raises ValueError for a folder that is missing, incomplete or
    altered, and for files that do not fit together.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = verified_folder(path, CONFIG)
    try:
        model = HSAModel(HSAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")), device="meta")
        tensors = dict(_read(folder, _weights(model), device, dtype))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def _weights(model: HSAModel) -> dict[str, torch.Tensor]:
    """What is stored of a model: a tied head is the embedding."""
    return {name: value for name, value in model.state_dict().items() if not (model.config.tied and name == "head.weight")}


def _stored(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()


def _read(
    folder: Path, expected: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a verified folder by name, one by one; names and shapes must be those `expected`."""
    misfit = f"path: the weights in {folder} do not fit its {CONFIG}"
    places = _places(folder)
    if different := sorted(places.keys() ^ expected.keys()):
        raise ValueError(f"{misfit} ({different[0]} is {'missing' if different[0] in expected else 'too many'})")

    def fitting(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or value.shape != expected[name].shape:
            got = f"{list(value.shape)} {value.dtype}"
            raise ValueError(f"{misfit} ({name}: got {got}, accepted is {list(expected[name].shape)} of a floating dtype)")
        return value.to(dtype)

    for file in sorted(set(places.values())):
        with safe_open(folder / file, framework="pt", device=str(device)) as shard:
            for name in shard.keys():
                yield name, fitting(name, shard.get_tensor(name))


def _places(folder: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it. Raises ValueError unless manifest, index and files agree."""
    vouched = _entries(folder, MANIFEST)
    if WEIGHTS not in vouched and INDEX not in vouched:
        raise ValueError(f"path: {folder / MANIFEST} does not name {WEIGHTS} or {INDEX}; accepted is a whole checkpoint")
    found: dict[str, str] = {}
    for file in sorted(name for name in vouched if name.endswith(".safetensors")):
        with safe_open(folder / file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    named = _entries(folder, INDEX, "weight_map") if INDEX in vouched else dict.fromkeys(found, WEIGHTS)
    for name in sorted(found.keys() | named.keys()):
        if named.get(name) != found.get(name):
            places = f"in {named.get(name, 'no file')} by the index, in {found.get(name, 'no file')} by the files themselves"
            raise ValueError(f"path: {folder}: {name} is {places}; accepted is a whole checkpoint")
    return found


def _entries(folder: Path, name: str, key: str | None = None) -> dict:
    """The JSON object in a file, or the one below `key` in it."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        return dict((content if key is None else content[key]).items())
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise ValueError(f"path: {folder} has no readable {name}; accepted is the folder of a checkpoint") from None


def save_memory(memory: ChunkMemory, path: Path) -> None:
    """Write what a model keeps of a text as a folder, so that it need not be read again. Raises ValueError if it is empty."""
    if memory.batch is None:
        raise ValueError("memory: got an empty one, accepted is one that has read a token")
    if memory.clock is not None and not any(memory.padding):
        memory = memory.branch()
        memory.unroll()
    tensors = {name: getattr(memory, name) for name in ("k", "v", "landmarks", "partial")}
    for blocks in ("lower", "upper"):
        for i, cache in enumerate(getattr(memory, blocks)):
            if cache is not None:
                tensors |= {f"{blocks}.{i}.k": cache.k, f"{blocks}.{i}.v": cache.v}
    tensors |= {f"block_queries.{i}": query for i, query in enumerate(memory.block_queries) if query is not None}
    read = {"position": memory.position, "padding": memory.padding}
    write_folder(path, {MEMORY: tensors}, {CONFIG: memory.config.to_json(), POSITION: json.dumps(read) + "\n"})


def load_memory(path: Path, *, device: torch.device | str = "cpu", offload: bool = False) -> ChunkMemory:
    """The memory of a folder that `save_memory` wrote, for the model that made it; `offload`: see `ChunkMemory`.

    On the CPU its tensors are mapped from the file, and read when they are needed. Raises ValueError for a folder that is
    missing, incomplete or altered.
    """
    folder = verified_folder(path, MEMORY, CONFIG, POSITION)
    try:
        memory = ChunkMemory(HSAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")), offload=offload)
        with safe_open(folder / MEMORY, framework="pt") as file:
            places = dict.fromkeys(("k", "v"), "cpu" if offload else device)
            tensors = {name: file.get_tensor(name).to(places.get(name, device)) for name in file.keys()}
        memory.append(*(tensors.pop(name) for name in ("k", "v", "landmarks")))
        read = json.loads((folder / POSITION).read_text(encoding="utf-8"))
        memory.position, memory.padding = int(read["position"]), tuple(read["padding"])
        if memory.padding:
            memory.clock = Clock(torch.tensor(memory.positions, device=device), memory.config.window)
        memory.partial = tensors.pop("partial")
        for name in sorted(tensors):
            blocks, i, *part = name.split(".")
            if blocks == "block_queries":
                memory.block_queries[int(i)] = tensors[name]
            elif part == ["k"]:
                pair = tensors[name], tensors[f"{blocks}.{i}.v"]
                getattr(memory, blocks)[int(i)] = WindowRing(*pair, memory.clock) if memory.clock else WindowCache(*pair)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    return memory


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


def _folder(path: Path) -> Path:
    """Where a checkpoint is: elsewhere if its writer died between two renames."""
    return path if path.is_dir() or not _previous(path).is_dir() else _previous(path)


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
