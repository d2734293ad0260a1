"""The state of an unfinished run of the laboratory: what a run that was cut off goes on from.

lab.runs/                     beside the records in lab.jsonl
  hsa-0-1f2e3d4c/step-N/      an arm, its seed, and a digest of all its settings
"""

import hashlib
import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from hsa_mini.checkpoint.training_state import (
    clear_up,
    load_progress,
    not_finite,
    save_progress,
)
from hsa_mini.lab.arms import Arm
from hsa_mini.lab.scales import Scale
from hsa_mini.training.trainer import Trainer

log = logging.getLogger(__name__)


class RunStates:
    """The folder of one run. It is named after everything that determines the run, so the state of
    other settings is never found.
    """

    def __init__(self, records: Path, arm: Arm, scale: Scale, seed: int, steps: int | None) -> None:
        """records: the file that the finished run's record will be added to."""
        settings = json.dumps(arm.settings(scale, steps), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        self.folder = records.with_suffix(".runs") / f"{arm.name}-{seed}-{digest}"

    def load(self, trainer: Trainer) -> dict | None:
        """Let the trainer go on from the newest whole state; returns what was kept beside it, or
        None without a state. A state that does not fit is left out, with a warning.
        """
        try:
            found = load_progress(self.folder)
            if found is None:
                return None
            tensors, progress = found
            trainer.load_state_dict(tensors, step=progress["step"])
        except (ValueError, KeyError) as error:
            log.warning("%s: the run begins anew (%s)", self.folder, error)
            return None
        clear_up(self.folder, trainer.step)
        return progress["kept"]

    def save(self, trainer: Trainer, kept: dict) -> None:
        """Write the state, unless a number in it is not finite: a diverged run is not resumed."""
        tensors = trainer.state_dict()
        if not_finite(tensors) is None:
            progress = {"step": trainer.step, "kept": kept}
            save_progress(self.folder, trainer.step, tensors, progress)

    def remove(self) -> None:
        """Remove the folder, when the record of the run is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other runs have folders here, or there is none
            self.folder.parent.rmdir()
