"""The prediction of training on many GPUs, against what a run on a mesh holds and exchanges."""

import dataclasses
import inspect
import json
import math
import shlex
from itertools import chain

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import call
from material import DEBUG, build
from processes import Processes
from torch.distributed.tensor import DTensor

from hsa_mini import PRESETS, ChunkMemory, ops
from hsa_mini.cli import plan as plan_command
from hsa_mini.model.cost_estimate import estimate_cost
from hsa_mini.ops.rope import rope_table
from hsa_mini.paths import data_dir
from hsa_mini.training.batches import StagedBatches
from hsa_mini.training.parallel.mesh import Mesh, MeshSizes
from hsa_mini.training.parallel.trainer import MeshBatches, MeshTrainer
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.scale.memory import block_numbers, encoder_numbers, memory_bytes
from hsa_mini.training.scale.plan import MAX_GPUS, meshes, plans, predict
from hsa_mini.training.scale.seconds import (
    Links,
    Measured,
    at_length,
    compute_seconds,
    step_seconds,
    transfer_seconds,
)
from hsa_mini.training.scale.shares import TrainingRun
from hsa_mini.training.scale.table import scale_table
from hsa_mini.training.scale.traffic import Transfer, bytes_by_kind, ring_bytes, traffic

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
    [
        ("dp=2", "default", 2),
        ("cp=2", "default", 1),
        ("dp=2", "experts", 1),
        ("ep=2", "experts", 1),
    ],
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


# ---- what a block keeps for its backward pass


class Keep(torch.autograd.Function):
    """A result of which, as of a fused kernel, only the inputs and perhaps the result are kept."""

    @staticmethod
    def forward(ctx, result, with_result, *inputs):
        result = result.detach().clone()
        ctx.save_for_backward(*[result] * with_result, *inputs)
        return result

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError


def fused(function, *, inputs=slice(None), with_result=True):
    def run(*arguments, **options):
        with torch.no_grad():
            result = function(*arguments, **options)
        return Keep.apply(result, with_result, *arguments[inputs])

    return run


def fused_choice(queries, *arguments, **options):
    with torch.no_grad():
        indices, weights = RETRIEVE(queries, *arguments, **options)
    return indices, Keep.apply(weights, False, queries)


RETRIEVE = ops.retrieve


def kept_bytes(function, known: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps of what `function` computes, without those of known tensors."""
    storages = {x.untyped_storage().data_ptr() for x in known}
    found = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.nbytes() for at, kept in found.items() if at not in storages)


@pytest.mark.parametrize("option", ["default", "experts", "no QK norm"])
def test_activations_are_what_autograd_keeps(monkeypatch, option):
    model = build(option, torch.float32).train()
    config = model.config
    x = torch.randn(1, 256, config.width, requires_grad=True)
    memory = ChunkMemory(config)
    with torch.no_grad():
        model.append_chunks(x, memory)
    source = memory.chunks.source()
    rope = rope_table(torch.arange(256), config.head_dim, config.rope_base)
    norm = fused(F.rms_norm, inputs=slice(1), with_result=False)
    monkeypatch.setattr(F, "rms_norm", norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused(F.scaled_dot_product_attention))
    for name in ("sliding_window_attention", "chunk_attention"):
        monkeypatch.setattr(ops, name, fused(getattr(ops, name)))
    monkeypatch.setattr(ops, "retrieve", fused_choice)
    known = [*model.parameters(), *rope, memory.chunks.k, memory.chunks.v]
    for block in (model.lower[0], model.lower[1], model.upper[0]):
        hsa = block.hsa is not None
        experts = bool(config.experts) and block is not model.lower[0]
        kept = kept_bytes(
            lambda: block(x, rope, None, 0, lambda hsa, y: hsa(y, source, position=0)[0]), known
        )
        numbers = block_numbers(config, with_hsa=hsa, with_experts=experts)
        assert kept == pytest.approx(4 * 256 * numbers, abs=4 * 256)
    kept = kept_bytes(lambda: model.encoder(x.unflatten(1, (-1, config.chunk_size))), known)
    assert kept == pytest.approx(4 * 256 * encoder_numbers(config), rel=2e-3)


def test_of_blocks_that_are_recomputed_only_inputs_and_one_block_are_kept():
    run = TrainingRun(DEBUG, 64, dtype="float32", loss_tokens=1)
    inputs = DEBUG.width * 6
    most = block_numbers(DEBUG, with_hsa=True, with_experts=False)
    numbers = inputs + most + encoder_numbers(DEBUG)
    assert memory_bytes(run)["activations"] == 4 * 64 * numbers
    whole = dataclasses.replace(run, checkpoint_blocks=False)
    least = block_numbers(DEBUG, with_hsa=False, with_experts=False)
    numbers = 2 * most + 4 * least + encoder_numbers(DEBUG)
    loss = 2 * DEBUG.vocab_size * 8
    assert memory_bytes(whole)["activations"] == 4 * 64 * numbers + loss


# ---- one GPU, and sums over kinds


LARGE = PRESETS["ul_8b_a1b"]
TOKENS = (1 << 14, 1 << 17, 1 << 20)


@pytest.fixture(scope="module")
def measured():
    return Measured.read(data_dir() / "results")


def test_one_gpu_is_the_one_that_was_measured(measured):
    plan = predict(TrainingRun(LARGE, measured.tokens), measured)
    results = json.loads((data_dir() / "results" / "ul_8b_a1b.json").read_text())
    rate = results["train_16k_tokens_per_second"]
    assert plan.tokens_per_second == plan.tokens_per_second_without_overlap
    assert plan.tokens_per_second == pytest.approx(rate, rel=1e-12)
    assert plan.mfu == pytest.approx(results["train_16k_mfu"], rel=1e-6)
    assert plan.efficiency == 1 and not any(plan.received_bytes.values())
    # The measured run held weights, gradients and Adam's state in bfloat16: half of the bytes.
    state = sum(plan.memory_bytes[name] for name in ("weights", "gradients", "Adam"))
    rest = plan.peak_bytes - state
    assert results["train_16k_peak_bytes"] == pytest.approx(state / 2 + rest, rel=0.05)
    assert state == 16 * estimate_cost(LARGE).params_total


@pytest.mark.parametrize("tokens", TOKENS)
def test_one_gpu_reads_as_long_as_the_same_sequences_take_alone(measured, tokens):
    run = TrainingRun(LARGE, tokens)
    more = dataclasses.replace(run, rows=3)
    assert step_seconds(more, measured, Links())["step"] == pytest.approx(
        3 * step_seconds(run, measured, Links())["step"], rel=1e-12
    )


def test_kernels_take_what_was_measured(measured):
    """Between two lengths, and twice as far as the longest, on a line through the nearest two."""
    assert at_length(measured.attention, 1 << 17) == pytest.approx(measured.attention[1 << 17])
    assert at_length({2: 1.0, 8: 4.0}, 4) == pytest.approx(2.0)
    assert at_length({2: 1.0, 8: 4.0}, 16) == pytest.approx(8.0)
    assert at_length({2: 1.0, 8: 4.0}, 1) == pytest.approx(0.5)


def test_parts_of_a_sequence_add_up(measured):
    """All processes but the last have less to score, so together they take less than cp times."""
    run = TrainingRun(LARGE, 1 << 20)
    whole = compute_seconds(run, measured)
    parts = compute_seconds(dataclasses.replace(run, sizes=MeshSizes(cp=8)), measured)
    assert whole < 8 * parts < 1.02 * whole


def test_a_shared_memory_is_less_than_full_attention_moves():
    for tokens in (1 << 17, 1 << 20):
        run = TrainingRun(LARGE, tokens, MeshSizes(cp=8))
        found = bytes_by_kind(traffic(run))
        assert found["halo"] + found["memory"] < 0.1 * ring_bytes(run)
    # Keys and values of 28 blocks in bfloat16, of seven of eight parts.
    each = 28 * 2 * 4 * 128 * 2
    assert ring_bytes(run) == 4 * (1 << 20) * 7 // 8 * each


# ---- links


def test_links_by_hand():
    links = Links(nvlink=100.0, network=10.0, start=1.0, nvlink_hop=0.25, network_hop=0.5)

    def seconds(kind: str, processes: int, stride: int) -> float:
        return transfer_seconds(Transfer(kind, processes, stride, 2, 1000), links)

    assert seconds("weights", 8, 1) == 1000 / 100 + 2 * (1 + 7 * 0.25)
    # Two hosts: eight ports bring in what the ring needs, 80 bytes per second.
    assert seconds("weights", 16, 1) == 1000 / 80 + 2 * (1 + 14 * 0.25 + 0.5)
    # One of every eight GPUs: each has its own port.
    assert seconds("memory", 4, 8) == 1000 / 10 + 2 * (1 + 3 * 0.5)
    assert seconds("halo", 8, 1) == 1000 / 100 + 2 * 1.25
    assert seconds("halo", 16, 1) == 1000 / 10 + 2 * 1.5
    # 8 of 15 others are in another host.
    assert seconds("experts", 16, 1) == pytest.approx(1000 * 8 / 15 / 10 + 2 * 1.5)


def test_faster_links_never_slow_a_step(measured):
    slow = Links(network=5e9)
    for plan in plans(LARGE, 1 << 14, 16, measured, links=slow):
        run = TrainingRun(LARGE, 1 << 14, MeshSizes.parse(plan.mesh))
        faster = predict(run, measured)
        assert faster.tokens_per_second >= plan.tokens_per_second
        assert plan.tokens_per_second_without_overlap <= plan.tokens_per_second


# ---- all meshes of a number of GPUs


@pytest.mark.parametrize("gpus", [1, 6, 64, 1024])
def test_meshes_are_all_and_each_once(gpus):
    found = list(meshes(gpus))
    exponents = [sum(gpus % p**k == 0 for k in range(1, 11)) for p in (2, 3)]
    assert len(set(found)) == len(found) == math.prod((n + 1) * (n + 2) // 2 for n in exponents)
    assert {sizes.processes for sizes in found} == {gpus}


def test_the_first_plan_is_the_fastest_that_fits(measured):
    found = plans(LARGE, 1 << 20, 8, measured)
    assert [plan.fits for plan in found] == sorted((p.fits for p in found), reverse=True)
    fitting = [plan for plan in found if plan.fits]
    assert fitting and fitting[0].tokens_per_second == max(p.tokens_per_second for p in fitting)
    # In 128 GB more activations fit, and with no memory at all the smallest comes first.
    more = plans(LARGE, 1 << 20, 8, measured, gpu_memory=1 << 40)
    assert all(plan.fits for plan in more) and len(more) == len(found)
    none = plans(LARGE, 1 << 20, 8, measured, gpu_memory=1)
    assert none[0].peak_bytes == min(plan.peak_bytes for plan in none)


def test_a_batch_is_read_in_as_many_rows_as_it_has(measured):
    found = plans(LARGE, 1 << 14, 8, measured, batch=1 << 18)
    assert {plan.step_tokens for plan in found} == {1 << 18}
    assert all(plan.rows == 16 // MeshSizes.parse(plan.mesh).data_ranks for plan in found)
    for plan in found:  # more rows at once cannot be slower
        run = TrainingRun(LARGE, 1 << 14, MeshSizes.parse(plan.mesh), plan.rows)
        assert predict(run, measured) == plan


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gpus=0), "gpus: got 0"),
        (dict(gpus=1025), "gpus: got 1025, .* 1024"),
        (dict(tokens=63), "tokens: got 63, .* from 64"),
        (dict(gpus=9), "mesh: got .*"),
        (dict(batch=1000), "batch: got 1000 tokens, accepted are whole sequences"),
    ],
)
def test_what_no_mesh_can_train_is_refused(measured, options, message):
    options = {"tokens": 1 << 14, "gpus": 8, "batch": 0, **options}
    with pytest.raises(ValueError, match=f"^{message}"):
        plans(LARGE, options["tokens"], options["gpus"], measured, batch=options["batch"])


# ---- the command


def test_the_command_prints_what_it_writes(tmp_path, capfd):
    path = tmp_path / "plan.json"
    words = ("plan", "ul_8b_a1b", "--gpus", "8", "--context", "16384", "1048576")
    status, out, err = call(capfd, *words, "--json", str(path))
    found = json.loads(path.read_text())
    assert (status, out, err) == (0, scale_table(found) + "\n", "")
    assert "prediction" in found["label"] and found["label"] in out
    assert max(map(len, out.split("\n"))) < 130
    for tokens, best in found["contexts"].items():
        want = plans(LARGE, int(tokens), 8, Measured.read(data_dir() / "results"))[:3]
        assert best == [plan.to_json() for plan in want]
        for plan in best:
            assert plan["mesh"] in out and f"{plan['tokens_per_second']:,.0f}" in out
    # At 1M tokens only one mesh fits, and the others say that they do not.
    assert [plan["fits"] for plan in found["contexts"]["1048576"]] == [True, False, False]
    assert out.count("does not fit") == 2


def test_the_stored_prediction_says_what_it_is_and_agrees_with_itself():
    """It was written before anything was measured on several GPUs, so it stays as it was written,
    also when later code predicts better.
    """
    stored = json.loads((data_dir() / "results" / "scale_prediction.json").read_text())
    words = shlex.split(stored["command"])
    assert words[:4] == ["python", "-m", "hsa_mini", "plan"] and "+" not in stored["commit"]
    assert "prediction" in stored["label"] and stored["measured"]
    assert list(stored["contexts"]) == ["16384", "131072", "1048576"]
    for plan in chain(*stored["contexts"].values()):
        assert plan["gpus"] == stored["gpus"] == MeshSizes.parse(plan["mesh"]).processes == 8
        assert plan["peak_bytes"] == sum(plan["memory_bytes"].values())
        steps = plan["step_tokens"] / plan["tokens_per_second"]
        assert steps == pytest.approx(plan["seconds"]["step"])


@pytest.mark.parametrize(
    "words, message",
    [
        (["nano", "--context", "64"], "--context: got it without --gpus, accepted is both"),
        (["nano", "--gpus", "0"], "--gpus: got 0, accepted is 1 to 1024"),
        (["nano", "--gpus", "1025"], "--gpus: got 1025, accepted is 1 to 1024"),
        (["nano", "--gpus", "2", "--context", "x"], "--context: got 'x', accepted is an integer"),
        (["nano", "--gpus", "2", "--context", "3"], "tokens: got 3, accepted is"),
        (["ul_8b_a1b", "--gpus", "9"], "mesh: got"),
        (["huge", "--gpus", "2"], "preset: got 'huge'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capfd, words, message):
    status, out, err = call(capfd, "plan", *words)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert message in err


def test_any_preset_and_a_limit_known_to_the_command(capfd):
    assert plan_command.MAX_GPUS == MAX_GPUS
    status, out, _ = call(capfd, "plan", "debug", "--gpus", "6", "--context", "100")
    assert status == 0 and out.startswith("debug on 6 GPUs")
