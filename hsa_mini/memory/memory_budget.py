"""How much memory is free, which is checked before large allocations, and how much was used."""

import os
import resource
import sys
from pathlib import Path

import torch

from hsa_mini.memory.memory_limits import bytes_within_limits


def free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can still be allocated on a GPU (what torch keeps for reuse included), or in this
    machine's memory: as many as are free, and as every limit of `memory_limits` allows.

    root: the folder in which `proc` and `sys` are found.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:  # Linux counts what is free and what the file cache would give back
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        free = 1024 * int(available.split()[1])
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min([free, *bytes_within_limits(root)]), 0)


def check_fits(
    device: torch.device,
    *,
    chunks: int,
    held: int,
    chunk_bytes: int,
    moved_bytes: int,
    chunk_size: int,
) -> None:
    """Raise MemoryError if `chunks` chunks in all do not fit on `device`; the error says how many
    tokens do.

    chunk_bytes: bytes of one chunk on this device; `held` chunks are there already. moved_bytes:
    bytes that are held twice while buffers move.
    """
    needed = moved_bytes + (chunks - held) * chunk_bytes
    free = free_bytes(device)
    if needed > free:
        fit = held + max(free - moved_bytes, 0) // chunk_bytes
        raise MemoryError(
            f"memory: got {chunks * chunk_size:,} tokens, "
            f"for which {needed / 1e9:,.3f} GB more are needed on {device} and "
            f"{free / 1e9:,.3f} GB are free, accepted are up to {fit * chunk_size:,} tokens"
        )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: on a GPU by tensors, otherwise by this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
