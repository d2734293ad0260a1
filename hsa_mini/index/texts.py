"""The text of one file, or of all text files in a folder, as one sequence of tokens that knows the
file and the line of each token.
"""

import functools
import os
import stat
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from hsa_mini.data.corpus import load_text
from hsa_mini.data.text_files import is_regular, is_text, walk_files
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer

MAX_TOKENS = 1 << 27  # the longest text that was tried
MAX_FILES = 20_000


@dataclass(frozen=True)
class Text:
    """tokens uint16 [n] of all files, with the end-of-text token between two files.

    names, starts: of each file, its path below the folder and its first token.
    """

    tokens: np.ndarray
    names: list[str]
    starts: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def same_as(self, other: "Text") -> bool:
        """Whether files and tokens are the same."""
        same = (self.names, self.starts) == (other.names, other.starts)
        return same and np.array_equal(self.tokens, other.tokens)

    def lines(self, first: int, last: int) -> tuple[str, int, int]:
        """The file in which token `first` lies, and the lines, counted from 1, of this token and of
        the last of the tokens [first, last) in this file.
        """
        file = bisect_right(self.starts, first) - 1
        start, end = [*self.starts, len(self)][file : file + 2]
        breaks = _line_breaks()[self.tokens[start : max(min(last, end), first + 1) - 1]]
        return self.names[file], 1 + int(breaks[: first - start].sum()), 1 + int(breaks.sum())


def encode_files(files: Iterable[tuple[str, Path]]) -> Text:
    """The text of files, given by name and path, in this order; empty files are left out.

    Raises ValueError, which names the file, for what is not UTF-8 text, and for more than
    `MAX_TOKENS` tokens.
    """
    parts = []
    names = []
    starts = []
    total = 0
    for name, path in files:
        tokens = load_text(path, max_tokens=MAX_TOKENS + 1 - total, name="TEXT").tokens
        if not len(tokens):
            continue
        if parts:
            tokens = np.concatenate(([end_of_text(load_tokenizer())], tokens)).astype(np.uint16)
        names.append(name)
        starts.append(total + bool(parts))
        parts.append(tokens)
        total += len(tokens)
        if total > MAX_TOKENS:
            raise ValueError(
                f"TEXT: got more than {MAX_TOKENS:,} tokens, accepted are {MAX_TOKENS:,} at most"
            )
    return Text(np.concatenate([np.zeros(0, np.uint16), *parts]), names, starts)


def find_files(path: Path, *, without: Path) -> tuple[dict[str, Path], int]:
    """The text files of a folder by name, sorted, and how many others were skipped; or the text
    file `path` alone.

    Hidden files and folders, and the folder `without`, do not count. Binary files (see
    `text_files`), links, pipes and devices are skipped. Raises ValueError for a path that is
    neither a folder nor a text file, for what cannot be read, and for more than `MAX_FILES` files.
    """
    accepted = "accepted is a UTF-8 text file, or a folder of such files"
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISDIR(mode):
            if not stat.S_ISREG(mode) or not is_text(path):
                kind = "is no UTF-8 text" if stat.S_ISREG(mode) else "is no regular file"
                raise ValueError(f"TEXT: {path} {kind}; {accepted}")
            return {path.name: path.absolute()}, 0
        files = list(islice(walk_files(path.absolute(), without=without), MAX_FILES + 1))
        if len(files) > MAX_FILES:
            raise ValueError(f"TEXT: {path} holds more than {MAX_FILES:,} files; {accepted}")
        texts = [file for file in files if is_regular(file) and is_text(file)]
    except OSError as error:
        raise ValueError(
            f"TEXT: cannot read {error.filename or path} ({error.strerror}); {accepted}"
        ) from None
    found = {file.relative_to(path.absolute()).as_posix(): file for file in texts}
    return dict(sorted(found.items())), len(files) - len(texts)


def ordered(found: dict[str, Path], first: Sequence[str]) -> list[tuple[str, Path]]:
    """The files found, as (name, path), those named in `first` first."""
    names = [name for name in first if name in found]
    return [(name, found[name]) for name in dict.fromkeys([*names, *found])]


@functools.cache
def _line_breaks() -> np.ndarray:
    """How many line breaks each token of the vocabulary holds, int64 [vocabulary]."""
    tokenizer = load_tokenizer()
    return np.array([tokenizer.decode([i]).count("\n") for i in range(tokenizer.n_vocab)])
