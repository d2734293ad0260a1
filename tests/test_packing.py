"""Packed rows hold every token of every document once, each document from a chunk's border on."""

import itertools
import random

import numpy as np
import pytest

from hsa_mini.data.packing import fill_row, pack_documents, padding_share


def places(row, chunk_size: int) -> list[int]:
    """Where each piece of a row begins."""
    first, found = 0, []
    for _, _, length in row:
        found.append(first)
        first += -(-length // chunk_size) * chunk_size
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_every_token_once_and_cut_only_what_is_too_long(seed):
    draw = random.Random(seed)
    chunk_size = draw.choice([1, 4, 7, 64])
    row_length = draw.choice([1, 5, 64, 100, 1024])
    lengths = [int(draw.expovariate(2 / row_length)) for _ in range(draw.randrange(200))]
    rows = pack_documents(lengths, row_length, chunk_size)
    pieces = sorted(piece for row in rows for piece in row)
    want = [
        (document, start, min(row_length, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, row_length)
    ]
    assert pieces == want
    for row in rows:
        assert row and places(row, chunk_size)[-1] + row[-1][2] <= row_length
    if rows:
        share = padding_share(rows, row_length)
        assert share == pytest.approx(1 - sum(lengths) / (len(rows) * row_length))
    assert rows == pack_documents(tuple(lengths), row_length, chunk_size)


def test_rows_by_hand():
    # 14 tokens are cut at 12. The 5 take two chunks of 4, so that the 4 fill their row.
    assert pack_documents([14, 5, 0, 4], 12, 4) == [
        [(0, 0, 12)],
        [(0, 12, 2)],
        [(1, 0, 5), (3, 0, 4)],
    ]


def test_no_row_is_opened_for_a_piece_that_another_row_could_hold():
    draw = random.Random(0)
    lengths = [draw.randrange(1, 1500) for _ in range(2000)]
    rows = pack_documents(lengths, 1000, 64)
    ends = [places(row, 64)[-1] + -(-row[-1][2] // 64) * 64 for row in rows]
    for (row, end), (other, its_end) in itertools.combinations(zip(rows, ends), 2):
        assert end + other[0][2] > 1000 or its_end + row[0][2] > 1000
    assert padding_share(rows, 1000) < 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([3, -1], 8, 4), r"lengths\[1\]: got -1, accepted is an integer of at least 0"),
        (([3], 0, 4), "row_length: got 0, accepted is an integer of at least 1"),
        (([3], 8, 0.5), "chunk_size: got 0.5, accepted is an integer of at least 1"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        pack_documents(*arguments)


def test_a_filled_row_by_hand():
    documents = [np.arange(10, 15), np.arange(20, 40)]
    ids, predicted, starts = fill_row([(1, 12, 2), (0, 0, 5), (1, 14, 1)], documents, 13, 4, 0)
    assert ids.tolist() == [32, 33, 0, 0, 10, 11, 12, 13, 14, 0, 0, 0, 34]
    assert predicted.nonzero()[0].tolist() == [1, 5, 6, 7, 8]
    assert starts.tolist() == [0] * 4 + [4] * 8 + [12]
