"""The exercises of the notebooks: a check knows what is right, and names what is wrong."""

import importlib
import pkgutil

import pytest
import torch

from hsa_mini import exercises
from hsa_mini.exercises.check import Check
from hsa_mini.exercises.kernels import backward, forward
from hsa_mini.exercises.kernels import retrieval as kernels
from hsa_mini.exercises.mechanism import chunks, fusion, layer, retrieval, why

CHECKS = {
    check.name: check
    for found in pkgutil.walk_packages(exercises.__path__, "hsa_mini.exercises.")
    for check in vars(importlib.import_module(found.name)).values()
    if isinstance(check, Check)
}
MISTAKES = [(check, hint) for check in CHECKS.values() for hint in check.usual_mistakes]
each_check = pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))


@each_check
def test_the_answer_passes_its_check(check):
    assert check.verdict(check.answer).startswith(f"✓ {check.name} is right")


@pytest.mark.parametrize("check, hint", MISTAKES)
def test_every_usual_mistake_gets_its_own_hint(check, hint):
    """The examples tell it from the right answer and from all other mistakes."""
    assert check.verdict(check.usual_mistakes[hint]) == f"✗ {check.name}: {hint}"
