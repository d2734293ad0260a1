"""The finished lengths of a run, kept beside its results file until the run is complete."""

import hashlib
import json
from pathlib import Path

import torch

from hsa_mini.evaluation.results import rows_of
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_file import check_writable, write_file
from hsa_mini.provenance import record


class Unfinished:
    """The rows of every finished length of a run. The same run goes on after them.

    lengths: for each finished length, in tokens, its rows as dicts under the names that the results
    file gives them.
    """

    def __init__(self, name: str, results: Path, run: dict) -> None:
        """Read what an earlier command kept for the file `results`.

        run: what the rows depend on. Nothing is kept for results that do not go to a regular file.
        Raises ValueError, which names the argument `name`, if the rows are those of another run.
        """
        self.keeps = results.is_file() or not results.exists()
        results = results.resolve()
        self.path = results.with_name(f"{results.name}.unfinished")
        self.run = json.loads(json.dumps(run))
        self.lengths: dict[int, dict[str, list[dict]]] = {}
        if self.keeps:
            check_writable(name, self.path)
        if not (self.keeps and self.path.exists()):
            return
        try:
            kept = read_json(self.path)
            whole = kept.pop("sha256") == _digest(kept)
            different = [key for key in self.run if kept["run"][key] != self.run[key]]
            self.lengths = {int(tokens): rows for tokens, rows in kept["lengths"].items()}
        except (ValueError, TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            reason = "is damaged"
        elif different:
            reason = f"holds finished lengths of another run (other {', '.join(different)})"
        else:
            return
        raise ValueError(
            f"{name}: {self.path} {reason}; "
            "accepted is another file, or the same one after that file is removed"
        )

    def add(self, tokens: int, **rows: list) -> None:
        """Keep the rows (dataclasses) of one more length."""
        self.lengths[tokens] = {name: [vars(row) for row in some] for name, some in rows.items()}
        if self.keeps:
            kept = {"run": self.run, "lengths": self.lengths}
            text = json.dumps({"sha256": _digest(kept), **kept}, indent=1)
            write_file(self.path, f"{text}\n".encode())

    def rows(self, name: str, kind: type) -> list:
        """The rows called `name` of all finished lengths of the run, as objects of class `kind`."""
        lengths = [self.lengths[tokens] for tokens in self.run["lengths"] if tokens in self.lengths]
        return rows_of(kind, (row for length in lengths for row in length[name]))

    def remove(self) -> None:
        """Remove the file: the results file is complete."""
        if self.keeps:
            self.path.unlink(missing_ok=True)


def describe_run(device: torch.device, **options) -> dict:
    """All that the rows of a run depend on: its options, and hardware, versions and commit."""
    source = {key: value for key, value in record(device).items() if key != "command"}
    return {**options, **source}


def _digest(kept: dict) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
