"""Processes that compute together: started once for a test module, and used by all its tests."""

import multiprocessing
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

SECONDS = 60  # that one call may take


class Processes:
    """Up to `count` processes, which `run` lets call a function together."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count = count
        self.folder = folder
        self.world = 0
        self.stores = 0
        self.pipes: list[Connection] = []
        self.workers = []
        # A server imports once, and every process is a fork of it.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["hsa_mini.training.parallel.checkpoint"])

    def start(self) -> None:
        for rank in range(self.count):
            ours, theirs = self.context.Pipe()
            worker = self.context.Process(target=_serve, args=(rank, theirs), daemon=True)
            worker.start()
            theirs.close()
            self.pipes.append(ours)
            self.workers.append(worker)

    def run(self, world: int, function, *arguments) -> list:
        """What `function(*arguments)`, a function of a module, returns in each of `world`
        processes. They are a process group of gloo.
        """
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
