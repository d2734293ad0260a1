"""The folder of a training run. Of several processes, the first one alone writes in it.

    step-N/              the two newest states, each with the log up to it
    step-N.damaged/      a state that the run passed over; for the user to look at
    log.csv              one row every few steps
    final/               the finished model
    batch-N.safetensors  the batch of step N, which made the loss or a weight not finite

One run at a time holds the folder. A run that is killed leaves whole states, from which the next
one continues and equals an uninterrupted run to the last bit.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn, Self

import torch
from safetensors.torch import save
from torch.utils.data import Dataset

from hsa_mini import provenance
from hsa_mini.checkpoint.training_state import (
    clear_up,
    discard_progress,
    load_progress,
    save_progress,
    state_folders,
)
from hsa_mini.files.lock import locked
from hsa_mini.files.whole_file import write_file
from hsa_mini.training.batches import prefetch
from hsa_mini.training.log import LOG, Log, restored_log
from hsa_mini.training.parallel.mesh import Mesh
from hsa_mini.training.parallel.ranks import OneProcess
from hsa_mini.training.recipes import recipe_settings
from hsa_mini.training.state_check import check_progress, check_settings
from hsa_mini.training.trainer import Trainer

FINAL = "final"
LOAD_BATCHES = 16  # to measure expert loads: those of a single batch vary too much
MAX_FILE_BYTES = 15 << 20  # of weights in one file; the repository allows 16 MiB

log = logging.getLogger(__name__)


@contextmanager
def held(path: Path, ranks: OneProcess) -> Iterator[None]:
    """Hold the folder of a run. Raises ValueError if another run holds it."""
    with nullcontext() if ranks.rank else locked(path, "run"):
        yield


class RunFolder:
    """What one run reads and writes in its folder, which `held` holds. Used in a `with` statement,
    which closes the log.

    Every process makes one and calls the same methods, because a state is gathered from all.
    seconds: how long the run was trained before.
    """

    def __init__(
        self,
        path: Path,
        trainer: Trainer,
        settings: dict,
        tokenizer: dict[str, str],
        *,
        header: str,
        restart: bool,
    ) -> None:
        """Let the trainer go on from the newest whole state, if there is one, and clear up after
        runs that were killed.

        settings: what a state must have in common with the run. tokenizer: the files of the user's
        tokenizer, name -> content, if there is one. header: that of a new log. restart: remove all
        states first.

        Raises ValueError for states that the trainer cannot go on from.
        """
        self.path = path
        self.trainer = trainer
        self.settings = settings
        self.tokenizer = tokenizer
        self.first = not trainer.ranks.rank
        if restart and self.first:
            discard_progress(path)
        progress = self._load()
        self.seconds = 0.0 if progress is None else progress["seconds"]
        if progress is None and (path / FINAL).exists() and not restart:
            raise ValueError(
                f"run: {path} holds a finished model and no state; "
                "accepted is another folder, or --restart, which trains the model anew"
            )
        self._rows = None
        if self.first:
            text = header if progress is None else restored_log(path, trainer.step, header)
            if progress is None and (path / LOG).exists():
                log.warning(
                    "run: %s holds no state: training begins at step 0, with a new log", path
                )
            clear_up(path, trainer.step)
            self._rows = Log(path / LOG, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows is not None:
            self._rows.__exit__()

    def _load(self) -> dict | None:
        """Go on from the newest whole state; returns its progress, or None if there is no state."""

        def check(progress: dict) -> None:
            check_settings(self.path, progress.get("settings"), self.settings)

        trainer = self.trainer
        if isinstance(trainer.ranks, Mesh):
            # It loads FSDP, which takes half a second.
            from hsa_mini.training.parallel.checkpoint import load_sharded

            return load_sharded(trainer, self.path, check)  # pyright: ignore
        state = load_progress(self.path)
        if state is None:
            return None
        tensors, progress = state
        check(progress)
        try:
            check_progress(progress, steps=trainer.recipe.steps)
            trainer.load_state_dict(tensors, step=progress["step"])
        except ValueError as error:
            raise ValueError(
                f"run: the newest state in {self.path} does not fit ({error}); "
                "accepted is --restart"
            ) from None
        return progress

    def write_row(self, row: dict[str, float]) -> None:
        """Append a row to the log."""
        if self._rows is not None:
            self._rows.write(row)

    def save(self, batches: Dataset, seconds: float) -> None:
        """Save the state of the trainer, after `seconds` of training. Raises FloatingPointError if
        a number in it is not finite; see `stop_at`.
        """
        trainer = self.trainer
        if bad := trainer.not_finite():
            self.stop_at(trainer.step, bad, batches)
        progress = {"step": trainer.step, "seconds": seconds, "settings": self.settings}
        texts = dict(self.tokenizer)
        if self._rows is not None:
            self._rows.sync()
            texts[LOG] = self._rows.text
        if isinstance(trainer.ranks, Mesh):
            from hsa_mini.training.parallel.checkpoint import save_sharded

            save_sharded(trainer, self.path, progress, texts)  # pyright: ignore
        else:
            save_progress(self.path, trainer.step, trainer.state_dict(), progress, texts)

    def stop_at(self, step: int, what: str, batches: Dataset) -> NoReturn:
        """Save the batch of a step, counted from 1 as in the log, and raise FloatingPointError."""
        path = self.path / f"batch-{step}.safetensors"
        if self.first:
            ids, parts, *_ = batches[step - 1]
            write_file(path, save({"ids": ids, "parts": parts, "step": torch.tensor(step)}))
        self.trainer.ranks.largest(0)  # wait until it is written
        states = state_folders(self.path)
        raise FloatingPointError(
            f"step {step} made {what} not finite: the run is stopped, its batch is in {path}, "
            f"and the last finite state is {states[-1] if states else 'the beginning'}"
        )

    def save_final(self, batches: Dataset, seconds: float) -> None:
        """Write the finished model: weights, the log, and training.json (how they were made).

        batches: those that this process trains on.
        """
        trainer = self.trainer
        recipe = trainer.recipe
        how = {
            **provenance.record(trainer.device),
            "seed": trainer.seed,
            "seconds": round(seconds, 1),
            "corpus": self.settings["corpus"],
            "recipe": recipe_settings(recipe),
        }
        if isinstance(trainer.ranks, Mesh):
            how["mesh"] = str(trainer.ranks.sizes)
        if trainer.model.config.experts:
            count = min(LOAD_BATCHES, recipe.stages[-1].steps)
            steps = range(recipe.steps - count, recipe.steps)
            counted = prefetch(batches, steps, device=trainer.device)
            how["imbalance"] = trainer.max_over_mean_loads(counted)
        if self.tokenizer:
            how["tokenizer"] = next(iter(self.tokenizer))
        model = trainer.whole_model()
        if self._rows is not None:
            texts = {LOG: self._rows.text, "training.json": json.dumps(how, indent=1) + "\n"}
            model.save_pretrained(
                self.path / FINAL,
                dtype=torch.bfloat16,
                texts=texts | self.tokenizer,
                shard_bytes=MAX_FILE_BYTES,
            )
        trainer.ranks.largest(0)  # wait until it is written
