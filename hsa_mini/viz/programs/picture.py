"""The picture of a recorded launch: every tensor as a grid of numbers, and who moves which."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hsa_mini.viz.programs.record import Record
from hsa_mini.viz.style import BLUE, INK, ORANGE, PALE, SKY

# What a cell shows: nothing moves it, other programs do, this one loads it, this one stores it.
COLORS = ListedColormap([PALE, SKY, ORANGE, BLUE])
OTHERS = 1
KINDS = {"load": 2, "store": 3}


def program_map(figure: Figure, record: Record, program: int) -> str:
    """Draw the tensors side by side, with the numbers that `program` moves; return one line on it.

    A tensor of more than two dimensions is drawn with its last dimension from left to right.
    """
    grids = {name: _cells(record, name, program) for name in record.arrays}
    widths = [max(grid.shape[1], 5) + 3 for grid in grids.values()]
    axes = figure.subplots(1, len(grids), width_ratios=widths, squeeze=False)[0]
    for ax, (name, grid) in zip(axes, grids.items()):
        line = 1.0 if grid.size <= 200 else 0.3
        ax.pcolormesh(grid, cmap=COLORS, vmin=0, vmax=3, edgecolors="white", linewidth=line)
        ax.set(xticks=[], yticks=[], aspect="equal", anchor="N", frame_on=False)
        ax.invert_yaxis()
        ax.set_title(f"{name}\n{_moved(record, name, program)}", fontsize=9, color=INK)
    return _summary(record, program)


def _cells(record: Record, name: str, program: int) -> np.ndarray:
    """[rows, columns]: the number of the colour of each cell."""
    shape = record.arrays[name].shape
    cells = np.zeros(shape, dtype=int)
    for kind, color in KINDS.items():
        cells[(cells < OTHERS) & (record.counts(name, kind) > 0)] = OTHERS
        cells[record.counts(name, kind, program) > 0] = color
    return cells.reshape(-1, shape[-1])


def _moved(record: Record, name: str, program: int) -> str:
    size = record.arrays[name].element_size()
    moved = {kind: size * record.counts(name, kind, program).sum() for kind in KINDS}
    words = [f"{kind}s {count} bytes" for kind, count in moved.items() if count]
    return ", ".join(words) or "nothing"


def _summary(record: Record, program: int) -> str:
    own = [record.bytes_moved(kind, program) for kind in KINDS]
    together = [record.bytes_moved(kind) for kind in KINDS]
    masked = (
        f"; masks keep out {record.masked[program]} addresses" if record.masked[program] else ""
    )
    flop = record.flop[program]
    moved = f"loads {own[0]:,} bytes and stores {own[1]:,}"
    if flop:
        moved = f"loads {own[0]:,} bytes, stores {own[1]:,} and computes {flop:,} FLOP"
    everyone = f"All programs load {together[0]:,} and store {together[1]:,}."
    return f"Program {program} of {record.programs} {moved}{masked}. {everyone}"
