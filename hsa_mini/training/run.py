"""A whole run of training: it resumes, logs, saves, stops at once when asked, and ends.

What it reads and writes stands in a `RunFolder`. Processes that train together all run this loop,
each with its part of the batches.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from hsa_mini.data.corpus import Corpus, load_corpus
from hsa_mini.data.own_corpus import load_own_corpus, split_off, tokenizer_files
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.finite import FiniteSteps
from hsa_mini.training.log import FIGURES, HELD_OUT, log_header
from hsa_mini.training.own.held_out import HeldOut
from hsa_mini.training.own.settings import Settings, load_settings
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.processes import joined
from hsa_mini.training.parallel.ranks import ONE_PROCESS, OneProcess
from hsa_mini.training.recipes import recipe_settings
from hsa_mini.training.run_folder import RunFolder, held
from hsa_mini.training.step import StepFigures
from hsa_mini.training.trainer import Trainer

SHOWN = ("loss", "answer_accuracy", HELD_OUT)  # figures beside the progress bar


def train(
    settings: str | Settings,
    *,
    run: Path,
    device: torch.device,
    steps: int | None = None,
    seed: int = 0,
    restart: bool = False,
    checkpoint_seconds: float = 120.0,
    log_every: int = 50,
    stop: Callable[[int], int] = lambda step: 0,
    on_stop: Callable[[int, int], object] = lambda step, reason: None,
    on_log: Callable[[dict[str, float]], object] = lambda row: None,
    mesh: MeshSizes | None = None,
) -> HSAModel:
    """Train a preset, or the model of any settings, in folder `run`, from its newest whole state
    on; returns the model.

    steps: replaces the recipe's number of steps. restart: remove the states in the folder and begin
    at step 0. stop: asked after every step whether to save the state and return; any answer but 0
    is a reason, which `on_stop` is told with the step. on_log: called with every row of the log, by
    column. mesh: train with other processes, which have the environment variables of torchrun and
    make the same call; each returns its shares of the model. The log is `run/log.csv`; the finished
    model is `run/final`, in bfloat16.

    Warnings say what was damaged or missing, in one line each. Raises ValueError for an unknown
    preset, for text that is not accepted (see `load_own_corpus`), for a mesh that does not fit, and
    for a folder that another run holds, that holds a run with other settings, or where training
    would begin anew over what is there. Raises FloatingPointError, and saves no state, if the loss
    or a weight is not finite. Raises ConnectionError if another process of the mesh has failed.
    """
    if isinstance(settings, str):
        settings = load_settings(settings)
    if steps is not None:
        settings = replace(settings, recipe=settings.recipe.scaled(steps))
    if mesh is not None:
        mesh.check(settings.config, settings.recipe)
    with nullcontext(ONE_PROCESS) if mesh is None else joined(mesh, device) as ranks:
        corpus, held_out = _texts(settings)
        tokenizer = tokenizer_files(settings.data)
        own = {"seed": seed, "corpus": corpus.identity}
        identity = {**settings.identity(), **own}
        model = asdict(settings.config)
        ranks.check_same({"model": model, "recipe": recipe_settings(settings.recipe), **own})
        options = {"documents": corpus, "chunk_size": settings.config.chunk_size}
        batches = StagedBatches(settings.recipe, seed, corpus.tokens, **options)
        measure = None if held_out is None else HeldOut(held_out, settings.recipe, settings.config)
        with held(run, ranks):
            trainer = _trainer(settings, device, seed, ranks)
            columns = log_header(held_out=measure is not None, speed=trainer.speed is not None)
            with RunFolder(
                run, trainer, identity, tokenizer, header=columns, restart=restart
            ) as folder:
                work = _Run(folder, trainer, batches, measure)
                if work.take_steps(log_every, checkpoint_seconds, stop, on_stop, on_log):
                    folder.save_final(work.own_batches, work.seconds())
        return trainer.model


def _trainer(settings: Settings, device: torch.device, seed: int, ranks: OneProcess) -> Trainer:
    """The trainer at step 0."""
    torch.manual_seed(seed)
    model = HSAModel(settings.config).to(device).train()
    if not isinstance(ranks, Mesh):
        return Trainer(model, settings.recipe, seed=seed)
    # It loads FSDP, which takes half a second.
    from hsa_mini.training.parallel.trainer import MeshTrainer

    return MeshTrainer(model, settings.recipe, ranks, seed=seed)


def _texts(settings: Settings) -> tuple[Corpus, Corpus | None]:
    """What is trained on, and what the held-out loss reads, if it is measured."""
    measured = settings.recipe.eval_every > 0
    if settings.data is None:
        return load_corpus("train"), load_corpus("validation") if measured else None
    corpus = load_own_corpus(settings.data, settings.config.vocab_size)
    return split_off(corpus, settings.data.held_out) if measured else (corpus, None)


class _Run:
    """The steps of a run, and what is measured on the way."""

    def __init__(
        self, folder: RunFolder, trainer: Trainer, batches: Dataset, held_out: HeldOut | None
    ) -> None:
        self.folder = folder
        self.trainer = trainer
        self.batches = batches
        self.own_batches = trainer.own_batches(batches)
        self.held_out = held_out
        self.began = time.monotonic() - folder.seconds

    def take_steps(
        self,
        log_every: int,
        checkpoint_seconds: float,
        stop: Callable[[int], int],
        on_stop: Callable[[int, int], object],
        on_log: Callable[[dict[str, float]], object],
    ) -> bool:
        """Take the steps that are left, or stop when asked to; returns whether all were taken."""
        trainer = self.trainer
        recipe = trainer.recipe
        finite = FiniteSteps(log_every, trainer.device)
        saved = time.monotonic()
        if trainer.speed is not None:
            trainer.speed.restart(trainer.step)
        with tqdm(
            total=recipe.steps,
            initial=trainer.step,
            desc=f"training {self.folder.settings['preset']}",
            unit="step",
            mininterval=0.5,
            disable=trainer.ranks.rank > 0,
        ) as bar:
            todo = range(trainer.step, recipe.steps)
            for batch in prefetch(self.own_batches, todo, device=trainer.device):
                figures = trainer.train_step(batch)
                step = trainer.step
                finite.note(step, figures)
                bar.update()
                last = step == recipe.steps
                measured = recipe.eval_every and (step % recipe.eval_every == 0 or last)
                if step % log_every == 0 or last or measured:
                    self.check(finite)
                    row = self.row(figures, measure=bool(measured))
                    self.folder.write_row(row)
                    on_log(row)
                    bar.set_postfix({name: f"{row[name]:.3f}" for name in SHOWN if row.get(name)})
                late = time.monotonic() - saved > checkpoint_seconds
                reason, save = trainer.ranks.largest(stop(step), late or last)
                if reason or save:
                    self.check(finite)
                    self.folder.save(self.batches, self.seconds())
                    saved = time.monotonic()
                if reason:
                    on_stop(step, int(reason))
                    return False
        return True

    def row(self, figures: StepFigures, *, measure: bool) -> dict[str, float]:
        """The row of the log for the step just taken; measure: with the held-out loss."""
        trainer = self.trainer
        row = {"step": trainer.step, **dict(zip(FIGURES, figures.numbers().values()))}
        if trainer.speed is not None:
            row |= trainer.speed.figures(trainer.step)
        if measure and self.held_out is not None:
            stage = trainer.recipe.stage(trainer.step - 1)
            row[HELD_OUT] = self.held_out.loss(trainer.models[stage], stage, trainer.ranks)
        if trainer.speed is not None:
            trainer.speed.restart(trainer.step)
        row["learning_rate"] = trainer.recipe.rate(trainer.step - 1)
        return {**row, "seconds": self.seconds()}

    def seconds(self) -> float:
        """How long this run has been trained."""
        return time.monotonic() - self.began

    def check(self, finite: FiniteSteps) -> None:
        """Raise FloatingPointError if one of the last steps was not finite."""
        if (bad := finite.first_bad(self.trainer.step)) is not None:
            self.folder.stop_at(bad, "the loss or the gradient", self.batches)
