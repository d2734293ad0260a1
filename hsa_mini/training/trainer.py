"""The trainer takes steps. `hsa_mini.training.run` makes a whole run of them.

The batch and the Gumbel noise of a step are functions of (seed, step). So the parameters, the
optimizer's state, the chunk queue and the step number are all that a run has to save. A resumed run
equals an uninterrupted one to the last bit (on the same hardware).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from hsa_mini.checkpoint.training_state import not_finite
from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.model.moe import MoE
from hsa_mini.ops.choice import runs_kernels
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.optimizers.factory import make_optimizer
from hsa_mini.training.optimizers.master_weights import MasterWeights
from hsa_mini.training.parallel.ranks import ONE_PROCESS, OneProcess
from hsa_mini.training.parallel.speed import Speed
from hsa_mini.training.recipes import Recipe
from hsa_mini.training.state_check import check_layout, check_numbers
from hsa_mini.training.step import StepFigures, max_over_mean_loads, noise_seed, train_step


class Trainer:
    """A model in training: its optimizer, chunk queue, and one recorded step for each stage.

    model: trained in place. models: stage -> a model with the window and K of that stage; all of
    them share the parameters of `model`. step: how many steps have been taken. ranks: the
    processes that train together. speed: what measures throughput for the log, if anything does.
    """

    ranks: OneProcess = ONE_PROCESS
    speed: Speed | None = None

    def __init__(self, model: HSAModel, recipe: Recipe, *, seed: int = 0) -> None:
        """model: in training mode, on its final device. seed: that of the Gumbel noise."""
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self.step = 0
        self.optimizer = make_optimizer(model, recipe)
        self.queue = ChunkQueue(recipe.queue_chunks)
        self.master = MasterWeights(model) if recipe.dtype == "bfloat16" else None
        read = model if self.master is None else self.master.model
        self.models = {
            stage: with_shared_parameters(read, stage.config(model.config))
            for stage in recipe.stages
        }
        for stage_model in self.models.values():
            if recipe.compile_blocks and runs_kernels(self.device):
                compile_blocks(stage_model)
            if recipe.checkpoint_blocks:
                checkpoint_blocks(stage_model)
        options = {"master": self.master}
        self._steps = {
            stage: CUDAGraphRunner(
                partial(
                    train_step, stage_model, self.optimizer, recipe, stage, self.queue, **options
                )
            )
            for stage, stage_model in self.models.items()
        }

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train_step(self, batch: tuple[torch.Tensor, ...]) -> StepFigures:
        """Train on the batch (ids, parts) or (ids, parts, document starts) of the current step,
        then advance by one step.

        The figures stay on the device. Read them before the next step, which overwrites them on a
        GPU.
        """
        # A blocking copy would wait for the GPU, which would then be idle at the start of every
        # step.
        ids, parts, *starts = (part.to(self.device, non_blocking=True) for part in batch)
        rate = torch.full((), self.recipe.rate(self.step), device=self.device)
        # Every part of a step has noise of its own.
        share = self.step * self.ranks.data_ranks + self.ranks.data_rank
        first = share * self.recipe.accumulate
        noise = torch.full((), noise_seed(self.seed, first), device=self.device)
        figures = self._steps[self.recipe.stage(self.step)](ids, parts, rate, noise, *starts)
        self.step += 1
        return StepFigures(*figures)

    def max_over_mean_loads(self, batches: Iterable[tuple[torch.Tensor, ...]]) -> list[float]:
        """The max-over-mean load of every MoE layer over batches of the last stage; no training."""
        stage = self.recipe.stages[-1]
        counting = with_shared_parameters(self.models[stage], self.models[stage].config)
        there = (tuple(part.to(self.device) for part in batch) for batch in batches)
        return max_over_mean_loads(counting, stage, self.queue, there)

    def own_batches(self, batches: Dataset) -> Dataset:
        """What this process reads of the batches of a recipe."""
        return batches

    def whole_model(self) -> HSAModel:
        """The model with whole weights."""
        return self.model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All state in one flat dictionary: model, optimizer, chunk queue, torch's generator."""
        tensors = {f"model.{name}": value for name, value in model_state(self.model).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        for i, store in enumerate(self.queue.stores or ()):
            tensors[f"past.{i}"] = store
        tensors["rng"] = torch.get_rng_state()
        return tensors

    def not_finite(self) -> str | None:
        """The name of a tensor of the state that holds NaN or infinity, or None."""
        return not_finite(self.state_dict())

    def load_state_dict(self, tensors: dict[str, torch.Tensor], *, step: int) -> None:
        """Restore what `state_dict` returned after `step` steps.

        Raises ValueError, before anything is changed, for the state of another trainer and for
        numbers that are not finite; see `check_layout` and `check_numbers`.
        """
        self.check_layout(tensors, step)
        check_numbers(tensors, step)
        self.take_over(self._placed(tensors), step)

    def check_layout(self, tensors: Mapping[str, torch.Tensor], step: int) -> None:
        """Raise ValueError unless tensors with these names, shapes and dtypes are a state of this
        trainer after `step` steps. They may be on the meta device.
        """
        parts = {"optimizer": self.optimizer, "queue": self.queue, "config": self.model.config}
        check_layout(tensors, step=step, weights=model_state(self.model), **parts)

    @torch.no_grad()
    def take_over(self, tensors: dict[str, torch.Tensor], step: int) -> None:
        """Go on from a checked state, of which this process has its part."""
        for name, value in model_state(self.model).items():
            value.copy_(tensors[f"model.{name}"])
        if self.master is not None:
            self.master.write_back()
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

    def _placed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What this process keeps of a state."""
        return tensors


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


def compile_blocks(model: HSAModel) -> None:
    """Let Inductor fuse what stands between the matrix products and the kernels of each block and
    of the encoder. Blocks of one kind share their code.
    """
    # HSA layers of different groups are compiled apart, because their noise differs.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for part in (*model.lower, *model.upper, model.encoder):
        part.forward = torch.compile(part.forward, dynamic=False)


def checkpoint_blocks(model: HSAModel) -> None:
    """Keep only the input of each block for the backward pass, which computes the rest again."""
    for block in (*model.lower, *model.upper):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )


def model_state(model: HSAModel) -> dict[str, torch.Tensor]:
    """The tensors of the model's `state_dict`, where a tied head appears only once."""
    kept = model.state_dict()
    return {
        **dict(model.named_parameters()),
        **{name: x for name, x in model.named_buffers() if name in kept},
    }
