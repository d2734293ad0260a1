"""How much memory is free, asked before much of it is taken."""

import os
from pathlib import Path

import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a GPU, what torch keeps for reuse included, or in the memory of this machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:  # Linux: what is free, and what the file cache would give back
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_room(tokens: int, needed: dict[torch.device, int]) -> None:
    """Raise MemoryError that says how many tokens fit, if the bytes that so many need on each device are not free."""
    for device, size in needed.items():
        free = free_bytes(device)
        if size > free:
            fit = tokens * free // size
            raise MemoryError(
                f"memory: got {tokens:,} tokens, which need {size / 1e9:,.1f} GB on {device}, "
                f"accepted are up to {fit:,}, for which the {free / 1e9:,.1f} GB that are free suffice"
            )
