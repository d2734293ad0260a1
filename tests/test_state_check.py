"""A training state is checked against the trainer before anything of it is taken over."""

import copy
import functools

import pytest
import torch
from material import TINY

from hsa_mini import HSAModel
from hsa_mini.training.recipes import Recipe, Stage
from hsa_mini.training.state_check import check_progress
from hsa_mini.training.trainer import Trainer

RECIPE = Recipe((Stage(steps=8, batch=3, tokens=24, queue_chunks=12),), warmup=1)


def trainer(seed: int) -> Trainer:
    torch.manual_seed(seed)
    return Trainer(HSAModel(TINY).train(), RECIPE)


@functools.cache
def state() -> dict[str, torch.Tensor]:
    """The state after two steps."""
    trained = trainer(0)
    for i in range(2):
        ids = torch.randint(4096, (3, 25), generator=torch.Generator().manual_seed(i))
        trained.train_step((ids, torch.zeros(3, 25, dtype=torch.int8)))
    return trained.state_dict()


def altered(name: str, change) -> dict[str, torch.Tensor]:
    value = change(state()[name].clone())
    return {**state(), name: value}


def spoiled(value: float):
    return lambda x: x.flatten().index_fill(0, torch.tensor([-1]), value).view(x.shape)


ALTERED = {
    "without a weight": lambda: {k: x for k, x in state().items() if k != "model.norm.weight"},
    "without a moment": lambda: {k: x for k, x in state().items() if k != "optimizer.0.exp_avg"},
    "without the queue": lambda: {k: x for k, x in state().items() if k != "past.2"},
    "without a generator": lambda: {k: x for k, x in state().items() if k != "rng"},
    "with a weight too many": lambda: state() | {"model.more": torch.zeros(3)},
    "with a parameter too many": lambda: state() | {"optimizer.999.step": torch.zeros(())},
    "with a name of many parts": lambda: state() | {"optimizer.0.exp_avg.x\x1b[1m": torch.zeros(3)},
    "a weight of another shape": lambda: altered("model.norm.weight", lambda x: x[:1]),
    "a weight that is turned": lambda: altered("model.embedding.weight", lambda x: x.T),
    "a weight of another dtype": lambda: altered("model.norm.weight", torch.Tensor.double),
    "whole numbers": lambda: altered("model.norm.weight", torch.Tensor.int),
    "a moment for all rows": lambda: altered("optimizer.0.exp_avg", lambda x: x[:1]),
    "a queue of another size": lambda: altered("past.0", lambda x: x[1:]),
    "a queue of whole numbers": lambda: altered("past.1", torch.Tensor.int),
    "a weight that is NaN": lambda: altered("model.norm.weight", spoiled(torch.nan)),
    "a moment that is infinite": lambda: altered("optimizer.3.exp_avg", spoiled(-torch.inf)),
    "a queue with NaN": lambda: altered("past.2", spoiled(torch.nan)),
    "a square below 0": lambda: altered("optimizer.3.exp_avg_sq", spoiled(-1.0)),
    "more steps than taken": lambda: altered("optimizer.3.step", lambda x: x + 1),
    "no step": lambda: altered("optimizer.3.step", torch.zeros_like),
    "a step that is NaN": lambda: altered("optimizer.3.step", spoiled(torch.nan)),
    "a short generator": lambda: altered("rng", lambda x: x[:-1]),
    "a generator of ones": lambda: altered("rng", torch.ones_like),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERED)
def test_a_state_that_does_not_fit_the_trainer_changes_nothing(name):
    wrong = ALTERED[name]()
    other = trainer(1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="^state: got .*") as caught:
        other.load_state_dict(wrong, step=2)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200
    after = other.state_dict()
    assert other.step == 0 and after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("step", [0, 1])
def test_a_state_of_another_step_is_refused(step):
    with pytest.raises(ValueError, match="^state: got "):
        trainer(1).load_state_dict(state(), step=step)


def test_the_state_before_the_first_step_is_taken():
    other = trainer(1)
    other.load_state_dict(state(), step=2)
    first = trainer(0).state_dict()
    other.load_state_dict(first, step=0)
    after = other.state_dict()
    assert other.step == 0 and after.keys() == first.keys()
    assert all(torch.equal(after[key], value) for key, value in first.items())


PROGRESS = {"step": 2, "seconds": 0.5}


@pytest.mark.parametrize("change", [{}, {"step": 0}, {"step": 8}, {"seconds": 0}, {"more": None}])
def test_progress_of_a_run_is_taken(change):
    check_progress(PROGRESS | change, steps=8)


@pytest.mark.parametrize(
    "name, value",
    [
        *(("step", value) for value in (-1, 9, 10**4000, 2.0, True, "2", None, [2], {})),
        *(
            ("seconds", value)
            for value in (-1, float("nan"), float("inf"), True, "1" * 999, None, [])
        ),
    ],
    ids=lambda value: f"{value!r:.9}",
)
def test_progress_of_other_types_or_beyond_its_bounds_is_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name}: got .*, accepted is ") as caught:
        check_progress(PROGRESS | {name: value}, steps=8)
    assert len(str(caught.value)) < 200
