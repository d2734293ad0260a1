"""The files of a Hugging Face checkpoint that go with its weights: the tokenizer, and the options
of generation.
"""

import json
from pathlib import Path
from typing import Any

from hsa_mini.checkpoint.weights import CONFIG
from hsa_mini.checks import quoted
from hsa_mini.data.encoder import declared_end
from hsa_mini.files.reading import read_bytes
from hsa_mini.paths import TOKENIZER_CONFIG, TOKENIZER_FILE

GENERATION = "generation_config.json"
OTHERS = (TOKENIZER_CONFIG, "special_tokens_map.json", "chat_template.jinja", GENERATION)
MAX_BYTES = 64 << 20


def read_companions(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The content of the files by name, for the folder of a converted model. config: the content of
    the checkpoint's config.json.

    Raises ValueError if there is no fast tokenizer, and if it is not that of the weights: an id
    lies outside the vocabulary, it uses less than half of the vocabulary, or it ends a text by
    another token than the configuration.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise ValueError(f"folder: {folder} has no {TOKENIZER_FILE}, accepted is a fast tokenizer")
    names = [name for name in (TOKENIZER_FILE, *OTHERS) if (folder / name).is_file()]
    contents = {name: read_bytes(folder / name, max_bytes=MAX_BYTES) for name in names}
    try:
        texts = {name: content.decode() for name, content in contents.items()}
        ids = _ids(json.loads(texts[TOKENIZER_FILE]))
        symbols = max(ids.values()) + 1
        end = declared_end(json.loads(texts.get(TOKENIZER_CONFIG, "{}")))
        end_id = ids.get(str(end))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f"{folder / TOKENIZER_FILE}: accepted is a file of `tokenizers`") from None
    vocabulary = config["vocab_size"]
    if not vocabulary <= 2 * symbols <= 2 * vocabulary:
        raise ValueError(
            f"{folder / TOKENIZER_FILE}: got {symbols} tokens, accepted are "
            f"{(vocabulary + 1) // 2} to {vocabulary} for the vocabulary of the weights"
        )
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    if end is not None and ends != [None] and end_id not in ends:
        raise ValueError(
            f"{folder / TOKENIZER_CONFIG}: got eos_token {quoted(end)} with id {end_id}, "
            f"accepted is eos_token_id of {CONFIG} ({quoted(config['eos_token_id'])})"
        )
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    return {GENERATION: json.dumps(special) + "\n", **texts}


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    """The id of every token. A unigram model lists its tokens, with scores, in the order of ids."""
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
