"""Text that the user names: files, folders and patterns, read as documents of token ids.

A `.jsonl` file holds one document on every line and a `.parquet` file one in every row. A `.bin`
file holds token ids, as `tokens.bin` of a run does. Any other file is one document of UTF-8 text.
"""

import glob
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hsa_mini.checks import check_integer, check_number, quoted
from hsa_mini.data.corpus import text_blocks
from hsa_mini.data.encoder import TextEncoder
from hsa_mini.data.text_files import is_regular, is_text, walk_files
from hsa_mini.files.reading import open_regular


@dataclass(frozen=True)
class OwnText:
    """Which text to train on, and how it is read.

    files: paths, folders (with all that they hold) and patterns. tokenizer: a file (see
    `load_encoder`); None: the course's. column: the key of `.jsonl` and the column of `.parquet`
    that hold the text. held_out: the share of the tokens that only the held-out loss reads, at the
    end of the text. end_token: the id that ends a document in `.bin`; None: the tokenizer's.

    Raises ValueError for values of another type and shares outside 0 to 0.5.
    """

    files: tuple[str, ...]
    tokenizer: str | None = None
    column: str = "text"
    held_out: float = 0.01
    end_token: int | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.files, tuple) and all(isinstance(x, str) for x in self.files)
        if not self.files or not named:
            raise ValueError(f"files: got {quoted(self.files)}, accepted is a list of paths")
        for name, accepted in (("tokenizer", str | None), ("column", str)):
            if not isinstance(getattr(self, name), accepted):
                raise ValueError(f"{name}: got {quoted(getattr(self, name))}, accepted is a string")
        check_number("held_out", self.held_out, 0, 0.5)
        if self.end_token is not None:
            check_integer("end_token", self.end_token, 0)


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files that paths, folders and patterns name, each once, in order.

    Of a folder, all regular files that are not hidden (see `text_files`). Raises ValueError if one
    of the patterns names no file, and OSError for a folder that cannot be listed.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(filter(is_regular, walk_files(path)))
        else:
            paths = [path] if path.exists() else map(Path, glob.glob(pattern, recursive=True))
            files = sorted(path for path in paths if path.is_file())
        if not files:
            raise ValueError(
                f"data: got {quoted(pattern)}, which names no file; "
                "accepted are files, folders and patterns such as 'texts/*.txt'"
            )
        found |= dict.fromkeys(files)
    return list(found)


def readable_files(text: OwnText, vocab_size: int, dtype: np.dtype) -> tuple[list[Path], int]:
    """The files of `text` that can be read, and how many were passed over because they are binary.

    vocab_size and dtype are those of the ids in `.bin` files. Raises ValueError, which names the
    file, for a `.parquet` file without the column, a `.jsonl` file with a line of another kind, a
    `.bin` file with other ids, and if no file is left; ImportError for `.parquet` without pyarrow.
    """
    files = []
    found = find_files(text.files)
    for path in tqdm(found, desc="checking the files", unit="file", delay=3):
        if path.suffix == ".parquet":
            _check_parquet(path, text.column)
        elif path.suffix == ".bin":
            _check_ids(path, vocab_size, dtype)
        elif not is_text(path):
            continue
        elif path.suffix == ".jsonl":
            deque(_lines(path, text.column), maxlen=0)  # raises for the first wrong line
        files.append(path)
    skipped = len(found) - len(files)
    if not files:
        raise ValueError(
            f"data: got {skipped} files, all binary; accepted are files of UTF-8 text, "
            ".jsonl, .parquet and .bin"
        )
    if not any(path.stat().st_size for path in files):
        raise ValueError(f"data: got {len(files)} files, all empty; accepted is some text")
    return files, skipped


def read_documents(
    path: Path, text: OwnText, encoder: TextEncoder, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The documents of a file as ids of `dtype`, each with the token that ends it. The file is one
    that `readable_files` found.
    """
    if path.suffix == ".bin":
        ids = np.memmap(path, dtype=dtype, mode="r")
        end = encoder.end if text.end_token is None else text.end_token
        ends = np.flatnonzero(ids == end) + 1
        yield from np.split(ids, ends)
        return
    readers = {".jsonl": _lines, ".parquet": _rows}
    for blocks in readers.get(path.suffix, _whole)(path, text.column):
        ids = [np.array(encoder.encode(block), dtype=dtype) for block in blocks]
        yield np.concatenate([*ids, np.array([encoder.end], dtype=dtype)])


def _whole(path: Path, column: str) -> Iterator[Iterator[str]]:
    with open_regular(path) as file:
        yield text_blocks(file)


def _lines(path: Path, column: str) -> Iterator[list[str]]:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            found = value.get(column) if isinstance(value, dict) else None
            if not isinstance(found, str):
                raise ValueError(
                    f"data: line {number} of {path} is {quoted(line.decode())}, "
                    f"accepted is a JSON object with a string {column!r}"
                )
            yield [found]


def _rows(path: Path, column: str) -> Iterator[list[str]]:
    for batch in _parquet(path).iter_batches(columns=[column]):
        for value in batch.column(0).to_pylist():
            yield [value or ""]


def _parquet(path: Path):
    """The parquet file. Raises ValueError, and ImportError without pyarrow."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"data: {path} needs the package pyarrow (`pip install 'hsa-mini[train]'`)"
        ) from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"data: {path} is no parquet file ({error})") from None


def _check_parquet(path: Path, column: str) -> None:
    """Raise ValueError unless the file has the column, and it holds strings."""
    schema = _parquet(path).schema_arrow
    kinds = {field.name: str(field.type) for field in schema}
    if kinds.get(column) not in ("string", "large_string", "string_view"):
        got = f"is {kinds[column]}" if column in kinds else "is missing"
        raise ValueError(
            f"data: column {quoted(column)} of {path} {got}, accepted is a column of strings "
            f"(`--set data.column=NAME`; the file has {quoted(sorted(kinds))})"
        )


def _check_ids(path: Path, vocab_size: int, dtype: np.dtype) -> None:
    """Raise ValueError unless the file holds ids of `dtype` below `vocab_size`."""
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise ValueError(
            f"data: {path} has {size} bytes, accepted are token ids of {dtype.itemsize} bytes"
        )
    largest = int(np.memmap(path, dtype=dtype, mode="r").max())
    if largest >= vocab_size:
        raise ValueError(
            f"data: {path} holds the id {largest}, accepted are {dtype} ids "
            f"below the model's vocab_size ({vocab_size})"
        )
