"""The exercises of notebook 13: how many seeds, how much luck, and an arm of one's own."""

import math
from collections.abc import Callable
from functools import partial
from itertools import combinations, count

import torch

from hsa_mini.exercises.check import Check
from hsa_mini.lab.arms import ARMS, Arm
from hsa_mini.lab.scales import SCALES


def _seeds(chance, *, ways=lambda n: math.comb(2 * n, n), directions=1, equal=False):
    def enough(n: int) -> bool:
        luck = directions / ways(n)
        return luck <= chance if equal else luck < chance

    return next(n for n in count(1) if enough(n))


check_seeds_needed = Check(
    name="seeds_needed",
    answer=_seeds,
    examples=((0.06,), (1 / 20,), (0.001,), (1e-6,), (1 / 70,)),
    usual_mistakes={
        "`less than` this chance: with 3 seeds luck has a chance of exactly 1 in 20.": partial(
            _seeds, equal=True
        ),
        "the claim says which arm is better. Count one direction only.": partial(
            _seeds, directions=2
        ),
        "a coin for each pair is another question: here every seed of A beats every seed of B.": (
            partial(_seeds, ways=lambda n: 2**n)
        ),
        "the order inside an arm does not matter. Count choices of n ranks among 2n.": partial(
            _seeds, ways=lambda n: math.factorial(2 * n)
        ),
        "this is the number of runs of both arms. Return the seeds of each.": (
            lambda chance: 2 * _seeds(chance)
        ),
        "this is the last number that is not enough.": lambda chance: _seeds(chance) - 1,
    },
)


def _luck(better, worse, *, directions=1, strict=False):
    every = better + worse
    seen = sum(better) - sum(worse)
    splits = [*combinations(range(len(every)), len(better))]
    hits = 0
    for split in splits:
        ours = sum(every[i] for i in split)
        gap = 2 * ours - sum(every)
        hits += gap > seen if strict else gap >= seen or (directions == 2 and -gap >= seen)
    return hits / len(splits)


def _separated(better, worse):
    """The chance that all of `better` lie above all of `worse`, whatever the numbers are."""
    return 1 / math.comb(len(better) + len(worse), len(better))


check_luck = Check(
    name="luck",
    answer=_luck,
    examples=(
        ([90, 80, 100], [50, 70, 60]),
        ([90, 60, 100], [50, 70, 65]),
        ([4, 9, 2, 7], [5, 3, 8, 1]),
        ([50, 50, 60], [50, 50, 40]),
    ),
    usual_mistakes={
        "the split that was seen is one of the splits: count gaps that are as large, too.": partial(
            _luck, strict=True
        ),
        "the claim says which arm is better. Count gaps in this direction only.": partial(
            _luck, directions=2
        ),
        "this is the chance of arms that do not overlap. Use the numbers: count the splits whose "
        "means differ at least as much.": _separated,
        "this is the share of splits with a smaller gap.": (
            lambda better, worse: 1 - _luck(better, worse)
        ),
        "this is the number of such splits. Divide it by the number of all splits.": (
            lambda better, worse: (
                _luck(better, worse) * math.comb(len(better) + len(worse), len(better))
            )
        ),
    },
)

SCALE = SCALES["tiny"]


def _of_arm(make: Callable, *_: object) -> tuple | None:
    """What an arm is: the chunks that it keeps in evaluation and in each stage; how many other
    fields of the configuration differ from the baseline's; the share of the baseline's parameters.
    """
    arm = make()
    if arm is None:
        return None
    if not isinstance(arm, Arm):
        raise TypeError(f"it returned a {type(arm).__name__}, not an Arm")
    if not callable(arm.changes):
        raise TypeError("`changes` is a function: lambda scale: {...}")
    config = arm.config(SCALE)
    usual = vars(ARMS["hsa"].config(SCALE))
    other = sum(value != usual[field] for field, value in vars(config).items() if field != "top_k")
    stages = [stage.config(config).top_k for stage in arm.recipe(SCALE).stages]
    parameters = arm.parameters(SCALE)["parameters"] / ARMS["hsa"].parameters(SCALE)["parameters"]
    return config.top_k, torch.tensor(stages), other, parameters


def _arm(name="one_chunk", **options):
    return lambda: Arm(name, "one chunk is kept", **options)


def _one(scale):
    return {"top_k": 1}


check_one_chunk = Check(
    name="one_chunk",
    answer=_arm(changes=_one),
    examples=((),),
    run=_of_arm,
    parts=(
        "the number of chunks that the model keeps",
        "the number of chunks that a stage keeps",
        "the number of other settings that differ",
        "the share of the baseline's parameters",
    ),
    usual_mistakes={
        "nothing differs from the baseline. `changes` is a function of the scale that returns the "
        "changed fields.": _arm(),
        "only the training keeps one chunk, and the questions are asked with the usual K. Change "
        "the configuration: `changes`.": _arm(training=lambda scale, stage: {"top_k": 1}),
        "one chunk is also one token long. Change how many chunks are kept, not their size.": _arm(
            changes=lambda scale: {"top_k": 1, "chunk_size": 1}
        ),
        "that is the chunk size. The number of chunks that a token keeps is `top_k`.": _arm(
            changes=lambda scale: {"chunk_size": 1}
        ),
    },
)
