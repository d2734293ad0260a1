"""The model that a command uses: a shipped one by its name, or the one in a folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from hsa_mini.config import MAX_TOKENS
from hsa_mini.paths import checkpoint_folder, shipped_models

if TYPE_CHECKING:
    from hsa_mini.data.encoder import TextEncoder


def read_encoder(argument: str, given: str | Path) -> "TextEncoder":
    """The tokenizer in the folder of a model, or the course's if there is none.

    Raises ValueError, which names the argument, for a file that holds no tokenizer.
    """
    from hsa_mini.data.encoder import checkpoint_encoder

    try:
        return checkpoint_encoder(given)
    except ValueError as error:
        raise ValueError(f"{argument}: {str(error).removeprefix('tokenizer: ')}") from None


def read_model(
    argument: str,
    given: str | Path,
    device,
    *,
    dtype=None,
    encoder: "TextEncoder | None" = None,
):
    """The model that is shipped under the name `given`, or the one in the folder `given`; for the
    dtype see `HSAModel.from_pretrained`.

    encoder: its tokenizer, from `read_encoder`; None accepts only the course's. Raises ValueError,
    which names the argument, if there is no model, if its vocabulary is too small, or if its
    tokenizer is not accepted.
    """
    from hsa_mini.hsa_model import HSAModel

    folder = checkpoint_folder(given)
    found = encoder or read_encoder(argument, given)
    try:
        model = HSAModel.from_pretrained(folder, device=device, dtype=dtype)
        if not (encoder or found.is_default):
            raise ValueError(
                f"{folder} has a tokenizer of its own, accepted is a model for the tokenizer of "
                "this project (`generate`, `demo` and transformers accept the others)"
            )
        if model.config.vocab_size < found.vocab_size:
            raise ValueError(
                f"{folder} knows {model.config.vocab_size} tokens, "
                f"accepted is a model of at least {found.vocab_size}"
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
    encoder: "TextEncoder | None" = None,
) -> None:
    """Raise ValueError if a text of `tokens` tokens is too short for a task.

    The text must hold the sentences and the question of the task, and the needle must lie outside
    the window of a model with this configuration. Every problem of a task takes equally many
    tokens of the course's tokenizer, and nearly as many of others.
    """
    import numpy as np

    from hsa_mini.tasks import sentences
    from hsa_mini.tasks.forms import TASKS

    problem = TASKS[task](np.random.default_rng(0), distractors=distractors)
    sizes = (config.chunk_size, config.window)
    encode = encoder.array if encoder else sentences.encode
    least = problem.min_tokens(*sizes, border=border, encode=encode)
    if not least <= tokens <= MAX_TOKENS:
        raise ValueError(f"{argument}: got {tokens}, accepted is {least} to {MAX_TOKENS}")
