"""How fast the processes of a mesh train, for the log.

tokens_per_second  tokens that all processes train on
mfu                useful FLOP, as `cost_estimate` counts them, as a share of what all devices
                   compute in a large matrix product, measured at the start
peak_memory_bytes  the most that a process has used so far
sent_bytes         the most that a process sends in a step: weights and gradients are computed
                   from their sizes, all else is counted as it is sent
"""

import time

import torch

from hsa_mini.config import HSAConfig
from hsa_mini.memory.memory_budget import peak_memory_bytes
from hsa_mini.model.core import HSACore
from hsa_mini.model.cost_estimate import training_flops
from hsa_mini.training.log import SPEED
from hsa_mini.training.parallel.collectives import TRAFFIC
from hsa_mini.training.parallel.mesh import Mesh
from hsa_mini.training.recipes import Recipe

PRODUCT = {"cuda": (8192, torch.bfloat16), "cpu": (512, torch.float32)}  # size, dtype
PRODUCTS = 20


class Speed:
    """Measures from one row of the log to the next."""

    def __init__(self, recipe: Recipe, config: HSAConfig, mesh: Mesh, *, weight_bytes: int) -> None:
        """weight_bytes: what a process sends in a step for weights and gradients."""
        self.recipe = recipe
        self.mesh = mesh
        self.weight_bytes = weight_bytes
        self.product_rate = flops_per_second(mesh.device)
        self.flops = {  # of one row
            stage: training_flops(HSACore(stage.config(config), device="meta"), stage.tokens)
            for stage in recipe.stages
        }
        self.restart(0)

    def restart(self, step: int) -> None:
        """Measure from now on, after `step` steps."""
        self.step = step
        self.began = time.monotonic()
        self.sent = TRAFFIC.sent_bytes

    def figures(self, step: int) -> dict[str, float]:
        """The figures of the steps since the last row, by column. Every process must call it."""
        seconds = time.monotonic() - self.began
        stages = [self.recipe.stage(done) for done in range(self.step, step)]
        rows = self.recipe.accumulate
        tokens = rows * sum(stage.batch * stage.tokens for stage in stages)
        flops = rows * sum(stage.batch * self.flops[stage] for stage in stages)
        counted = (TRAFFIC.sent_bytes - self.sent) / max(len(stages), 1)
        peak, sent = self.mesh.largest(
            peak_memory_bytes(self.mesh.device), self.weight_bytes + counted
        )
        mfu = flops / seconds / (self.product_rate * self.mesh.sizes.processes)
        return dict(zip(SPEED, (tokens / seconds, mfu, peak, sent), strict=True))


def flops_per_second(device: torch.device) -> float:
    """FLOP per second of a large matrix product, the fastest of a few."""
    size, dtype = PRODUCT[device.type]
    generator = torch.Generator(device).manual_seed(0)  # the global one belongs to the run
    a, b = torch.rand(2, size, size, device=device, dtype=dtype, generator=generator)
    fastest = float("inf")
    for _ in range(PRODUCTS):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - began)
    return 2 * size**3 / fastest
