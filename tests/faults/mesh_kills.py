"""SIGKILL at random moments of a run of two processes, for one of them or for both.

Afterwards every state that has its name is whole, none that was finished is lost, a process that
was spared has ended, and the next run ends in the state of an undisturbed one.
"""

import contextlib
import hashlib
import multiprocessing
import os
import random
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed as dist
from material import tiny, word_corpus
from safetensors.torch import save

from faults.processes import Counter
from faults.report import Progress, Report
from faults.writers import CPU, TRAINED, names_in
from hsa_mini.checkpoint.training_state import clear_up, load_progress, read_state, state_folders
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.parallel.checkpoint import load_sharded, save_sharded
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.trainer import MeshBatches, MeshTrainer
from hsa_mini.training.recipes import Recipe

STEPS = 6
SECONDS = 120  # for a run that nobody disturbs
MAX_KILLS = 4  # of one run, before it may finish
RECIPE = Recipe((replace(TRAINED.stages[0], steps=STEPS, batch=2),))
VICTIMS = ((0,), (1,), (0, 1))


def attack(count: int, seed: int, progress: Progress) -> Report:
    """`count` kills."""
    report = Report("mesh_kills")
    rng = random.Random(seed)
    with TemporaryDirectory() as scratch:
        run = Run(Path(scratch))
        seconds = run.go_on()
        want = run.result()
        what = f"{run.saved.value} steps: {run.errors()}"
    if want is None:
        report.fault("undisturbed", what)
        return report
    while report.tried < count:
        with TemporaryDirectory() as scratch:
            run = Run(Path(scratch))
            for _ in range(min(rng.randint(1, MAX_KILLS), count - report.tried)):
                victims = rng.choice(VICTIMS)
                after = rng.uniform(0, seconds)
                run.go_on(victims, after)
                report.tried += 1
                progress(1)
                if what := run.wrong():
                    report.fault(f"ranks {victims}", f"killed after {after:.3f} s: {what}")
            run.go_on()
            if (found := run.result()) != want:
                report.fault("the run after the kills", f"{found}, not {want}: {run.errors()}")
    return report


class Run:
    """A run of two processes in a folder. saved: the last step whose state was written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved = Counter()
        self.begun = Counter()  # the last step that was begun
        self.starts = 0
        self.hung = False

    def go_on(self, victims: tuple[int, ...] = (), after: float = 0.0) -> float:
        """Start both processes and wait until they have ended; returns how many seconds they took.
        victims: the ranks that are killed, `after` seconds later.
        """
        self.starts += 1
        began = time.monotonic()
        ranks = [
            multiprocessing.get_context("fork").Process(target=self._train, args=(rank,))
            for rank in range(2)
        ]
        for process in ranks:
            process.start()
        if victims:
            ranks[victims[0]].join(after)
        for rank in victims:
            ranks[rank].kill()
        for process in ranks:
            process.join(SECONDS)
            self.hung |= process.is_alive()
            process.kill()
        return time.monotonic() - began

    def wrong(self) -> str | None:
        """What is wrong after a kill, or nothing."""
        if self.hung:
            return "a process hangs"
        run = self.folder / "run"
        for state in state_folders(run):
            try:
                read_state(state, lambda files: None)
            except ValueError as error:
                return str(error)
        found = load_progress(run)
        step = found[1]["step"] if found else 0
        if not self.saved.value <= step <= self.begun.value:
            return f"step {self.saved.value} was saved, step {step} is found"
        return None

    def result(self) -> object:
        """The last state and the names of all files, or None if the run has not reached its end."""
        found = load_progress(self.folder / "run")
        if found is None or found[1]["step"] != STEPS or self.saved.value != STEPS:
            return None
        return hashlib.sha256(save(found[0])).hexdigest(), sorted(names_in(self.folder / "run"))

    def errors(self) -> str:
        """What the first process said at last."""
        return (self.folder / "errors-0").read_text(errors="replace").strip()[-300:]

    def _train(self, rank: int) -> None:
        """What each process does: train from the newest state on, and save after every step."""
        os.dup2(os.open(self.folder / f"errors-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder}/store-{self.starts}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=SECONDS / 2),
        )
        mesh = Mesh(MeshSizes(dp=2), CPU)
        trainer = MeshTrainer(tiny().train(), RECIPE, mesh)
        corpus = word_corpus("train")
        size = trainer.model.config.chunk_size
        batches = StagedBatches(RECIPE, 0, corpus.tokens, documents=corpus, chunk_size=size)
        own = MeshBatches(batches, size, mesh)
        run = self.folder / "run"
        load_sharded(trainer, run)
        if rank == 0:
            clear_up(run, trainer.step)
            repeated = self.begun.value - trainer.step
            assert repeated <= 1, f"{repeated} steps are repeated"
        for step in range(trainer.step, STEPS):
            self.begun.value = step + 1
            trainer.train_step(own[step])
            save_sharded(trainer, run, {"step": trainer.step, "seconds": 0.0})
            if rank == 0:
                self.saved.value = trainer.step
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()
