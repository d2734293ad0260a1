"""How the processes of a mesh meet, and how one that fails ends the others.

They meet as torchrun arranges it, through the environment variables RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT. One process alone needs none of them.

A process that fails says so in the store that all share, and one that is killed is missed by the
process before it: each shows every second that it lives. Waiting for a process that has ended would
take until the timeout of the backend, and its error would not name that process.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from hsa_mini import provenance
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes, check_same

TIMEOUT = 600.0  # seconds that a process waits for the others, to meet and in each exchange
BEAT = 1.0  # seconds between two signs of life
MAX_SILENCE = 15.0  # seconds without one; torchrun kills the others 30 s after one has died
GRACE = 5.0  # seconds in which a process may report the failure of another one by itself
FAILURE = "failure"

log = logging.getLogger(__name__)


def process_rank() -> int:
    """The rank of this process among those that were started together."""
    return int(os.environ.get("RANK", "0"))


def started_processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of several GPUs of a host, each process has its own."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


@contextmanager
def joined(sizes: MeshSizes, device: torch.device) -> Iterator[Mesh]:
    """The mesh of this process and the others, which must be `sizes.processes` in number.

    Raises ValueError for another number, and if the processes differ in their mesh or code. Raises
    ConnectionError if they do not meet, and, also inside of the `with` statement, if another one
    fails.
    """
    rank = process_rank()
    world = started_processes()
    sizes.check_number(world)
    timeout = timedelta(seconds=TIMEOUT)
    try:
        # A store of a process alone needs no address.
        store = HashStore() if world == 1 else next(rendezvous("env://", timeout=timeout))[0]
    except dist.DistError as error:
        raise ConnectionError(f"mesh: {world} processes did not meet ({error})") from None
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    over = False
    watch = _Watch(store, rank, world)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        code = {"code": provenance.code(), "versions": provenance.versions()}
        check_same({"mesh": str(sizes), **code})
        mesh = Mesh(sizes, device)
        yield mesh
        mesh.largest(0)  # a process that leaves early looks like one that has failed
        over = True
    except BaseException as error:
        if failure := watch.failure_behind(error):
            raise ConnectionError(f"mesh: {failure}") from error
        raise
    finally:
        watch.end()
        # With NCCL, this could wait for a process that has failed.
        if dist.is_initialized() and (over or world == 1):
            dist.destroy_process_group()


class _Watch:
    """A thread that shows that this process lives, and looks whether the next one does."""

    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.rank = rank
        self.next = (rank + 1) % world
        self.failure = ""
        self._over = threading.Event()
        self._failed = threading.Event()
        if world > 1:
            # A connection of its own: a store answers one question at a time, and some are waits.
            self.store = store.clone()  # pyright: ignore
            threading.Thread(target=self._watch, daemon=True).start()

    def end(self) -> None:
        """Watch no longer."""
        self._over.set()

    def failure_behind(self, error: BaseException) -> str:
        """Which process failed first, if that is why this one did. Otherwise, tell the others."""
        alone = self.next == self.rank
        text = " ".join(str(error).split())
        exchange = isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text
        if alone or (exchange and self._failed.wait(MAX_SILENCE + 2 * BEAT)):
            return self.failure
        reason = text if isinstance(error, Exception) and text else type(error).__name__
        self._tell(f"rank {self.rank} stopped: {reason}")
        return ""

    def _tell(self, failure: str) -> None:
        """Write a failure into the store, if it is the first. The others follow from that one."""
        with suppress(dist.DistError):  # the process that holds the store may be the failed one
            self.store.compare_set(FAILURE, "", failure)

    def _watch(self) -> None:
        beat = 0
        seen = b""
        last = time.monotonic()
        while not self._over.wait(BEAT):
            beat += 1
            try:
                self.store.set(f"beat-{self.rank}", str(beat))
                key = f"beat-{self.next}"
                found = self.store.get(key) if self.store.check([key]) else b""
                if found != seen or not found:
                    seen = found
                    last = time.monotonic()
                if time.monotonic() - last > MAX_SILENCE:
                    self._tell(f"rank {self.next} gave no sign of life for {MAX_SILENCE:.0f} s")
                if self.store.check([FAILURE]):
                    self.failure = self.store.get(FAILURE).decode()
                    break
            except dist.DistError:
                # Rank 0 or torchrun holds the store. At the end of a run it may go first.
                self._over.wait(GRACE)
                self.failure = "rank 0, or torchrun on its host, has ended"
                break
        self._failed.set()
        if not self._over.wait(GRACE):
            log.error("mesh: %s", self.failure)
            os._exit(2)
