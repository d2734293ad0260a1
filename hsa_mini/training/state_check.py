"""Whether a saved training state fits a trainer. A trainer asks before it takes anything over:
with half of a state, or with numbers of another run, it would train on without any error.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from hsa_mini.checkpoint.tensors import is_finite
from hsa_mini.checks import quoted
from hsa_mini.config import HSAConfig
from hsa_mini.training.cross_batch import ChunkQueue

log = logging.getLogger(__name__)


def check_progress(progress: dict, *, steps: int) -> None:
    """Raise ValueError unless `step` and `seconds` of a state are numbers, for a run of `steps`."""
    step = progress.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= steps:
        raise ValueError(f"step: got {quoted(step)}, accepted is an integer of 0 to {steps}")
    seconds = progress.get("seconds")
    is_number = isinstance(seconds, int | float)
    if not is_number or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds: got {quoted(seconds)}, accepted is a number of at least 0")


def check_settings(run: Path, found: object, settings: dict) -> None:
    """Raise ValueError if what a state holds as its settings are not those of this run."""
    found = found if isinstance(found, dict) else {}
    for key, value in json.loads(json.dumps(settings)).items():
        if key == "corpus" and key not in found:  # a state of an earlier version
            log.warning("run: %s does not say which corpus it read; it goes on with %s", run, value)
        elif found.get(key) != value:
            values = f": got {value}, the run has {quoted(found.get(key))}"
            raise ValueError(
                f"run: {run} holds a run of other settings; accepted is an empty folder, one of "
                "the same settings, or --restart, which removes its states "
                f"({key}{'' if key == 'recipe' else values})"
            )


def check_layout(
    tensors: Mapping[str, torch.Tensor],
    *,
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    queue: ChunkQueue,
    config: HSAConfig,
) -> None:
    """Raise ValueError unless names, shapes and dtypes of `tensors` are those of the state of a
    trainer after `step` steps.

    weights, optimizer, queue, config: those of the trainer.
    """
    accepted = _accepted(step, weights, optimizer, queue, config)
    for name in sorted(tensors.keys() ^ accepted.keys()):
        got = "no tensor" if name in accepted else "a tensor"
        raise ValueError(f"state: got {got} {quoted(name)}, accepted are those of the trainer")
    for name, (shape, *dtypes) in accepted.items():
        value = tensors[name]
        if value.shape != shape or value.dtype not in dtypes:
            raise ValueError(
                f"state: got {name} {list(value.shape)} {value.dtype}, "
                f"accepted is {list(shape)} {dtypes[0]}"
            )


def check_numbers(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Raise ValueError unless the numbers of a state after `step` steps are possible.

    Every number must be finite, and the optimizer must not have taken more steps than the run.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not is_finite(value):
            raise ValueError(f"state: got {name} with NaN or infinity, accepted are finite numbers")
        if name.endswith(".exp_avg_sq") and (value < 0).any():
            raise ValueError(f"state: got {name} below 0, accepted are means of squares")
        if name.startswith("optimizer.") and name.endswith(".step") and not 1 <= value <= step:
            raise ValueError(f"state: got {name} {float(value)}, accepted is 1 to {step}")
    try:
        torch.Generator().set_state(tensors["rng"])
    except RuntimeError:
        raise ValueError("state: got rng that is no state of torch's generator") from None


def _accepted(
    step: int,
    weights: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    queue: ChunkQueue,
    config: HSAConfig,
) -> dict[str, tuple]:
    """Shape and accepted dtypes of every tensor of the state, by name."""
    generator = torch.get_rng_state()
    accepted: dict[str, tuple] = {"rng": (generator.shape, generator.dtype)}
    for name, value in weights.items():
        accepted[f"model.{name}"] = (value.shape, value.dtype)
    if not step:
        return accepted
    parameters = ((group, p) for group in optimizer.param_groups for p in group["params"])
    for i, (group, value) in enumerate(parameters):
        of_adamw = "betas" in group
        if of_adamw:
            accepted[f"optimizer.{i}.step"] = ((), torch.float32)
        for moment in ("exp_avg", "exp_avg_sq") if of_adamw else ("momentum_buffer",):
            accepted[f"optimizer.{i}.{moment}"] = (value.shape, value.dtype)
    if queue.size:
        kv = (queue.size, config.chunk_size, config.hsa_kv_heads, config.hsa_head_dim)
        for i, shape in enumerate((kv, kv, (queue.size, config.width))):
            # On a GPU, chunks are made in bfloat16; a run may go on elsewhere.
            accepted[f"past.{i}"] = (shape, torch.float32, torch.bfloat16)
    return accepted
