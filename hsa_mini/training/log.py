"""The log of a training run: a CSV file with one row every few steps."""

import csv
import io
import math
from pathlib import Path

from hsa_mini.files.whole_file import write_file

# The columns of the file for the fields of `StepFigures`, in order. `imbalance` is
# `max_over_mean_load`.
FIGURES = ("loss", "text", "copy", "answer", "answer_accuracy", "gradient_norm", "imbalance")
COLUMNS = ("step", *FIGURES, "learning_rate", "seconds")


class Log:
    """Appends rows to the CSV file of a run and flushes each at once.

    A resumed run drops the rows after its first step: it will write them again.
    """

    def __init__(self, path: Path, start: int) -> None:
        """start: the number of steps done so far; 0 begins a new file."""
        rows = list(csv.reader(io.StringIO(path.read_text()))) if path.exists() and start else []
        kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and int(row[0]) <= start]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *kept])
        write_file(path, text.getvalue().encode())
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, step: int, numbers: dict[str, float], rate: float, seconds: float) -> None:
        """Append the row of a step; numbers: see `StepFigures.numbers`.

        Raises FloatingPointError if the loss is not finite.
        """
        loss = numbers["loss"]
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} after step {step}: the run is stopped")
        self._writer.writerow([step, *(f"{x:.6g}" for x in (*numbers.values(), rate, seconds))])
        self._file.flush()
