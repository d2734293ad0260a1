"""The prediction of training on many GPUs, against what a run on a mesh holds and exchanges."""

import dataclasses
import inspect
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from material import DEBUG, build
from processes import Processes
from torch.distributed.tensor import DTensor

from hsa_mini import PRESETS
from hsa_mini.paths import data_dir
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.trainer import MeshBatches, MeshTrainer
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.scale.memory import memory_bytes
from hsa_mini.training.scale.shares import TrainingRun
from hsa_mini.training.scale.traffic import bytes_by_kind, traffic

CPU = torch.device("cpu")
EXPERTS = dataclasses.replace(DEBUG, experts=4, experts_active=2, expert_width=16)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(2, tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


# ---- against a run of two processes


class Received:
    """Counts, inside the `with` block, the bytes that each collective brings to this process."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "Received":
        self.plain = {name: getattr(dist, name) for name in COUNTED if hasattr(dist, name)}
        for name, function in self.plain.items():
            setattr(dist, name, self._counting(function, *COUNTED[name]))
        return self

    def __exit__(self, *_) -> None:
        for name, function in self.plain.items():
            setattr(dist, name, function)

    def _counting(self, function, kind: str, argument: int, own: bool):
        def counting(*arguments, **options):
            call = inspect.signature(function).bind(*arguments, **options).arguments
            received = list(call.values())[argument].nbytes
            if not own:
                received *= dist.get_world_size(call.get("group")) - 1
            self.bytes[kind] = self.bytes.get(kind, 0) + received
            return function(*arguments, **options)

        return counting


# Collective -> the kind of bytes; which argument has those that each other process sends, or those
# of all processes, the own among them. The first two have other names in earlier versions of torch.
COUNTED = {
    "all_gather_single": ("weights", 1, False),
    "all_gather_into_tensor": ("weights", 1, False),
    "reduce_scatter_single": ("gradients", 0, False),
    "reduce_scatter_tensor": ("gradients", 0, False),
    "all_gather": ("memory", 1, False),
    "reduce_scatter": ("memory", 0, False),
    "all_to_all_single": ("exchanged", 0, True),
}


class Batches(StagedBatches):
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        stage = self.recipe.stage(step)
        shape = (stage.batch * self.recipe.accumulate, stage.tokens + 1)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(DEBUG.vocab_size, shape, generator=generator)
        return ids, torch.zeros(shape, dtype=torch.int8)


def trained(option: str, run: TrainingRun) -> tuple[dict[str, int], dict[str, int]]:
    """The bytes that a step brought to this process, by collective, and those of its state."""
    mesh = Mesh(run.sizes, CPU)
    stage = Stage(2, mesh.data_ranks, run.tokens, gumbel_noise=False)
    recipe = Recipe(
        (stage,),
        accumulate=run.rows,
        dtype=run.dtype,
        checkpoint_blocks=run.checkpoint_blocks,
        loss_tokens=run.loss_tokens,
    )
    trainer = MeshTrainer(build(option, torch.float32).train(), recipe, mesh)
    batches = MeshBatches(Batches(recipe), DEBUG.chunk_size, mesh)
    trainer.train_step(batches[0])
    with Received() as received:
        trainer.train_step(batches[1])
    held = [p.to_local() for p in trainer.model.parameters() if isinstance(p, DTensor)]
    states = [x for state in trainer.optimizer.state.values() for x in state.values() if x.dim()]
    adam = sum(x.to_local().nbytes for x in states)
    return received.bytes, {"weights": sum(x.nbytes for x in held), "Adam": adam}


@pytest.mark.parametrize("options", [{}, dict(dtype="float32", checkpoint_blocks=False)])
@pytest.mark.parametrize(
    "sizes, option, rows",
    [("dp=2", "default", 2), ("cp=2", "default", 1), ("dp=2", "experts", 1), ("ep=2", "experts", 1)],
)
def test_bytes_and_memory_are_those_of_a_run(processes, sizes, option, rows, options):
    config = EXPERTS if option == "experts" else DEBUG
    run = TrainingRun(config, 32, MeshSizes.parse(sizes), rows, loss_tokens=8, **options)
    answers = processes.run(2, trained, option, run)
    want = bytes_by_kind(traffic(run))
    for found, held in answers:
        kinds = ("weights", "gradients", "memory")
        assert [found.get(kind, 0) for kind in kinds] == [want[kind] for kind in kinds]
        memory = memory_bytes(run)
        assert held == {name: memory[name] for name in held}
    exchanged = sum(found.get("exchanged", 0) for found, _ in answers)
    # Two processes share the experts, and rows that stay on their process are counted. A halo
    # crosses the one border between two parts.
    assert exchanged == 2 * 2 * want["experts"] + want["halo"]
