"""How a user's text becomes token ids and ids become text: the course's tokenizer, ranks that
`save_ranks` wrote, or a `tokenizer.json` of Hugging Face.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from hsa_mini.data.tokenizer import (
    MAX_RANKS_BYTES,
    decode_stream,
    end_of_text,
    load_tokenizer,
    ranks_digest,
)
from hsa_mini.files.reading import read_bytes, read_json
from hsa_mini.paths import RANKS_FILE, TOKENIZER_CONFIG, TOKENIZER_FILE, checkpoint_folder

# The names of the token that ends a document, in tokenizers of others that do not declare it.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class TextEncoder:
    """encode: text -> ids, without special tokens. decode: ids -> text. decode_stream: ids as they
    arrive -> parts of the text, which joined equal what `decode` gives. vocab_size: ids are below
    it. end: the id that ends every document. digest: hexadecimal digits that identify the
    tokenizer.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    decode_stream: Callable[[Iterable[int]], Iterator[str]]
    vocab_size: int
    end: int
    digest: str

    @property
    def dtype(self) -> np.dtype:
        """The smallest dtype that holds all ids: uint16 or uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def array(self, text: str) -> np.ndarray:
        """The ids of a text as an array [tokens] of `dtype`."""
        return np.array(self.encode(text), dtype=self.dtype)

    @property
    def is_default(self) -> bool:
        """Whether it is the course's tokenizer."""
        return self.digest == ranks_digest()


def load_encoder(path: Path | None = None) -> TextEncoder:
    """The encoder in a file, or the course's. A name in `.json` is read with the package
    `tokenizers`; if it gives the ids of the course's tokenizer, it is that one.

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
    return TextEncoder(
        tokenizer.encode_ordinary,
        tokenizer.decode,
        partial(decode_stream, tokenizer),
        tokenizer.n_vocab,
        end_of_text(tokenizer),
        ranks_digest(file),
    )


def checkpoint_encoder(given: str | Path) -> TextEncoder:
    """The tokenizer in the folder of a model (see `checkpoint_folder`), or the course's if the
    folder has none. Raises as `load_encoder` does.
    """
    folder = checkpoint_folder(given)
    own = (folder / name for name in (TOKENIZER_FILE, RANKS_FILE))
    return load_encoder(next((file for file in own if file.is_file()), None))


def _from_json(path: Path) -> TextEncoder:
    try:
        from tokenizers import Tokenizer
        from tokenizers.decoders import DecodeStream
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
    config = path.with_name(TOKENIZER_CONFIG)
    declared = declared_end(read_json(config)) if config.is_file() else None
    names = (*([declared] if isinstance(declared, str) else []), *END_TOKENS)
    found = [i for name in names if (i := tokenizer.token_to_id(name)) is not None]
    if not found:
        raise ValueError(
            f"tokenizer: {path} has no token that ends a document, "
            f"accepted is one with any of {', '.join(END_TOKENS)}"
        )

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    def stream(ids: Iterable[int]) -> Iterator[str]:
        parts = DecodeStream(skip_special_tokens=False)
        seen = []
        said = 0
        for i in ids:
            seen.append(i)
            if part := parts.step(tokenizer, i):
                said += len(part)
                yield part
        if rest := decode(seen)[said:]:  # bytes that are no whole character
            yield rest

    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(content + bytes(str(found[0]), "ascii")).hexdigest()[:8]
    encoder = TextEncoder(encode, decode, stream, size, found[0], digest)
    default = load_encoder()
    return default if _same_ids(encoder, default) else encoder


def declared_end(config: dict) -> str | None:
    """The token that ends a text, from the content of a `tokenizer_config.json`."""
    end = config.get("eos_token")
    return end.get("content") if isinstance(end, dict) else end


def _same_ids(one: TextEncoder, other: TextEncoder) -> bool:
    """Whether two tokenizers encode the text of every token of `other` alike."""
    if (one.vocab_size, one.end) != (other.vocab_size, other.end):
        return False
    texts = (other.decode([i]) for i in range(other.vocab_size))
    return all(one.encode(text) == other.encode(text) for text in texts)
