"""Which mesh trains a model fastest on a number of GPUs, as predicted."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from hsa_mini.checks import check_integer
from hsa_mini.config import HSAConfig
from hsa_mini.training.parallel.mesh import MeshSizes
from hsa_mini.training.scale.memory import memory_bytes
from hsa_mini.training.scale.seconds import Links, Measured, alone, step_seconds
from hsa_mini.training.scale.shares import TrainingRun, sequence_flops
from hsa_mini.training.scale.traffic import bytes_by_kind, ring_bytes, traffic

MAX_GPUS = 1024
GPU_MEMORY_BYTES = 80_000_000_000  # of an H100
FREE = 0.08  # of the memory, for what is not counted: buffers of NCCL, workspaces, fragmentation


@dataclass(frozen=True)
class ScalePlan:
    """The prediction for one mesh: nothing in it was measured on more than one GPU.

    memory_bytes: what -> bytes on one GPU. received_bytes: kind -> bytes that a GPU receives in a
    step. full_attention_ring_bytes: the same for keys and values under full attention. seconds: the
    parts of a step (see `step_seconds`). mfu: of the product rate measured. efficiency: the tokens
    per second of a GPU as a share of those of one GPU alone. limit: the longest part of a step.
    """

    mesh: str
    gpus: int
    tokens: int
    rows: int
    step_tokens: int
    memory_bytes: dict[str, int]
    fits: bool
    received_bytes: dict[str, int]
    full_attention_ring_bytes: int
    seconds: dict[str, float]
    tokens_per_second: float
    tokens_per_second_without_overlap: float
    mfu: float
    efficiency: float
    limit: str

    @property
    def efficiency_without_overlap(self) -> float:
        return self.efficiency * self.tokens_per_second_without_overlap / self.tokens_per_second

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    def to_json(self) -> dict:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def predict(
    run: TrainingRun,
    measured: Measured,
    links: Links | None = None,
    gpu_memory: int = GPU_MEMORY_BYTES,
) -> ScalePlan:
    """The plan of a run on its mesh. Allocates no memory for tensors."""
    links = links or Links()
    seconds = step_seconds(run, measured, links)
    memory = memory_bytes(run)
    gpus = run.sizes.processes
    rate = run.step_tokens / seconds["step"]
    single = alone(run)
    of_one = single.step_tokens / step_seconds(single, measured, links)["step"]
    flops = sequence_flops(run.config, run.tokens) / run.tokens
    return ScalePlan(
        mesh=str(run.sizes),
        gpus=gpus,
        tokens=run.tokens,
        rows=run.rows,
        step_tokens=run.step_tokens,
        memory_bytes=memory,
        fits=sum(memory.values()) <= (1 - FREE) * gpu_memory,
        received_bytes=bytes_by_kind(traffic(run)),
        full_attention_ring_bytes=ring_bytes(run),
        seconds=seconds,
        tokens_per_second=rate,
        tokens_per_second_without_overlap=run.step_tokens / seconds["step without overlap"],
        mfu=rate * flops / (gpus * measured.product),
        efficiency=rate / (gpus * of_one),
        limit=max((k for k in seconds if "step" not in k), key=lambda kind: seconds[kind]),
    )


def meshes(gpus: int) -> Iterator[MeshSizes]:
    """All meshes of this many GPUs."""
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    for cp in divisors:
        for ep in divisors:
            if gpus % (cp * ep) == 0:
                yield MeshSizes(gpus // (cp * ep), cp, ep)


def plans(
    config: HSAConfig, tokens: int, gpus: int, measured: Measured, *, batch: int = 0, **options
) -> list[ScalePlan]:
    """The predictions for all meshes that this model can be trained on: first those that fit into
    memory, the fastest first; then the others, the smallest first.

    batch: tokens of a step; 0: every group of `cp` GPUs reads one sequence, so that a step grows
    with the GPUs. options: see `predict`.

    Raises ValueError for values out of range, and if no mesh can train the model.
    """
    check_integer("gpus", gpus, 1, MAX_GPUS)
    found = []
    refused = ""
    for sizes in meshes(gpus):
        rows, rest = divmod(batch, tokens * sizes.data_ranks) if batch else (1, 0)
        if rest or not rows:
            continue
        try:
            run = TrainingRun(config, tokens, sizes, rows)
        except ValueError as error:
            refused = str(error)
            continue
        found.append(predict(run, measured, **options))
    if not found:
        raise ValueError(refused or f"batch: got {batch} tokens, accepted are whole sequences")
    return sorted(found, key=_rank)


def _rank(plan: ScalePlan) -> tuple[bool, float]:
    return not plan.fits, -plan.tokens_per_second if plan.fits else plan.peak_bytes
