"""Runs everything that is still missing, several runs at once, each in a worker process.

A worker receives one (arm, seed) after another. It sends back the number of steps done (int), the
record (dict), or what went wrong (str).
"""

import dataclasses
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
from tqdm import tqdm

from hsa_mini import provenance
from hsa_mini.evaluation.runner import without_interrupts
from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.records import RunKey, append_record, current, read_records
from hsa_mini.lab.run import run_arm
from hsa_mini.lab.scales import SCALES, Scale

# One worker may have to compile attention anew for the window of every arm and stage.
RECOMPILE_LIMIT = 64

Worker = tuple[Connection, SpawnProcess]


def run_missing(
    arms: Iterable[str],
    seeds: Iterable[int],
    *,
    path: Path,
    device: torch.device,
    scale: str = "lab",
    steps: int | None = None,
    jobs: int = 1,
) -> int:
    """Run every (arm, seed) that has no record in `path` yet, `jobs` at once; returns how many runs
    were missing.

    A run that fails is reported at once on standard error, and all others go on. At the end
    ChildProcessError is raised.
    """
    arms = tuple(arms)
    done = current(read_records(path), scale, steps)
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    total = sum(ARMS[arm].recipe(SCALES[scale], steps).steps for arm, _ in missing)
    jobs = max(min(jobs, len(missing)), 1)
    # Taken before this command itself changes the checkout by writing records.
    source = provenance.record(device)
    failed = []
    workers = _Workers(missing, jobs, partial(_start, scale, steps, device, jobs))
    bar = tqdm(
        total=total, desc=f"{len(missing)} runs", unit="step", mininterval=0.5, smoothing=0.05
    )
    try:
        for (arm, seed), message in workers.messages():
            if isinstance(message, int):
                bar.update(message)
            elif isinstance(message, dict):
                append_record(path, message | source)
            else:
                failed.append(f"{arm} with seed {seed}")
                bar.write(f"{failed[-1]} failed: {message}", file=sys.stderr)
    finally:
        bar.close()
        workers.stop()
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(missing)} runs failed ({', '.join(failed)});"
            f" all others are in {path}"
        )
    return len(missing)


class _Workers:
    """At most `jobs` worker processes, and the runs that wait for one."""

    def __init__(self, runs: Iterable[RunKey], jobs: int, start: Callable[[], Worker]) -> None:
        self.waiting = list(runs)
        self.jobs = jobs
        self.start = start
        self.busy: dict[Connection, tuple[SpawnProcess, RunKey]] = {}

    def messages(self) -> Iterator[tuple[RunKey, int | dict | str]]:
        """Every message of every run, as it arrives; ends when no run is left."""
        while self.waiting or self.busy:
            while self.waiting and len(self.busy) < self.jobs:
                self._give_next(*self.start())
            ready = wait(self.busy)
            for link, (process, run) in list(self.busy.items()):
                if link not in ready:
                    continue
                try:
                    message = link.recv()
                except (EOFError, ConnectionResetError):
                    message = "its process ended"
                yield run, message
                if isinstance(message, dict):
                    self._give_next(link, process)
                elif isinstance(message, str):
                    # The cause may lie in the process, so the next run gets a fresh one.
                    del self.busy[link]
                    _stop(link, process)

    def _give_next(self, link: Connection, process: SpawnProcess) -> None:
        """Send the worker its next run; without one, stop it."""
        if not self.waiting:
            self.busy.pop(link, None)
            _stop(link, process)
            return
        run = self.waiting.pop(0)
        self.busy[link] = (process, run)
        with suppress(BrokenPipeError, ConnectionResetError):  # `messages` notices the end
            link.send(run)

    def stop(self) -> None:
        """Stop all workers, even in the middle of a run."""
        for link, (process, _) in self.busy.items():
            _stop(link, process)


def _start(scale: str, steps: int | None, device: torch.device, jobs: int) -> Worker:
    """Start a worker process and return the link to it."""
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    link, other = context.Pipe()
    process = context.Process(target=_work, args=(other, SCALES[scale], steps, device, jobs))
    with without_interrupts():
        process.start()
    other.close()  # only the worker holds this end now, so the link ends when the worker does
    return link, process


def _stop(link: Connection, process: SpawnProcess) -> None:
    link.close()
    process.terminate()
    process.join()


def _work(
    link: Connection, scale: Scale, steps: int | None, device: torch.device, jobs: int
) -> None:
    """What a worker process does: run each (arm, seed) that it receives, until the link ends."""
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    try:
        if device.type == "cuda":
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            prepare(scale, device)
        while True:
            arm, seed = link.recv()
            record = run_arm(ARMS[arm], scale, seed, device=device, steps=steps, progress=link.send)
            link.send(record)
            gc.collect()  # frees the recorded CUDA graphs with their memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        link.send(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def prepare(scale: Scale, device: torch.device) -> None:
    """Compile all kernels once per process, by a few steps of every stage and a few questions.

    Otherwise the recorded time of a process's first run would include compiling.
    """
    few = dataclasses.replace(scale, questions=2, texts=2)
    run_arm(ARMS["hsa"], few, 0, device=device, steps=8 * (len(scale.growth) + 1))
