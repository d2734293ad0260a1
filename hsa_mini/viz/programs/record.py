"""Run a Triton kernel in the interpreter and note what each of its programs loads and stores.

The record is made from the addresses that the programs really ask for, so a picture of it cannot
differ from the kernel. It needs no GPU; with one, the kernel is interpreted here all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Record:
    """What the programs of one launch loaded and stored.

    arrays: the tensors of the launch, by the names of the arguments. moves: for each load or store
    the number of the program, "load" or "store", the name of the tensor, and the positions [n] of
    the numbers that were moved, counted from the tensor's first number. masked: how many
    addresses the masks of each program kept out.
    """

    arrays: dict[str, torch.Tensor]
    programs: int
    moves: list[tuple[int, str, str, np.ndarray]]
    masked: list[int]

    def counts(self, name: str, kind: str, program: int | None = None) -> np.ndarray:
        """How often each number of a tensor was moved: by one program, or by all of them."""
        count = np.zeros(self.arrays[name].numel(), dtype=int)
        for moved_by, what, tensor, positions in self.moves:
            if (what, tensor) == (kind, name) and program in (None, moved_by):
                np.add.at(count, positions, 1)
        return count.reshape(self.arrays[name].shape)

    def bytes_moved(self, kind: str, program: int | None = None) -> int:
        """Bytes that one program, or all of them, loaded or stored."""
        return sum(
            array.element_size() * int(self.counts(name, kind, program).sum())
            for name, array in self.arrays.items()
        )


def record(kernel, grid: tuple[int, ...], **arguments) -> Record:
    """Run a `@triton.jit` kernel on copies of its arguments, one program after the other.

    The tensors must be contiguous. A load or store outside of all of them raises IndexError.
    """
    own = {key: _copy(value) for key, value in arguments.items()}
    arrays = {key: value for key, value in own.items() if isinstance(value, torch.Tensor)}
    found = Record(arrays, int(np.prod(grid)), [], [0] * int(np.prod(grid)))
    with _listening(found, (*grid, 1, 1)):
        InterpretedFunction(kernel.fn)[grid](**own)
    return found


def _copy(value):
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def _listening(found: Record, grid: tuple[int, ...]) -> Iterator[None]:
    """While the context lasts, every load and store of the interpreter is noted."""
    builder = interpreter_builder

    def note(kind: str, addresses, mask) -> None:
        x, y, z = builder.grid_idx
        program = (x * grid[1] + y) * grid[2] + z
        found.masked[program] += int((~mask.data).sum())
        wanted = addresses.data[mask.data].astype(np.int64)
        if len(wanted):
            name, positions = _find(found.arrays, wanted)
            found.moves.append((program, kind, name, positions))

    def load(pointers, mask, *others):
        note("load", pointers, mask)
        return type(builder).create_masked_load(builder, pointers, mask, *others)

    def store(pointers, value, mask, *others):
        note("store", pointers, mask)
        return type(builder).create_masked_store(builder, pointers, value, mask, *others)

    with (
        patch.object(builder, "create_masked_load", load),
        patch.object(builder, "create_masked_store", store),
        patch.object(JITFunction, "__call__", _call_interpreted),
    ):
        yield


def _call_interpreted(function: JITFunction, *arguments, **options):
    """A function that a kernel calls, on a machine whose GPU would compile it."""
    scope = interpreter._patch_lang(function.fn)
    try:
        return InterpretedFunction(function.fn).rewrite()(*arguments, **options)
    finally:
        scope.restore()


def _find(arrays: dict[str, torch.Tensor], addresses: np.ndarray) -> tuple[str, np.ndarray]:
    """The tensor in which all these addresses lie, and the positions of its numbers there."""
    for name, array in arrays.items():
        positions = (addresses - array.data_ptr()) // array.element_size()
        if ((positions >= 0) & (positions < array.numel())).all():
            return name, positions
    raise IndexError(
        "a program loads or stores numbers outside of every tensor: is a mask missing?"
    )
