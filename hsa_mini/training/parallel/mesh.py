"""The mesh: which process holds which rows of a batch, which part of each sequence, and which
experts.

    dp   data parallelism: groups of processes read other rows of the batch
    cp   context parallelism: a group of processes reads the same rows, each a part of them
    ep   expert parallelism: a group of processes shares the experts of each MoE layer; each
         process also reads rows of its own

Process `rank` stands at (dp, cp, ep), and ep varies fastest: its messages are the most frequent.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hsa_mini.checks import check_integer, quoted
from hsa_mini.config import HSAConfig
from hsa_mini.training.parallel.context import part_bounds
from hsa_mini.training.parallel.ranks import OneProcess
from hsa_mini.training.recipes import Recipe

MAX_PROCESSES = 1 << 16


def check_same(values: dict[str, Any]) -> None:
    """Raise ValueError, on every process, unless each value is the same on all.

    values: of types that JSON can hold. The error names a process that differs from most others.
    """
    digests = [
        hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest()
        for value in values.values()
    ]
    own = torch.tensor(list(map(list, digests)), dtype=torch.uint8)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    for place, name in enumerate(values):
        found = [bytes(row.tolist()) for row in torch.stack(every)[:, place]]
        usual = Counter(found).most_common(1)[0][0]
        for rank, digest in enumerate(found):
            if digest != usual:
                raise ValueError(
                    f"mesh: got another {name} on rank {rank} than on rank {found.index(usual)}, "
                    "accepted is the same on all"
                )


@dataclass(frozen=True)
class MeshSizes:
    """The sizes of the mesh. Raises ValueError for a size below 1."""

    dp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            check_integer(f"mesh.{field.name}", getattr(self, field.name), 1, MAX_PROCESSES)

    @classmethod
    def parse(cls, text: str) -> "MeshSizes":
        """The sizes in a text such as "dp=2,cp=4"; a size that is not named is 1.

        Raises ValueError.
        """
        pairs = [part.partition("=") for part in text.split(",")]
        sizes = {name: int(size) for name, _, size in pairs if size.isdecimal() and len(size) < 10}
        if len(sizes) < len(pairs) or sizes.keys() - {field.name for field in fields(cls)}:
            raise ValueError(
                f"mesh: got {quoted(text)}, accepted are sizes of dp, cp and ep, each at most "
                "once, such as dp=2,cp=4"
            )
        return cls(**sizes)

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @property
    def processes(self) -> int:
        return self.dp * self.cp * self.ep

    @property
    def data_ranks(self) -> int:
        """In how many shares the rows of a batch are read."""
        return self.dp * self.ep

    def check_number(self, started: int) -> None:
        """Raise ValueError for a mesh of another number of processes than were started."""
        if self.processes != started:
            raise ValueError(
                f"mesh: got {self}, which is {self.processes} processes, accepted are sizes "
                f"whose product is the {started} started"
            )

    def check(self, config: HSAConfig, recipe: Recipe) -> None:
        """Raise ValueError if this model or recipe cannot be trained on the mesh."""
        for name in ("muon", "compile_blocks"):
            if value := getattr(recipe, name):
                off = type(value)(0)
                raise ValueError(f"mesh: got {self} with {name}={value}, accepted is {off}")
        if config.experts % self.ep or (self.ep > 1 and not config.experts):
            accepted = f"divisors of the {config.experts} experts" if config.experts else "1"
            raise ValueError(f"mesh: got ep={self.ep}, accepted for this model are {accepted}")
        if config.experts and config.width % (self.dp * self.cp):
            raise ValueError(
                f"mesh: got dp={self.dp} and cp={self.cp}, accepted with experts are sizes whose "
                f"product divides the width {config.width}"
            )
        for stage in recipe.stages:
            if stage.queue_chunks is not None:
                raise ValueError(
                    f"mesh: got {self} with queue_chunks={stage.queue_chunks} in a stage, accepted "
                    "are stages in which a sequence reads its own chunks only (queue_chunks null)"
                )
            if stage.batch % self.data_ranks:
                raise ValueError(
                    f"mesh: got dp={self.dp} and ep={self.ep} for batches of {stage.batch} rows, "
                    "accepted are sizes whose product divides the rows"
                )
            if stage.tokens // config.chunk_size < self.cp:
                raise ValueError(
                    f"mesh: got cp={self.cp} for rows of {stage.tokens} tokens, accepted are at "
                    f"most {stage.tokens // config.chunk_size}, their complete chunks"
                )


class Mesh(OneProcess):
    """The process groups of a mesh, as this process sees them.

    dp, cp, ep: the place of this process. context and experts: the groups of this process that
    share a sequence and the experts. device_mesh: one dimension, all processes. expert_mesh:
    ("replicas", "experts"), where the processes of a column hold the same experts.
    """

    def __init__(self, sizes: MeshSizes, device: torch.device) -> None:
        """Needs `torch.distributed.init_process_group`. Raises ValueError for a mesh of another
        number of processes.
        """
        started = dist.get_world_size()
        sizes.check_number(started)
        self.sizes = sizes
        self.device = device
        self.rank = dist.get_rank()
        kind = device.type
        replicas = sizes.dp * sizes.cp
        whole = init_device_mesh(kind, astuple(sizes), mesh_dim_names=("dp", "cp", "ep"))
        self.device_mesh: DeviceMesh = init_device_mesh(kind, (started,), mesh_dim_names=("all",))
        self.expert_mesh: DeviceMesh = init_device_mesh(
            kind, (replicas, sizes.ep), mesh_dim_names=("replicas", "experts")
        )
        self.dp, self.cp, self.ep = (whole.get_local_rank(name) for name in ("dp", "cp", "ep"))
        self.data_ranks = sizes.data_ranks
        self.data_rank = self.dp * sizes.ep + self.ep
        self.context = whole.get_group("cp")
        self.experts = whole.get_group("ep")

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def largest(self, *numbers: float) -> tuple[float, ...]:
        # On the host: the device need not wait.
        every = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(every, dist.ReduceOp.MAX)
        return tuple(every.tolist())

    def check_same(self, values: dict[str, Any]) -> None:
        check_same(values)

    def own_part(
        self, batch: tuple[torch.Tensor, ...], *, chunk_size: int, accumulate: int = 1
    ) -> tuple[torch.Tensor, ...]:
        bounds = part_bounds(batch[0].shape[1] - 1, chunk_size, self.sizes.cp)
        first, last = bounds[self.cp : self.cp + 2]
        shares = (accumulate, self.data_ranks, -1)
        return tuple(
            # One token more than the part has: the last input's target.
            x.unflatten(0, shares)[:, self.data_rank].flatten(0, 1)[:, first : last + 1]
            for x in batch
        )

    def clip_gradients(self, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        """No number of a gradient lies on two processes, so the norm is that of all shares."""
        shares = [p.grad.to_local() for p in parameters if p.grad is not None]  # pyright: ignore
        norm = self.total(torch.nn.utils.get_total_norm(shares).square()).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(shares, factor)  # pyright: ignore
        return norm
