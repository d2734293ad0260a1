"""The model that a command uses: a shipped one by its name, or the one in a folder."""

from pathlib import Path

from hsa_mini.config import MAX_TOKENS
from hsa_mini.files.whole_folder import read_manifest
from hsa_mini.paths import RANKS_FILE, TOKENIZER_FILE, checkpoint_folder, shipped_models


def own_tokenizer(given: str | Path) -> Path | None:
    """The tokenizer's file of a model that has another tokenizer than the course's.

    None also for a folder without a model, which `read_model` refuses.
    """
    folder = checkpoint_folder(given)
    try:
        names = read_manifest(folder)
    except (ValueError, OSError):
        return None
    own = (TOKENIZER_FILE, RANKS_FILE)
    return next((folder / name for name in own if name in names), None)


def read_model(argument: str, given: str | Path, device, *, dtype=None, own_ranks: bool = False):
    """The model that is shipped under the name `given`, or the one in the folder `given`; for the
    dtype see `HSAModel.from_pretrained`.

    own_ranks: a model with ranks of its own (see `own_tokenizer`) is accepted. Raises ValueError,
    which names the argument, if there is no model, if its vocabulary is too small, or if its
    tokenizer is not accepted.
    """
    from hsa_mini.data.tokenizer import load_tokenizer
    from hsa_mini.hsa_model import HSAModel

    folder = checkpoint_folder(given)
    try:
        model = HSAModel.from_pretrained(folder, device=device, dtype=dtype)
        ranks = own_tokenizer(given)
        if ranks is not None and not (own_ranks and ranks.name == RANKS_FILE):
            raise ValueError(
                f"{folder} has a {ranks.name} of its own, accepted is a model for the tokenizer of "
                "this project (`hsa_mini.integrations.huggingface` reads the others)"
            )
        symbols = load_tokenizer(ranks and ranks.resolve()).n_vocab
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
