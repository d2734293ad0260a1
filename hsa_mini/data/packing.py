"""Packing: several documents share one row of tokens, and no document is cut without need.

    row_length 20, chunk_size 4, documents of 6, 9 and 3 tokens:  | aaaaaa..bbbbbbbbb... | cccc...

Every document begins at a multiple of the chunk size, so no chunk mixes documents. The tokens
between documents are padding.
"""

from bisect import bisect_right, insort
from collections.abc import Sequence

import numpy as np

from hsa_mini.checks import check_integer

Piece = tuple[int, int, int]  # document, first token in the document, number of tokens


def pack_documents(lengths: Sequence[int], row_length: int, chunk_size: int) -> list[list[Piece]]:
    """The pieces of every row, in order. Each piece begins at the first multiple of `chunk_size`
    behind the piece before it.

    lengths: tokens of each document. A document longer than `row_length` is cut into pieces of
    `row_length` tokens and a rest; empty documents are left out. Long pieces are placed first, each
    into the fullest row that can hold it. The result is the same for the same lengths. Raises
    ValueError for a length below 0, a row length below 1 or a chunk size below 1.
    """
    check_integer("row_length", row_length, 1)
    check_integer("chunk_size", chunk_size, 1)
    for i, length in enumerate(lengths):
        check_integer(f"lengths[{i}]", length, 0)
    pieces = [
        (document, start, min(length - start, row_length))
        for document, length in enumerate(lengths)
        for start in range(0, length, row_length)
    ]
    rows: list[list[Piece]] = []
    open_rows: dict[int, list[int]] = {}  # chunks in use -> the rows that use so many
    counts: list[int] = []  # the keys of `open_rows`, sorted
    for piece in sorted(pieces, key=lambda piece: -piece[2]):
        # So many chunks may be in use in front of the piece.
        place = bisect_right(counts, (row_length - piece[2]) // chunk_size)
        if place:
            used = counts[place - 1]
            row = open_rows[used].pop()
            if not open_rows[used]:
                del open_rows[used], counts[place - 1]
            rows[row].append(piece)
        else:
            used = 0
            row = len(rows)
            rows.append([piece])
        used += -(-piece[2] // chunk_size)
        if used not in open_rows:
            insort(counts, used)
        open_rows.setdefault(used, []).append(row)
    return sorted(rows)


def padding_share(rows: Sequence[Sequence[Piece]], row_length: int) -> float:
    """The share of the rows' tokens that is padding: 0.0 if every row is full or there is none."""
    tokens = sum(piece[2] for row in rows for piece in row)
    return 1 - tokens / (len(rows) * row_length) if rows else 0.0


def fill_row(
    row: Sequence[Piece],
    documents: Sequence[np.ndarray],
    row_length: int,
    chunk_size: int,
    padding: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row of `pack_documents` as arrays [row_length]: ids int64; predicted, a bool; and
    document_starts int32, the place where each token's piece begins.

    documents: the ids of each document. padding: the id behind a piece. Neither padding nor the
    first token of a piece is predicted, because what stands in front of it is another document.
    Padding belongs to the piece before it, of which no token sees it.
    """
    ids = np.full(row_length, padding, np.int64)
    predicted = np.zeros(row_length, bool)
    document_starts = np.zeros(row_length, np.int32)
    place = 0
    for document, start, length in row:
        ids[place : place + length] = documents[document][start : start + length]
        predicted[place + 1 : place + length] = True
        document_starts[place:] = place
        place += -(-length // chunk_size) * chunk_size
    return ids, predicted, document_starts
