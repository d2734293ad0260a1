"""Training on several processes equals training on one. The processes use gloo, on the CPU."""

import dataclasses
import functools
import logging
import random
import re
import shutil
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from material import DEBUG, OPTIONS, build, document_starts, text
from processes import Processes, forks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import Dataset

from hsa_mini import HSAModel, cli
from hsa_mini.checkpoint.shards import shard_files
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.files.whole_folder import read_manifest, write_manifest
from hsa_mini.model.cost_estimate import training_flops
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.parallel.checkpoint import load_sharded, save_sharded
from hsa_mini.training.parallel.collectives import TRAFFIC, all_to_all, gather
from hsa_mini.training.parallel.context import part_bounds, split_sequences
from hsa_mini.training.parallel.experts import moe_layers, share_experts
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.speed import Speed
from hsa_mini.training.parallel.trainer import MeshBatches, MeshTrainer
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.trainer import Trainer

CPU = torch.device("cpu")
MOE = dataclasses.replace(DEBUG, experts=4, experts_active=2, expert_width=16)
STAGE = Stage(steps=20, batch=4, tokens=32, gumbel_noise=False)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(4, tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


# ---- the mesh


def test_a_mesh_is_read_from_text():
    assert MeshSizes.parse("dp=2,cp=4") == MeshSizes(dp=2, cp=4, ep=1)
    assert MeshSizes.parse(str(MeshSizes(2, 3, 4))) == MeshSizes(2, 3, 4)


@pytest.mark.parametrize(
    "wrong", ["", "dp", "dp=", "dp=x", "dp=-1", "tp=2", "dp=2,dp=2", "dp=2;cp=2"]
)
def test_text_that_is_no_mesh_is_refused(wrong):
    with pytest.raises(ValueError, match="^mesh: got .*, accepted are sizes of dp, cp and ep"):
        MeshSizes.parse(wrong)


@pytest.mark.parametrize("name, value", [("muon", 0.2), ("compile_blocks", True)])
def test_an_option_of_one_process_is_refused_on_a_mesh(name, value):
    recipe = Recipe((STAGE,), **{name: value})
    with pytest.raises(ValueError, match=f"^mesh: got dp=2,.* with {name}={value}, accepted is "):
        MeshSizes(dp=2).check(DEBUG, recipe)


@pytest.mark.parametrize(
    "sizes, config, changes, message",
    [
        ("ep=2", DEBUG, {}, "ep=2, accepted for this model are 1"),
        ("ep=3", MOE, {}, "ep=3, accepted for this model are divisors of the 4 experts"),
        ("dp=3", MOE, {"batch": 3}, "dp=3 and cp=1, .* divides the width 32"),
        ("dp=3", DEBUG, {}, "dp=3 and ep=1 for batches of 4 rows"),
        ("dp=2,ep=4", MOE, {}, "dp=2 and ep=4 for batches of 4 rows"),
        ("cp=9", DEBUG, {}, "cp=9 for rows of 32 tokens, accepted are at most 8"),
        ("cp=2", DEBUG, {"queue_chunks": 0}, "with queue_chunks=0 in a stage"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, config, changes, message):
    recipe = Recipe((dataclasses.replace(STAGE, **changes),))
    with pytest.raises(ValueError, match=f"^mesh: got .*{message}"):
        MeshSizes.parse(sizes).check(config, recipe)


def other_number() -> str:
    with pytest.raises(ValueError) as caught:
        Mesh(MeshSizes(dp=3), CPU)
    return str(caught.value)


def places() -> tuple:
    mesh = Mesh(MeshSizes(cp=2, ep=2), CPU)
    ranks = dist.get_process_group_ranks
    columns = ranks(mesh.expert_mesh.get_group("replicas"))
    return mesh.data_rank, mesh.cp, ranks(mesh.context), ranks(mesh.experts), columns


def test_every_process_has_its_place(processes):
    message = "mesh: got dp=3,cp=1,ep=1, which is 3 processes, accepted .* the 2 started"
    assert all(re.match(message, answer) for answer in processes.run(2, other_number))
    assert processes.run(4, places) == [
        (0, 0, [0, 2], [0, 1], [0, 2]),
        (1, 0, [1, 3], [0, 1], [1, 3]),
        (0, 1, [0, 2], [2, 3], [0, 2]),
        (1, 1, [1, 3], [2, 3], [1, 3]),
    ]


# ---- context parallelism

CASES = {
    # tokens, window, other changes of the forward pass
    "equal parts": (32, 8, {}),
    "unfinished chunk": (35, 8, {}),
    "unequal parts": (45, 8, {}),
    "no window in front": (32, 1, {}),
    "window over all": (37, 64, {}),
    "window over several parts": (50, 21, {}),
    "noise": (35, 8, {"gumbel_seed": 7}),
    "documents": (46, 14, {"document_starts": document_starts([0, 12, 20], [0, 4, 40], tokens=46)}),
}


def gradients_of(model: HSAModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients(model: HSAModel) -> dict[str, torch.Tensor]:
    """The gradients by name, added over all processes."""
    found = gradients_of(model)
    for gradient in found.values():
        dist.all_reduce(gradient)
    return found


def split_and_whole(option: str, case: str, dtype: torch.dtype) -> tuple[float, float]:
    """The largest difference of a logit of this process's part, and that of a gradient."""
    tokens, window, options = CASES[case]
    ids = text(tokens)
    factors = torch.randn(2, tokens, DEBUG.vocab_size, generator=torch.manual_seed(1)).to(dtype)
    whole = build(option, dtype, window=window).train()
    want = whole(ids, gumbel_noise="gumbel_seed" in options, **options).logits
    ((want * factors).mean() / dist.get_world_size()).backward()
    part = build(option, dtype, window=window).train()
    bounds = part_bounds(tokens, DEBUG.chunk_size, dist.get_world_size())
    own = slice(*bounds[dist.get_rank() :][:2])
    options = {name: x[:, own] if name == "document_starts" else x for name, x in options.items()}
    split_sequences(part, Mesh(MeshSizes(cp=dist.get_world_size()), CPU).context, tokens)
    got = part(ids[:, own], gumbel_noise="gumbel_seed" in options, **options).logits
    ((got * factors[:, own]).sum() / want.numel()).backward()
    found = gradients(part)
    wanted = gradients(whole)
    assert found.keys() == wanted.keys()
    differences = [float((found[name] - x).abs().max()) for name, x in wanted.items()]
    return float((got - want[:, own]).abs().max().detach()), max(differences)


def all_splits(names: list[tuple[str, str]], dtype: torch.dtype) -> dict:
    return {name: split_and_whole(*name, dtype) for name in names}


def test_parts_of_a_sequence_have_the_logits_and_gradients_of_the_whole(processes):
    names = [("default", case) for case in CASES]
    names += [(option, "unequal parts") for option in OPTIONS]
    for differences in processes.run(2, all_splits, names, torch.float32):
        logits, gradient = zip(*differences.values())
        assert max(logits) < 2e-6 and max(gradient) < 1e-6, differences
        # Elsewhere the window's blocks, or the matrices of the experts, are others: that rounds
        # differently.
        same = ("equal parts", "unfinished chunk", "no window in front", "noise")
        assert all(differences["default", case][0] == 0 for case in same), differences


def test_a_window_may_reach_over_several_processes(processes):
    names = [("default", "window over several parts"), ("query block", "unequal parts")]
    for differences in processes.run(4, all_splits, names, torch.float64):
        assert max(max(pair) for pair in differences.values()) < 1e-14, differences


@pytest.mark.parametrize("tokens, parts", [(32, 4), (35, 4), (37, 9), (4, 1)])
def test_parts_are_whole_chunks_of_nearly_equal_number(tokens, parts):
    bounds = part_bounds(tokens, 4, parts)
    chunks = [(right - left) // 4 for left, right in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == tokens and not any(b % 4 for b in bounds[:-1])
    assert max(chunks) - min(chunks) <= 1


def test_a_sequence_with_fewer_chunks_than_processes_is_refused():
    with pytest.raises(ValueError, match="^tokens: got 11 for 3 processes, accepted .* 12"):
        part_bounds(11, 4, 3)


# ---- expert parallelism


def shared_and_whole(dtype: torch.dtype, crowded: bool) -> tuple[float, float, bool]:
    """One step of the MoE model on rows of its own in every process: the largest differences of a
    logit and of a gradient, and whether the counts are equal. crowded: every token chooses the
    experts 0 and 1, so that other processes may receive no row.
    """
    world = dist.get_world_size()
    rank = dist.get_rank()
    whole = build("experts", dtype).train()
    shared = build("experts", dtype).train()
    mesh = Mesh(MeshSizes(ep=world), CPU)
    share_experts(shared, mesh)
    for model in (whole, shared):
        for layer in moe_layers(model):
            layer.count_tokens()
            layer.bias[:2] += 100.0 * crowded
    ids = torch.cat([text(37, seed) for seed in range(world)])
    rows = slice(2 * rank, 2 * rank + 2)
    factors = torch.randn(2 * world, 37, DEBUG.vocab_size, generator=torch.manual_seed(1)).to(dtype)
    want = whole(ids, gumbel_noise=False).logits
    (want * factors).mean().backward()
    got = shared(ids[rows], gumbel_noise=False).logits
    ((got * factors[rows]).sum() / want.numel()).backward()
    wanted = gradients_of(whole)
    differences = []
    for name, gradient in gradients_of(shared).items():
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        else:
            dist.all_reduce(gradient)
        differences.append(float((gradient - wanted[name]).abs().max()))
    equal = True
    for layer, other in zip(moe_layers(whole), moe_layers(shared)):
        assert layer.tokens_per_expert is not None and other.tokens_per_expert is not None
        dist.all_reduce(other.tokens_per_expert)
        equal &= torch.equal(layer.tokens_per_expert, other.tokens_per_expert)
    return float((got - want[rows]).abs().max().detach()), max(differences), equal


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("crowded", [False, True])
def test_shared_experts_equal_whole_ones(processes, world, crowded):
    for logits, gradient, counts in processes.run(world, shared_and_whole, torch.float32, crowded):
        assert logits < 2e-6 and gradient < 1e-6 and counts, (logits, gradient, counts)


# ---- training

RECIPE = Recipe((STAGE,), warmup=5)
STAGES = (
    dataclasses.replace(STAGE, steps=1, tokens=19, window=3, top_k=1),
    dataclasses.replace(STAGE, steps=2, text_weight=0.5),
)
SHORT = Recipe(STAGES, warmup=1, accumulate=2, checkpoint_blocks=True, loss_tokens=20)
# Not 19 tokens: the router's float32 sigmoid rounds differently where a vector is not full.
SHORT_MOE = dataclasses.replace(
    SHORT, stages=(dataclasses.replace(STAGES[0], tokens=16), STAGES[1])
)
NOISY = Recipe((dataclasses.replace(STAGE, steps=2, gumbel_noise=True),), warmup=1)
BFLOAT16 = Recipe((dataclasses.replace(STAGE, steps=3),), warmup=1, dtype="bfloat16")


class Batches(StagedBatches):
    """Random batches of a recipe, in which a quarter of the tokens is of each part of the loss.
    Accumulated batches have rows of several documents.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        stage = self.recipe.stage(step)
        generator = torch.Generator().manual_seed(step)
        shape = (stage.batch * self.recipe.accumulate, stage.tokens + 1)
        ids = torch.randint(DEBUG.vocab_size, shape, generator=generator)
        parts = torch.randint(4, shape, generator=generator, dtype=torch.int8)
        starts = (torch.arange(shape[1]) // 12 * 12).int().expand(shape)
        return (ids, parts, starts) if self.recipe.accumulate > 1 else (ids, parts)


Trained = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def trained(trainer: Trainer, batches: Dataset) -> Trained:
    """The figures of every step of a recipe, and the weights in the end."""
    steps = range(trainer.recipe.steps)
    figures = [trainer.train_step(batches[step]).numbers() for step in steps]
    weights = trainer.model.state_dict().items()
    return figures, {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in weights}


@functools.cache
def trained_alone(option: str, recipe: Recipe, dtype: torch.dtype) -> Trained:
    return trained(Trainer(build(option, dtype).train(), recipe, seed=3), Batches(recipe))


def trained_together(sizes: str, option: str, recipe: Recipe, dtype: torch.dtype) -> Trained:
    mesh = Mesh(MeshSizes.parse(sizes), CPU)
    trainer = MeshTrainer(build(option, dtype).train(), recipe, mesh, seed=3)
    return trained(trainer, MeshBatches(Batches(recipe), DEBUG.chunk_size, mesh))


def differences(processes: Processes, sizes: str, *run) -> tuple[float, float]:
    """The largest relative difference of a figure, and the largest one of a weight, between a run
    on a mesh and a run of one process.
    """
    figures, weights = trained_alone(*run)
    world = MeshSizes.parse(sizes).processes
    (found, found_weights), *others = processes.run(world, trained_together, sizes, *run)
    assert all(same == found for same, _ in others)
    pairs = [(x[name], y[name]) for x, y in zip(found, figures, strict=True) for name in y]
    assert found_weights.keys() == weights.keys()
    return (
        max(abs(x - y) / max(abs(y), 1) for x, y in pairs),
        max(float((found_weights[name] - x).abs().max()) for name, x in weights.items()),
    )


@pytest.mark.parametrize(
    "sizes, option, steps",
    [
        ("dp=2", "default", 3),
        ("cp=2", "default", 20),
        ("dp=2", "experts", 20),
        ("cp=2", "experts", 3),
        ("ep=2", "experts", 20),
        ("dp=2,cp=2", "default", 3),
        ("dp=2,cp=2", "experts", 3),
        ("dp=2,ep=2", "experts", 3),
        ("cp=2,ep=2", "experts", 3),
    ],
)
def test_steps_on_a_mesh_equal_those_of_one_process(processes, sizes, option, steps):
    recipe = RECIPE.scaled(steps)
    figures, weights = differences(processes, sizes, option, recipe, torch.float64)
    assert figures < 1e-6 and weights < 1e-12, (figures, weights)  # losses are float32


def test_in_float32_a_mesh_differs_by_rounding_alone(processes):
    run = ("default", RECIPE.scaled(3), torch.float32)
    figures, weights = differences(processes, "cp=2", *run)
    assert figures < 1e-6 and weights < 4e-6, (figures, weights)


@pytest.mark.parametrize(
    "sizes, option, recipe", [("cp=2", "default", SHORT), ("ep=2", "experts", SHORT_MOE)]
)
def test_stages_accumulated_batches_and_checkpointed_blocks_work_on_a_mesh(
    processes, sizes, option, recipe
):
    figures, weights = differences(processes, sizes, option, recipe, torch.float64)
    assert figures < 1e-6 and weights < 1e-12, (figures, weights)


def test_parts_of_a_sequence_have_the_noise_of_the_whole(processes):
    figures, weights = differences(processes, "cp=2", "default", NOISY, torch.float64)
    assert figures < 1e-6 and weights < 1e-12, (figures, weights)
    _, without = trained_alone(
        "default", dataclasses.replace(NOISY, stages=RECIPE.scaled(2).stages), torch.float64
    )
    _, noisy = trained_alone("default", NOISY, torch.float64)
    assert not torch.equal(without["upper.0.hsa.q.weight"], noisy["upper.0.hsa.q.weight"])


@pytest.mark.parametrize("sizes", ["dp=2", "ep=2"])
def test_weights_stay_float32_and_bfloat16_computes(processes, sizes):
    run = ("experts", BFLOAT16, torch.float32)
    figures, weights = trained_alone(*run)
    found, found_weights = processes.run(2, trained_together, sizes, *run)[0]
    losses = [abs(x["loss"] / y["loss"] - 1) for x, y in zip(found, figures, strict=True)]
    # Alone, the gradients of all rows are rounded; here, those of the rows of each process.
    assert losses[0] < 1e-6 and 0 < max(losses) < 1e-3, losses
    for name, weight in found_weights.items():
        assert weight.dtype == torch.float32
        # Three steps of 1e-3 each lead to nearly the same weights.
        assert float((weight - weights[name]).abs().mean()) < 6e-4, name
    matrix = found_weights["upper.0.swa.out.weight"]
    assert not torch.equal(matrix, matrix.bfloat16().float())


# ---- what is measured


def sent(sizes: str, option: str, recipe: Recipe) -> tuple[int, int]:
    """Bytes that a step of this process sends for weights and gradients: as FSDP exchanges them,
    and as they are computed for the log.
    """
    mesh = Mesh(MeshSizes.parse(sizes), CPU)
    trainer = MeshTrainer(build(option, torch.float32).train(), recipe, mesh, seed=3)
    exchanged = [0]

    def counting(function, shared: str):
        def call(self, output_tensor, input_tensor, group, *rest, **options):
            share = input_tensor if shared == "input" else output_tensor
            exchanged[0] += share.nbytes * (dist.get_world_size(group) - 1)
            return function(self, output_tensor, input_tensor, group, *rest, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for kind, shared in ((DefaultAllGather, "input"), (DefaultReduceScatter, "output")):
            patch.setattr(kind, "__call__", counting(kind.__call__, shared))
        trainer.train_step(trainer.own_batches(Batches(recipe))[0])
    assert trainer.speed is not None
    return exchanged[0], trainer.speed.weight_bytes


@pytest.mark.parametrize("sizes", ["dp=2", "dp=2,ep=2"])
@pytest.mark.parametrize("recipe", [RECIPE, BFLOAT16, SHORT_MOE])
def test_the_bytes_of_weights_in_the_log_are_those_that_are_exchanged(processes, sizes, recipe):
    world = MeshSizes.parse(sizes).processes
    for exchanged, computed in processes.run(world, sent, sizes, "experts", recipe):
        assert exchanged == computed > 0


def sent_rows() -> tuple[int, int, int]:
    """Bytes counted for an exchange of rows, its backward pass, and a gather of parts."""
    rank = dist.get_rank()
    sizes = [[3, 2], [1, 4]]  # rows of 8 bytes, from each process to each
    before = TRAFFIC.sent_bytes
    group = dist.group.WORLD
    assert group is not None
    rows = torch.ones(5, 2, requires_grad=True)
    received = [row[rank] for row in sizes]
    out = all_to_all(rows, sizes[rank], received, group)
    forward = TRAFFIC.sent_bytes - before
    out.sum().backward()
    both = TRAFFIC.sent_bytes - before
    gather((torch.ones(1, rank + 1, 2),), [1, 2], group)
    return forward, both - forward, TRAFFIC.sent_bytes - before - both


def test_what_is_exchanged_is_counted(processes):
    # Both parts of the gather are padded to two rows of 8 bytes.
    assert processes.run(2, sent_rows) == [(16, 8, 16), (8, 16, 16)]


def test_the_log_tells_throughput_and_the_share_of_the_possible_flop():
    class TwoProcesses(Mesh):
        def __init__(self) -> None:
            self.device = CPU
            self.sizes = MeshSizes(dp=2)

        def largest(self, *numbers: float) -> tuple[float, ...]:
            return numbers

    recipe = dataclasses.replace(SHORT, accumulate=3)
    speed = Speed(recipe, DEBUG, TwoProcesses(), weight_bytes=1000)
    speed.product_rate = 1e12
    speed.began = time.monotonic() - 10
    TRAFFIC.sent_bytes += 300
    found = speed.figures(3)
    rows = 3 * 4
    assert found["tokens_per_second"] == pytest.approx(rows * (19 + 2 * 32) / 10, rel=0.01)
    flops = [
        training_flops(HSAModel(stage.config(DEBUG), device="meta"), stage.tokens)
        for stage in recipe.stages
    ]
    assert found["mfu"] == pytest.approx(rows * (flops[0] + 2 * flops[1]) / 2e13, rel=0.01)
    assert found["sent_bytes"] == 1100 and found["peak_memory_bytes"] > 50e6


# ---- the state of a run


def resumed(sizes: str, state: dict, step: int, option: str, recipe: Recipe) -> tuple:
    """What a trainer on a mesh that takes over a state saves again, and the weights and loads
    after the rest of the recipe.
    """
    mesh = Mesh(MeshSizes.parse(sizes), CPU)
    trainer = MeshTrainer(build(option, torch.float64).train(), recipe, mesh, seed=3)
    # A copy, because the processes share the memory of tensors that they send each other.
    trainer.load_state_dict({name: x.clone() for name, x in state.items()}, step=step)
    again = {name: x.clone() for name, x in trainer.state_dict().items()}
    batches = MeshBatches(Batches(recipe), DEBUG.chunk_size, mesh)
    for later in range(step, recipe.steps):
        trainer.train_step(batches[later])
    loads = trainer.max_over_mean_loads(batches[later] for later in range(2))
    return again, trainer.state_dict(), loads


def test_a_state_goes_on_on_any_mesh(processes):
    recipe = Recipe((dataclasses.replace(STAGE, steps=4),), warmup=1)
    alone = Trainer(build("experts", torch.float64).train(), recipe, seed=3)
    batches = Batches(recipe)
    for step in range(2):
        alone.train_step(batches[step])
    state = {name: x.detach().clone() for name, x in alone.state_dict().items()}
    for step in range(2, 4):
        alone.train_step(batches[step])
    wanted = alone.state_dict()
    loads = alone.max_over_mean_loads(batches[step] for step in range(2))
    for sizes in ("dp=2", "ep=2", "cp=2"):
        again, found, found_loads = processes.run(2, resumed, sizes, state, 2, "experts", recipe)[0]
        assert again.keys() == state.keys()
        other = [n for n, x in state.items() if n != "rng" and not torch.equal(again[n], x)]
        assert other == [], sizes
        differ = {
            n: float((found[n] - x).detach().abs().max()) for n, x in wanted.items() if n != "rng"
        }
        assert max(differ.values()) < 1e-12, differ
        assert found_loads == loads
        state = again  # as the run on this mesh would save it


# ---- states in files

SAVED = Recipe((dataclasses.replace(STAGE, steps=4),), warmup=1)
FIRST, SECOND = shard_files(2)
State = dict[str, torch.Tensor]


def mesh_trainer(sizes: str, option: str = "experts") -> tuple[MeshTrainer, MeshBatches]:
    mesh = Mesh(MeshSizes.parse(sizes), CPU)
    trainer = MeshTrainer(build(option, torch.float64).train(), SAVED, mesh, seed=3)
    return trainer, MeshBatches(Batches(SAVED), DEBUG.chunk_size, mesh)


def whole_state(trainer: Trainer) -> State:
    return {name: x.detach().clone() for name, x in trainer.state_dict().items()}


def progress_of(trainer: Trainer) -> dict:
    settings = {"config": dataclasses.asdict(trainer.model.config)}
    return {"step": trainer.step, "seconds": 1.0, "settings": settings}


def save_twice(run: Path) -> tuple[State, State]:
    """Train for four steps on dp=2 and save after each of the first two; returns the whole states
    after two and after four.
    """
    trainer, batches = mesh_trainer("dp=2")
    states = []
    for step in range(4):
        trainer.train_step(batches[step])
        states.append(whole_state(trainer))
        if step < 2:
            save_sharded(trainer, run, progress_of(trainer), {"log.csv": f"{step}"})
    return states[1], states[3]


def load_and_train(sizes: str, run: Path) -> tuple[dict, State]:
    """The progress of the newest state, and the state after the rest of the recipe."""
    trainer, batches = mesh_trainer(sizes)
    progress = load_sharded(trainer, run)
    assert progress is not None
    for step in range(trainer.step, 4):
        trainer.train_step(batches[step])
    return progress, whole_state(trainer)


def why_not_loaded(run: Path, option: str, refusal: str = "") -> tuple[str, bool]:
    """Why a trainer does not go on from a run, and whether that left it as it was."""

    def check(progress: dict) -> None:
        if refusal:
            raise ValueError(refusal)

    trainer, _ = mesh_trainer("dp=2", option)
    before = whole_state(trainer)
    with pytest.raises(ValueError) as caught:
        load_sharded(trainer, run, check)
    after = whole_state(trainer)
    return str(caught.value), all(torch.equal(after[name], x) for name, x in before.items())


def why_not_saved(run: Path, full: int) -> str:
    """Why a state is not saved if the disk is full for one process."""
    trainer, batches = mesh_trainer("dp=2")
    trainer.train_step(batches[0])
    trainer.step = 3
    error = OSError(28, "No space left on device")
    failing = mock.patch("os.fsync", side_effect=error)
    with failing if dist.get_rank() == full else nullcontext(), pytest.raises(OSError) as caught:
        save_sharded(trainer, run, progress_of(trainer))
    return str(caught.value)


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def newest(run: Path) -> tuple[State, dict]:
    state = load_progress(run)
    assert state is not None
    return state


def largest_difference(found: State, wanted: State) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[n].double() - x.double()).abs().max()) for n, x in wanted.items())


@pytest.fixture(scope="module")
def saved(processes, tmp_path_factory) -> tuple[Path, State, State]:
    run = tmp_path_factory.mktemp("saved") / "run"
    return run, *processes.run(2, save_twice, run)[0]


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of the saved run."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_every_process_writes_its_part_and_nothing_else_is_left(saved):
    run, state, _ = saved
    files = ("log.csv", "manifest.json", "progress.json", FIRST, SECOND)
    steps = ("step-1", "step-2")
    assert names_in(run) == sorted([*steps, *(f"{s}/{name}" for s in steps for name in files)])
    sizes = [(run / "step-2" / name).stat().st_size for name in (FIRST, SECOND)]
    assert max(sizes) < 0.6 * sum(x.nbytes for x in state.values())
    tensors, progress = newest(run)
    assert largest_difference(tensors, state) == 0 and progress["step"] == 2


@pytest.mark.parametrize("sizes", ["dp=2", "cp=2", "ep=2"])
def test_a_saved_state_goes_on_on_any_mesh(processes, saved, sizes):
    run, _, wanted = saved
    (progress, found), (_, other) = processes.run(2, load_and_train, sizes, run)
    assert progress["step"] == 2 and largest_difference(found, other) == 0
    difference = largest_difference(found, wanted)
    assert difference == 0 if sizes == "dp=2" else difference < 1e-12


def test_a_state_of_several_processes_goes_on_in_one(saved):
    run, _, wanted = saved
    tensors, progress = newest(run)
    alone = Trainer(build("experts", torch.float64).train(), SAVED, seed=3)
    alone.load_state_dict(tensors, step=progress["step"])
    for step in range(2, 4):
        alone.train_step(Batches(SAVED)[step])
    assert largest_difference(whole_state(alone), wanted) < 1e-12


def test_the_state_of_one_process_goes_on_on_a_mesh(processes, tmp_path):
    alone = Trainer(build("experts", torch.float64).train(), SAVED, seed=3)
    for step in range(4):
        alone.train_step(Batches(SAVED)[step])
        if step == 1:
            save_progress(tmp_path, 2, alone.state_dict(), progress_of(alone))
    progress, found = processes.run(2, load_and_train, "dp=2", tmp_path)[0]
    assert progress["step"] == 2 and largest_difference(found, whole_state(alone)) < 1e-12


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_a_damaged_part_is_found_and_the_run_goes_on_from_the_state_before(processes, run, damage):
    damage(run / "step-2" / SECOND)
    for progress, _ in processes.run(2, load_and_train, "dp=2", run):
        assert progress["step"] == 1
    damage(run / "step-1" / FIRST)
    answers = processes.run(2, why_not_loaded, run, "experts")
    assert answers[0] == answers[1]
    message, unchanged = answers[0]
    assert re.match(rf"run: no state in .*step-2 .*{SECOND}.*step-1 .*{FIRST}", message)
    assert unchanged and "\n" not in message


def test_parts_that_make_no_whole_tensors_are_refused(processes, run):
    """As after a part, and its entry in the manifest, were lost."""
    for step in ("step-1", "step-2"):
        manifest = read_manifest(run / step)
        write_manifest(run / step, manifest.keys() - {FIRST})
    for message, unchanged in processes.run(2, why_not_loaded, run, "experts"):
        assert re.match("run: no state in .* is whole: .*holds parts of", message) and unchanged
    with pytest.raises(ValueError, match="holds parts of"):
        load_progress(run)


def test_a_state_of_another_configuration_is_refused(processes, saved):
    for message, unchanged in processes.run(2, why_not_loaded, saved[0], "default"):
        assert re.match("state: got a tensor .*, accepted are those of the trainer", message)
        assert unchanged
    for answer in processes.run(2, why_not_loaded, saved[0], "experts", "run: other settings"):
        assert answer == ("run: other settings", True)


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_process_leaves_the_earlier_states(processes, run, full):
    before = names_in(run)
    messages = processes.run(2, why_not_saved, run, full)
    assert messages[0] == messages[1]
    assert re.search(f"process {full} failed .*No space left", messages[0])
    assert names_in(run) == before and newest(run)[1]["step"] == 2


def test_the_state_of_a_run_becomes_a_model(saved, tmp_path, capsys):
    run, state, _ = saved
    out = tmp_path / "out"
    assert cli.main(["consolidate", str(run), str(out)]) == 0
    assert capsys.readouterr().out == f"the model after 2 steps is in {out}\n"
    model = build("experts", torch.float64)
    weights = {n.removeprefix("model."): x for n, x in state.items() if n.startswith("model.")}
    model.load_state_dict(weights, strict=False)
    found = HSAModel.from_pretrained(out, dtype=torch.float64)
    assert torch.equal(found(text(40)).logits, model(text(40)).logits)
    assert (out / "log.csv").read_text() == "1"
    assert cli.main(["consolidate", str(run / "step-1"), str(out)]) == 0
    assert (out / "log.csv").read_text() == "0"
    flip_a_bit(run / "step-1" / FIRST)
    assert cli.main(["consolidate", str(run / "step-1"), str(out)]) == 2
    refusal = r"hsa-mini consolidate: error: .*does not match.*\n"
    assert re.fullmatch(refusal, capsys.readouterr().err)
    assert cli.main(["consolidate", str(tmp_path), str(out)]) == 2
    assert "which holds no state" in capsys.readouterr().err
    assert (out / "log.csv").read_text() == "0"


class Numbers:
    """Stands in for a trainer: all numbers of its state are its step."""

    step = 0

    def own_state(self) -> State:
        mesh = init_device_mesh("cpu", (2,))
        numbers = torch.full((200, 300), float(self.step))
        return {"model.x": distribute_tensor(numbers, mesh, [Shard(0)], src_data_rank=None)}


def save_until_killed(rank: int, store: Path, run: Path, saved) -> None:
    """Save one state after the other. saved: the step of the last one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    numbers = Numbers()
    while True:
        numbers.step = saved.value + 1
        save_sharded(numbers, run, {"step": numbers.step})  # pyright: ignore
        dist.barrier()
        saved.value = numbers.step
        dist.barrier()


def test_a_process_may_be_killed_at_any_moment_of_saving(tmp_path, caplog):
    context = forks()
    saved = context.Value("i", 0, lock=False)
    chance = random.Random(0)
    for kill in range(10):
        arguments = (tmp_path / f"store-{kill}", tmp_path / "run", saved)
        writers = [
            context.Process(target=save_until_killed, args=(rank, *arguments)) for rank in range(2)
        ]
        for writer in writers:
            writer.start()
        before = saved.value
        while saved.value == before:
            assert all(writer.is_alive() for writer in writers)
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        for victim in chance.choice([writers[:1], writers[1:], writers]):
            victim.kill()
        for writer in writers:
            writer.join(20)
            assert not writer.is_alive(), "one that was spared waits for the other"
        tensors, progress = newest(tmp_path / "run")
        assert saved.value <= progress["step"] <= saved.value + 1
        assert torch.equal(tensors["model.x"], torch.full((200, 300), float(progress["step"])))
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]  # none was passed over
