"""Batches of a recipe: a function of (seed, step), drawn in advance while a GPU computes."""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hsa_mini.checks import check_step
from hsa_mini.data.corpus import Corpus
from hsa_mini.training.mixture import TrainingBatches
from hsa_mini.training.own.batches import DocumentBatches
from hsa_mini.training.recipes import Recipe, Stage

log = logging.getLogger(__name__)

WORKERS = 4  # processes that draw batches for a GPU
AHEAD = 4  # batches that each of them draws before they are needed


class StagedBatches(Dataset):
    """The batches of a whole recipe: item `step` is drawn by the `TrainingBatches` of its stage, or
    by `DocumentBatches` if the stage has no mixture. It holds `recipe.accumulate` batches in one.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        text: np.ndarray | None = None,
        *,
        documents: Corpus | None = None,
        chunk_size: int = 1,
    ) -> None:
        """text: see `TrainingBatches`. documents, chunk_size: see `DocumentBatches`."""
        self.recipe = recipe
        self.batches: dict[Stage, Dataset] = {}
        for stage in dict.fromkeys(recipe.stages):
            sizes = {"batch": stage.batch * recipe.accumulate, "tokens": stage.tokens, "seed": seed}
            if stage.mixture is not None:
                self.batches[stage] = TrainingBatches(
                    stage.mixture, **sizes, steps=recipe.steps, text=text
                )
                continue
            assert documents is not None, "a stage without a mixture needs documents"
            packed = DocumentBatches(documents, **sizes, chunk_size=chunk_size)
            self.batches[stage] = packed
            if packed.split:
                log.warning(
                    "data: %d of %d documents are longer than a row of %d tokens and were split",
                    packed.split,
                    len(documents.starts),
                    stage.tokens,
                )

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        check_step(step, self.recipe.steps)
        return self.batches[self.recipe.stage(step)][step]


def prefetch(
    batches: Dataset, steps: range, *, device: torch.device
) -> Iterable[tuple[torch.Tensor, ...]]:
    """The batches of `steps`, in order.

    For a GPU, worker processes draw them in advance: a GPU takes a step in the time in which one
    process draws a batch. The workers are started anew, because a process that has used a GPU
    cannot be forked.
    """
    if device.type == "cpu":
        return DataLoader(batches, batch_size=None, sampler=steps)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        multiprocessing_context="spawn",
        pin_memory=True,
    )
