"""The model in the state of a training run, as a folder that `HSAModel.from_pretrained` reads."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from hsa_mini.checkpoint.shards import Shards
from hsa_mini.checkpoint.training_state import (
    PROGRESS,
    newest_state,
    not_finite,
    read_state,
    tensor_files,
)
from hsa_mini.checks import quoted
from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.files.reading import read_json
from hsa_mini.files.whole_folder import MANIFEST
from hsa_mini.hsa_model import HSAModel
from hsa_mini.paths import RANKS_FILE, TOKENIZER_CONFIG, TOKENIZER_FILE
from hsa_mini.training.log import LOG
from hsa_mini.training.state_check import check_progress
from hsa_mini.training.trainer import model_state

COMPANIONS = (LOG, RANKS_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG)


@dataclass(frozen=True)
class TrainedModel:
    """model: with the weights of a state, in their own dtype. step: how many steps were taken.
    texts: files that belong to it, name -> content: `training.json`, the log, its tokenizer.
    """

    model: HSAModel
    step: int
    texts: dict[str, str]


def read_trained(folder: Path) -> TrainedModel:
    """The model in the newest whole state of a run, or in one of its states `step-N`, whatever
    number of processes wrote it.

    If newer states are damaged, a warning names them. Raises ValueError if there is no whole state.
    """
    one = (folder / MANIFEST).exists()
    found = read_state(folder, _read) if one else newest_state(folder, _read)
    if found is None:
        raise ValueError(
            f"run: got {folder}, which holds no state, accepted is the folder of a run, or one of "
            "its states (step-N)"
        )
    return found


def _read(files: dict[str, Path]) -> TrainedModel:
    folder = files[PROGRESS].parent
    progress = read_json(files[PROGRESS])
    check_progress(progress, steps=sys.maxsize)
    model = HSAModel(_config(progress, folder), device="meta")
    shards = Shards(tensor_files(files))
    prefix = "model."
    wanted = {f"{prefix}{name}": x.shape for name, x in model_state(model).items()}
    if wanted != {n: x.shape for n, x in shards.tensors.items() if n.startswith(prefix)}:
        raise ValueError(f"path: the tensors in {folder} do not fit its settings")
    tensors = shards.read_whole(prefix)
    if name := not_finite(tensors):
        raise ValueError(f"path: {folder} holds {name}, which is not finite")
    model.adopt_weights({name.removeprefix(prefix): x for name, x in tensors.items()})
    texts = {name: files[name].read_text() for name in COMPANIONS if name in files}
    texts["training.json"] = json.dumps(progress, indent=1) + "\n"
    return TrainedModel(model.eval().requires_grad_(False), progress["step"], texts)


def _config(progress: dict, folder: Path) -> HSAConfig:
    """The configuration that a state names. Raises ValueError."""
    settings = progress.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    if isinstance(fields := settings.get("config"), dict):
        return HSAConfig.from_dict(fields)
    if (name := settings.get("preset")) not in PRESETS:
        raise ValueError(f"path: {folder} is of the unknown preset {quoted(name)}")
    return PRESETS[name]
