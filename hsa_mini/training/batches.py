"""Batches of a recipe: a function of (seed, step), drawn by a thread while the device computes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import Dataset

from hsa_mini.training.mixture import TrainingBatches, check_step
from hsa_mini.training.recipes import Recipe

AHEAD = 8  # batches that are drawn before they are needed


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
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of `steps`, in order. A thread draws up to `AHEAD` of them in advance.

    A thread is enough, because drawing a batch takes milliseconds. A worker process would have to
    be forked, and forking a process that has used a GPU takes seconds.
    """

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.pin_memory() if device.type == "cuda" else part for part in batches[step])

    pool = ThreadPoolExecutor(1)
    waiting = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(draw, step))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
