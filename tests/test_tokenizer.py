"""The tokenizer: lossless for any text, one token per symbol of keys and values, recorded ranks."""

import base64
import pickle
import random
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from material import real_archives, words

from hsa_mini.data.documents import read_documents
from hsa_mini.data.tokenizer import (
    RANKS_SHA256,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    decode_stream,
    end_of_text,
    load_ranks,
    load_tokenizer,
    pad,
    save_ranks,
    train_ranks,
)
from hsa_mini.paths import RANKS_FILE, data_dir
from hsa_mini.tasks.chains import Chain
from hsa_mini.tasks.needles import Needle, ask
from hsa_mini.tasks.sentences import LETTERS

TOKENIZER = load_tokenizer()
encode = TOKENIZER.encode_ordinary
decode = TOKENIZER.decode
LATIN = st.text(st.characters(max_codepoint=255))
KEYS = st.text(LETTERS, min_size=4, max_size=4)
NEEDLES = st.builds(Needle, KEYS, st.text("0123456789", min_size=6, max_size=6))
CHAINS = st.builds(
    Chain, st.text("0123456789", min_size=8, max_size=8), st.lists(KEYS, min_size=2, max_size=3)
)
QUESTIONS = st.one_of(
    st.lists(NEEDLES, min_size=1, max_size=2).map(ask), CHAINS.map(lambda chain: chain.question)
)


def pieces(text: str) -> list[bytes]:
    return [TOKENIZER.decode_single_token_bytes(i) for i in encode(text)]


@given(st.one_of(st.text(), LATIN))
@example("\0\0a\0")
# Combining marks, two of them with nothing to combine with.
@example("e\u0301 \u0301\u0301x \u0301")
@example("👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff\ufeff")
@example("\r\n\r\r\n \t\x0b\x0c\x85\u2028\u3000 end  ")
@example("ΑΣ ǅungla ʰ ª 中文 עברית ١٢٣ Ⅳ ½")
@example(" ".join(SPECIAL_TOKENS))
def test_any_text_survives(text):
    ids = encode(text)
    assert decode(ids) == text
    assert all(0 <= i < VOCAB_SIZE - len(SPECIAL_TOKENS) for i in ids)


@pytest.mark.parametrize("text", ["a", " ", "\n", " \n", "\0", "!", "0", "A", "é", "中", "😀"])
def test_a_million_times_the_same_survives(text):
    """Without its bound, the pattern overflows tiktoken's stack on long white space."""
    for end in ("", "x"):
        assert decode(encode(text * 1_000_000 + end)) == text * 1_000_000 + end


def test_all_entries_are_there():
    assert TOKENIZER.n_vocab == VOCAB_SIZE
    tokens = {TOKENIZER.decode_single_token_bytes(i) for i in range(VOCAB_SIZE)}
    assert len(tokens) == VOCAB_SIZE
    assert {bytes([i]) for i in range(256)} <= tokens  # so there is no text without ids
    assert (end_of_text(TOKENIZER), pad(TOKENIZER)) == (VOCAB_SIZE - 2, VOCAB_SIZE - 1)


def test_no_token_spans_a_digit_or_two_capitals():
    for token in TOKENIZER.token_byte_values()[: VOCAB_SIZE - len(SPECIAL_TOKENS)]:
        assert not re.search(rb"[0-9]", token) or len(token) == 1, token
        assert not re.search(rb"[A-Z]", token) or re.fullmatch(rb" ?[A-Z][^A-Z]*", token), token


@given(st.text(), st.text("0123456789", min_size=1), st.text())
def test_every_digit_is_a_token_whatever_stands_beside_it(before, digits, after):
    assert [p for p in pieces(before + digits + after) if re.search(rb"[0-9]", p)] == [
        c.encode() for c in before + digits + after if c in "0123456789"
    ]


@given(QUESTIONS)
def test_keys_and_numbers_of_the_tasks_are_read_symbol_by_symbol(question):
    for text in (*question.needed, question.text, question.answer):
        symbols = "".join(re.findall(r"[A-Z]{4}|[0-9]{6,}", text))
        assert symbols and [
            p.decode() for p in pieces(text) if re.fullmatch(rb"[A-Z0-9]", p)
        ] == list(symbols)


@given(st.text(), QUESTIONS, st.text())
def test_a_sentence_in_a_text_encodes_as_it_does_alone(before, question, after):
    """Inserting a sentence's ids equals encoding the text with the sentence typed in.

    Only white space in front of it, or punctuation behind its full stop, could join with it.
    """
    before = before + "x"
    after = " " + after
    for sentence in question.needed:
        assert encode(before + sentence + after) == [
            *encode(before),
            *encode(sentence),
            *encode(after),
        ]
    joined = encode(before + question.text + question.answer)
    assert joined == [*encode(before), *encode(question.text), *encode(question.answer)]


@given(
    st.one_of(
        st.text().map(lambda text: list(text.encode())), st.lists(st.integers(0, VOCAB_SIZE - 1))
    )
)
@example([0xE4, 0xB8])  # a character that never ends
@example([0xE4, 65, 0x80, 0xFF])
def test_text_that_comes_token_by_token_is_the_text_of_all_tokens(numbers):
    single = {TOKENIZER.encode_single_token(bytes([byte])) for byte in range(256)}
    ids = [TOKENIZER.encode_single_token(bytes([n])) if n < 256 else n for n in numbers]
    parts = list(decode_stream(TOKENIZER, iter(ids)))
    assert "".join(parts) == decode(ids) and all(parts)
    if set(ids) <= single and "\ufffd" not in decode(ids):
        assert parts == list(decode(ids))  # each character by itself, once its last byte has come


def test_text_comes_no_later_than_its_last_byte():
    ids = encode("né 中 x")
    asked = []
    text = ""
    for part in decode_stream(TOKENIZER, (asked.append(i) or i for i in ids)):
        text += part
        assert text == "né 中 x".encode()[: len(TOKENIZER.decode_bytes(asked))].decode(
            errors="ignore"
        )
    assert text == "né 中 x"


def test_an_id_without_a_token_is_a_replacement_character():
    assert (
        "".join(decode_stream(TOKENIZER, [*encode("ab"), VOCAB_SIZE, *encode("c")])) == "ab\ufffdc"
    )


def test_it_pickles():
    twin = pickle.loads(pickle.dumps(TOKENIZER))
    assert twin.encode_ordinary(words(500)) == encode(words(500)) and twin.n_vocab == VOCAB_SIZE


def test_ranks_are_the_recorded_ones():
    assert RANKS_SHA256 in (data_dir() / "PROVENANCE.md").read_text(encoding="utf-8")


def test_altered_ranks_of_the_course_are_refused(tmp_path, monkeypatch):
    """Also if they are ranks: other ranks make other tokens of the same text."""
    content = (data_dir() / RANKS_FILE).read_bytes()
    monkeypatch.setenv("HSA_MINI_DATA", str(tmp_path))
    rng = random.Random(0)
    places = [rng.randrange(len(content)) for _ in range(200)]
    damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]
    swapped = content.replace(b" 300\n", b" x\n").replace(b" 301\n", b" 300\n")
    for altered in (*damaged, swapped.replace(b" x\n", b" 301\n"), content[:-1], b""):
        (tmp_path / RANKS_FILE).write_bytes(altered)
        with pytest.raises(ValueError, match=f"^{tmp_path / RANKS_FILE}: the file is altered"):
            load_ranks.__wrapped__()
    (tmp_path / RANKS_FILE).write_bytes(content)
    assert load_ranks.__wrapped__() == TOKENIZER._mergeable_ranks


BYTES = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]  # AA== 0


@pytest.mark.parametrize(
    "lines, reason",
    [
        ([*BYTES, "AAE= 257"], "the ranks of 257 lines are not 0, 1, 2, ... once each"),
        ([*BYTES, "AAE= 256", "AAI= 256"], "the ranks of 258 lines"),
        ([*BYTES, "AAE= 256", "AAE= 257"], "the ranks of 258 lines"),
        ([*BYTES[:255], "AAE= 255"], "not every byte has a rank"),
        ([*BYTES, "AAECAw== 256"], "the token with rank 256 does not join two of lower rank"),
        ([*BYTES, " 256"], "the token with rank 256 does not join"),
        ([*BYTES, "AAE= -1"], "the ranks"),
        ([*BYTES, "AAE= x"], "int"),
        ([*BYTES, "AAE=256"], "unpack"),
        ([*BYTES, "AAE= 256 0"], "unpack"),
        ([*BYTES, "AA!E= 256"], "base64"),
        ([*BYTES, "AAEé= 256"], "ascii"),
        ([], "not every byte"),
    ],
)
def test_a_file_that_does_not_hold_ranks_is_refused_by_name(tmp_path, lines, reason):
    path = tmp_path / "ranks"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"^{path}: .*{re.escape(reason)}.*, accepted are ranks"):
        load_tokenizer(path)


def test_more_ranks_than_are_accepted_are_refused(tmp_path, monkeypatch):
    pairs = [bytes([i, j]) for i in range(256) for j in range(256)]
    lines = [f"{base64.b64encode(pair).decode()} {256 + i}" for i, pair in enumerate(pairs)]
    (tmp_path / "ranks").write_text("\n".join([*BYTES, *lines]))
    assert len(load_ranks.__wrapped__(tmp_path / "ranks")) == 65_792
    monkeypatch.setattr("hsa_mini.data.tokenizer.MAX_RANKS", 65_791)
    with pytest.raises(ValueError, match="the ranks of 65792 lines"):
        load_ranks.__wrapped__(tmp_path / "ranks")


def test_ranks_come_from_the_training_text_alone():
    if not real_archives():
        pytest.skip("the corpus archives are not in the cache")
    documents = read_documents(real_archives())
    assert (
        train_ranks(d.text for d in documents if d.split == "train") == TOKENIZER._mergeable_ranks
    )


def test_ranks_are_learnt_written_and_read_back(tmp_path):
    ranks = train_ranks([words(2000)], vocab_size=300)
    save_ranks(ranks, tmp_path / "ranks")
    tokenizer = load_tokenizer(tmp_path / "ranks")
    assert tokenizer._mergeable_ranks == ranks and tokenizer.n_vocab == 300
    assert tokenizer.decode(tokenizer.encode_ordinary(words(100))) == words(100)
    assert len(tokenizer.encode_ordinary(words(100))) < len(words(100))
