"""What a training run is made of: a preset with its recipe, or a configuration file.

The file is a JSON object with three sections, whose keys are the fields of the classes named here:

    "model"  the name of a preset, or the fields of HSAConfig; with the key "preset", the fields
             that differ from that preset
    "train"  Recipe, whose "stages" are a list of Stage; null as "mixture" of a stage, the default
             here, means whole documents with borders
    "data"   OwnText; without this section, the course's corpus
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from hsa_mini.checks import quoted
from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.data.own_text import OwnText
from hsa_mini.data.tokenizer import VOCAB_SIZE
from hsa_mini.files.reading import read_json
from hsa_mini.training.mixture import Mixture
from hsa_mini.training.recipes import RECIPES, Recipe, Stage, recipe_settings

SECTIONS = ("model", "train", "data")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Settings:
    """What to train, how and on what. name: that of the preset or of the file. data: None means the
    course's corpus.
    """

    name: str
    config: HSAConfig
    recipe: Recipe
    data: OwnText | None = None

    def __post_init__(self) -> None:
        """Raise ValueError if parts do not fit together."""
        if self.data is None and self.config.vocab_size < VOCAB_SIZE:
            raise ValueError(
                f"model.vocab_size: got {self.config.vocab_size}, "
                f"accepted is at least {VOCAB_SIZE} for the default text"
            )
        if not self.recipe.steps:
            raise ValueError("steps: got 0 in all stages, accepted is at least 1")
        for stage in self.recipe.stages:
            stage.config(self.config)
            own_tokenizer = self.data is not None and self.data.tokenizer is not None
            if own_tokenizer and stage.mixture is not None:
                raise ValueError(
                    "tokenizer: got one of your own with a mixture, accepted is "
                    '"mixture": null in every stage: the questions are written for the default one'
                )

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it goes on with."""
        known = PRESETS.get(self.name) == self.config
        config = {} if known else {"config": asdict(self.config)}
        return {"preset": self.name, **config, "recipe": recipe_settings(self.recipe)}


def load_settings(given: str, changes: Sequence[tuple[str, Any]] = ()) -> Settings:
    """The settings of a preset with a recipe, or those in a configuration file.

    changes: pairs of a name and a value. A name is `model.FIELD`, `train.FIELD`, `data.FIELD`,
    `stage.FIELD` (of every stage) or `stage.N.FIELD` (of one, counted from 0).

    Raises ValueError, which names the key, what was given and what is accepted.
    """
    values = _sections(given)
    for name, value in changes:
        _change(values, name, value)
    if "train" not in values:
        raise ValueError(f"train: {given} has no such section, accepted is one with stages")
    data = values.get("data")
    return Settings(
        given if given in RECIPES else Path(given).stem,
        _model(values.get("model")),
        _made(Recipe, values["train"], "train", stages=_stages, betas=_tuple),
        None if data is None else _made(OwnText, data, "data", files=_tuple),
    )


def load_config(path: str) -> HSAConfig:
    """The model of a configuration file. Raises ValueError."""
    return _model(_sections(path).get("model"))


def _sections(given: str) -> dict[str, Any]:
    """The sections of a configuration file, or of a preset as such a file would have them."""
    if given in RECIPES:
        return json.loads(json.dumps({"model": {"preset": given}, "train": asdict(RECIPES[given])}))
    if not given.endswith(".json"):
        raise ValueError(
            f"preset: got {quoted(given)}, accepted are {', '.join(RECIPES)}, "
            "and a configuration file FILE.json"
        )
    values = read_json(Path(given))
    for name in values:
        if name not in SECTIONS:
            raise ValueError(
                f"{given}: got unknown key {quoted(name)}, accepted are {', '.join(SECTIONS)}"
            )
    if isinstance(values.get("model"), str):
        values["model"] = {"preset": values["model"]}
    return values


def _change(values: dict[str, Any], name: str, value: Any) -> None:
    """Set one value in the sections. Raises ValueError for a name that leads nowhere."""
    section, *path = name.split(".")
    places: list[Any] = [values.setdefault(section, {})] if section in SECTIONS else []
    if section == "stage":
        train = values.get("train")
        stages = train.get("stages") if isinstance(train, dict) else None
        places = list(stages) if isinstance(stages, list) else []
        if path and path[0].isdecimal():
            places = places[int(path.pop(0)) :][:1]
    for key in path[:-1]:
        places = [place.get(key) if isinstance(place, dict) else None for place in places]
    if not path or not places or not all(isinstance(place, dict) for place in places):
        raise ValueError(
            f"--set: got {quoted(name)}, accepted are model.FIELD, train.FIELD, data.FIELD, "
            "stage.FIELD, and stage.N.FIELD for a stage that exists"
        )
    for place in places:
        place[path[-1]] = value


def _model(value: Any) -> HSAConfig:
    """The configuration with these fields; with the key "preset", they differ from a preset."""
    fields = dict(value) if isinstance(value, dict) else {"preset": value}
    if "preset" in fields:
        name = fields.pop("preset")
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(
                f"model: got {quoted(name)}, accepted are the fields of HSAConfig, "
                f"or one of {', '.join(PRESETS)}"
            )
        fields = {**asdict(PRESETS[name]), **fields}
    try:
        return HSAConfig.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"model.{error}") from None


def _made(kind: type[Made], value: Any, where: str, **readers: Callable[[Any, str], Any]) -> Made:
    """The dataclass `kind` with the fields in a JSON object; readers: field -> how it is read.

    Raises ValueError, which says where the object is.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {quoted(value)}, accepted is a JSON object")
    known = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore
    for name in value:
        if name not in known:
            raise ValueError(
                f"{where}: got unknown key {quoted(name)}, accepted are {', '.join(known)}"
            )
    for name, field in known.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise ValueError(f"{where}: key {name!r} is missing")
    read = {n: readers[n](x, f"{where}.{n}") if n in readers else x for n, x in value.items()}
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def _stages(value: Any, where: str) -> tuple[Stage, ...]:
    stages = enumerate(_tuple(value, where))
    return tuple(_stage(stage, f"{where}[{i}]") for i, stage in stages)


def _stage(value: Any, where: str) -> Stage:
    if isinstance(value, dict):
        value = {"mixture": None, **value}
    return _made(Stage, value, where, mixture=_mixture)


def _mixture(value: Any, where: str) -> Mixture | None:
    return None if value is None else _made(Mixture, value, where)


def _tuple(value: Any, where: str) -> tuple:
    if not isinstance(value, list):
        raise ValueError(f"{where}: got {quoted(value)}, accepted is a list")
    return tuple(value)
