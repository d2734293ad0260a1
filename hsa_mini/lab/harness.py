"""All runs that are still missing: several at once, each in a process, each a line of JSON in one file when it is done.

The file is written by this process alone, whole: whoever stops or kills it finds every finished run, and no part of another.
"""

import gc
import json
import multiprocessing
import os
import signal
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from tqdm import tqdm

from .. import provenance
from ..paths import write_whole
from .arms import ARMS, SCALES
from .run import run

Task = tuple[str, int]  # arm and seed


def read_records(path: Path) -> list[dict]:
    """The records of a file, none if it is not there. Raises ValueError for a line that is none."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            records.append(json.loads(line))
            records[-1]["arm"], records[-1]["seed"], records[-1]["settings"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"path: line {number} of {path} is no record of a run, accepted is a file of them") from None
    return records


def append_record(path: Path, record: dict) -> None:
    """One more line. The file is replaced by a longer one: it never ends in half a line."""
    before = path.read_bytes() if path.exists() else b""
    write_whole(path, before + json.dumps(record, allow_nan=False).encode() + b"\n")


def current(records: Iterable[dict], scale: str = "lab", steps: int | None = None) -> dict[Task, dict]:
    """The newest record of each arm and seed whose settings are those declared now: what was run with others is left out."""
    declared = {name: json.loads(json.dumps(arm.settings(SCALES[scale], steps))) for name, arm in ARMS.items()}
    return {(r["arm"], r["seed"]): r for r in records if r["arm"] in declared and _agrees(r["settings"], declared[r["arm"]])}


def _agrees(recorded, declared) -> bool:
    """Whether two settings say the same; an option that is younger than the record did not matter to it."""
    if isinstance(recorded, dict) and isinstance(declared, dict):
        return all(name in declared and _agrees(value, declared[name]) for name, value in recorded.items())
    if isinstance(recorded, list) and isinstance(declared, list):
        return len(recorded) == len(declared) and all(map(_agrees, recorded, declared))
    return recorded == declared


def run_missing(
    arms: Iterable[str], seeds: Iterable[int], *, path: Path, device: torch.device, scale: str = "lab", steps: int | None = None,
    jobs: int = 1,
) -> int:  # fmt: skip
    """Run every arm with every seed that `path` does not hold yet, `jobs` at once; returns how many were run.

    Raises ChildProcessError, after all others, if a run ended without a record.
    """
    done, seeds = current(read_records(path), scale, steps), tuple(seeds)
    todo = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    total = sum(ARMS[arm].recipe(SCALES[scale], steps).steps for arm, _ in todo)
    jobs = max(min(jobs, len(todo)), 1)
    source = provenance.record(device)  # before this very file changes the checkout
    waiting, failed, workers = list(todo), [], {}
    bar = tqdm(total=total, desc=f"{len(todo)} runs", unit="step", mininterval=0.5, smoothing=0.05)

    def finish(link: Connection) -> None:
        """Start the next run in the worker's place."""
        if waiting:
            workers[link] = workers[link][0], waiting.pop(0)
            link.send(workers[link][1])
        else:
            _stop(link, workers.pop(link)[0])

    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                link, process = _start(scale, steps, device, jobs)
                workers[link] = process, None
                finish(link)
            for link in wait(workers):
                try:
                    message = link.recv()
                except (EOFError, ConnectionResetError):
                    process, task = workers.pop(link)
                    failed.append("{} with seed {}".format(*task))
                    _stop(link, process)
                    continue
                if isinstance(message, int):
                    bar.update(message)
                else:
                    append_record(path, message | source)
                    finish(link)
    finally:
        bar.close()
        for link, (process, _) in workers.items():
            _stop(link, process)
    if failed:
        raise ChildProcessError(f"{len(failed)} of {len(todo)} runs failed ({', '.join(failed)}); all others are in {path}")
    return len(todo)


def _start(scale: str, steps: int | None, device: torch.device, jobs: int) -> tuple[Connection, multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")  # a process that has used a GPU cannot be forked
    link, other = context.Pipe()
    process = context.Process(target=_work, args=(other, scale, steps, device, jobs))
    process.start()
    other.close()  # so that the link ends when the process does
    return link, process


def _stop(link: Connection, process: multiprocessing.Process) -> None:
    link.close()
    process.terminate()
    process.join()


def _work(link: Connection, scale: str, steps: int | None, device: torch.device, jobs: int) -> None:
    """Of each (arm, seed) received, send steps as they are done and the record; until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear
    torch.set_num_threads(max(torch.get_num_threads() // jobs, 1))
    # on a GPU batches must not be waited for; on a processor there is nothing to be gained
    workers = min(4, (os.cpu_count() or 1) // jobs) if device.type == "cuda" else 0
    try:
        while True:
            arm, seed = link.recv()
            record = run(
                ARMS[arm], SCALES[scale], seed, device=device, steps=steps, workers=workers, progress=lambda n: link.send(n)
            )
            link.send(record)
            gc.collect()  # recorded steps and their memory
            if device.type == "cuda":
                torch.cuda.empty_cache()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
