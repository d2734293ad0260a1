"""The model that a command uses: a shipped one by its name, or the one in a folder."""

from pathlib import Path

from hsa_mini.config import MAX_TOKENS
from hsa_mini.paths import data_dir


def shipped_models() -> dict[str, Path]:
    """The folders of the models that come with the package, by name."""
    home = data_dir() / "checkpoints"
    if not home.is_dir():
        return {}
    return {path.name: path for path in sorted(home.iterdir()) if path.is_dir()}


def checkpoint_folder(given: str) -> Path:
    """The folder of the shipped model named `given`, or else the path `given` itself."""
    return shipped_models().get(given, Path(given))


def read_model(argument: str, given: str, device, *, dtype=None):
    """The model that is shipped under the name `given`, or the one in the folder `given`; for the
    dtype see `HSAModel.from_pretrained`.

    Raises ValueError, which names the argument, if there is none or if its vocabulary is too small.
    """
    from hsa_mini.data.tokenizer import load_tokenizer
    from hsa_mini.hsa_model import HSAModel

    folder = checkpoint_folder(given)
    try:
        model = HSAModel.from_pretrained(folder, device=device, dtype=dtype)
        symbols = load_tokenizer().n_vocab
        if model.config.vocab_size < symbols:
            raise ValueError(
                f"{folder} knows {model.config.vocab_size} tokens, "
                f"accepted is a model of at least {symbols}"
            )
    except (ValueError, OSError) as error:
        reason = str(error).removeprefix("path: ")
        shipped = ", ".join(shipped_models()) or "none"
        raise ValueError(f"{argument}: {reason} (shipped with the package: {shipped})") from None
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
    """Raise ValueError if a text of `tokens` tokens is too short for a task.

    The text must hold the sentences and the question of the task, and the needle must lie outside
    the window of a model with this configuration. Every problem of a task takes equally many
    tokens.
    """
    import numpy as np

    from hsa_mini.tasks.forms import TASKS

    problem = TASKS[task](np.random.default_rng(0), distractors=distractors)
    least = problem.min_tokens(config.chunk_size, config.window, border=border)
    if not least <= tokens <= MAX_TOKENS:
        raise ValueError(f"{argument}: got {tokens}, accepted is {least} to {MAX_TOKENS}")
