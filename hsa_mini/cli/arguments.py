"""What the words of a command line mean: numbers and their ranges, devices, models. Raises one line that names the argument."""

import argparse
from pathlib import Path

from hsa_mini.config import MOST_TOKENS
from hsa_mini.paths import data_dir


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, accepted is an integer") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text[:80]!r}, accepted is a number") from None


def check_choices(name: str, given: list[str], accepted) -> None:
    for word in given:
        if word not in accepted:
            raise ValueError(f"{name}: got {word[:80]!r}, accepted are {', '.join(accepted)}")


def check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:  # nan is in no range
        raise ValueError(f"{name}: got {value}, accepted is {least} to {most}")


def choose_device(name: str):
    """The device of a name; "auto" is a GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = torch.cuda.device_count()
    accepted = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in accepted:
        raise ValueError(f"--device: got {name!r}, accepted here are {', '.join(accepted)}")
    return torch.device(name)


def shipped_models() -> dict[str, Path]:
    """Folders of the models that come with the package, by name."""
    home = data_dir() / "checkpoints"
    return (
        {path.name: path for path in sorted(home.iterdir()) if path.is_dir()}
        if home.is_dir()
        else {}
    )


def checkpoint_folder(given: str) -> Path:
    """Where the model is that is shipped under a name, or in a folder."""
    return shipped_models().get(given, Path(given))


def read_model(argument: str, given: str, device):
    """The model that is shipped under a name, or in a folder. Raises ValueError that names the argument."""
    from hsa_mini.checkpoint.weights import load_model
    from hsa_mini.data.tokenizer import load_tokenizer

    folder = checkpoint_folder(given)
    try:
        model = load_model(folder, device=device)
        symbols = load_tokenizer().n_vocab
        if model.config.vocab_size < symbols:
            raise ValueError(
                f"{folder} knows {model.config.vocab_size} tokens, accepted is a model of at least {symbols}"
            )
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix("path: ")
        raise ValueError(
            f"{argument}: {reason} (shipped with the package: {', '.join(shipped_models()) or 'none'})"
        ) from None
    return model


def check_length(
    argument: str,
    tokens: int,
    config,
    task: str = "s_niah",
    *,
    distractors: int = 0,
    border: bool = False,
) -> None:
    """Raise ValueError if sentences and question of `task` do not fit into `tokens` tokens for a model of this window."""
    import numpy as np

    from hsa_mini.tasks.forms import TASKS

    problem = TASKS[task](np.random.default_rng(0), distractors=distractors)  # any other is as long
    check_range(
        argument,
        tokens,
        problem.min_tokens(config.chunk_size, config.window, border=border),
        MOST_TOKENS,
    )
