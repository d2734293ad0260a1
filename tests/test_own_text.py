"""Text that a user names: which files are read, how they become ids, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from material import words

from hsa_mini.data import own_corpus
from hsa_mini.data.encoder import load_encoder
from hsa_mini.data.own_corpus import load_own_corpus, split_off
from hsa_mini.data.own_text import OwnText, find_files, readable_files
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer, save_ranks

TOKENIZER = load_tokenizer()
END = end_of_text(TOKENIZER)
TEXTS = [words(200, seed=f"document {i}") for i in range(4)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HSA_MINI_CACHE", str(tmp_path / "cache"))
    return tmp_path


def ids_of(texts: list[str]) -> list[int]:
    return [i for text in texts for i in (*TOKENIZER.encode_ordinary(text), END)]


def write_parquet(path: str, **columns) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)


def write_all(kind: str) -> None:
    """TEXTS as files of one kind."""
    Path("texts").mkdir()
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            Path(f"texts/{i}.txt").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"text": text, "id": 7}) + "\n" for text in TEXTS]
        Path("texts/all.jsonl").write_text("".join(lines))
    elif kind == "parquet":
        write_parquet("texts/all.parquet", id=[1, 2, 3, 4], text=TEXTS)
    else:
        Path("texts/all.bin").write_bytes(np.array(ids_of(TEXTS), dtype=np.uint16).tobytes())


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "bin"])
@pytest.mark.parametrize("pattern", ["texts", "texts/*", "**/*"])
def test_every_kind_of_file_gives_the_same_documents(kind, pattern):
    write_all(kind)
    corpus = load_own_corpus(OwnText((pattern,)), 4096)
    ids = np.array(ids_of(TEXTS))
    assert corpus.tokens.dtype == np.uint16 and corpus.tokens.tolist() == ids.tolist()
    assert corpus.starts.tolist() == [0, *(np.flatnonzero(ids == END)[:-1] + 1)]


def test_a_large_vocabulary_is_stored_as_uint32():
    write_all("txt")
    corpus = load_own_corpus(OwnText(("texts",)), 157_184)
    assert corpus.tokens.dtype == np.uint32 and corpus.tokens.tolist() == ids_of(TEXTS)
    ids = np.array([5, 157_183, 9, 8], dtype=np.uint32)
    Path("large.bin").write_bytes(ids.tobytes())
    corpus = load_own_corpus(OwnText(("large.bin",), end_token=9), 157_184)
    assert corpus.tokens.tolist()[:3] == ids.tolist()[:3] and corpus.starts.tolist() == [0]


def test_ids_above_uint16_are_encoded_and_read_back():
    """65,536 pairs of bytes, each a token: most ids need more than 16 bits."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)}
    save_ranks(ranks, Path("ranks"))
    Path("a.txt").write_text("the zebra")
    corpus = load_own_corpus(OwnText(("a.txt",), tokenizer="ranks"), 65_794)
    *ids, end = corpus.tokens.tolist()
    tokenizer = load_tokenizer(Path("ranks"))
    assert tokenizer.decode(ids) == "the zebra" and end == 65_792 == end_of_text(tokenizer)
    assert corpus.tokens.dtype == np.uint32 and max(ids) > 1 << 14


def test_a_tokenizer_of_hugging_face_encodes_the_text():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "</s>": 1, "the": 2, "zebra": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save("tokenizer.json")
    Path("a.txt").write_text("the zebra the</s>zebra")
    corpus = load_own_corpus(OwnText(("a.txt",), tokenizer="tokenizer.json"), 4)
    assert corpus.tokens.tolist() == [2, 3, 0, 1]  # the name of a special token is plain text


def test_binary_files_are_left_out_and_counted(caplog):
    write_all("txt")
    Path("texts/latin.txt").write_bytes(b"caf\xe9 " * 9)
    Path("texts/null.txt").write_bytes(b"a\0b")
    Path("texts/cut.txt").write_bytes("é".encode()[:1])
    Path("texts/.hidden").write_text("not read")
    assert load_own_corpus(OwnText(("texts",)), 4096).tokens.tolist() == ids_of(TEXTS)
    assert caplog.messages == ["data: 3 of 7 files are binary and were left out"]


def test_a_text_is_encoded_once_and_anew_when_a_file_changes(monkeypatch):
    write_all("txt")
    text = OwnText(("texts",))
    load_own_corpus(text, 4096)
    with monkeypatch.context() as patch:
        patch.setattr(own_corpus, "read_documents", None)
        assert load_own_corpus(text, 4096).tokens.tolist() == ids_of(TEXTS)
    Path("texts/4.txt").write_text("more")
    assert load_own_corpus(text, 4096).tokens.tolist() == ids_of([*TEXTS, "more"])


def test_a_damaged_cache_is_encoded_anew_and_a_line_says_so(caplog):
    write_all("txt")
    load_own_corpus(OwnText(("texts",)), 4096)
    (file,) = Path("cache").glob("*/tokens.bin")
    file.write_bytes(file.read_bytes()[:-2] + b"xy")
    assert load_own_corpus(OwnText(("texts",)), 4096).tokens.tolist() == ids_of(TEXTS)
    (line,) = caplog.messages
    assert line.endswith("the text is encoded anew")


def test_the_end_of_the_text_is_held_out():
    write_all("txt")
    corpus = load_own_corpus(OwnText(("texts",)), 4096)
    for share in (0.0, 0.1, 0.4):
        train, rest = split_off(corpus, share)
        assert [*train.tokens, *rest.tokens] == corpus.tokens.tolist()
        assert len(rest) == max(round(share * len(corpus)), 2)
        moved = {0, *(rest.starts + len(train))}
        assert {*train.starts, *moved} == {*corpus.starts, len(train)} and rest.starts[0] == 0


def test_files_are_found_once_in_order():
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/.git/d.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("x")
    found = [str(path) for path in find_files(["b.txt", "*.txt", "deep"])]
    assert found == ["b.txt", "a.txt", "deep/c.txt"]


def bad(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: "nowhere/*.txt", r"got 'nowhere/\*.txt', which names no file"),
        (lambda: Path("empty").mkdir() or "empty", "got 'empty', which names no file"),
        (lambda: bad("a.txt", b""), "got 1 files, all empty"),
        (lambda: bad("a.txt", b"\xff\xfe"), "got 1 files, all binary"),
        (lambda: bad("a.bin", b"abc"), "a.bin has 3 bytes, accepted are token ids of 2 bytes"),
        (lambda: bad("a.bin", b""), "a.bin has 0 bytes"),
        (lambda: bad("a.bin", b"\xff\xff"), r"a.bin holds the id 65535, accepted are uint16 ids"),
        (lambda: bad("a.jsonl", b'{"text": "x"}\n{"body": 1}'), r"line 2 of a.jsonl is '\{.*body"),
        (lambda: bad("a.jsonl", b'{"text": 5}'), "line 1 of a.jsonl .*a string 'text'"),
        (lambda: bad("a.jsonl", b"[" * 100_000), r"line 1 of a.jsonl is '\["),
        (lambda: bad("a.parquet", b"PAR1"), "a.parquet is no parquet file"),
    ],
)
def test_text_that_cannot_be_read_is_refused_in_one_line_before_anything_is_written(make, reason):
    pytest.importorskip("pyarrow")
    text = OwnText((make(),))
    with pytest.raises(ValueError, match=f"^data: {reason}") as caught:
        load_own_corpus(text, 4096)
    assert "\n" not in str(caught.value) and not Path("cache").exists()


def test_a_parquet_file_without_the_column_is_refused_with_the_columns_that_it_has():
    write_parquet("a.parquet", id=[1], body=["x"])
    with pytest.raises(ValueError, match=r"^data: column 'text' of a.parquet is missing.*'body'"):
        readable_files(OwnText(("a.parquet",)), 4096, np.dtype(np.uint16))
    with pytest.raises(ValueError, match=r"^data: column 'id' of a.parquet is int64"):
        readable_files(OwnText(("a.parquet",), column="id"), 4096, np.dtype(np.uint16))


@pytest.mark.parametrize(
    "tokenizer, reason",
    [
        (None, r"the default one has 4096 tokens, .* the model's vocab_size \(512\)"),
        ("nowhere", r"cannot read nowhere \(No such file"),
        ("ranks", r"\S+/ranks: the ranks of 1 lines are not"),
        ("tokenizer.json", "tokenizer.json holds no tokenizer"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tokenizer, reason):
    pytest.importorskip("tokenizers")
    write_all("txt")
    Path("ranks").write_text("QQ== 5\n")
    Path("tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^tokenizer: {reason}") as caught:
        load_own_corpus(OwnText(("texts",), tokenizer=tokenizer), 512)
    assert "\n" not in str(caught.value) and not Path("cache").exists()


def test_the_default_encoder_is_the_tokenizer_of_the_course():
    encoder = load_encoder()
    assert encoder.encode(TEXTS[0]) == TOKENIZER.encode_ordinary(TEXTS[0])
    assert (encoder.vocab_size, encoder.end) == (4096, END)


@pytest.mark.parametrize(
    "values",
    [dict(files=()), dict(files=(1,)), dict(column=3), dict(held_out=0.6), dict(end_token=-1)],
)
def test_wrong_values_are_refused_by_name(values):
    (name,) = values
    with pytest.raises(ValueError, match=rf"^{name}: got .*, accepted is"):
        OwnText(**{"files": ("x",), **values})
