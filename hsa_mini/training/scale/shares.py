"""A training run on a mesh, and how its weights are cut and gathered (see `parallel.shard`)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from hsa_mini.checks import check_integer
from hsa_mini.config import MAX_TOKENS, HSAConfig
from hsa_mini.model.core import HSACore
from hsa_mini.model.cost_estimate import training_flops
from hsa_mini.training.parallel.context import part_bounds
from hsa_mini.training.parallel.mesh import MeshSizes
from hsa_mini.training.recipes import Recipe, Stage

MAX_ROWS = 1 << 20
ONE_GPU = MeshSizes()
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrainingRun:
    """A model in training on a mesh.

    tokens: of a sequence, the training context. rows: the sequences that each group of `cp`
    processes reads in a step, one after the other. dtype: in which weights are gathered and used;
    the shares of weights, gradients and Adam's state are float32. checkpoint_blocks and
    loss_tokens: as in `Recipe`.

    Raises ValueError for values out of range, and for a mesh that does not fit.
    """

    config: HSAConfig
    tokens: int
    sizes: MeshSizes = ONE_GPU
    rows: int = 1
    dtype: str = "bfloat16"
    checkpoint_blocks: bool = True
    loss_tokens: int = 2048

    def __post_init__(self) -> None:
        check_integer("tokens", self.tokens, self.config.chunk_size, MAX_TOKENS)
        check_integer("rows", self.rows, 1, MAX_ROWS)
        stage = Stage(1, self.sizes.data_ranks, self.tokens)
        recipe = Recipe((stage,), dtype=self.dtype, loss_tokens=self.loss_tokens)
        self.sizes.check(self.config, recipe)

    @property
    def part(self) -> int:
        """Tokens of a sequence that a process reads: those of the last part, which is as large as
        any.
        """
        start, end = part_bounds(self.tokens, self.config.chunk_size, self.sizes.cp)[-2:]
        return end - start

    @property
    def item_bytes(self) -> int:
        """Bytes of a number that is computed with."""
        return ITEM_BYTES[self.dtype]

    @property
    def step_tokens(self) -> int:
        """Tokens that all processes together read in a step."""
        return self.tokens * self.rows * self.sizes.data_ranks


@dataclass(frozen=True)
class Gathered:
    """Weights that are gathered together.

    processes: that hold a share each. numbers: in the share of the first process, which is as large
    as any. gathers: for each row read. own: whether only every ep-th process takes part.
    """

    processes: int
    numbers: int
    gathers: int = 2  # in the forward and in the backward pass
    own: bool = False

    @property
    def whole(self) -> int:
        """Numbers of the gathered weights, with the padding of uneven shares."""
        return self.processes * self.numbers


@lru_cache(maxsize=64)
def gathered(config: HSAConfig, sizes: MeshSizes) -> tuple[tuple[Gathered, ...], ...]:
    """The weights of every part of the model: each block, the encoder, and last what lies outside
    of them, which stays gathered from the forward pass to the backward pass.

    With expert parallelism a block has several groups of weights.
    """
    *parts, (outside,) = _weights(config)
    outside = Gathered(sizes.processes, _share(outside, sizes.processes), gathers=1)
    return (*(tuple(_groups(part, sizes)) for part in parts), (outside,))


def _groups(part: tuple[Shapes, Shapes, Shapes], sizes: MeshSizes) -> Iterator[Gathered]:
    experts, beside, others = part
    n = sizes.processes
    if sizes.ep > 1 and experts:
        replicas = sizes.dp * sizes.cp
        yield Gathered(n, _share(beside, n))
        yield Gathered(replicas, sum(map(prod, experts)) // n, own=True)
        yield Gathered(n, _share(others, n))
    else:
        yield Gathered(n, _share(beside + others, n) + sum(map(prod, experts)) // n)


def _share(shapes: Shapes, processes: int) -> int:
    """Numbers of the first share of weights that are cut along their first dimension."""
    return sum(-(-shape[0] // processes) * prod(shape[1:]) for shape in shapes)


@lru_cache(maxsize=4)
def _weights(config: HSAConfig) -> list:
    """The shapes of each part's experts, of what else its MoE layer holds, and of the rest; last
    those outside of all parts. Experts are cut along the width, which divides evenly.
    """
    model = on_meta(config)
    found = []
    inside: set[int] = set()
    for part in (*model.lower, model.encoder, *model.upper):
        named = dict(part.named_parameters())
        inside |= {id(p) for p in named.values()}
        experts = [name for name, p in named.items() if p.dim() == 3]
        beside = [name for name in named if name.startswith(("mlp.shared.", "mlp.router."))]
        others = [name for name in named if name not in (*experts, *beside)]
        kinds = (experts, beside, others)
        found.append(tuple(tuple(tuple(named[n].shape) for n in names) for names in kinds))
    outside = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    return [*found, (outside,)]


@lru_cache(maxsize=4)
def on_meta(config: HSAConfig) -> HSACore:
    """The model with shapes but without memory."""
    return HSACore(config, device="meta", dtype=torch.bfloat16)


@lru_cache(maxsize=64)
def sequence_flops(config: HSAConfig, tokens: int) -> float:
    """FLOP of training on one sequence, without what is recomputed."""
    return training_flops(on_meta(config), tokens)
