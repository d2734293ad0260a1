"""How long a call takes, and how much memory."""

import statistics
import time
from collections.abc import Callable

import torch

WARMUP, SAMPLES = 2, 10
LEAST_SAMPLES, SECONDS = 3, 1.5  # after this many seconds a measurement ends with fewer samples


def measure(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Median milliseconds, and the most bytes that a call allocates on a GPU (None elsewhere)."""
    gpu, times, began = device.type == "cuda", [], time.perf_counter()
    for _ in range(WARMUP):
        call()
    before = 0
    if gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    while len(times) < SAMPLES and (len(times) < LEAST_SAMPLES or time.perf_counter() - began < SECONDS):
        if gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), torch.cuda.max_memory_allocated(device) - before if gpu else None
