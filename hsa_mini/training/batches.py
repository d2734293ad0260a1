"""Batches of a recipe: a function of (seed, step), drawn in advance while a GPU computes."""

from collections.abc import Iterable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hsa_mini.training.mixture import TrainingBatches, check_step
from hsa_mini.training.recipes import Recipe

WORKERS = 4  # processes that draw batches for a GPU
AHEAD = 4  # batches that each of them draws before they are needed


class StagedBatches(Dataset):
    """The batches of a whole recipe: item `step` is drawn by the `TrainingBatches` of its stage."""

    def __init__(self, recipe: Recipe, seed: int, text: np.ndarray | None = None) -> None:
        """text: see `TrainingBatches`."""
        self.recipe = recipe
        self.batches = {
            stage: TrainingBatches(
                stage.mixture,
                batch=stage.batch,
                tokens=stage.tokens,
                steps=recipe.steps,
                seed=seed,
                text=text,
            )
            for stage in dict.fromkeys(recipe.stages)
        }

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
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
