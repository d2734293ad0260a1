"""Runs everything that is still missing, several runs at once, each in a worker process.

A worker receives one (arm, seed) after another. It sends back the number of steps done (int), the
record (dict), what went wrong (str), or None if the time was over before the run was done.
"""

import dataclasses
import gc
import math
import multiprocessing
import sys
import time
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
from hsa_mini.files.lock import locked
from hsa_mini.lab.arms import ARMS
from hsa_mini.lab.records import RunKey, append_record, current, read_records
from hsa_mini.lab.rounds import arms_of
from hsa_mini.lab.run import run_arm
from hsa_mini.lab.scales import SCALES, Scale
from hsa_mini.lab.states import RunStates

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
    minutes: float = math.inf,
) -> tuple[int, int]:
    """Run every (arm, seed) that has no record in `path` yet, `jobs` at once; returns how many runs
    were missing, and how many are missing now.

    A run that is cut off goes on from its newest state with the next call; see `lab.states`. After
    `minutes` all runs save their states, and no other begins. Measuring a model that is trained by
    then takes its time. A run that fails is reported at once on standard error, and all others go
    on. At the end ChildProcessError is raised.
    """
    deadline = time.monotonic() + 60 * minutes
    missing = missing_runs(arms, seeds, path=path, scale=scale, steps=steps)
    total = sum(arms_of(scale)[arm].recipe(SCALES[scale], steps).steps for arm, _ in missing)
    jobs = max(min(jobs, len(missing)), 1)
    # Taken before this command itself changes the checkout by writing records.
    source = provenance.record(device)
    failed = []
    finished = 0
    start = partial(_start, scale, steps, device, jobs, path, deadline)
    workers = _Workers(missing, jobs, start, deadline)
    bar = tqdm(
        total=total, desc=f"{len(missing)} runs", unit="step", mininterval=0.5, smoothing=0.05
    )
    try:
        for (arm, seed), message in workers.messages():
            if isinstance(message, int):
                bar.update(message)
            elif isinstance(message, dict):
                append_record(path, message | source)
                states_of(arm, seed, path, scale, steps).remove()
                finished += 1
            elif message is not None:
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
    return len(missing), len(missing) - finished


def missing_runs(
    arms: Iterable[str], seeds: Iterable[int], *, path: Path, scale: str, steps: int | None
) -> list[RunKey]:
    """Every (arm, seed) that has no record in `path` yet, seed by seed."""
    arms = tuple(arms)
    done = current(read_records(path), scale, steps)
    return [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]


def states_of(arm: str, seed: int, path: Path, scale: str, steps: int | None) -> RunStates:
    """Where the run of an arm keeps its state."""
    return RunStates(path, arms_of(scale)[arm], SCALES[scale], seed, steps)


class _Workers:
    """At most `jobs` worker processes, and the runs that wait for one until the deadline."""

    def __init__(
        self, runs: Iterable[RunKey], jobs: int, start: Callable[[], Worker], deadline: float
    ) -> None:
        self.waiting = list(runs)
        self.jobs = jobs
        self.start = start
        self.deadline = deadline
        self.busy: dict[Connection, tuple[SpawnProcess, RunKey]] = {}

    def messages(self) -> Iterator[tuple[RunKey, int | dict | str | None]]:
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
                if time.monotonic() > self.deadline:
                    self.waiting.clear()
                if isinstance(message, dict) or message is None:
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


def _start(
    scale: str, steps: int | None, device: torch.device, jobs: int, path: Path, deadline: float
) -> Worker:
    """Start a worker process and return the link to it."""
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    link, other = context.Pipe()
    work = (other, scale, steps, device, jobs, path, deadline)
    process = context.Process(target=_work, args=work)
    with without_interrupts():
        process.start()
    other.close()  # only the worker holds this end now, so the link ends when the worker does
    return link, process


def _stop(link: Connection, process: SpawnProcess) -> None:
    link.close()
    process.terminate()
    process.join()


def _work(
    link: Connection,
    scale: str,
    steps: int | None,
    device: torch.device,
    jobs: int,
    path: Path,
    deadline: float,
) -> None:
    """What a worker process does: run each (arm, seed) that it receives, until the link ends."""
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    try:
        if device.type == "cuda":
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            prepare(SCALES[scale], device)
        options = {"device": device, "steps": steps, "progress": link.send, "deadline": deadline}
        while True:
            arm, seed = link.recv()
            states = states_of(arm, seed, path, scale, steps)
            with locked(states.folder, "run"):
                record = run_arm(arms_of(scale)[arm], SCALES[scale], seed, states=states, **options)
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
    few = dataclasses.replace(scale, questions=2, texts=2, points=0, crowds=None)
    run_arm(ARMS["hsa"], few, 0, device=device, steps=8 * (len(scale.growth) + 1))
