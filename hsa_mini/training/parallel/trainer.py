"""The trainer of one process of a mesh, and the batches that it reads."""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import Dataset

from hsa_mini.checkpoint.training_state import not_finite
from hsa_mini.config import HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.hsa import HSA
from hsa_mini.model.swa import SlidingWindowAttention
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.optimizers.factory import make_optimizer
from hsa_mini.training.parallel.context import split_sequences
from hsa_mini.training.parallel.experts import moe_layers, share_experts
from hsa_mini.training.parallel.mesh import Mesh
from hsa_mini.training.parallel.shard import shard_weights, weight_bytes
from hsa_mini.training.parallel.speed import Speed
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.step import StepFigures, max_over_mean_loads, train_step
from hsa_mini.training.trainer import Trainer, checkpoint_blocks, model_state


class MeshTrainer(Trainer):
    """`Trainer` on a mesh: every process makes one and calls the same methods. Its figures are
    those of the whole batch.

    A step equals that of one process, but for two things. Float32 sums round in another order. And
    Gumbel noise depends on (seed, step, data rank, row), so that only a mesh with one data rank has
    the noise of a single process.
    """

    def __init__(self, model: HSAModel, recipe: Recipe, mesh: Mesh, *, seed: int = 0) -> None:
        """model: in training mode, on the mesh's device, with the same weights on all processes.
        It is changed in place: its weights become shares.

        Raises ValueError for a model or recipe that does not fit the mesh.
        """
        # Nothing of `Trainer.__init__`: its second models share whole weights, and a CUDA graph
        # cannot hold what the processes say to each other.
        mesh.sizes.check(model.config, recipe)
        share_experts(model, mesh)
        if recipe.checkpoint_blocks:
            checkpoint_blocks(model)
        for layer in moe_layers(model):
            layer.count_tokens()
        shard_weights(model, mesh, recipe.dtype)
        self.model = model
        self.recipe = recipe
        self.ranks = mesh
        self.mesh = mesh
        self.seed = seed
        self.step = 0
        self.optimizer = make_optimizer(model, recipe)
        self.queue = ChunkQueue(0)
        self.master = None
        sent = recipe.accumulate * weight_bytes(model, mesh, recipe.dtype)
        self.speed = Speed(recipe, model.config, mesh, weight_bytes=sent)
        self.config = model.config
        self.configs = {stage: stage.config(model.config) for stage in recipe.stages}
        self.models = dict.fromkeys(recipe.stages, model)
        arguments = (model, self.optimizer, recipe)
        self._steps = {
            stage: partial(train_step, *arguments, stage, self.queue, ranks=mesh)
            for stage in recipe.stages
        }

    def train_step(self, batch: tuple[torch.Tensor, ...]) -> StepFigures:
        """`Trainer.train_step` on this process's part of the batch (see `MeshBatches`)."""
        self._begin(self.recipe.stage(self.step))
        return super().train_step(batch)

    def max_over_mean_loads(self, batches: Iterable[tuple[torch.Tensor, ...]]) -> list[float]:
        """`Trainer.max_over_mean_loads`, each process with its part of the batches."""
        stage = self.recipe.stages[-1]
        self._begin(stage)
        there = (tuple(part.to(self.device) for part in batch) for batch in batches)
        loads = max_over_mean_loads(self.model, stage, self.queue, there, self.ranks)
        for layer in moe_layers(self.model):
            layer.count_tokens()
        return loads

    def own_batches(self, batches: StagedBatches) -> Dataset:
        return MeshBatches(batches, self.config.chunk_size, self.mesh)

    def whole_model(self) -> HSAModel:
        """The model with whole weights, in host memory. Only that of rank 0 has them."""
        whole = HSAModel(self.config, device="meta")
        # One after the other: a device may not have room for all of them.
        tensors = {}
        for name, x in model_state(self.model).items():
            x = (x.full_tensor() if isinstance(x, DTensor) else x).detach()
            if not self.mesh.rank:
                tensors[name] = x.cpu()
        whole.adopt_weights(tensors)
        return whole

    def _begin(self, stage: Stage) -> None:
        """Give the model the window, K and length of a stage."""
        set_config(self.model, self.configs[stage])
        if self.mesh.sizes.cp > 1:
            split_sequences(self.model, self.mesh.context, stage.tokens)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`Trainer.state_dict` with whole tensors, in host memory: the state of any mesh, and of a
        run of one process. Every process must call it.
        """
        return {
            name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()
            for name, x in self.own_state().items()
        }

    def own_state(self) -> dict[str, torch.Tensor]:
        """`Trainer.state_dict` where this process has its part of each `DTensor`."""
        return super().state_dict()

    def not_finite(self) -> str | None:
        own = self.own_state().items()
        shares = {name: x.to_local() if isinstance(x, DTensor) else x for name, x in own}
        bad = not_finite(shares)
        names = [None, *shares]
        (place,) = self.mesh.largest(names.index(bad))
        return names[int(place)]

    def empty_state(self, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Zeros for what this process keeps of a state with these names, shapes and dtypes."""
        owners = self._owners(like)
        whole = {n: torch.zeros_like(x, device="cpu") for n, x in like.items() if n not in owners}
        return whole | {name: torch.zeros_like(owner) for name, owner in owners.items()}

    def _placed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def part(x: torch.Tensor, owner: DTensor) -> DTensor:
            here = x.to(self.device)
            return distribute_tensor(here, owner.device_mesh, owner.placements, src_data_rank=None)

        owners = self._owners(tensors)
        return {n: part(x, owners[n]) if n in owners else x for n, x in tensors.items()}

    def _owners(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, DTensor]:
        """The tensors of a state of which each process keeps a part, by name: the parameter that
        has the same parts.
        """
        weights = {f"model.{name}": p for name, p in self.model.named_parameters()}
        numbered = enumerate(p for group in self.optimizer.param_groups for p in group["params"])
        weights |= {f"optimizer.{i}": p for i, p in numbered}
        found = {}
        for name, x in tensors.items():
            of_optimizer = name.startswith("optimizer.")
            owner = weights.get(name.rpartition(".")[0] if of_optimizer else name)
            if isinstance(owner, DTensor) and x.dim():
                found[name] = owner
        return found


def set_config(model: HSAModel, config: HSAConfig) -> None:
    """Give `model` another window and K."""
    model.config = config
    for layer in model.modules():
        if isinstance(layer, SlidingWindowAttention):
            layer.window = config.window
        elif isinstance(layer, HSA):
            layer.config = config


class MeshBatches(Dataset):
    """The batches of a recipe, cut to the rows and the part of the sequences that one process
    reads.
    """

    def __init__(self, batches: StagedBatches, chunk_size: int, mesh: Mesh) -> None:
        self.batches = batches
        self.chunk_size = chunk_size
        self.mesh = mesh

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.mesh.own_part(
            self.batches[step],
            chunk_size=self.chunk_size,
            accumulate=self.batches.recipe.accumulate,
        )
