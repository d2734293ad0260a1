"""S-NIAH samples: exactly as long as asked, the needle where it was asked for, and nothing written over it.

Dimensions: T tokens, S chunk size, W window.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import word_tokens

from hsa_mini.data.tasks import DISTRACTORS, KEY_LETTERS, LETTERS, VALUE_DIGITS, Needle, NeedleTask, tile
from hsa_mini.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()
TASK = NeedleTask(TOKENIZER)
n, q = TASK.sentence_tokens, TASK.question_tokens
SIZES = st.sampled_from([(4, 8), (16, 32), (64, 128)])  # (S, W) of debug, nano and mini
DEPTHS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))


def draw(seed=0, *, tokens=1000, depth=0.5, sizes=(16, 32), **options):
    S, W = sizes
    return TASK.sample(np.random.default_rng(seed), tokens=tokens, depth=depth, chunk_size=S, window=W, **options)


def least(sizes) -> int:
    return TASK.least_tokens(*sizes)


def needle_places(ids) -> list[int]:
    """Where sentences of a needle's form start."""
    fixed = TASK._sentence[1] < 0
    rows = np.lib.stride_tricks.sliding_window_view(ids, n)
    return np.flatnonzero((rows[:, fixed] == TASK._sentence[0][fixed]).all(axis=1)).tolist()


@given(SIZES, st.integers(0, 3000), DEPTHS, st.integers(0, 1000), st.booleans())
def test_a_sample_has_the_stated_length_and_nothing_overlaps(sizes, more, depth, seed, control):
    tokens = least(sizes) + more
    sample = draw(seed, tokens=tokens, depth=depth, sizes=sizes, control=control)
    haystack = tile(word_tokens(), tokens)
    ids = sample.apply(haystack)
    assert ids.shape == (tokens,) and ids.dtype == np.int64

    ranges = sorted((first, first + len(patch)) for first, patch in sample.patches)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise([(0, 0), *ranges, (tokens, tokens)]))
    assert len(ranges) == DISTRACTORS + 2 - control
    assert ranges[-1] == (tokens - q, tokens)  # the question ends the text: the answer follows
    touched = np.zeros(tokens, dtype=bool)
    for first, last in ranges:
        touched[first:last] = True
    assert np.array_equal(ids[~touched], haystack[~touched])

    text = TOKENIZER.decode(ids.tolist())
    assert text.count(sample.needle.sentence) == 1 - control
    assert text.count(sample.needle.key) == 3 - control  # twice in the question
    assert text.endswith(sample.needle.question)
    assert TOKENIZER.decode(sample.answer.tolist()) == sample.needle.answer
    places = needle_places(ids)
    assert len(places) == DISTRACTORS + 1 - control and (control or sample.start in places)
    keys = {TOKENIZER.decode(ids[place + 6 : place + 10].tolist()) for place in places}
    assert len(keys) == len(places) and (sample.needle.key in keys) != control


@given(SIZES, st.integers(0, 3000), st.integers(0, 1000))
def test_depth_runs_from_the_first_chunk_to_the_last_outside_the_window(sizes, more, seed):
    (S, W), tokens = sizes, least(sizes) + more
    starts = [draw(seed, tokens=tokens, depth=depth, sizes=sizes).start for depth in np.linspace(0, 1, 11)]
    assert starts[0] == 0 and starts == sorted(starts)
    end = starts[-1] + n
    assert end % S == 0  # it fills the end of a chunk, which is complete,
    assert tokens - max(W, q) - S < end <= tokens - max(W, q)  # the last one that neither window nor question reaches
    assert np.allclose(starts, np.linspace(0, starts[-1], 11), atol=0.5)
    assert draw(seed, tokens=tokens, depth=0, sizes=sizes).needle_chunks(S, n)[0] == 0
    assert draw(seed, tokens=tokens, depth=1, sizes=sizes).needle_chunks(S, n)[-1] == end // S - 1


@given(st.integers(1, 128), st.integers(0, 2000), st.integers(1, 40))
def test_needle_chunks_are_those_that_hold_a_token_of_it(S, start, length):
    sample = draw()
    moved = type(sample)(**{**vars(sample), "start": start})
    assert moved.needle_chunks(S, length) == sorted({place // S for place in range(start, start + length)})


def test_a_sample_is_a_function_of_its_seed():
    first, again, other = draw(7), draw(7), draw(8)
    assert first.needle == again.needle != other.needle
    for (place, patch), (same_place, same_patch) in zip(first.patches, again.patches, strict=True):
        assert place == same_place and np.array_equal(patch, same_patch)
    assert [place for place, _ in first.patches] != [place for place, _ in other.patches]


def test_keys_and_values_have_the_stated_form_and_are_spread_evenly():
    needles = TASK.needles(np.random.default_rng(0), 2000)
    assert len({needle.key for needle in needles}) == 2000
    for needle in needles:
        assert len(needle.key) == KEY_LETTERS and set(needle.key) <= set(LETTERS)
        assert len(needle.value) == VALUE_DIGITS and needle.value.isdecimal()
    for symbols, drawn in ((LETTERS, "".join(x.key for x in needles)), ("0123456789", "".join(x.value for x in needles))):
        share = len(drawn) / len(symbols)
        assert all(0.8 * share < drawn.count(symbol) < 1.2 * share for symbol in symbols)


def test_keys_of_the_text_are_not_drawn():
    absent = [needle.key for needle in TASK.needles(np.random.default_rng(3), 4)]
    drawn = TASK.needles(np.random.default_rng(3), 6, absent_from=f"... {absent[0]}, x{absent[2]}y")
    keys = [needle.key for needle in drawn]
    assert not {absent[0], absent[2]} & set(keys) and {absent[1], absent[3]} <= set(keys)


def test_a_text_with_every_key_is_refused():
    every = " ".join("".join(letters) for letters in itertools.product(LETTERS, repeat=KEY_LETTERS))
    with pytest.raises(ValueError, match="^absent_from: .*accepted is"):
        draw(absent_from=every)


@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan"), float("inf")])
def test_depth_out_of_range(depth):
    with pytest.raises(ValueError, match=f"^depth: got {depth}, accepted is 0 to 1$"):
        draw(depth=depth)


@pytest.mark.parametrize("sizes", [(4, 8), (16, 32), (64, 128)])
def test_too_few_tokens(sizes):
    draw(tokens=least(sizes), sizes=sizes, depth=1.0)
    with pytest.raises(ValueError, match=f"^tokens: got {least(sizes) - 1}, accepted are at least {least(sizes)}$"):
        draw(tokens=least(sizes) - 1, sizes=sizes)


def test_needles_fit_the_shortest_demo_of_every_shipped_size():
    assert least((64, 128)) <= 1024


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=50), st.integers(0, 200), st.integers(0, 200))
def test_tile_starts_over_at_the_end(text, tokens, first):
    got = tile(np.array(text, dtype=np.uint16), tokens, first)
    assert got.tolist() == [text[(first + i) % len(text)] for i in range(tokens)]


def test_a_needle_says_what_it_is():
    needle = Needle("QXZB", "482913")
    assert needle.sentence == " The secret code of QXZB is 482913."
    assert needle.question + needle.answer == "\nWhat is the secret code of QXZB?\nThe secret code of QXZB is 482913."
