"""Byte-pair encoding: ranks trained once with `rustbpe`, encoded by `tiktoken` from the file in `data/`.

Every digit and every capital letter that no small letter follows is a token of its own, so that the
keys (`QXZB`) and values (`482913`) of the retrieval tasks are read symbol by symbol.
"""

import base64
import codecs
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

from hsa_mini.paths import data_dir

PATTERN = (
    r"\p{N}"  # one digit
    r"| ?\p{Lu}?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"  # a word, with its space and its capital
    r"|\p{Lu}"  # one capital letter
    r"| ?[^\s\p{L}\p{N}\p{M}]+[\r\n]*"  # punctuation
    r"|\s{1,512}(?!\S)|\s{1,512}"  # white space; without a bound the regular expression runs out of stack on long runs
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
VOCAB_SIZE = 4096
RANKS_FILE = "tokenizer.tiktoken"


def train_ranks(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> dict[bytes, int]:
    """Learn merges from `texts`; returns token bytes -> rank, leaving room for the special tokens."""
    import rustbpe  # only whoever trains a tokenizer needs it

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(
        iter(texts), vocab_size=vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN
    )
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def save_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Write ranks in tiktoken's text format: one `base64 rank` pair a line."""
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda x: x[1])
    )
    path.write_text("".join(lines), encoding="ascii")


@functools.cache
def load_tokenizer(path: Path | None = None) -> tiktoken.Encoding:
    """The course's tokenizer; `encode_ordinary(text)` -> token ids, `decode(ids)` -> text."""
    path = path or data_dir() / RANKS_FILE
    pairs = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "hsa-mini", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def decode_stream(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids as they come: a character whose bytes lie in several tokens appears with its last byte.

    Joined it is `tokenizer.decode` of them all: bytes that are no UTF-8 become U+FFFD; so does an id without a token.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        token = (
            tokenizer.decode_single_token_bytes(i)
            if i < tokenizer.n_vocab
            else "\N{REPLACEMENT CHARACTER}".encode()
        )
        if text := decoder.decode(token):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def end_of_text(tokenizer: tiktoken.Encoding) -> int:
    return tokenizer.encode_single_token(SPECIAL_TOKENS[0])


def pad(tokenizer: tiktoken.Encoding) -> int:
    return tokenizer.encode_single_token(SPECIAL_TOKENS[1])
