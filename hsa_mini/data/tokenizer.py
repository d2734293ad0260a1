"""Byte-pair encoding: ranks trained once with `rustbpe`, encoded by `tiktoken` from the file in
`data/`.

Every digit is a token of its own, and so is every capital letter that no small letter follows. So
the model reads the keys (`QXZB`) and values (`482913`) of the retrieval tasks symbol by symbol.
"""

import base64
import codecs
import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import tiktoken

from hsa_mini.files.reading import read_bytes
from hsa_mini.files.whole_file import write_file
from hsa_mini.paths import RANKS_FILE, data_dir

PATTERN = (
    r"\p{N}"  # one digit
    r"| ?\p{Lu}?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"  # a word, with its space and its capital
    r"|\p{Lu}"  # one capital letter
    r"| ?[^\s\p{L}\p{N}\p{M}]+[\r\n]*"  # punctuation
    # White space. Without the bound, long runs overflow the stack of the regular expression.
    r"|\s{1,512}(?!\S)|\s{1,512}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|pad|>")
VOCAB_SIZE = 4096
RANKS_SHA256 = "550d425df1d6bce69db52877fa3b9ad1a4469931568c59d2de38ca717b34a4f1"
MAX_RANKS = (1 << 20) - len(SPECIAL_TOKENS)
MAX_RANKS_BYTES = 16 << 20


def train_ranks(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> dict[bytes, int]:
    """Learn merges from `texts`: token bytes -> rank. The special tokens are part of `vocab_size`
    but have no rank.
    """
    import rustbpe  # optional: only training a tokenizer needs it

    # rustbpe is a compiled module without type stubs.
    trainer = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    trainer.train_from_iterator(
        iter(texts), vocab_size=vocab_size - len(SPECIAL_TOKENS), pattern=PATTERN
    )
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def save_ranks(ranks: dict[bytes, int], path: Path) -> None:
    """Write ranks in tiktoken's text format: one `base64 rank` pair per line."""
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for token, rank in sorted(ranks.items(), key=lambda pair: pair[1])
    )
    write_file(path, "".join(lines).encode("ascii"))


@functools.cache
def load_ranks(path: Path | None = None) -> dict[bytes, int]:
    """Token bytes -> rank, from a file that `save_ranks` wrote (default: the course's file).

    Raises ValueError, which names the file, if the course's file is altered or another file does
    not hold the ranks of a byte-pair encoding.
    """
    file = path or data_dir() / RANKS_FILE
    content = read_bytes(file, max_bytes=MAX_RANKS_BYTES)
    if path is None and hashlib.sha256(content).hexdigest() != RANKS_SHA256:
        raise ValueError(
            f"{file}: the file is altered, accepted is the one with sha256 {RANKS_SHA256}"
            " (`git checkout` restores it)"
        )
    try:
        return _parse_ranks(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}, accepted are ranks that `save_ranks` wrote") from None


def _parse_ranks(content: bytes) -> dict[bytes, int]:
    """Token bytes -> rank. Raises ValueError unless every text can be encoded with these ranks."""
    lines = content.decode("ascii").splitlines()
    pairs = [line.split(" ") for line in lines]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if sorted(ranks.values()) != list(range(len(lines))) or len(lines) > MAX_RANKS:
        raise ValueError(f"the ranks of {len(lines)} lines are not 0, 1, 2, ... once each")
    if not {bytes([byte]) for byte in range(256)} <= ranks.keys():
        raise ValueError("not every byte has a rank")
    for token, rank in ranks.items():
        merges = ((token[:i], token[i:]) for i in range(1, len(token)))
        if len(token) != 1 and not any(
            max(ranks.get(left, rank), ranks.get(right, rank)) < rank for left, right in merges
        ):
            raise ValueError(f"the token with rank {rank} does not join two of lower rank")
    return ranks


def ranks_digest(path: Path | None = None) -> str:
    """Eight hexadecimal digits that identify the ranks, for names of files that hold tokens."""
    ranks = sorted(load_ranks(path).items())
    return hashlib.sha256(repr(ranks).encode()).hexdigest()[:8]


@functools.cache
def load_tokenizer(path: Path | None = None) -> tiktoken.Encoding:
    """The course's tokenizer; `encode_ordinary(text)` -> token ids, `decode(ids)` -> text."""
    ranks = load_ranks(path)
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "hsa-mini", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def decode_stream(tokenizer: tiktoken.Encoding, ids: Iterable[int]) -> Iterator[str]:
    """Decode token ids as they arrive. A character whose bytes lie in several tokens is yielded
    with its last byte.

    The parts joined equal `tokenizer.decode` of all ids: bytes that are not UTF-8 become U+FFFD. An
    id without a token also becomes U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if i < tokenizer.n_vocab:
            token = tokenizer.decode_single_token_bytes(i)
        else:
            token = "\N{REPLACEMENT CHARACTER}".encode()
        if text := decoder.decode(token):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def end_of_text(tokenizer: tiktoken.Encoding) -> int:
    """The id of the token that ends every document."""
    return tokenizer.encode_single_token(SPECIAL_TOKENS[0])


def pad(tokenizer: tiktoken.Encoding) -> int:
    """The id of the token that fills a batch."""
    return tokenizer.encode_single_token(SPECIAL_TOKENS[1])
