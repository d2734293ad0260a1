"""The rows that an evaluation of retrieval yields, the file that holds them, and the paper's
published numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hsa_mini.files.reading import read_json

# Tokens; the lengths of the paper's Figure 4.
LENGTHS = (4096, 16384, 65536, 262144, 1048576, 4194304, 16777216)
# Accuracy of the paper's 8B model at these lengths, as (lowest, highest) percent, read from Figure
# 4. For S-NIAH: the range that the figure prints after long-context mid-training. For the other two
# tasks: the best curve.
PUBLISHED = {
    "s_niah": ((94, 100),) * 7,
    "mq_niah": tuple((x, x) for x in (100, 98, 96, 98, 90, 90, 75)),
    "vt": tuple((x, x) for x in (96, 100, 98, 100, 98, 100, 90)),
}
CONTROLS = {
    "absent": "the text does not contain the answer",
    "shuffled": "the memory holds the sentences of another sample",
}


@dataclass(frozen=True)
class RetrievalRow:
    """Counts (samples, correct, retrieved, whole, whole_correct) for the questions of one length
    and band of depth.

    depth: the middle of the band in which the first sentence stands that the question needs (the
    needle asked for, the first of two needles, or the head of the chain). All other sentences stand
    anywhere.
    retrieved: the samples in which any HSA layer chose a chunk of that sentence for the first
    answer token. whole: those in which it lies in a single chunk.
    distinct_tokens: how many tokens the text has before it repeats itself.
    correct_by_text: the right answers about each text; as many questions are asked about each.
    Files of earlier versions lack `whole` and what follows it.
    """

    tokens: int
    depth: float
    samples: int
    correct: int
    retrieved: int
    distinct_tokens: int
    seed: int
    whole: int = 0
    whole_correct: int = 0
    correct_by_text: tuple[int, ...] = ()


@dataclass(frozen=True)
class ControlRow(RetrievalRow):
    """Questions that the memory cannot answer, at any depth; retrieved refers to where the sentence
    would stand.
    """

    control: str = ""  # one of CONTROLS


def read_results(path: Path) -> tuple[list[RetrievalRow], list[ControlRow], str]:
    """Rows, control rows and the hardware, from a file that `python -m hsa_mini eval` wrote.

    If NAME_far.json lies beside `path` (NAME.json), its rows, for further lengths, are added.
    Raises ValueError, which names the file, for a file that holds no results.
    """
    paths = [path]
    far = path.with_name(f"{path.stem}_far.json")
    if far.is_file():
        paths.append(far)
    results = [read_json(p) for p in paths]
    try:
        rows = rows_of(RetrievalRow, (row for result in results for row in result["rows"]))
        controls = rows_of(
            ControlRow, (row for result in results for row in result["control_rows"])
        )
        hardware = " and ".join(sorted({result["hardware"] for result in results}))
    except (KeyError, TypeError):
        names = " or ".join(map(str, paths))
        raise ValueError(
            f"path: {names} holds other rows, accepted is a file that `eval` wrote"
        ) from None
    return rows, controls, hardware


def rows_of(kind: type, rows: Iterable[dict]) -> list:
    """The rows of a JSON file as objects of class `kind`."""
    return [
        kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in row.items()})
        for row in rows
    ]


def check_replaceable(name: str, path: Path, checkpoint: str) -> None:
    """Raise ValueError, which names the argument `name`, if the file `path` holds anything else
    than results of the checkpoint with this fingerprint.
    """
    if not path.is_file() or path.stat().st_size == 0:
        return
    try:
        found = read_json(path)
    except ValueError:
        found = {}
    # Results that are older than the key do not name their checkpoint.
    if "rows" in found and found.get("checkpoint", checkpoint) == checkpoint:
        return
    raise ValueError(
        f"{name}: {path} holds something else than results of this checkpoint; "
        "accepted is a new file, or one with results of this checkpoint, which is replaced"
    )
