"""A check of one exercise: it runs the reader's function on examples and says what is wrong.

A wrong result is compared with the results of the usual mistakes. If they agree on every example,
the hint names the mistake, however the reader's code is written. Of a longer function that makes
several mistakes, the hint names one that explains the first wrong part of the result.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from hsa_mini.checks import quoted

TOLERANCE = 1e-4


def _plain_call(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Check:
    """`check_x(x)` prints one line about the reader's function `x`.

    name: what the function is called. answer: a function that is right. examples: the arguments of
    each call, the simplest first. usual_mistakes: for each hint a function that makes this mistake.
    run: calls a function with the arguments of an example and returns what is compared.
    parts: what each of several compared results is, in the order in which they arise.
    """

    name: str
    answer: Callable
    examples: Sequence[tuple]
    usual_mistakes: Mapping[str, Callable]
    run: Callable = _plain_call
    parts: Sequence[str] = ()

    def __call__(self, attempt: Callable) -> None:
        print(self.verdict(attempt))

    def verdict(self, attempt: Callable) -> str:
        """One line: right, still blank, or what is wrong."""
        if not callable(attempt):
            return f"{self.name}: give the function itself, without brackets and arguments."
        got = []
        for example in self.examples:
            own = deepcopy(example)
            try:
                got.append(self.run(attempt, *own))
            except Exception as error:
                said = quoted(str(error))
                return f"{self.name} stopped with {type(error).__name__}: {said} {_call(example)}"
            if not _same(own, example):
                return f"{self.name} changed one of its arguments. Work on a copy."
        if all(_is_blank(result) for result in got):
            return f"{self.name} is still blank. Write it and run this cell again."
        want = [*self._results(self.answer)]
        if all(map(_same, got, want)):
            return f"✓ {self.name} is right: {len(want)} examples agree."
        for hint, mistake in self.usual_mistakes.items():
            if all(map(_same, got, self._results(mistake))):
                return f"✗ {self.name}: {hint}"
        number = next(i for i in range(len(want)) if not _same(got[i], want[i]))
        said = self._first_difference(_tensors(got[number]), _tensors(want[number]), number)
        return f"✗ {self.name}: {said}"

    def _results(self, function: Callable) -> Iterator[Any]:
        return (self.run(function, *deepcopy(example)) for example in self.examples)

    def _first_difference(self, theirs: list, ours: list, number: int) -> str:
        where = _call(self.examples[number])
        if len(theirs) != len(ours):
            return f"it should return {_parts(len(ours))}, not {_parts(len(theirs))}. {where}"
        i = next(i for i in range(len(ours)) if not _close(theirs[i], ours[i]))
        mine = theirs[i]
        right = ours[i]
        for hint, mistake in self.usual_mistakes.items() if self.parts else ():
            result = _tensors(self.run(mistake, *deepcopy(self.examples[number])))
            if _close(mine, result[i]):
                return hint
        what = self.parts[i] if self.parts else "the result"
        if mine.shape != right.shape:
            shape = "the shape" if what == "the result" else f"the shape of {what}"
            return f"{shape} is {list(mine.shape)}, not {list(right.shape)}. {where}"
        far = ~mine.isclose(right, TOLERANCE, TOLERANCE, equal_nan=True)
        index = far.nonzero()[0].tolist()
        place = f"at {index} " if index else ""
        return f"{place}{what} is {mine[far][0]:.4g}, not {right[far][0]:.4g}. {where}"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normally distributed numbers for an example. The seed decides them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _tensors(value: Any) -> list[torch.Tensor]:
    """What a function returned: one tensor in float64 for each part."""
    if isinstance(value, tuple):
        return [part for x in value for part in _tensors(x)]
    try:
        return [torch.as_tensor(value).detach().double().cpu()]
    except (TypeError, ValueError, RuntimeError):
        return []


def _same(got: Any, want: Any) -> bool:
    ours = _tensors(want)
    theirs = _tensors(got)
    return len(ours) == len(theirs) and all(map(_close, theirs, ours))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True)


def _is_blank(value: Any) -> bool:
    """Nothing was returned, or a kernel has stored nothing over the NaN it was given."""
    if value is None:
        return True
    parts = _tensors(value)
    return bool(parts) and all(bool(x.isnan().all()) and x.numel() > 0 for x in parts)


def _parts(count: int) -> str:
    return {0: "nothing that is a number", 1: "one result"}.get(count, f"{count} results")


def _call(example: tuple) -> str:
    """The arguments of a call in few words: numbers, and the shapes of tensors."""
    shown = (str(list(x.shape)) if isinstance(x, torch.Tensor) else quoted(x) for x in example)
    return f"(The arguments were {', '.join(shown)}.)"
