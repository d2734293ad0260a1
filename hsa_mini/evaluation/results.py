"""results: TODO."""

import json
from dataclasses import dataclass
from pathlib import Path

LENGTHS = (4096, 16384, 65536, 262144, 1048576, 4194304, 16777216)  # of the paper's Figure 4
# What the paper's 8B reached at these lengths, lowest and highest percent (Figure 4; of S-NIAH we keep the range that it prints
# after long-context mid-training, of the other two the best curve).
PUBLISHED = {
    "s_niah": ((94, 100),) * 7,
    "mq_niah": tuple((x, x) for x in (100, 98, 96, 98, 90, 90, 75)),
    "vt": tuple((x, x) for x in (96, 100, 98, 100, 98, 100, 90)),
}
CONTROLS = {
    "absent": "what is asked for is nowhere in the text",
    "shuffled": "the memory holds the sentences of another sample",
}


@dataclass(frozen=True)
class Row:
    """The questions of one length and depth: correct and retrieved are counts.

    depth: the place of the first sentence that the question needs (the asked needle, the first of two, or the head of the
    chain); all others lie anywhere. retrieved: any HSA layer kept a chunk of that sentence for the first answer token.
    """

    tokens: int
    depth: float
    samples: int
    correct: int
    retrieved: int
    distinct_tokens: int
    seed: int


@dataclass(frozen=True)
class ControlRow(Row):
    """Questions that cannot be answered; depth and retrieved are of the place where the sentence would stand."""

    control: str  # one of CONTROLS


def read_results(path: Path) -> tuple[list[Row], list[ControlRow], str]:
    """Rows and control rows that a command wrote into `path`, and into NAME_far.json beside it, of further lengths, if that is
    there; and the hardware that was asked."""
    paths = [p for p in (path, path.with_name(f"{path.stem}_far.json")) if p == path or p.is_file()]
    found = [json.loads(p.read_text()) for p in paths]
    rows = [Row(**row) for part in found for row in part["rows"]]
    controls = [ControlRow(**row) for part in found for row in part["control_rows"]]
    return rows, controls, " and ".join(sorted({part["hardware"] for part in found}))
