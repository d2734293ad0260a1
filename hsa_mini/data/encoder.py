"""How a user's text becomes token ids: the course's tokenizer, ranks that `save_ranks` wrote, or a
`tokenizer.json` of Hugging Face.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hsa_mini.data.tokenizer import MAX_RANKS_BYTES, end_of_text, load_tokenizer, ranks_digest
from hsa_mini.files.reading import read_bytes

# The names of the token that ends a document, in tokenizers of others.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class TextEncoder:
    """encode: text -> ids, without special tokens. vocab_size: ids are below it. end: the id that
    ends every document. digest: hexadecimal digits that identify the tokenizer.
    """

    encode: Callable[[str], list[int]]
    vocab_size: int
    end: int
    digest: str


def load_encoder(path: Path | None = None) -> TextEncoder:
    """The encoder in a file, or the course's. A name in `.json` is read with the package
    `tokenizers`.

    Raises ValueError, which names the file, if it holds no tokenizer, or none with a token that
    ends a document; ImportError without that package.
    """
    if path is not None and path.suffix == ".json":
        return _from_json(path)
    file = path and path.resolve()  # tokenizers are cached by their path
    try:
        tokenizer = load_tokenizer(file)
    except OSError as error:
        raise ValueError(f"tokenizer: cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"tokenizer: {error}") from None
    end = end_of_text(tokenizer)
    return TextEncoder(tokenizer.encode_ordinary, tokenizer.n_vocab, end, ranks_digest(file))


def _from_json(path: Path) -> TextEncoder:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError(
            f"tokenizer: {path} needs the package tokenizers (`pip install 'hsa-mini[hf]'`)"
        ) from None
    try:
        content = read_bytes(path, max_bytes=4 * MAX_RANKS_BYTES)
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # the package raises plain exceptions
        raise ValueError(f"tokenizer: {path} holds no tokenizer ({error})") from None
    tokenizer.encode_special_tokens = True  # in a text, their names are plain text
    found = [i for name in END_TOKENS if (i := tokenizer.token_to_id(name)) is not None]
    if not found:
        raise ValueError(
            f"tokenizer: {path} has no token that ends a document, "
            f"accepted is one with any of {', '.join(END_TOKENS)}"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    return TextEncoder(encode, size, found[0], hashlib.sha256(content).hexdigest()[:8])
