"""Samples of every task have the length asked for, and their text gives the answer unharmed.

Dimensions: T tokens, S chunk size, W window.
"""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from material import read, word_tokens

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.tasks.chains import Chain, draw_chains
from hsa_mini.tasks.forms import TASKS, s_niah
from hsa_mini.tasks.needles import VALUE_DIGITS, Needle, ask, draw_needles
from hsa_mini.tasks.placement import place, scatter, tile
from hsa_mini.tasks.sentences import KEY_LETTERS, LETTERS, draw_keys, encode, is_held_out

TOKENIZER = load_tokenizer()
SIZES = st.sampled_from([(4, 8), (16, 32), (64, 128)])  # (S, W) of debug, nano and mini
DEPTHS = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
every_task = pytest.mark.parametrize("task", TASKS)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def draw(
    task="s_niah",
    seed=0,
    *,
    tokens=1000,
    depth=0.5,
    sizes=(16, 32),
    distractors=0,
    absent_from="",
    **options,
):
    source = rng(seed)
    problem = TASKS[task](source, distractors=distractors, absent_from=absent_from)
    return place(
        source, problem, tokens=tokens, depth=depth, chunk_size=sizes[0], window=sizes[1], **options
    )


def least(task: str, sizes, distractors=0, border=False) -> int:
    return TASKS[task](rng(), distractors=distractors).min_tokens(*sizes, border=border)


# (sentences that the question needs, all sentences)
COUNTS = {"s_niah": (1, 6), "mq_niah": (2, 6), "vt": (3, 6)}


@given(
    st.sampled_from(list(TASKS)),
    SIZES,
    st.integers(0, 3000),
    DEPTHS,
    st.integers(0, 1000),
    st.integers(0, 7),
)
def test_a_sample_has_the_stated_length_and_its_answer_is_in_the_text(
    task, sizes, more, depth, seed, distractors
):
    tokens = least(task, sizes, distractors) + more
    sample = draw(task, seed, tokens=tokens, depth=depth, sizes=sizes, distractors=distractors)
    haystack = tile(word_tokens(), tokens)
    ids = sample.apply(haystack)
    question = sample.problem.question
    assert ids.shape == (tokens,) and ids.dtype == np.int64
    assert (
        len(question.needed) == COUNTS[task][0]
        and len(sample.patches) == COUNTS[task][1] + distractors + 1
    )

    ranges = sorted((first, first + len(patch)) for first, patch in sample.patches)
    assert all(
        last <= first
        for (_, last), (first, _) in itertools.pairwise([(0, 0), *ranges, (tokens, tokens)])
    )
    # The question ends the text, so the answer follows it.
    assert ranges[-1] == (tokens - len(encode(question.text)), tokens)
    touched = np.zeros(tokens, dtype=bool)
    for first, last in ranges:
        touched[first:last] = True
    assert np.array_equal(ids[~touched], haystack[~touched])

    text = TOKENIZER.decode(ids.tolist())
    assert (
        text.endswith(question.text) and TOKENIZER.decode(sample.answer.tolist()) == question.answer
    )
    assert read(text.removesuffix(question.text), question.text) == question.answer
    assert all(text.count(sentence) == 1 for sentence in sample.problem.sentences)
    first = TOKENIZER.decode(
        ids[sample.start : sample.start + len(encode(question.needed[0]))].tolist()
    )
    assert first == question.needed[0] == sample.problem.sentences[0]
    keys = set(re.findall(rf"[{LETTERS}]{{4}}", text))
    assert len(keys) == COUNTS[task][1] + distractors and all(is_held_out(key) for key in keys)


@given(st.sampled_from(list(TASKS)), SIZES, DEPTHS, st.integers(0, 1000))
def test_where_it_is_absent_nothing_that_the_question_needs_is_in_the_text(
    task, sizes, depth, seed
):
    tokens = least(task, sizes) + 500
    sample, control = (
        draw(task, seed, tokens=tokens, depth=depth, sizes=sizes, absent=x) for x in (False, True)
    )
    question = control.problem.question
    text = TOKENIZER.decode(control.apply(tile(word_tokens(), tokens)).tolist()).removesuffix(
        question.text
    )
    needed, others = (
        control.problem.sentences[: len(question.needed)],
        control.problem.sentences[len(question.needed) :],
    )
    assert needed == question.needed and not any(sentence in text for sentence in needed)
    assert all(sentence in text for sentence in others)
    with pytest.raises(KeyError):
        read(text, question.text)
    for kept, same in zip(control.patches, sample.patches[len(needed) :], strict=True):
        assert kept[0] == same[0] and np.array_equal(kept[1], same[1])


@given(
    st.sampled_from(list(TASKS)),
    SIZES,
    st.integers(0, 3000),
    DEPTHS,
    st.integers(0, 1000),
    st.integers(0, 40),
)
def test_across_borders(task, sizes, more, depth, seed, distractors):
    """Every sentence lies in two chunks, none is lost, and the first hardly moves."""
    S, W = sizes
    tokens = least(task, sizes, distractors, border=True) + more
    options = dict(tokens=tokens, depth=depth, sizes=sizes, distractors=distractors)
    plain, sample = (draw(task, seed, **options, border=border) for border in (False, True))
    assert sample.problem == plain.problem
    *hidden, question = sorted((first, first + len(patch)) for first, patch in sample.patches)
    assert len(hidden) == 6 + distractors and question[1] == tokens and hidden[0][0] >= 0
    assert all(first // S < (last - 1) // S for first, last in hidden)
    assert all(last <= first for (_, last), (first, _) in itertools.pairwise([*hidden, question]))
    n = len(encode(sample.problem.sentences[0]))
    assert abs(sample.start - plain.start) <= S + n
    # The sentence lies in complete chunks outside the window.
    assert sample.start + n <= (tokens - max(W, question[1] - question[0])) // S * S


@given(st.sampled_from(list(TASKS)), SIZES, st.integers(0, 3000), st.integers(0, 1000))
def test_depth_runs_from_the_first_chunk_to_the_last_outside_the_window(task, sizes, more, seed):
    S, W = sizes
    tokens = least(task, sizes) + more
    samples = [
        draw(task, seed, tokens=tokens, depth=depth, sizes=sizes) for depth in np.linspace(0, 1, 11)
    ]
    starts = [sample.start for sample in samples]
    assert starts[0] == 0 and starts == sorted(starts)
    q = len(encode(samples[0].problem.question.text))
    end = starts[-1] + len(encode(samples[0].problem.sentences[0]))
    # The first sentence ends with a complete chunk: the last one that neither window nor question
    # reaches.
    assert end % S == 0
    assert tokens - max(W, q) - S < end <= tokens - max(W, q)
    assert np.allclose(starts, np.linspace(0, starts[-1], 11), atol=0.5)
    assert samples[0].first_chunks(S)[0] == 0 and samples[-1].first_chunks(S)[-1] == end // S - 1


@every_task
@given(st.integers(1, 128), st.integers(0, 2000))
def test_first_chunks_are_those_that_hold_a_token_of_the_first_sentence(task, S, start):
    sample = draw(task)
    moved = type(sample)(**{**vars(sample), "start": start})
    length = len(encode(sample.problem.sentences[0]))
    assert moved.first_chunks(S) == sorted({place // S for place in range(start, start + length)})


@every_task
def test_a_sample_is_a_function_of_its_seed(task):
    first = draw(task, 7)
    again = draw(task, 7)
    other = draw(task, 8)
    assert first.problem == again.problem != other.problem
    for (place_, patch), (same_place, same_patch) in zip(first.patches, again.patches, strict=True):
        assert place_ == same_place and np.array_equal(patch, same_patch)
    assert [place_ for place_, _ in first.patches] != [place_ for place_, _ in other.patches]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 1000), st.data())
def test_scattered_stretches_lie_in_the_room_and_never_overlap(lengths, seed, data):
    room = 2 * sum(lengths)
    first = data.draw(st.integers(0, room - lengths[0]))
    places = scatter(rng(seed), first, lengths, room)
    assert places[0] == first and len(places) == len(lengths)
    ranges = sorted((place_, place_ + length) for place_, length in zip(places, lengths))
    assert ranges[0][0] >= 0 and ranges[-1][1] <= room
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_scattered_stretches_may_lie_anywhere():
    drawn = [scatter(rng(seed), 3, [2, 2], 10)[1] for seed in range(700)]
    counts = {place_: drawn.count(place_) for place_ in set(drawn)}
    assert counts.keys() == {0, 1, 5, 6, 7, 8} and all(
        80 < count < 160 for count in counts.values()
    )


def test_keys_and_values_have_the_stated_form_and_are_spread_evenly():
    for held_out in (False, True):
        needles = draw_needles(rng(), 2000, held_out=held_out)
        assert len({needle.key for needle in needles}) == 2000
        for needle in needles:
            assert (
                len(needle.key) == KEY_LETTERS
                and set(needle.key) <= set(LETTERS)
                and is_held_out(needle.key) == held_out
            )
            assert len(needle.value) == VALUE_DIGITS and needle.value.isdecimal()
        for symbols, drawn in (
            (LETTERS, "".join(x.key for x in needles)),
            ("0123456789", "".join(x.value for x in needles)),
        ):
            share = len(drawn) / len(symbols)
            assert all(0.8 * share < drawn.count(symbol) < 1.2 * share for symbol in symbols)


def test_one_key_in_ten_is_held_out():
    every = ["".join(letters) for letters in itertools.product(LETTERS, repeat=KEY_LETTERS)]
    assert sum(map(is_held_out, every)) == pytest.approx(0.1 * len(every), rel=0.01)
    assert (
        {key[0] for key in every if is_held_out(key)}
        == {key[-1] for key in every if is_held_out(key)}
        == set(LETTERS)
    )


def test_names_and_numbers_of_chains_differ():
    chains = draw_chains(rng(), [3, 2] * 300, held_out=True)
    assert [len(chain.names) for chain in chains] == [3, 2] * 300
    names = [name for chain in chains for name in chain.names]
    assert len(set(names)) == len(names) and all(map(is_held_out, names))
    assert len({chain.number for chain in chains}) == 600
    assert all(len(chain.number) == 8 and chain.number.isdecimal() for chain in chains)


@every_task
def test_keys_of_the_text_are_not_drawn(task):
    held_out = draw_keys(rng(3), 4, held_out=True)
    drawn = draw_keys(rng(3), 6, held_out=True, absent_from=f"... {held_out[0]}, x{held_out[2]}y")
    assert not {held_out[0], held_out[2]} & set(drawn) and {held_out[1], held_out[3]} <= set(drawn)
    text = " ".join(TASKS[task](rng(5)).sentences)
    again = " ".join(TASKS[task](rng(5), absent_from=text).sentences)
    found = [set(re.findall(rf"[{LETTERS}]{{4}}", x)) for x in (text, again)]
    assert len(found[0]) == len(found[1]) == 6 and not found[0] & found[1]


def test_a_text_with_every_key_is_refused():
    every = " ".join("".join(letters) for letters in itertools.product(LETTERS, repeat=KEY_LETTERS))
    with pytest.raises(ValueError, match=r"^absent_from: .*accepted is"):
        draw(absent_from=every)


@every_task
@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan"), float("inf")])
def test_depth_out_of_range(task, depth):
    with pytest.raises(ValueError, match=f"^depth: got {depth}, accepted is a number from 0 to 1$"):
        draw(task, depth=depth)


@every_task
@pytest.mark.parametrize("distractors", [0, 64])
@pytest.mark.parametrize("sizes", [(4, 8), (16, 32), (64, 128)])
def test_too_few_tokens(task, sizes, distractors):
    fewest = least(task, sizes, distractors)
    draw(task, tokens=fewest, sizes=sizes, depth=1.0, distractors=distractors)
    with pytest.raises(
        ValueError, match=f"^tokens: got {fewest - 1}, accepted are at least {fewest}$"
    ):
        draw(task, tokens=fewest - 1, sizes=sizes, distractors=distractors)


def test_sentences_fit_the_shortest_demo_of_every_shipped_size():
    assert max(least(task, (64, 128)) for task in TASKS) <= 1024


@given(
    st.lists(st.integers(0, 4000), min_size=1, max_size=50),
    st.integers(0, 200),
    st.integers(0, 200),
)
def test_tile_starts_over_at_the_end(text, tokens, first):
    got = tile(np.array(text, dtype=np.uint16), tokens, first)
    assert got.tolist() == [text[(first + i) % len(text)] for i in range(tokens)]


def test_needles_and_chains_say_what_they_are():
    needles = Needle("QXZB", "482913"), Needle("WQNH", "394149")
    one = ask(needles[:1])
    two = ask(needles)
    assert one.needed == (" The secret code of QXZB is 482913.",)
    assert (
        one.text + one.answer
        == "\nWhat is the secret code of QXZB?\nThe secret code of QXZB is 482913."
    )
    assert two.needed == (*one.needed, " The secret code of WQNH is 394149.")
    assert two.text == "\nWhat are the secret codes of QXZB and WQNH?\nThe secret code of QXZB is "
    assert two.answer == "482913. The secret code of WQNH is 394149."
    chain = Chain("48291307", ("QXZB", "WQNH", "JKLM"))
    head, *links = chain.sentences
    assert head == " The number 48291307 is given to QXZB."
    assert links == [
        " The number of QXZB is given to WQNH.",
        " The number of WQNH is given to JKLM.",
    ]
    assert chain.question.needed == chain.sentences and chain.question.answer == "QXZB, WQNH, JKLM."
    assert (
        chain.question.text
        == "\nWhich names are given the number 48291307?\nThe number 48291307 is given to "
    )


def test_the_shipped_form_of_a_needle_keeps_its_token_counts():
    """A shipped model was trained on them."""
    question = s_niah(rng()).question
    assert [len(encode(text)) for text in (*question.needed, question.text, question.answer)] == [
        19,
        26,
        7,
    ]


@every_task
@pytest.mark.parametrize("border", [False, True])
@pytest.mark.parametrize(
    "name, value",
    [
        *(("chunk_size", value) for value in (0, -1, -16, 1.5, True, "16")),
        *(("window", value) for value in (0, -1, 32.0, None)),
        *(("tokens", value) for value in (0, -1, 1e6, "1000")),
        *(("depth", value) for value in ("0.5", None, True, 10**400)),
    ],
)
def test_a_wrong_size_is_refused_by_name(task, border, name, value):
    """Some of them, such as a negative chunk size with `border`, would run for ever."""
    right = dict(tokens=10_000, depth=0.5, chunk_size=16, window=32)
    problem = TASKS[task](rng())
    with pytest.raises(ValueError, match=f"^{name}: got .*, accepted (is|are) "):
        place(rng(), problem, **right | {name: value}, border=border)


@every_task
@given(
    st.integers(1, 80), st.integers(1, 80), st.integers(0, 40), st.floats(0, 1),
    st.integers(0, 1000), st.integers(0, 12),
)  # fmt: skip
def test_the_shortest_text_of_any_sizes_holds_every_sentence_across_a_border(
    task, chunk_size, window, more, depth, seed, distractors
):
    sizes = (chunk_size, window)
    tokens = least(task, sizes, distractors, border=True) + more
    sample = draw(
        task, seed, tokens=tokens, depth=depth, sizes=sizes, distractors=distractors, border=True
    )
    *hidden, question = sorted((first, first + len(patch)) for first, patch in sample.patches)
    ends = itertools.pairwise([(0, 0), *hidden, question])
    assert all(last <= first for (_, last), (first, _) in ends)
    assert all(first // chunk_size < (last - 1) // chunk_size for first, last in hidden)


def test_stretches_that_have_no_place_are_refused():
    for step in (None, 16):
        with pytest.raises(ValueError, match="^space: got 100 tokens, accepted are enough"):
            scatter(rng(), 0, [40, 40, 40], 100, step)


@pytest.mark.parametrize(
    "name, call",
    [
        ("count", lambda: draw_keys(rng(), -1, held_out=True)),
        ("count", lambda: draw_keys(rng(), 20_000, held_out=True)),
        ("count", lambda: draw_needles(rng(), 150_000, held_out=False)),
        ("lengths", lambda: draw_chains(rng(), [3, 0], held_out=True)),
        ("needles", lambda: ask([])),
        ("tokens", lambda: tile(np.zeros(3), -1)),
        ("first", lambda: tile(np.zeros(3), 1, -1)),
        ("text", lambda: tile(np.zeros(0), 1)),
        ("haystack", lambda: draw().apply(np.zeros(999))),
        ("chunk_size", lambda: draw().first_chunks(0)),
        *(("distractors", lambda t=t, n=n: t(rng(), distractors=n))
          for t in TASKS.values() for n in (-1, 10**9, 1.5)),
    ],
)  # fmt: skip
def test_other_wrong_numbers_are_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}: got .*, accepted (is|are) "):
        call()
