"""Checks of plain values, and quotes of them in errors. Imports no torch."""

import reprlib
from typing import Any

MAX_QUOTED = 80  # characters of a value in an error

_REPR = reprlib.Repr()  # bounds the depth and the length of containers
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = MAX_QUOTED


def quoted(value: object) -> str:
    """`repr(value)` on one line of at most `MAX_QUOTED` characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = f"a very large {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> None:
    """Raise ValueError unless `value` is an integer within the bounds; a bool is none."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
        raise ValueError(f"{name}: got {quoted(value)}, accepted is an integer {bounds}")


def check_number(name: str, value: Any, minimum: float, maximum: float) -> None:
    """Raise ValueError unless `value` is a number within the bounds; a bool or NaN is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not minimum <= value <= maximum:
        raise ValueError(
            f"{name}: got {quoted(value)}, accepted is a number from {minimum:g} to {maximum:g}"
        )


def check_step(step: int, steps: int) -> None:
    """Raise IndexError, which ends a loop over batches, for a step that is not among `steps`."""
    if not 0 <= step < steps:
        raise IndexError(f"step: got {step}, accepted is 0 to {steps - 1}")
