"""Run a Triton kernel in the interpreter and note what each of its programs moves and computes.

The record is made from the addresses that the programs really ask for, and from the tiles with
which they really compute, so a picture of it cannot differ from the kernel. It needs no GPU; with
one, the kernel is interpreted here all the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction

# What counts as one FLOP a number. Comparisons and the largest number of a row count nothing.
ARITHMETIC = (np.add, np.subtract, np.multiply, np.divide, np.exp, np.exp2, np.log, np.sqrt)


class Move(NamedTuple):
    """One load or store of one program.

    kind: "load" or "store". name: of the tensor. positions [n]: of the numbers that were moved,
    counted from the tensor's first number. flop: what the program had computed before.
    """

    program: int
    kind: str
    name: str
    positions: np.ndarray
    flop: int


@dataclass(frozen=True)
class Record:
    """What the programs of one launch loaded, stored and computed.

    arrays: the tensors of the launch, by the names of the arguments. moves: in the order in which
    they were made, one program after the other. masked: how many addresses the masks of each
    program kept out. flop: of each program, in floating point, whatever happens to the numbers
    later: 1 a number for an operation of `ARITHMETIC`, n - 1 for a sum of n numbers, and 2 n for
    each number of a `tl.dot` over n.
    """

    arrays: dict[str, torch.Tensor]
    programs: int
    moves: list[Move]
    masked: list[int]
    flop: list[int]

    def counts(self, name: str, kind: str, program: int | None = None) -> np.ndarray:
        """How often each number of a tensor was moved: by one program, or by all of them."""
        count = np.zeros(self.arrays[name].numel(), dtype=int)
        for move in self.moves:
            if (move.kind, move.name) == (kind, name) and program in (None, move.program):
                np.add.at(count, move.positions, 1)
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
    programs = int(np.prod(grid))
    found = Record(arrays, programs, [], [0] * programs, [0] * programs)
    with _listening(found, (*grid, 1, 1)):
        InterpretedFunction(kernel.fn)[grid](**own)
    return found


def _copy(value):
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


@contextmanager
def _listening(found: Record, grid: tuple[int, ...]) -> Iterator[None]:
    """While the context lasts, every load, store and operation of the interpreter is noted."""
    builder = interpreter_builder
    kind_of = type(builder)
    reduce = interpreter.ReduceOps.sum

    def program() -> int:
        x, y, z = builder.grid_idx
        return (x * grid[1] + y) * grid[2] + z

    def note(kind: str, addresses, mask) -> None:
        found.masked[program()] += int((~mask.data).sum())
        wanted = addresses.data[mask.data].astype(np.int64)
        if len(wanted):
            place = _find(found.arrays, wanted)
            found.moves.append(Move(program(), kind, *place, found.flop[program()]))

    def load(pointers, mask, *others):
        note("load", pointers, mask)
        return kind_of.create_masked_load(builder, pointers, mask, *others)

    def store(pointers, value, mask, *others):
        note("store", pointers, mask)
        return kind_of.create_masked_store(builder, pointers, value, mask, *others)

    def elementwise(*operands_and_operation):
        *operands, operation = operands_and_operation
        result = getattr(kind_of, f"{('unary', 'binary')[len(operands) - 1]}_op")(
            builder, *operands_and_operation
        )
        if operation in ARITHMETIC and result.dtype.scalar.is_floating():
            found.flop[program()] += result.data.size
        return result

    def dot(a, b, *others):
        result = kind_of.create_dot(builder, a, b, *others)
        found.flop[program()] += 2 * result.data.size * a.data.shape[-1]
        return result

    def sum_up(self, tile):
        result = reduce(self, tile)
        if tile.dtype.scalar.is_floating():
            found.flop[program()] += tile.handle.data.size - np.size(result.handle.data)
        return result

    with (
        patch.object(builder, "create_masked_load", load),
        patch.object(builder, "create_masked_store", store),
        patch.object(builder, "unary_op", elementwise),
        patch.object(builder, "binary_op", elementwise),
        patch.object(builder, "create_dot", dot),
        patch.object(interpreter.ReduceOps, "sum", sum_up),
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
