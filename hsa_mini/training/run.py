"""A whole run of training in a folder: it resumes, saves, stops at once when asked, and ends.

    step-N/              the two newest states, each with the log up to it
    step-N.damaged/      a state that the run passed over; for the user to look at
    log.csv              one row every few steps
    final/               the finished model
    batch-N.safetensors  the batch of step N, which made the loss or a weight not finite

One process at a time holds the folder. A process that is killed leaves whole states, from which the
next one continues and equals an uninterrupted run to the last bit.
"""

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import save
from tqdm import tqdm

from hsa_mini import provenance
from hsa_mini.checkpoint.training_state import (
    clear_up,
    discard_progress,
    load_progress,
    not_finite,
    save_progress,
    state_folders,
)
from hsa_mini.data.corpus import Corpus, load_corpus
from hsa_mini.data.own_corpus import load_own_corpus, split_off, tokenizer_files
from hsa_mini.files.lock import locked
from hsa_mini.files.whole_file import write_file
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.finite import FiniteSteps
from hsa_mini.training.log import (
    FIGURES,
    HEADER,
    HEADER_WITH_HELD_OUT,
    HELD_OUT,
    LOG,
    Log,
    restored_log,
)
from hsa_mini.training.own.held_out import HeldOut
from hsa_mini.training.own.settings import Settings, load_settings
from hsa_mini.training.recipes import recipe_settings
from hsa_mini.training.state_check import check_progress, check_settings
from hsa_mini.training.step import StepFigures
from hsa_mini.training.trainer import Trainer

FINAL = "final"
LOAD_BATCHES = 16  # to measure expert loads: those of a single batch vary too much
SHOWN = ("loss", "answer_accuracy", HELD_OUT)  # figures beside the progress bar
MAX_FILE_BYTES = 15 << 20  # of weights in one file; the repository allows 16 MiB

log = logging.getLogger(__name__)


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
    stop: Callable[[int], bool] = lambda step: False,
    on_log: Callable[[dict[str, float]], object] = lambda row: None,
) -> HSAModel:
    """Train a preset, or the model of any settings, in folder `run`, from its newest whole state
    on; returns the model.

    steps: replaces the recipe's number of steps. restart: remove the states in the folder and begin
    at step 0. stop: asked after every step whether to save the state and return. on_log: called
    with every row of the log, by column. The log is `run/log.csv`; the finished model is
    `run/final`, in bfloat16.

    Warnings say what was damaged or missing, in one line each. Raises ValueError for an unknown
    preset, for text that is not accepted (see `load_own_corpus`), and for a folder that another
    process holds, that holds a run with other settings, or where training would begin anew over
    what is there. Raises FloatingPointError, and saves no state, if the loss or a weight is not
    finite.
    """
    if isinstance(settings, str):
        settings = load_settings(settings)
    if steps is not None:
        settings = replace(settings, recipe=settings.recipe.scaled(steps))
    recipe = settings.recipe
    corpus, held_out = _texts(settings)
    tokenizer = tokenizer_files(settings.data)
    chunk_size = settings.config.chunk_size
    batches = StagedBatches(recipe, seed, corpus.tokens, documents=corpus, chunk_size=chunk_size)
    measure = None if held_out is None else HeldOut(held_out, recipe, settings.config)
    with locked(run, "run"):
        torch.manual_seed(seed)
        trainer = Trainer(HSAModel(settings.config).to(device).train(), recipe, seed=seed)
        identity = {**settings.identity(), "seed": seed, "corpus": corpus.identity}
        if restart:
            discard_progress(run)
        text, seconds = _resume(trainer, run, identity, restart=restart)
        with Log(run / LOG, text) as rows:
            work = _Run(run, trainer, batches, measure, identity, rows, seconds)
            if work.take_steps(log_every, checkpoint_seconds, stop, on_log):
                work.save_final(tokenizer)
    return trainer.model


def _texts(settings: Settings) -> tuple[Corpus, Corpus | None]:
    """What is trained on, and what the held-out loss reads, if it is measured."""
    measured = settings.recipe.eval_every > 0
    if settings.data is None:
        return load_corpus("train"), load_corpus("validation") if measured else None
    corpus = load_own_corpus(settings.data, settings.config.vocab_size)
    return split_off(corpus, settings.data.held_out) if measured else (corpus, None)


class _Run:
    """What `train` does in a folder that this process holds."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        batches: StagedBatches,
        held_out: HeldOut | None,
        settings: dict,
        rows: Log,
        seconds: float,
    ) -> None:
        """seconds: how long this run was trained before."""
        self.folder = folder
        self.trainer = trainer
        self.batches = batches
        self.held_out = held_out
        self.settings = settings
        self.rows = rows
        self.began = time.monotonic() - seconds

    def take_steps(
        self,
        log_every: int,
        checkpoint_seconds: float,
        stop: Callable[[int], bool],
        on_log: Callable[[dict[str, float]], object],
    ) -> bool:
        """Take the steps that are left, or stop when asked to; returns whether all were taken."""
        trainer = self.trainer
        recipe = trainer.recipe
        finite = FiniteSteps(log_every, trainer.device)
        saved = time.monotonic()
        with tqdm(
            total=recipe.steps,
            initial=trainer.step,
            desc=f"training {self.settings['preset']}",
            unit="step",
            mininterval=0.5,
        ) as bar:
            todo = range(trainer.step, recipe.steps)
            for batch in prefetch(self.batches, todo, device=trainer.device):
                figures = trainer.train_step(batch)
                step = trainer.step
                finite.note(step, figures)
                bar.update()
                last = step == recipe.steps
                measured = recipe.eval_every and (step % recipe.eval_every == 0 or last)
                if step % log_every == 0 or last or measured:
                    self.check(finite)
                    row = self.row(figures, measure=bool(measured))
                    self.rows.write(row)
                    on_log(row)
                    bar.set_postfix({name: f"{row[name]:.3f}" for name in SHOWN if row.get(name)})
                stopped = stop(step)
                if stopped or last or time.monotonic() - saved > checkpoint_seconds:
                    self.check(finite)
                    self.save()
                    saved = time.monotonic()
                if stopped:
                    return False
        return True

    def row(self, figures: StepFigures, *, measure: bool) -> dict[str, float]:
        """The row of the log for the step just taken; measure: with the held-out loss."""
        trainer = self.trainer
        row = {"step": trainer.step, **dict(zip(FIGURES, figures.numbers().values()))}
        if measure and self.held_out is not None:
            stage = trainer.recipe.stage(trainer.step - 1)
            row[HELD_OUT] = self.held_out.loss(trainer.models[stage], stage)
        row["learning_rate"] = trainer.recipe.rate(trainer.step - 1)
        return {**row, "seconds": self.seconds()}

    def seconds(self) -> float:
        """How long this run has been trained."""
        return time.monotonic() - self.began

    def check(self, finite: FiniteSteps) -> None:
        """Raise FloatingPointError if one of the last steps was not finite."""
        if (bad := finite.first_bad(self.trainer.step)) is not None:
            self.stop_at(bad, "the loss or the gradient")

    def save(self) -> None:
        """Save the state. Raises FloatingPointError if a number in it is not finite."""
        step = self.trainer.step
        tensors = self.trainer.state_dict()
        if bad := not_finite(tensors):
            self.stop_at(step, bad)
        self.rows.sync()
        progress = {"step": step, "seconds": self.seconds(), "settings": self.settings}
        save_progress(self.folder, step, tensors, progress, {LOG: self.rows.text})

    def stop_at(self, step: int, what: str) -> NoReturn:
        """Save the batch of a step, counted from 1 as in the log, and raise FloatingPointError."""
        ids, parts, *_ = self.batches[step - 1]
        path = self.folder / f"batch-{step}.safetensors"
        write_file(path, save({"ids": ids, "parts": parts, "step": torch.tensor(step)}))
        states = state_folders(self.folder)
        raise FloatingPointError(
            f"step {step} made {what} not finite: the run is stopped, its batch is in {path}, "
            f"and the last finite state is {states[-1] if states else 'the beginning'}"
        )

    def save_final(self, tokenizer: dict[str, str]) -> None:
        """Write the finished model: weights, the log, and training.json (how they were made).

        tokenizer: the files of the user's tokenizer, name -> content, if there is one.
        """
        trainer = self.trainer
        recipe = trainer.recipe
        how = {
            **provenance.record(trainer.device),
            "seed": trainer.seed,
            "seconds": round(self.seconds(), 1),
            "corpus": self.settings["corpus"],
            "recipe": recipe_settings(recipe),
        }
        if trainer.model.config.experts:
            count = min(LOAD_BATCHES, recipe.stages[-1].steps)
            steps = range(recipe.steps - count, recipe.steps)
            counted = prefetch(self.batches, steps, device=trainer.device)
            how["imbalance"] = trainer.max_over_mean_loads(counted)
        if tokenizer:
            how["tokenizer"] = next(iter(tokenizer))
        texts = {LOG: self.rows.text, "training.json": json.dumps(how, indent=1) + "\n"}
        texts |= tokenizer
        trainer.model.save_pretrained(
            self.folder / FINAL, dtype=torch.bfloat16, texts=texts, shard_bytes=MAX_FILE_BYTES
        )


def _resume(trainer: Trainer, run: Path, settings: dict, *, restart: bool) -> tuple[str, float]:
    """Load the newest whole state of the run, if any, and clear up after runs that were killed.

    Returns the text of the log up to that state, and the seconds trained until then.
    """
    header = HEADER_WITH_HELD_OUT if trainer.recipe.eval_every else HEADER
    state = load_progress(run)
    if state is None:
        if (run / FINAL).exists() and not restart:
            raise ValueError(
                f"run: {run} holds a finished model and no state; "
                "accepted is another folder, or --restart, which trains the model anew"
            )
        if (run / LOG).exists():
            log.warning("run: %s holds no state: training begins at step 0, with a new log", run)
        clear_up(run, 0)
        return header, 0.0
    tensors, progress = state
    check_settings(run, progress.get("settings"), settings)
    try:
        check_progress(progress, steps=trainer.recipe.steps)
        trainer.load_state_dict(tensors, step=progress["step"])
    except ValueError as error:
        raise ValueError(
            f"run: the newest state in {run} does not fit ({error}); accepted is --restart"
        ) from None
    text = restored_log(run, trainer.step, header)
    clear_up(run, trainer.step)
    return text, progress["seconds"]
