"""All runs that are still missing: several at once, each in a process, each a line of JSON in one file when it is done.

The file is replaced by a longer one for every line: whoever stops or kills this finds every finished run, and no part of
another.
"""

import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from hsa_mini import provenance
from hsa_mini.lab.arms import ARMS, SCALES, Scale
from hsa_mini.lab.run import run
from hsa_mini.paths import write_whole

Task = tuple[str, int]  # arm and seed
WINDOWS = 64  # of different arms, for which one process may have to compile attention anew


def read_records(path: Path) -> list[dict]:
    """The records of a file, none if it is not there. Raises ValueError for a line that is none."""
    records = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1
    ):
        try:
            records.append(json.loads(line))
            records[-1]["arm"], records[-1]["seed"], records[-1]["settings"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"path: line {number} of {path} is no record of a run, accepted is a file of them"
            ) from None
    return records


def append_record(path: Path, record: dict) -> None:
    """One more line, whole or not at all; several commands may write into one file."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        write_whole(path, (path.read_bytes() if path.exists() else b"") + line)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process is in here with the same folder."""
    import fcntl  # not on every system, where records can still be read

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def current(
    records: Iterable[dict], scale: str = "lab", steps: int | None = None
) -> dict[Task, dict]:
    """The newest record of each arm and seed whose settings are those declared now: what was run with others is left out."""
    declared = {
        name: json.loads(json.dumps(arm.settings(SCALES[scale], steps)))
        for name, arm in ARMS.items()
    }
    return {
        (r["arm"], r["seed"]): r
        for r in records
        if r["arm"] in declared and _agrees(r["settings"], declared[r["arm"]])
    }


def _agrees(recorded, declared) -> bool:
    """Whether two settings say the same; an option that is younger than the record did not matter to it."""
    if isinstance(recorded, dict) and isinstance(declared, dict):
        return all(
            name in declared and _agrees(value, declared[name]) for name, value in recorded.items()
        )
    if isinstance(recorded, list) and isinstance(declared, list):
        return len(recorded) == len(declared) and all(map(_agrees, recorded, declared))
    return recorded == declared


def run_missing(
    arms: Iterable[str], seeds: Iterable[int], *, path: Path, device: torch.device, scale: str = "lab", steps: int | None = None,
    jobs: int = 1,
) -> int:  # fmt: skip
    """Run every arm with every seed that `path` does not hold yet, `jobs` at once; returns how many were run.

    Raises ChildProcessError, after all others, if a run ended without a record; why is said when it happens.
    """
    done = current(read_records(path), scale, steps)
    seeds = tuple(seeds)
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    total = sum(ARMS[arm].recipe(SCALES[scale], steps).steps for arm, _ in todo)
    jobs = max(min(jobs, len(todo)), 1)
    source = provenance.record(device)  # before this very file changes the checkout
    waiting = list(todo)
    failed = []
    workers: dict[Connection, tuple[multiprocessing.Process, Task]] = {}
    bar = tqdm(total=total, desc=f"{len(todo)} runs", unit="step", mininterval=0.5, smoothing=0.05)

    def give_next(link: Connection, process: multiprocessing.Process) -> None:
        if waiting:
            workers[link] = process, waiting.pop(0)
            with suppress(
                BrokenPipeError, ConnectionResetError
            ):  # a process that has ended is found below
                link.send(workers[link][1])
        else:
            workers.pop(link, None)
            _stop(link, process)

    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                give_next(*_start(scale, steps, device, jobs))
            for link in wait(workers):
                process, task = workers[link]
                try:
                    message = link.recv()
                except (EOFError, ConnectionResetError):
                    message = "its process ended"
                if isinstance(message, int):
                    bar.update(message)
                elif isinstance(message, dict):
                    append_record(path, message | source)
                    give_next(link, process)
                else:  # whatever is wrong may last as long as its process: the next run gets another one
                    failed.append("{} with seed {}".format(*task))
                    bar.write(f"{failed[-1]} failed: {message}", file=sys.stderr)
                    del workers[link]
                    _stop(link, process)
    finally:
        bar.close()
        for link, (process, _) in workers.items():
            _stop(link, process)
    if failed:
        raise ChildProcessError(
            f"{len(failed)} of {len(todo)} runs failed ({', '.join(failed)}); all others are in {path}"
        )
    return len(todo)


def _start(
    scale: str, steps: int | None, device: torch.device, jobs: int
) -> tuple[Connection, multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    link, other = context.Pipe()
    process = context.Process(target=_work, args=(other, SCALES[scale], steps, device, jobs))
    process.start()
    other.close()  # so that the link ends when the process does
    return link, process


def _stop(link: Connection, process: multiprocessing.Process) -> None:
    link.close()
    process.terminate()
    process.join()


def _work(
    link: Connection, scale: Scale, steps: int | None, device: torch.device, jobs: int
) -> None:
    """Of each (arm, seed) received, send steps as they are done, and the record or what went wrong; until the link ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    try:
        if device.type == "cuda":
            torch._dynamo.config.recompile_limit = WINDOWS
            prepare(scale, device)
        while True:
            arm, seed = link.recv()
            link.send(run(ARMS[arm], scale, seed, device=device, steps=steps, progress=link.send))
            gc.collect()  # recorded steps and their memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        link.send(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def prepare(scale: Scale, device: torch.device) -> None:
    """A few steps of every stage and a few questions, so that kernels are compiled once in a process and not in its first run."""
    few = dataclasses.replace(scale, questions=2, texts=2)
    run(ARMS["hsa"], few, 0, device=device, steps=8 * (len(scale.growth) + 1))
