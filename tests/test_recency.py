"""The preference for newer chunks against a loop over Python numbers."""

import math

import pytest
import torch
from helpers import assert_close, random

from hsa_mini.model.recency import prefer_newer


def choice(slots: int = 5, empty: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks in random order and their weights, the last `empty` slots of the first token empty."""
    generator = torch.Generator().manual_seed(0)
    chunks = [torch.randperm(40, generator=generator)[:slots] for _ in range(2 * 3 * 2)]
    indices = torch.stack(chunks).view(2, 3, 2, slots).int()
    weights = random(2, 3, 2, slots).softmax(-1)
    if empty:
        indices[0, 0, :, -empty:] = -1
        weights[0, 0, :, -empty:] = 0
    weights = weights / weights.sum(-1, keepdim=True)
    return indices, weights


def loop(indices: list[int], weights: list[float], strength: float) -> list[float]:
    changed = []
    for chunk, weight in zip(indices, weights):
        newer = sum(w for other, w in zip(indices, weights) if other > chunk)
        changed.append(weight * math.exp(-strength * newer))
    total = sum(changed)
    return [weight / total for weight in changed]


def test_it_is_the_loop_over_all_chosen_chunks():
    indices, weights = choice()
    strength = 3 * random(2, 3, 2, seed=1)
    got = prefer_newer(indices, weights, strength)
    for b, t, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 2))).tolist():
        place = (b, t, j)
        want = loop(indices[place].tolist(), weights[place].tolist(), strength[place].item())
        assert got[place].tolist() == pytest.approx(want, rel=1e-12)
    assert (got[0, 0, :, -2:] == 0).all()
    assert_close(got.sum(-1), torch.ones(2, 3, 2).double(), 1e-12)


def test_without_strength_nothing_changes_and_a_token_without_chunks_keeps_no_weight():
    indices, weights = choice()
    assert_close(prefer_newer(indices, weights, torch.zeros(2, 3, 2).double()), weights, 1e-14)
    none = prefer_newer(torch.full_like(indices, -1), torch.zeros_like(weights), random(2, 3, 2))
    assert (none == 0).all()


def test_of_equal_chunks_the_newest_wins_however_many_others_are_newer():
    matches = [0.0] * 16
    matches[2] = matches[9] = matches[11] = 30.0
    weights = torch.tensor(matches).double().softmax(0).view(1, 1, 1, 16)
    indices = torch.arange(16).view(1, 1, 1, 16).int()
    got = prefer_newer(indices, weights, torch.full((1, 1, 1), 9.0).double())[0, 0, 0]
    assert got[11].item() == pytest.approx(1 / (1 + math.exp(-3) + math.exp(-6)), rel=1e-6)
    old = prefer_newer(indices, weights, torch.full((1, 1, 1), -9.0).double())[0, 0, 0]
    assert old[2].item() == pytest.approx(got[11].item(), rel=1e-6)


def test_gradients():
    indices, weights = choice(empty=0)
    inputs = (weights.requires_grad_(), random(2, 3, 2, seed=2).requires_grad_())
    assert torch.autograd.gradcheck(lambda w, s: prefer_newer(indices, w, s), inputs)
    indices, weights = choice()
    strength = random(2, 3, 2).requires_grad_()
    prefer_newer(indices, weights.requires_grad_(), strength)[..., 0].sum().backward()
    assert weights.grad.isfinite().all() and strength.grad.isfinite().all()
