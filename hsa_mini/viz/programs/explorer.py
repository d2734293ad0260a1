"""Recorded launches as a widget: step through the loads and stores of every program."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

from hsa_mini.viz.programs.picture import KINDS, program_map
from hsa_mini.viz.programs.record import Record
from hsa_mini.viz.widgets import CANVAS, PLAYER, make_figure, still_bundle, to_png

SCRIPT = (Path(__file__).parent / "launches.js").read_text(encoding="utf-8")


def explore_programs(
    records: Mapping[str, Record], *, alt: str, launch: str | None = None, program: int = 0
) -> "ProgramExplorer":
    """The tensors of a launch as grids, with what one program moves, and its bytes and FLOP.

    Mouse and arrow keys choose a program, and a bar plays its loads and stores one by one. The
    kernel of the notebook is not asked. records: by the names of their kernels, in the order of the
    menu. launch, program: what is shown first. alt: the picture in words.
    """
    return ProgramExplorer(records, alt, list(records).index(launch) if launch else 0, program)


class ProgramExplorer(anywidget.AnyWidget):
    """What `explore_programs` returns.

    data: what `packed` makes of each record. launch: the number of the record. program: that of
    the program. step: after how many of its moves the program is shown; -1: after all.
    """

    _esm = CANVAS + PLAYER + SCRIPT
    data = traitlets.Dict().tag(sync=True)
    launch = traitlets.Int(0).tag(sync=True)
    program = traitlets.Int(0).tag(sync=True)
    step = traitlets.Int(-1).tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, records: Mapping[str, Record], alt: str, launch: int = 0, program: int = 0
    ) -> None:
        self.records = list(records.values())
        data = {"launches": [packed(name, record) for name, record in records.items()]}
        super().__init__(data=data, launch=launch, program=program, alt=alt)

    def _repr_mimebundle_(self, **kwargs):
        record = self.records[self.launch]
        figure = make_figure(10, 3)
        summary = program_map(figure, record, min(self.program, record.programs - 1))
        bundle = super()._repr_mimebundle_(**kwargs)
        return still_bundle(bundle, to_png(figure), f"{self.alt} {summary}")


def packed(name: str, record: Record) -> dict[str, Any]:
    """A record for the browser: of each move the numbers of program, kind and tensor, how many
    positions it has, and the FLOP before it; all positions as bytes.
    """
    names = list(record.arrays)
    kinds = list(KINDS)
    positions = [move.positions for move in record.moves]
    return {
        "name": name,
        "arrays": [
            [key, list(array.shape), array.element_size()] for key, array in record.arrays.items()
        ],
        "programs": record.programs,
        "moves": [
            [m.program, kinds.index(m.kind), names.index(m.name), len(m.positions), m.flop]
            for m in record.moves
        ],
        "positions": np.concatenate([*positions, []]).astype("<i4").tobytes(),
        "flop": record.flop,
        "masked": record.masked,
    }
