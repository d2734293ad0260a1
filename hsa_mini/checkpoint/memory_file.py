"""memory_file: TODO."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hsa_mini.checkpoint.folder import CONFIG, verified_folder, write_folder
from hsa_mini.config import HSAConfig
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.memory.window_cache import Clock, WindowRing
from hsa_mini.model.swa import WindowCache

MEMORY = "memory.safetensors"
POSITION = "position.json"


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
    tensors |= {
        f"block_queries.{i}": query
        for i, query in enumerate(memory.block_queries)
        if query is not None
    }
    read = {"position": memory.position, "padding": memory.padding}
    write_folder(
        path,
        {MEMORY: tensors},
        {CONFIG: memory.config.to_json(), POSITION: json.dumps(read) + "\n"},
    )


def load_memory(
    path: Path, *, device: torch.device | str = "cpu", offload: bool = False
) -> ChunkMemory:
    """The memory of a folder that `save_memory` wrote, for the model that made it; `offload`: see `ChunkMemory`.

    On the CPU its tensors are mapped from the file, and read when they are needed. Raises ValueError for a folder that is
    missing, incomplete or altered.
    """
    folder = verified_folder(path, MEMORY, CONFIG, POSITION)
    try:
        memory = ChunkMemory(
            HSAConfig.from_json((folder / CONFIG).read_text(encoding="utf-8")), offload=offload
        )
        with safe_open(folder / MEMORY, framework="pt") as file:
            places = dict.fromkeys(("k", "v"), "cpu" if offload else device)
            tensors = {
                name: file.get_tensor(name).to(places.get(name, device)) for name in file.keys()
            }
        memory.append(*(tensors.pop(name) for name in ("k", "v", "landmarks")))
        read = json.loads((folder / POSITION).read_text(encoding="utf-8"))
        memory.position = int(read["position"])
        memory.padding = tuple(read["padding"])
        if memory.padding:
            memory.clock = Clock(
                torch.tensor(memory.positions, device=device), memory.config.window
            )
        memory.partial = tensors.pop("partial")
        for name in sorted(tensors):
            blocks, i, *part = name.split(".")
            if blocks == "block_queries":
                memory.block_queries[int(i)] = tensors[name]
            elif part == ["k"]:
                pair = tensors[name], tensors[f"{blocks}.{i}.v"]
                getattr(memory, blocks)[int(i)] = (
                    WindowRing(*pair, memory.clock) if memory.clock else WindowCache(*pair)
                )
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"path: {folder} cannot be read ({error})") from None
    return memory
