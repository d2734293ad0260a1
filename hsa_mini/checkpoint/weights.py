"""weights: TODO."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hsa_mini.checkpoint.folder import CONFIG, MANIFEST, _entries, verified_folder, write_folder
from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9


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
    shards = []
    size = 0
    room = -1
    for name, value in _weights(model).items():
        nbytes = (
            value.numel() * (dtype if dtype and value.is_floating_point() else value.dtype).itemsize
        )
        if nbytes > room:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = value
        size = size + nbytes
        room = room - nbytes
    texts = {CONFIG: model.config.to_json(), **(texts or {})}
    files = {WEIGHTS: shards[0]}
    if len(shards) > 1:
        files = {
            f"model-{i:05}-of-{len(shards):05}.safetensors": shard
            for i, shard in enumerate(shards, 1)
        }
        weight_map = {name: file for file, shard in files.items() for name in shard}
        texts[INDEX] = (
            json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1)
            + "\n"
        )
    write_folder(path, files, texts, dtype=dtype)


def load_model(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> HSAModel:
    """The model of a checkpoint folder, in evaluation mode.

    dtype None: bfloat16 on a GPU, float32 elsewhere. Raises ValueError for a folder that is missing, incomplete or
    altered, and for files that do not fit together.
    """
    device = torch.device(device)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = verified_folder(path, CONFIG)
    try:
        model = HSAModel(
            HSAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")), device="meta"
        )
        tensors = dict(_read(folder, _weights(model), device, dtype))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    model.load_state_dict(tensors, strict=False, assign=True)
    if model.config.tied:
        model.head.weight = model.embedding.weight
    return model.eval().requires_grad_(False)


def _weights(model: HSAModel) -> dict[str, torch.Tensor]:
    """What is stored of a model: a tied head is the embedding."""
    return {
        name: value
        for name, value in model.state_dict().items()
        if not (model.config.tied and name == "head.weight")
    }


def _read(
    folder: Path, expected: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a verified folder by name, one by one; names and shapes must be those `expected`."""
    misfit = f"path: the weights in {folder} do not fit its {CONFIG}"
    places = _places(folder)
    if different := sorted(places.keys() ^ expected.keys()):
        raise ValueError(
            f"{misfit} ({different[0]} is {'missing' if different[0] in expected else 'too many'})"
        )

    def fitting(name: str, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or value.shape != expected[name].shape:
            got = f"{list(value.shape)} {value.dtype}"
            raise ValueError(
                f"{misfit} ({name}: got {got}, accepted is {list(expected[name].shape)} of a floating dtype)"
            )
        return value.to(dtype)

    for file in sorted(set(places.values())):
        with safe_open(folder / file, framework="pt", device=str(device)) as shard:
            for name in shard.keys():
                yield name, fitting(name, shard.get_tensor(name))


def _places(folder: Path) -> dict[str, str]:
    """Tensor name -> the file that holds it. Raises ValueError unless manifest, index and files agree."""
    vouched = _entries(folder, MANIFEST)
    if WEIGHTS not in vouched and INDEX not in vouched:
        raise ValueError(
            f"path: {folder / MANIFEST} does not name {WEIGHTS} or {INDEX}; accepted is a whole checkpoint"
        )
    found: dict[str, str] = {}
    for file in sorted(name for name in vouched if name.endswith(".safetensors")):
        with safe_open(folder / file, framework="pt") as shard:
            found |= dict.fromkeys(shard.keys(), file)
    named = (
        _entries(folder, INDEX, "weight_map") if INDEX in vouched else dict.fromkeys(found, WEIGHTS)
    )
    for name in sorted(found.keys() | named.keys()):
        if named.get(name) != found.get(name):
            places = f"in {named.get(name, 'no file')} by the index, in {found.get(name, 'no file')} by the files themselves"
            raise ValueError(f"path: {folder}: {name} is {places}; accepted is a whole checkpoint")
    return found
