"""Processes that compute together: started once for a test module, and used by all its tests; and
processes that each run a command, as torchrun starts them.
"""

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

SECONDS = 60  # that one call may take


def forks():
    """Processes of this context are forks of a server that imports once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "hsa_mini.training.run", "hsa_mini.training.parallel.checkpoint"]
    )
    return context


class Processes:
    """Up to `count` processes, which `run` lets call a function together."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self.folder = folder
        self.world = 0
        self.stores = 0
        self.pipes: list[Connection] = []
        self.workers = []

    def start(self) -> None:
        context = forks()
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, world: int, function, *arguments) -> list:
        """What `function(*arguments)`, a function of a module, returns in each of `world`
        processes. They are a process group of gloo.

        If a process dies, all are started anew and try once more: gloo now and then destroys the
        heap ("malloc(): unaligned tcache chunk") when one group follows another.
        """
        try:
            return self._run(world, function, *arguments)
        except (EOFError, BrokenPipeError):
            self.close()
        return self._run(world, function, *arguments)

    def _run(self, world: int, function, *arguments) -> list:
        if not self.workers:
            self.start()
        if world != self.world:
            self.world = world
            self.stores += 1
        store = str(self.folder / f"store-{self.stores}")
        waiting = dict(zip(self.pipes[:world], range(world)))
        for pipe in waiting:
            pipe.send((world, store, function, arguments))
        answers = [None] * world
        errors = []
        while waiting:
            # One that failed leaves the others waiting, which then fail too.
            ready = wait(list(waiting), timeout=2 if errors else SECONDS)
            if not ready:
                errors.append(f"processes {list(waiting.values())} do not answer")
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # pyright: ignore
                error, answers[rank] = pipe.recv()  # pyright: ignore
                errors += [error] if error else []
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return answers

    def close(self) -> None:
        """End all processes; the next call starts others."""
        for worker in self.workers:
            worker.kill()
            worker.join()
        self.world = 0
        self.workers.clear()
        self.pipes.clear()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    joined = None
    while True:
        world, store, function, arguments = pipe.recv()
        try:
            if joined != store:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{store}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=SECONDS / 2),
                )
                joined = store
            pipe.send((None, function(*arguments)))
        except Exception:
            pipe.send((traceback.format_exc(), None))


class Ended(NamedTuple):
    """How a command ended: its exit status, and what it printed."""

    status: int | None
    out: str
    err: str


def run_together(
    commands: list[list[str]], folder: Path, prepare: Callable[[], object] = int
) -> list[Ended]:
    """Run `python -m hsa_mini` with the words of each command in a process of its own, all at once.
    They see each other as the processes of torchrun do.

    folder: for what they print. prepare: called in each process before its command.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": len(commands)}
    context = forks()
    started = []
    for rank, words in enumerate(commands):
        environment = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        out = folder / f"rank-{rank}"
        process = context.Process(target=_command, args=(words, environment, out, prepare))
        process.start()
        started.append((process, out))
    ended = []
    for process, out in started:
        process.join(SECONDS)
        process.kill()
        texts = (out.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        ended.append(Ended(process.exitcode, *texts))
    return ended


def _command(words: list[str], environment: dict, out: Path, prepare: Callable) -> None:
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {name: str(value) for name, value in environment.items()}
    torch.set_num_threads(1)
    from hsa_mini.cli import main

    prepare()
    sys.exit(main(words))
