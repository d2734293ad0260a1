"""The exercises of notebook 12: how many questions, all or nothing, and a needle evaluation.

The evaluation is checked with a haystack that answers by plan: it is right, or wrong in the last
digit, the full stop or the first digit. What it asks for stands in the samples that it gets.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import count
from types import SimpleNamespace

import numpy as np
import torch

from hsa_mini.evaluation.statistics import wilson_interval
from hsa_mini.exercises.check import Check
from hsa_mini.tasks.forms import TASKS
from hsa_mini.tasks.placement import Sample, place
from hsa_mini.tasks.sentences import encode


def _plain_interval(correct: int, samples: int) -> tuple[float, float]:
    share = correct / samples
    half = 1.96 * math.sqrt(share * (1 - share) / samples)
    return share - half, share + half


def _questions(share, bound, *, interval=wilson_interval, step=50, end=0):
    return next(n for n in count(step, step) if interval(round(share * n), n)[end] > bound)


check_questions_needed = Check(
    name="questions_needed",
    answer=_questions,
    examples=((0.98, 0.95), (0.9, 0.8), (1.0, 0.99), (0.6, 0.5)),
    usual_mistakes={
        "the lower end of the interval has to lie above the bound. You took the upper end.": (
            partial(_questions, end=1)
        ),
        "this is the interval with the spread at the observed share. Use `wilson`.": partial(
            _questions, interval=_plain_interval
        ),
        "count in steps of 50 questions.": partial(_questions, step=1),
        "this is one step too many: the first number that is enough.": (
            lambda share, bound: _questions(share, bound) + 50
        ),
        "this is the last number that is not enough.": (
            lambda share, bound: _questions(share, bound) - 50
        ),
    },
)

check_scores = Check(
    name="scores",
    answer=lambda p, codes, digits: (p ** (codes * digits), p),
    examples=((0.9, 1, 6), (0.9, 2, 6), (0.99, 1, 4), (0.5, 3, 2)),
    usual_mistakes={
        "an answer with several codes is right only if all of them are.": (
            lambda p, codes, digits: (p**digits, p)
        ),
        "an answer has several digits, and every digit must be right.": (
            lambda p, codes, digits: (p**codes, p)
        ),
        "digits are independent: multiply their probabilities.": (
            lambda p, codes, digits: (1 - codes * digits * (1 - p), p)
        ),
        "this is the probability that at least one digit is right.": (
            lambda p, codes, digits: (1 - (1 - p) ** (codes * digits), p)
        ),
        "partial credit is the mean share of right digits, whatever their number.": (
            lambda p, codes, digits: (p ** (codes * digits), p * codes * digits)
        ),
        "the order is: all or nothing first, partial credit second.": (
            lambda p, codes, digits: (p, p ** (codes * digits))
        ),
    },
)

CHUNK_SIZE = 64
WINDOW = 128
TOKENS = 600
DIGITS = encode("0123456789").tolist()


def _wrong_at(*places: int) -> Callable[[list[int]], list[int]]:
    """An answer with another digit at these places."""

    def spoil(answer: list[int]) -> list[int]:
        given = [*answer]
        for i in places:
            given[i] = next(digit for digit in DIGITS if digit != answer[i])
        return given

    return spoil


_RIGHT = _wrong_at()
_ALL_DIGITS = _wrong_at(*range(6))
_LAST_DIGIT = _wrong_at(5)
_FULL_STOP = _wrong_at(6)
# How the questions at each depth are answered, in turn.
PLANS = (
    (_RIGHT, _RIGHT, _LAST_DIGIT, _RIGHT),
    (_FULL_STOP, _RIGHT, _wrong_at(0), _FULL_STOP),
    (_ALL_DIGITS, _ALL_DIGITS, _RIGHT, _LAST_DIGIT),
    (_RIGHT, _RIGHT, _RIGHT, _RIGHT),
)


class PlannedHaystack:
    """Answers like a `Haystack`: it looks only at what it is asked. The same question has the same
    answer.
    """

    def __init__(self) -> None:
        self.text = torch.zeros(TOKENS, dtype=torch.int64)
        self.model = SimpleNamespace(config=SimpleNamespace(chunk_size=CHUNK_SIZE, window=WINDOW))
        self.asked: list[float] = []
        self._answers: dict[float, tuple[tuple[Callable, ...], dict[str, Callable]]] = {}

    def ask(
        self, sample: Sample, *, answer_tokens: int, remembered: Sample | None = None
    ) -> SimpleNamespace:
        """What `Haystack.ask` returns: ids [1, answer_tokens]; no layer has retrieved anything.

        Raises ValueError for a sample of another length, and for a needle in the window.
        """
        if sample.tokens != TOKENS:
            raise ValueError(f"tokens: the sample has {sample.tokens}, the text {TOKENS}")
        if sample.start + len(sample.patches[0][1]) > TOKENS - WINDOW:
            raise ValueError("window: the needle stands in it, so nothing has to be retrieved")
        self.asked.append(sample.depth)
        new = PLANS[len(self._answers) % len(PLANS)], {}
        plan, known = self._answers.setdefault(sample.depth, new)
        answer = known.setdefault(sample.problem.question.text, plan[len(known) % len(plan)])
        ids = (answer(sample.answer.tolist()) + DIGITS * 2)[:answer_tokens]
        nothing = SimpleNamespace(retrievals=())
        return SimpleNamespace(ids=torch.tensor([ids], dtype=torch.int64), first=nothing)


def _depths_and_rows(evaluate: Callable, depths: list[float], questions: int) -> tuple | None:
    """The depths of all questions, and the rows that were returned."""
    haystack = PlannedHaystack()
    rows = evaluate(haystack, depths, questions)
    if rows is None and not haystack.asked:
        return None
    return sorted(haystack.asked), torch.nan if rows is None else rows


def _all_tokens(given, answer):
    return given.tolist() == answer.tolist()


def _evaluate(
    haystack, depths, questions, *,
    correct=_all_tokens, interval=wilson_interval, tokens=lambda answer: len(answer),
    one_question=False, depth_of=lambda depth: depth, asked=lambda questions, depths: questions,
):  # fmt: skip
    rng = np.random.default_rng(0)
    rows = []
    for depth in depths:
        right = 0
        for _ in range(questions):
            rng = np.random.default_rng(0) if one_question else rng
            problem = TASKS["s_niah"](rng)
            options = {"depth": depth_of(depth), "tokens": len(haystack.text)}
            sample = place(rng, problem, chunk_size=CHUNK_SIZE, window=WINDOW, **options)
            given = haystack.ask(sample, answer_tokens=tokens(sample.answer)).ids[0].numpy()
            right += correct(given, sample.answer)
        rows.append((right, *interval(right, asked(questions, depths))))
    return rows


def _added_up(haystack, depths, questions):
    rows = _evaluate(haystack, depths, questions)
    right = 0
    added = []
    for row in rows:
        right += row[0]
        added.append((right, *wilson_interval(min(right, questions), questions)))
    return added


check_evaluate_needles = Check(
    name="evaluate_needles",
    answer=_evaluate,
    examples=(([0.0, 1.0], 4), ([0.0, 0.3, 0.6, 1.0], 4), ([0.5], 7)),
    run=_depths_and_rows,
    parts=("the list of depths that you asked", "the table of your rows"),
    usual_mistakes={
        "a right digit earns nothing. An answer is right if every token of it is.": partial(
            _evaluate, correct=lambda given, answer: (given == answer).mean()
        ),
        "one right token is not enough. Every token must be right.": partial(
            _evaluate, correct=lambda given, answer: (given == answer).any()
        ),
        "the first token alone does not decide. Every token must be right.": partial(
            _evaluate, correct=lambda given, answer: given[0] == answer[0]
        ),
        "the full stop belongs to the answer: without it a model may go on with more digits.": (
            partial(_evaluate, correct=lambda given, answer: _all_tokens(given[:-1], answer[:-1]))
        ),
        "ask for as many tokens as the answer has, and compare all of them.": partial(
            _evaluate, tokens=lambda answer: 2 * len(answer)
        ),
        "the same question was asked again and again. Make the random generator once, before the "
        "loops.": partial(_evaluate, one_question=True),
        "every depth needs its own questions: place the needle at the depth of the row.": partial(
            _evaluate, depth_of=lambda depth: 0.5
        ),
        "a row counts its own questions only. Set the counter to 0 at each depth.": _added_up,
        "this interval has no width where all answers are right. Use `wilson`.": partial(
            _evaluate, interval=_plain_interval
        ),
        "the interval of a depth rests on the questions at this depth, not on all of them.": (
            partial(_evaluate, asked=lambda questions, depths: questions * len(depths))
        ),
        "`wilson` takes the number of right answers, not their share.": partial(
            _evaluate, interval=lambda right, n: wilson_interval(right / n, n)
        ),
        "a row holds counts and shares from 0 to 1. These are percent.": partial(
            _evaluate, interval=lambda right, n: tuple(100 * x for x in wilson_interval(right, n))
        ),
        "a row is three numbers: right answers, lower end, upper end. You gave the share first.": (
            lambda haystack, depths, questions: [
                (right / questions, low, high)
                for right, low, high in _evaluate(haystack, depths, questions)
            ]
        ),
        "return the rows.": lambda *arguments: _evaluate(*arguments) and None,
    },
)  # fmt: skip
