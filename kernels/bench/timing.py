"""How long a call takes, and how much memory."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch

WARMUP = 2
SAMPLES = 10
MIN_SAMPLES = 3
SECONDS = 1.5  # if `SAMPLES` calls take longer than this, fewer calls are timed


def measure(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Median milliseconds of a call, and its peak of allocated bytes on a GPU (None elsewhere)."""
    return (_measure_gpu if device.type == "cuda" else _measure_cpu)(call)


def peak_bytes(device: torch.device) -> int | None:
    """The peak of bytes in use on a GPU since the last reset (None elsewhere)."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _samples(seconds: float) -> int:
    return min(SAMPLES, max(MIN_SAMPLES, int(SECONDS / max(seconds, 1e-9))))


def _measure_cpu(call: Callable[[], object]) -> tuple[float, None]:
    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for _ in range(WARMUP):
        seconds = timed()
    return statistics.median(timed() for _ in range(_samples(seconds))) * 1e3, None


def _measure_gpu(call: Callable[[], object]) -> tuple[float, int]:
    """Calls follow each other without waiting, as in a model, so that work of the CPU between
    launches is hidden.
    """
    for _ in range(WARMUP):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_samples(seconds) + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) for start, end in pairwise(marks)]
    return statistics.median(times), torch.cuda.max_memory_allocated() - before
