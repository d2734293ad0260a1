"""The log of a training run: a CSV file with one row every few steps."""

import logging
import math
import os
from pathlib import Path
from typing import Self

from hsa_mini.checkpoint.training_state import state_folder
from hsa_mini.files.whole_file import write_file

log = logging.getLogger(__name__)

LOG = "log.csv"
# The columns of the file for the fields of `StepFigures`, in order. `imbalance` is
# `max_over_mean_load`.
FIGURES = ("loss", "text", "copy", "answer", "answer_accuracy", "gradient_norm", "imbalance")
COLUMNS = ("step", *FIGURES, "learning_rate", "seconds")
HEADER = ",".join(COLUMNS) + "\n"
# On a mesh there are further columns (see `parallel/speed.py`). With held-out text there is one
# more; it is nan in rows without a measurement.
SPEED = ("tokens_per_second", "mfu", "peak_memory_bytes", "sent_bytes")
HELD_OUT = "held_out"


def log_header(*, held_out: bool, speed: bool) -> str:
    """The first line of a log, with the columns of the held-out loss and of speed if asked for."""
    return (
        ",".join((*COLUMNS, *(SPEED if speed else ()), *((HELD_OUT,) if held_out else ()))) + "\n"
    )


class Log:
    """Appends rows to the CSV file of a run and flushes each at once.

    text: all that the file holds. Used in a `with` statement, which closes the file.
    """

    def __init__(self, path: Path, text: str = HEADER) -> None:
        """text: the header and the rows of the steps done so far. They replace the file.

        Raises ValueError if `path` leads to a device, a pipe or a folder.
        """
        if path.exists() and not path.is_file():
            raise ValueError(f"run: {path} is no regular file; accepted is a log, or none")
        write_file(path, text.encode())
        self.text = text
        self._file = path.open("a", encoding="utf-8", newline="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: dict[str, float]) -> None:
        """Append a row, by column; a column that is missing is nan."""
        columns = self.text[: self.text.index("\n")].split(",")[1:]
        figures = (f"{row.get(name, math.nan):.6g}" for name in columns)
        line = ",".join((str(row["step"]), *figures)) + "\n"
        self.text += line
        self._file.write(line)
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows have reached the disk."""
        os.fsync(self._file.fileno())


def restored_log(run: Path, step: int, header: str) -> str:
    """The text of the log up to the state after `step` steps; warnings say what was lost.

    header: that of a new log. Raises ValueError if only a damaged log holds these rows.
    """
    path = run / LOG
    kept = state_folder(run, step) / LOG
    if not path.is_file():
        log.warning("run: %s is missing: it is written anew, as far as it is known", path)
        return kept.read_text() if kept.exists() else header
    if not kept.exists():  # a state of an earlier version
        return rows_until(path, step)
    text = kept.read_text()
    if not path.read_text(errors="replace").startswith(text):
        log.warning("run: %s is damaged: it is restored from %s", path, kept)
    return text


def rows_until(path: Path, step: int) -> str:
    """The header of a log and its rows up to `step`. A row that a kill cut off is left out.

    Raises ValueError, which names the line, if one of these rows is damaged.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    kept = []
    last = -1.0
    for number, line in enumerate(lines, 1):
        done = _step_of(line) if number > 1 else 0.0 if line == HEADER else None
        if done is None or done <= last:
            raise ValueError(
                f"run: line {number} of {path} is damaged; "
                f"accepted is a log with whole rows up to step {step}, or no log"
            )
        if done > step:
            break
        kept.append(line)
        last = done
    return "".join(kept) or HEADER


def _step_of(line: str) -> float | None:
    """The step of a row, or None if the row is damaged."""
    try:
        row = [float(x) for x in line.split(",")]
    except ValueError:
        return None
    return row[0] if len(row) == len(COLUMNS) else None
