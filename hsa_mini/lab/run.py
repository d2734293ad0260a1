"""One run: an arm is trained from scratch with one seed, then measured. Only a record of it is
kept.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from hsa_mini.data.corpus import SPLITS, load_corpus
from hsa_mini.hsa_model import HSAModel
from hsa_mini.lab.arms import Arm
from hsa_mini.lab.measure import measure_arm
from hsa_mini.lab.scales import Scale
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.log import FIGURES
from hsa_mini.training.mixture import NONE
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.trainer import Trainer

POINTS = 40  # each curve of a record has about this many points
LAST = 4  # each final figure is the mean of this many last points


def run_arm(
    arm: Arm,
    scale: Scale,
    seed: int,
    *,
    device: torch.device,
    steps: int | None = None,
    progress: Callable[[int], object] = lambda steps: None,
) -> dict:
    """Train and measure `arm`; returns the record, which JSON can hold.

    steps: replaces the scale's number of training steps. progress(n): called whenever n more steps
    were given to the device. A figure that is not finite, because training diverged, is None.
    """
    began = time.monotonic()
    recipe = arm.recipe(scale, steps)
    torch.manual_seed(seed)
    model = arm.model(arm.config(scale)).to(device).train()
    curve = _train(model, recipe, PackedBatches(recipe, seed, arm.packed), seed, device, progress)
    trained = time.monotonic()
    if device.type == "cuda":
        model.bfloat16()
    found = measure_arm(model.eval(), scale)
    measured = time.monotonic()
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": arm.settings(scale, steps),
        "corpora": [load_corpus(split).identity for split in SPLITS],
        **arm.parameters(scale),
        "seconds": {
            "training": round(trained - began, 1),
            "evaluation": round(measured - trained, 1),
        },
        "final": {
            name: _finite(_mean(values[-LAST:])) for name, values in curve.items() if name != "step"
        },
        "curve": {name: [_finite(value) for value in values] for name, values in curve.items()},
        "found": {
            name: [{key: _finite(x) for key, x in row.items()} for row in rows]
            for name, rows in found.items()
        },
    }


def _train(
    model: HSAModel,
    recipe: Recipe,
    batches: Dataset,
    seed: int,
    device: torch.device,
    progress: Callable[[int], object],
) -> dict[str, list[float]]:
    """Take all steps of the recipe; returns "step" and the figures of about `POINTS` steps."""
    trainer = Trainer(model, recipe, seed=seed)
    every = max(recipe.steps // POINTS, 1)
    curve: dict[str, list[float]] = {name: [] for name in ("step", *FIGURES)}
    for step, batch in enumerate(prefetch(batches, range(recipe.steps), device=device)):
        figures = trainer.train_step(batch)
        if (step + 1) % every == 0:
            curve["step"].append(step + 1)
            for name, value in zip(FIGURES, figures):
                curve[name].append(float(f"{float(value):.6g}"))
        progress(1)
    return curve


class PackedBatches(Dataset):
    """The batches of a recipe, made of sequences of at most 1/`packed` of its longest.

    Several such sequences, drawn independently of one another, fill one row.
    """

    def __init__(self, recipe: Recipe, seed: int, packed: int) -> None:
        longest = max(stage.tokens for stage in recipe.stages) // packed

        def shortened(stage: Stage) -> Stage:
            count = max(stage.tokens // longest, 1)
            return dataclasses.replace(
                stage, batch=count * stage.batch, tokens=stage.tokens // count
            )

        stages = tuple(map(shortened, recipe.stages))
        self.batches = StagedBatches(dataclasses.replace(recipe, stages=stages), seed)
        self.recipe = recipe

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and parts [B, T + 1] of a step."""
        ids, parts = self.batches[step]
        parts[:, 0] = NONE  # nothing in front of a sequence predicts its first token
        stage = self.recipe.stage(step)

        def in_rows(x: torch.Tensor) -> torch.Tensor:
            """[count*B, T/count + 1] -> [B, T + 1], without the surplus in front of each row."""
            return x.reshape(stage.batch, -1)[:, -(stage.tokens + 1) :]

        return in_rows(ids), in_rows(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
