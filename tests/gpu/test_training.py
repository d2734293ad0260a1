"""Training on a GPU.

A recorded step does what a plain one does, to the last bit, in every stage of the recipe.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from hsa_mini import PRESETS, HSAModel
from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.training.cross_batch import ChunkQueue
from hsa_mini.training.optimizers.factory import make_optimizer
from hsa_mini.training.recipes import RECIPES
from hsa_mini.training.step import train_step
from hsa_mini.training.trainer import Trainer, with_shared_parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("muon", [0.0, 2.5])
@pytest.mark.parametrize("preset", ["mini", "mini_moe"])
def test_recorded_steps_equal_plain_ones(preset, muon):
    recipe = replace(RECIPES[preset], muon=muon)
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(4096, (12, 2**15 + 32), generator=generator, device="cuda")
    parts = torch.randint(4, ids.shape, generator=generator, device="cuda", dtype=torch.int8)

    def losses(wrap) -> torch.Tensor:
        torch.manual_seed(0)
        model = HSAModel(PRESETS[preset], device="cuda").train()
        optimizer = make_optimizer(model, recipe)
        queue = ChunkQueue(recipe.queue_chunks)
        found = []
        for stage in recipe.stages:
            step = wrap(
                partial(
                    train_step,
                    with_shared_parameters(model, stage.config(model.config)),
                    optimizer,
                    recipe,
                    stage,
                    queue,
                )
            )
            shape = stage.batch, stage.tokens + 1
            batches = zip(*(x[:, : math.prod(shape)].unflatten(1, shape) for x in (ids, parts)))
            for i, batch in enumerate(batches):
                rate = torch.full((), 1e-3, device="cuda")
                noise = torch.full((), i, device="cuda")
                found.append(torch.stack([x.float() for x in step(*batch, rate, noise)]))
        return torch.stack(found)

    plain = losses(lambda step: step)
    recorded = losses(CUDAGraphRunner)
    assert torch.equal(plain, recorded) and plain.isfinite().all()
    assert (plain[:, 0].diff() != 0).all()  # every step changed the model


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("preset", ["mini", "mini_moe"])
def test_compiled_steps_train_like_plain_ones(preset, checkpointed):
    """Fused blocks round less often, so losses differ by rounding only."""
    recipe = replace(RECIPES[preset].scaled(6), checkpoint_blocks=checkpointed)
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(4096, (32, 1025), generator=generator, device="cuda")
    parts = torch.randint(4, ids.shape, generator=generator, device="cuda", dtype=torch.int8)
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = HSAModel(PRESETS[preset], device="cuda").train()
        trainer = Trainer(model, replace(recipe, compile_blocks=compiled))
        steps = [trainer.train_step((ids, parts)).loss.item() for _ in range(6)]
        losses[compiled] = torch.tensor(steps)
    assert losses[True][-1] < losses[True][0] - 0.1
    torch.testing.assert_close(losses[True], losses[False], rtol=0.01, atol=0)
