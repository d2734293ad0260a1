"""One run: an arm is trained from scratch with one seed, then measured. Only a record of it is
kept, and until then a state, from which a run that was cut off goes on.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.data import Dataset

from hsa_mini.data.corpus import SPLITS, load_corpus
from hsa_mini.lab.arms import Arm
from hsa_mini.lab.capacity.measure import measure_capacity
from hsa_mini.lab.measure import measure_arm, perplexity_row
from hsa_mini.lab.scales import Scale
from hsa_mini.lab.states import RunStates
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.log import FIGURES
from hsa_mini.training.mixture import NONE
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.step import autocast
from hsa_mini.training.trainer import Trainer

POINTS = 40  # each curve of a record has about this many points
LAST = 4  # each final figure is the mean of this many last points
SAVE_SECONDS = 120.0  # between two states of a run


def run_arm(
    arm: Arm,
    scale: Scale,
    seed: int,
    *,
    device: torch.device,
    steps: int | None = None,
    progress: Callable[[int], object] = lambda steps: None,
    states: RunStates | None = None,
    deadline: float = math.inf,
) -> dict | None:
    """Train and measure `arm`; returns the record, which JSON can hold.

    steps: replaces the scale's number of training steps. progress(n): called whenever n more steps
    were given to the device. A figure that is not finite, because training diverged, is None.
    states: where the run keeps its state. It goes on from there, and then its record is that of an
    uninterrupted run, except for the seconds. deadline: the time of `time.monotonic` at which
    training stops; the state is then saved, and the result is None.
    """
    training = _Training(arm, scale, seed, device, steps)
    if states is not None:
        training.resume(states)
    progress(training.trainer.step)
    if not training.take_steps(progress, states, deadline):
        return None
    trained = time.monotonic()
    model = training.trainer.model
    if device.type == "cuda":
        model.bfloat16()
    found = (
        measure_capacity(model.eval(), scale.crowds)
        if scale.crowds
        else measure_arm(model.eval(), scale)
    )
    measured = time.monotonic()
    curve = training.kept["curve"]
    record = {
        "arm": arm.name,
        "seed": seed,
        "settings": arm.settings(scale, steps),
        "corpora": [load_corpus(split).identity for split in SPLITS],
        **arm.parameters(scale),
        "seconds": {
            "training": round(training.kept["seconds"], 1),
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
    if training.kept["learning"]:
        record["learning"] = training.kept["learning"]
    return record


class _Training:
    """The training of one arm.

    kept: what the record needs of the steps so far: "curve" (the step and the figures of about
    `POINTS` steps), "learning" (a row per measurement of the held-out loss) and "seconds".
    """

    def __init__(
        self, arm: Arm, scale: Scale, seed: int, device: torch.device, steps: int | None
    ) -> None:
        self.began = time.monotonic()
        self.scale = scale
        recipe = arm.recipe(scale, steps)
        torch.manual_seed(seed)
        model = arm.model(arm.config(scale)).to(device).train()
        self.batches = PackedBatches(recipe, seed, arm.packed)
        self.trainer = Trainer(model, recipe, seed=seed)
        model.eval()  # the models of the stages share its parameters, and they are trained
        self.learning_steps = learning_steps(recipe, scale.points)
        self.kept: dict = {
            "curve": {name: [] for name in ("step", *FIGURES)},
            "learning": [],
            "seconds": 0.0,
        }

    def resume(self, states: RunStates) -> None:
        """Go on from the newest state, if there is one."""
        self.kept = states.load(self.trainer) or self.kept

    def take_steps(
        self, progress: Callable[[int], object], states: RunStates | None, deadline: float
    ) -> bool:
        """Take the steps that are left; returns whether all were taken before the deadline."""
        trainer = self.trainer
        total = trainer.recipe.steps
        every = max(total // POINTS, 1)
        before = self.kept["seconds"]
        saved = time.monotonic()
        todo = range(trainer.step, total)
        for batch in prefetch(self.batches, todo, device=trainer.device):
            figures = trainer.train_step(batch)
            step = trainer.step
            if step % every == 0:
                self.kept["curve"]["step"].append(step)
                for name, value in zip(FIGURES, figures):
                    self.kept["curve"][name].append(float(f"{float(value):.6g}"))
            if step in self.learning_steps:
                self.kept["learning"].append(self.measure_learning())
            progress(1)
            now = time.monotonic()
            self.kept["seconds"] = before + now - self.began
            if states is not None and (now > min(saved + SAVE_SECONDS, deadline) or step == total):
                states.save(trainer, self.kept)
                saved = now
            if now > deadline and step < total:
                return False
        return True

    @torch.no_grad()
    def measure_learning(self) -> dict:
        """The held-out loss of every text now, at each of the lengths of the curve."""
        trainer = self.trainer
        corpus = load_corpus("validation").tokens
        model = trainer.model
        with autocast(trainer.device):
            rows = [
                perplexity_row(model, self.scale, multiple * self.scale.stage.tokens, corpus, 1)
                for multiple in self.scale.curve_multiples
            ]
        return {
            "step": trainer.step,
            "seen": tokens_seen(trainer.recipe, trainer.step),
            "rows": [{key: _finite(x) for key, x in row.items()} for row in rows],
        }


def learning_steps(recipe: Recipe, points: int) -> set[int]:
    """The steps after which the held-out loss is measured: `points`, even in the last stage."""
    last = recipe.stages[-1].steps
    first = recipe.steps - last
    return {first + round(last * (i + 1) / points) for i in range(points)}


def tokens_seen(recipe: Recipe, step: int) -> int:
    """The training tokens of the first `step` steps."""
    seen = 0
    for stage in recipe.stages:
        taken = min(step, stage.steps)
        seen += taken * stage.batch * stage.tokens
        step -= taken
    return seen


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


def _finite(value):
    """A number, or None if it is not finite; of a list, each number."""
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return value if math.isfinite(value) else None
