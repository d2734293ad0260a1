"""Training: `Trainer` takes steps; `train` is a whole run that can be interrupted and resumed.

The batch and the Gumbel noise of a step are functions of (seed, step). So the parameters, the
optimizer's state, the chunk queue and the step number are all that a run has to save. A resumed run
equals an uninterrupted one to the last bit (on the same hardware).
"""

import json
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hsa_mini import provenance
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.model.moe import MoE
from hsa_mini.training.batches import StagedBatches, prefetch
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.log import Log
from hsa_mini.training.optimizer import make_optimizer
from hsa_mini.training.recipes import RECIPES, Recipe, recipe_settings
from hsa_mini.training.state_check import check_state
from hsa_mini.training.step import StepFigures, max_over_mean_loads, noise_seed, train_step

LOG = "log.csv"
LOAD_BATCHES = 16  # to measure expert loads: those of a single batch vary too much
MAX_FILE_BYTES = 15 << 20  # of weights in one file; the repository allows 16 MiB


class Trainer:
    """A model in training: its optimizer, chunk queue, and one recorded step for each stage.

    model: trained in place. models: stage -> a model with the window and K of that stage; all of
    them share the parameters of `model`. step: how many steps have been taken.
    """

    def __init__(self, model: HSAModel, recipe: Recipe, *, seed: int = 0) -> None:
        """model: in training mode, on its final device. seed: that of the Gumbel noise."""
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self.step = 0
        self.optimizer = make_optimizer(model, recipe)
        self.queue = ChunkQueue(recipe.queue_chunks)
        self.models = {
            stage: with_shared_parameters(model, stage.config(model.config))
            for stage in recipe.stages
        }
        self._steps = {
            stage: CUDAGraphRunner(
                partial(train_step, stage_model, self.optimizer, recipe, stage, self.queue)
            )
            for stage, stage_model in self.models.items()
        }

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train_step(self, batch: tuple[torch.Tensor, ...]) -> StepFigures:
        """Train on the batch (ids, parts) of the current step, then advance by one step.

        The figures stay on the device. Read them before the next step, which overwrites them on a
        GPU.
        """
        # A blocking copy would wait for the GPU, which would then be idle at the start of every
        # step.
        ids, parts = (part.to(self.device, non_blocking=True) for part in batch)
        rate = torch.full((), self.recipe.rate(self.step), device=self.device)
        noise = torch.full((), noise_seed(self.seed, self.step), device=self.device)
        figures = self._steps[self.recipe.stage(self.step)](ids, parts, rate, noise)
        self.step += 1
        return StepFigures(*figures)

    def max_over_mean_loads(self, batches: Iterable[tuple[torch.Tensor, ...]]) -> list[float]:
        """The max-over-mean load of every MoE layer over batches of the last stage; no training."""
        stage = self.recipe.stages[-1]
        counting = with_shared_parameters(self.model, stage.config(self.model.config))
        ids = (batch[0].to(self.device) for batch in batches)
        return max_over_mean_loads(counting, stage, self.queue, ids)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All state in one flat dictionary: model, optimizer, chunk queue, torch's generator."""
        tensors = {f"model.{name}": value for name, value in _model_state(self.model).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        for i, store in enumerate(self.queue.stores or ()):
            tensors[f"past.{i}"] = store
        tensors["rng"] = torch.get_rng_state()
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, torch.Tensor], *, step: int) -> None:
        """Restore what `state_dict` returned after `step` steps.

        Raises ValueError, before anything is changed, for the state of another trainer and for
        numbers that are not finite; see `check_state`.
        """
        weights = _model_state(self.model)
        parts = {"optimizer": self.optimizer, "queue": self.queue, "config": self.model.config}
        check_state(tensors, step=step, weights=weights, **parts)
        for name, value in weights.items():
            value.copy_(tensors[f"model.{name}"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        names = [f"past.{i}" for i in range(3) if f"past.{i}" in tensors]
        self.queue.stores = tuple(tensors[name].to(self.device) for name in names) or None
        torch.set_rng_state(tensors["rng"])
        self.step = step


def with_shared_parameters(model: HSAModel, config: HSAConfig) -> HSAModel:
    """A model with another window or K and the same parameters: training one trains both.

    Its experts count the tokens that they receive, from 0.
    """
    twin = type(model)(config, device="meta").train(model.training)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    for layer in twin.modules():
        if isinstance(layer, MoE):
            layer.count_tokens()
    return twin


def _model_state(model: HSAModel) -> dict[str, torch.Tensor]:
    """The tensors of the model's `state_dict`, where a tied head appears only once."""
    kept = model.state_dict()
    return {
        **dict(model.named_parameters()),
        **{name: x for name, x in model.named_buffers() if name in kept},
    }


def train(
    name: str,
    *,
    run: Path,
    device: torch.device,
    steps: int | None = None,
    seed: int = 0,
    checkpoint_seconds: float = 120.0,
    log_every: int = 50,
    stop_after: int | None = None,
) -> HSAModel:
    """Train preset `name` in folder `run`, from its newest saved state on; returns the model.

    steps: replaces the recipe's number of steps. stop_after: save the state and return after this
    step. The log is `run/log.csv`; the finished model is `run/final`, in bfloat16. Raises
    ValueError for an unknown preset or a folder that holds a run with other settings.
    """
    if name not in RECIPES:
        raise ValueError(f"preset: got {name!r}, accepted are {', '.join(RECIPES)}")
    recipe = RECIPES[name] if steps is None else RECIPES[name].scaled(steps)
    torch.manual_seed(seed)
    trainer = Trainer(HSAModel(PRESETS[name]).to(device).train(), recipe, seed=seed)
    settings = {"preset": name, "seed": seed, "recipe": recipe_settings(recipe)}
    seconds_before = _resume(trainer, run, settings)
    log = Log(run / LOG, trainer.step)
    batches = StagedBatches(recipe, seed)
    todo = range(trainer.step, recipe.steps)
    began = saved = time.monotonic()

    def elapsed() -> float:
        return seconds_before + time.monotonic() - began

    with tqdm(
        total=recipe.steps,
        initial=trainer.step,
        desc=f"training {name}",
        unit="step",
        mininterval=0.5,
    ) as bar:
        for batch in prefetch(batches, todo, device=device):
            figures = trainer.train_step(batch)
            step = trainer.step
            bar.update()
            if step % log_every == 0 or step == recipe.steps:
                numbers = figures.numbers()
                log.write(step, numbers, recipe.rate(step - 1), elapsed())
                accuracy = numbers["answer_accuracy"]
                bar.set_postfix(loss=f"{numbers['loss']:.3f}", answers=f"{accuracy:.1%}")
            overdue = time.monotonic() - saved > checkpoint_seconds and step < recipe.steps
            if step == stop_after or overdue:
                progress = {"step": step, "seconds": elapsed(), "settings": settings}
                save_progress(run, step, trainer.state_dict(), progress)
                saved = time.monotonic()
            if step == stop_after:
                return trainer.model
    _save_final(trainer, run, batches, device=device, seconds=elapsed())
    return trainer.model


def _resume(trainer: Trainer, run: Path, settings: dict) -> float:
    """Load the newest saved state of the run, if any; returns the seconds trained so far."""
    if (state := load_progress(run)) is None:
        return 0.0
    tensors, progress = state
    if progress["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"run: {run} holds a run of other settings; "
            "accepted is an empty folder or one of the same"
        )
    trainer.load_state_dict(tensors, step=progress["step"])
    return progress["seconds"]


def _save_final(
    trainer: Trainer, run: Path, batches: StagedBatches, *, device: torch.device, seconds: float
) -> None:
    """Write `run/final`: weights in bfloat16, the log, and training.json (how they were made)."""
    recipe = trainer.recipe
    how = {
        **provenance.record(device),
        "seed": trainer.seed,
        "seconds": round(seconds, 1),
        "recipe": recipe_settings(recipe),
    }
    if trainer.model.config.experts:
        count = min(LOAD_BATCHES, recipe.stages[-1].steps)
        counted = prefetch(batches, range(recipe.steps - count, recipe.steps), device=device)
        how["imbalance"] = trainer.max_over_mean_loads(counted)
    texts = {LOG: (run / LOG).read_text(), "training.json": json.dumps(how, indent=1) + "\n"}
    trainer.model.save_pretrained(
        run / "final", dtype=torch.bfloat16, texts=texts, shard_bytes=MAX_FILE_BYTES
    )
