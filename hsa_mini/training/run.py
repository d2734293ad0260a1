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
    state_folder,
    state_folders,
)
from hsa_mini.checks import quoted
from hsa_mini.config import PRESETS
from hsa_mini.data.corpus import load_corpus
from hsa_mini.files.lock import locked
from hsa_mini.files.whole_file import write_file
from hsa_mini.hsa_model import HSAModel
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.finite import FiniteSteps
from hsa_mini.training.log import HEADER, LOG, Log, rows_until
from hsa_mini.training.recipes import RECIPES, recipe_settings
from hsa_mini.training.state_check import check_progress
from hsa_mini.training.trainer import Trainer

FINAL = "final"
LOAD_BATCHES = 16  # to measure expert loads: those of a single batch vary too much
MAX_FILE_BYTES = 15 << 20  # of weights in one file; the repository allows 16 MiB

log = logging.getLogger(__name__)


def train(
    name: str,
    *,
    run: Path,
    device: torch.device,
    steps: int | None = None,
    seed: int = 0,
    restart: bool = False,
    checkpoint_seconds: float = 120.0,
    log_every: int = 50,
    stop: Callable[[int], bool] = lambda step: False,
) -> HSAModel:
    """Train preset `name` in folder `run`, from its newest whole state on; returns the model.

    steps: replaces the recipe's number of steps. restart: remove the states in the folder and begin
    at step 0. stop: asked after every step whether to save the state and return. The log is
    `run/log.csv`; the finished model is `run/final`, in bfloat16.

    Warnings say what was damaged or missing, in one line each. Raises ValueError for an unknown
    preset, and for a folder that another process holds, that holds a run with other settings, or
    where training would begin anew over what is there. Raises FloatingPointError, and saves no
    state, if the loss or a weight is not finite.
    """
    if name not in RECIPES:
        raise ValueError(f"preset: got {quoted(name)}, accepted are {', '.join(RECIPES)}")
    recipe = RECIPES[name] if steps is None else RECIPES[name].scaled(steps)
    with locked(run, "run"):
        torch.manual_seed(seed)
        trainer = Trainer(HSAModel(PRESETS[name]).to(device).train(), recipe, seed=seed)
        corpus = load_corpus("train")
        settings = {"preset": name, "seed": seed, "recipe": recipe_settings(recipe)}
        settings["corpus"] = corpus.identity
        if restart:
            discard_progress(run)
        text, seconds = _resume(trainer, run, settings, restart=restart)
        batches = StagedBatches(recipe, seed, corpus.tokens)
        with Log(run / LOG, text) as rows:
            work = _Run(run, trainer, batches, settings, rows, seconds)
            if work.take_steps(log_every, checkpoint_seconds, stop):
                work.save_final()
    return trainer.model


class _Run:
    """What `train` does in a folder that this process holds."""

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        batches: StagedBatches,
        settings: dict,
        rows: Log,
        seconds: float,
    ) -> None:
        """seconds: how long this run was trained before."""
        self.folder = folder
        self.trainer = trainer
        self.batches = batches
        self.settings = settings
        self.rows = rows
        self.began = time.monotonic() - seconds

    def take_steps(
        self, log_every: int, checkpoint_seconds: float, stop: Callable[[int], bool]
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
                if step % log_every == 0 or last:
                    self.check(finite)
                    numbers = figures.numbers()
                    self.rows.write(step, numbers, recipe.rate(step - 1), self.seconds())
                    accuracy = numbers["answer_accuracy"]
                    bar.set_postfix(loss=f"{numbers['loss']:.3f}", answers=f"{accuracy:.1%}")
                stopped = stop(step)
                if stopped or last or time.monotonic() - saved > checkpoint_seconds:
                    self.check(finite)
                    self.save()
                    saved = time.monotonic()
                if stopped:
                    return False
        return True

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
        ids, parts = self.batches[step - 1]
        path = self.folder / f"batch-{step}.safetensors"
        write_file(path, save({"ids": ids, "parts": parts, "step": torch.tensor(step)}))
        states = state_folders(self.folder)
        raise FloatingPointError(
            f"step {step} made {what} not finite: the run is stopped, its batch is in {path}, "
            f"and the last finite state is {states[-1] if states else 'the beginning'}"
        )

    def save_final(self) -> None:
        """Write the finished model: weights, the log, and training.json (how they were made)."""
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
        texts = {LOG: self.rows.text, "training.json": json.dumps(how, indent=1) + "\n"}
        trainer.model.save_pretrained(
            self.folder / FINAL, dtype=torch.bfloat16, texts=texts, shard_bytes=MAX_FILE_BYTES
        )


def _resume(trainer: Trainer, run: Path, settings: dict, *, restart: bool) -> tuple[str, float]:
    """Load the newest whole state of the run, if any, and clear up after runs that were killed.

    Returns the text of the log up to that state, and the seconds trained until then.
    """
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
        return HEADER, 0.0
    tensors, progress = state
    _check_settings(run, progress.get("settings"), settings)
    try:
        check_progress(progress, steps=trainer.recipe.steps)
        trainer.load_state_dict(tensors, step=progress["step"])
    except ValueError as error:
        raise ValueError(
            f"run: the newest state in {run} does not fit ({error}); accepted is --restart"
        ) from None
    text = _rows_until(run, trainer.step)
    clear_up(run, trainer.step)
    return text, progress["seconds"]


def _check_settings(run: Path, found: object, settings: dict) -> None:
    """Raise ValueError if what a state holds as its settings are not those of this run."""
    found = found if isinstance(found, dict) else {}
    for key, value in json.loads(json.dumps(settings)).items():
        if key == "corpus" and key not in found:  # a state of an earlier version
            log.warning("run: %s does not say which corpus it read; it goes on with %s", run, value)
        elif found.get(key) != value:
            values = f": got {value}, the run has {quoted(found.get(key))}"
            raise ValueError(
                f"run: {run} holds a run of other settings; accepted is an empty folder, one of "
                "the same settings, or --restart, which removes its states "
                f"({key}{'' if key == 'recipe' else values})"
            )


def _rows_until(run: Path, step: int) -> str:
    """The text of the log up to the state after `step` steps."""
    path = run / LOG
    kept = state_folder(run, step) / LOG
    if not path.is_file():
        log.warning("run: %s is missing: it is written anew, as far as it is known", path)
        return kept.read_text() if kept.exists() else HEADER
    if not kept.exists():  # a state of an earlier version
        return rows_until(path, step)
    text = kept.read_text()
    if not path.read_text(errors="replace").startswith(text):
        log.warning("run: %s is damaged: it is restored from %s", path, kept)
    return text
