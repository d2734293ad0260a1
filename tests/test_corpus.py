"""The corpora: what each split holds, encoding that is complete or not there, verified inputs, and
one-line errors. `test_archives.py` tests how the archives are fetched.
"""

import codecs
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from material import pinned, real_archives, small_archives, words

from hsa_mini.data import corpus
from hsa_mini.data import documents as reading
from hsa_mini.data.archives import Archive
from hsa_mini.data.corpus import FILES, Corpus, load_corpus, load_text
from hsa_mini.data.documents import HELD_OUT_WORKS, Document, longer_documents, read_documents
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.files.whole_folder import MANIFEST

TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module", params=["small", "real"])
def documents(request, tmp_path_factory):
    if request.param == "real":
        contents = real_archives()
    else:
        contents = contents_of(small_archives(tmp_path_factory.mktemp("archives")))
    if not contents:
        pytest.skip("the corpus archives are not in the cache")
    return list(read_documents(contents))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HSA_MINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(cache, monkeypatch) -> list[Document]:
    """The documents of the small archives, which stand in the cache, pinned as the real ones."""
    contents = contents_of(small_archives(cache / "archives"))
    monkeypatch.setattr(reading, "ARCHIVES", pinned(contents))
    return list(read_documents(contents))


def contents_of(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def encoded(cache: Path) -> Path:
    """The folder of the encoded corpus."""
    (folder,) = cache.glob("corpus-*")
    return folder


def test_every_text_is_there_once_and_in_one_split(documents):
    paths = [document.path for document in documents]
    assert len(set(paths)) == len(paths)
    texts = {hashlib.sha256(document.text.encode()).digest() for document in documents}
    assert len(texts) == len(documents)
    assert {document.split for document in documents} == set(corpus.SPLITS)
    assert {document.kind for document in documents} == {
        "english",
        "code",
        "documentation",
        "translation",
    }


def test_code_and_documentation_are_split_by_whole_folders(documents):
    splits: dict[str, set[str]] = {}
    for document in documents:
        if document.kind in ("code", "documentation"):
            splits.setdefault(document.path.rpartition("/")[0], set()).add(document.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == set(corpus.SPLITS)


def test_held_out_works_are_validation_in_every_edition(documents):
    for document in documents:
        if document.kind == "english":
            held_out = any(work in document.path for work in HELD_OUT_WORKS)
            assert document.split == ("validation" if held_out else "train"), document.path
    hamlets = [
        document.path for document in documents if "hamlet" in document.path.rpartition("/")[2]
    ]
    assert len(hamlets) == 2


def test_no_held_out_work_hides_in_another_file(documents):
    """Only stock phrases occur as lines of English in both splits."""

    def lines(split):
        texts = [
            document.text
            for document in documents
            if document.kind == "english" and document.split == split
        ]
        plain = (
            re.sub("[^a-z ]", "", line.lower()).strip()
            for text in texts
            for line in text.splitlines()
        )
        return {line for line in plain if len(line) > 30}

    train = lines("train")
    validation = lines("validation")
    assert len(train & validation) <= 0.005 * len(validation)


def test_translations_are_training_text(documents):
    assert {document.split for document in documents if document.kind == "translation"} == {"train"}


def test_what_is_no_text_is_left_out(documents):
    names = [document.path.rpartition("/")[2] for document in documents]
    assert not {"metadata.txt", "short.txt", "latin.txt", "logo.svg", "lear_copy.txt"} & set(names)
    assert all(len(document.text.encode()) >= 200 for document in documents)


def test_tokens_are_those_of_the_documents_one_after_another(cache, small, monkeypatch):
    loaded = {split: load_corpus(split) for split in corpus.SPLITS}
    for split, got in loaded.items():
        texts = [document.text for document in small if document.split == split]
        want = [[*TOKENIZER.encode_ordinary(text), end_of_text(TOKENIZER)] for text in texts]
        assert got.tokens.tolist() == list(itertools.chain.from_iterable(want))
        assert got.tokens.dtype == np.uint16 and isinstance(got.tokens, np.memmap)
        assert got.starts.tolist() == np.cumsum([0, *map(len, want)])[:-1].tolist()
        assert (len(got), got.name) == (len(got.tokens), f"archives/{split}")
    kinds = json.loads((encoded(cache) / "kinds.json").read_text())
    assert {split: sum(counts.values()) for split, counts in kinds.items()} == {
        s: len(c) for s, c in loaded.items()
    }

    monkeypatch.setattr(corpus, "_encode", None)  # the second time nothing is encoded
    assert np.array_equal(load_corpus("train").tokens, loaded["train"].tokens)


def test_an_encoder_that_is_killed_leaves_nothing_that_is_read(cache, small):
    code = """
import os, signal
from hsa_mini.data import corpus
def killed(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
corpus.np.save = killed
corpus.load_documents = lambda: ("archives", iter([]))
corpus.load_corpus("train")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == -signal.SIGKILL
    assert not list(cache.glob("corpus-*"))
    texts = [document.text for document in small if document.split == "train"]
    assert len(load_corpus("train")) == sum(
        len(TOKENIZER.encode_ordinary(text)) + 1 for text in texts
    )
    assert sorted(path.name for path in cache.iterdir()) == ["archives", encoded(cache).name]


def test_an_encoder_that_fails_or_comes_second_leaves_nothing_behind(cache, small):
    def interrupted():
        yield small[0]
        raise KeyboardInterrupt

    def overtaken():
        corpus._encode(iter(small), cache / "corpus-x")
        yield from small

    with pytest.raises(KeyboardInterrupt):
        corpus._encode(interrupted(), cache / "corpus-x")
    assert [path.name for path in cache.iterdir()] == ["archives"]
    # Another process was faster.
    corpus._encode(overtaken(), cache / "corpus-x")
    assert sorted(path.name for path in cache.iterdir()) == ["archives", "corpus-x"]
    assert sum(
        (cache / "corpus-x" / f"{split}.bin").stat().st_size for split in corpus.SPLITS
    ) == 2 * sum(len(TOKENIZER.encode_ordinary(document.text)) + 1 for document in small)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_corpus_is_encoded_anew_and_one_line_says_so(cache, small, caplog, name):
    """An altered byte, a file of half its length, no file, another program's file of this name."""
    whole = load_corpus("validation").tokens.tolist()
    path = encoded(cache) / name
    content = path.read_bytes()
    place = random.Random(name).randrange(len(content))
    flipped = bytes([content[place] ^ 4])
    for damaged in (content[:place] + flipped + content[place + 1 :], content[: len(content) // 2]):
        path.write_bytes(damaged)
        caplog.clear()
        assert load_corpus("validation").tokens.tolist() == whole and path.read_bytes() == content
        (line,) = caplog.messages
        assert str(encoded(cache)) in line and line.endswith("; the corpus is encoded anew")
    path.unlink()
    assert load_corpus("validation").tokens.tolist() == whole
    os.mkfifo(encoded(cache) / "pipe")  # not ours: neither opened nor removed
    path.unlink()
    with pytest.raises(ValueError, match="pipe"):
        load_corpus("validation")
    assert (encoded(cache) / "pipe").is_fifo()


def test_a_damaged_archive_is_refused_with_its_name_and_what_repairs_it(cache, small):
    """Also if the damage would make another text, or no archive at all, of it."""
    rng = random.Random(0)
    for archive in reading.ARCHIVES:
        content = archive.path.read_bytes()
        places = [rng.randrange(len(content)) for _ in range(20)]
        damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]
        for altered in (*damaged, content[: len(content) // 2], b"", content + b"\0"):
            archive.path.write_bytes(altered)
            with pytest.raises(ValueError, match=r"`python -m hsa_mini fetch` fetches") as caught:
                load_corpus("train")
            assert str(archive.path) in str(caught.value) and "\n" not in str(caught.value)
        archive.path.write_bytes(content)
    assert not list(cache.glob("corpus-*"))


@pytest.mark.parametrize("umask, modes", [(0o022, {0o755, 0o644}), (0o077, {0o700, 0o600})])
def test_the_umask_decides_who_may_read_an_encoded_corpus(cache, small, umask, modes):
    before = os.umask(umask)
    try:
        load_corpus("train")
    finally:
        os.umask(before)
    folder = encoded(cache)
    assert {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())} == modes


def test_a_corpus_is_identified_by_its_name_and_its_tokens(small):
    loaded = load_corpus("validation")
    digest = hashlib.sha256(np.array(loaded.tokens).tobytes()).hexdigest()
    assert loaded.identity == {"name": "archives/validation", "sha256": digest}
    other = loaded.tokens.copy()
    other[7] ^= 1
    assert dataclasses.replace(loaded, tokens=other).identity["sha256"] != digest


def test_without_archives_the_standard_library_serves_and_a_warning_says_so(
    cache, monkeypatch, caplog
):
    few = [Document(f"{split}.py", "code", split, words(300, split)) for split in corpus.SPLITS]
    monkeypatch.setattr(reading, "_standard_library", lambda: iter(few))
    with caplog.at_level(logging.WARNING):
        got = load_corpus("validation")
    assert "standard library" in caplog.text and "make setup" in caplog.text
    assert got.name == f"python-{sys.version_info.major}.{sys.version_info.minor}/validation"
    assert TOKENIZER.decode(got.tokens[:-1].tolist()) == few[1].text


def test_the_standard_library_is_split_by_package_and_has_no_tests():
    splits: dict[str, set[str]] = {}
    for document in reading._standard_library():
        parts = Path(document.path).parts
        assert not {"test", "tests", "site-packages"} & set(parts)
        splits.setdefault(parts[0], set()).add(document.split)
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == set(corpus.SPLITS)


def packed(folder: Path, name: str, files: dict[str, str]) -> Archive:
    """An archive of these files in the folder, pinned."""
    with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    content = (folder / f"{name}.tar.gz").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Archive(name, f"{name}.tar.gz", len(content), digest)


@pytest.fixture
def longer(cache, small, monkeypatch) -> dict[str, tuple[Archive, ...]]:
    folder = cache / "archives"
    shared, own = words(100, "shared"), [words(100, f"own {i}") for i in range(4)]
    first = packed(folder, "first", {"a.py": own[0], "b.rst": shared, "x/third_party/c.py": own[3]})
    files = {
        "a.py": own[1], "copy.py": own[1], "b.txt": shared.replace(" ", "  "), "m.c": own[2],
        "django.py": words(100, "1 guide"), "long.py": "x " * reading.MAX_BYTES, "p.svg": own[3],
        "short.py": "too short",
    }  # fmt: skip
    archives = {"train": (first,), "validation": (packed(folder, "second", files),)}
    monkeypatch.setattr(reading, "LONGER", archives)
    return archives


def test_the_longer_corpus_has_each_document_once_and_whole_packages_in_a_split(longer):
    found = [(document.path, document.kind, document.split) for document in longer_documents()]
    assert found == [
        ("first/a.py", "code", "train"), ("first/b.rst", "documentation", "train"),
        ("second/a.py", "code", "validation"), ("second/m.c", "code", "validation"),
    ]  # fmt: skip
    texts = {document.path: document.text for document in longer_documents()}
    end = end_of_text(TOKENIZER)
    for split in corpus.SPLITS:
        loaded = load_corpus(split, longer=True)
        paths = [path for path, _, of in found if of == split]
        wanted = [i for p in paths for i in (*TOKENIZER.encode_ordinary(texts[p]), end)]
        assert loaded.tokens.tolist() == wanted and loaded.name == f"longer/{split}"
        assert load_corpus(split).name == f"archives/{split}"


def test_a_missing_archive_of_the_longer_corpus_is_named_with_what_fetches_it(longer):
    longer["validation"][0].path.unlink()
    with pytest.raises(ValueError, match=r"second\.tar\.gz: missing; .* fetch --longer` fetches"):
        load_corpus("train", longer=True)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"^split: got 'test', accepted are train, validation$"):
        load_corpus("test")


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "No such file"),
        ("folder", "Is a directory"),
        (b"a" * 100 + b"\xff\xfe", r"not UTF-8 text \(byte 100\)"),
    ],
)
def test_load_text_says_in_one_line_what_is_wrong(tmp_path, content, reason):
    path = tmp_path / "text"
    if content == "folder":
        path.mkdir()
    elif content:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^--haystack: .*{path}.*{reason}.*; accepted is any UTF-8 text file"
    ) as caught:
        load_text(path, max_tokens=1000, name="--haystack")
    assert "\n" not in str(caught.value)


def test_load_text_reads_any_text(tmp_path):
    text = words(100) + "\0 中文 😀\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    got = load_text(tmp_path / "text", max_tokens=10_000)
    assert isinstance(got, Corpus) and TOKENIZER.decode(got.tokens.tolist()) == text


def test_a_text_that_is_read_in_blocks_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK", 50)
    text = words(300) + " naïve 中文 😀 end_of ₂ x² 1_000.\n\n\t" * 20 + "e" * 200 + words(50)
    (tmp_path / "text").write_bytes(text.replace("\n", "\r\n").encode())
    tokens = TOKENIZER.encode_ordinary(text)
    for count in (1, 100, len(tokens), len(tokens) + 1):
        got = load_text(tmp_path / "text", max_tokens=count).tokens
        assert got.dtype == np.uint16 and got.tolist() == tokens[:count]
    bad = (text[:70] + "é" * 100).encode() + b"\xff"
    (tmp_path / "text").write_bytes(bad)
    with pytest.raises(ValueError, match=rf"not UTF-8 text \(byte {len(bad) - 1}\)"):
        load_text(tmp_path / "text", max_tokens=10_000)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "text").write_bytes(codecs.BOM_UTF8 + b"To be\xef\xbb\xbf")
    got = load_text(tmp_path / "text", max_tokens=100).tokens
    assert TOKENIZER.decode(got.tolist()) == "To be\ufeff"  # only the first is a mark


def test_of_an_endless_text_only_the_beginning_is_read(tmp_path):
    assert load_text("/dev/zero", max_tokens=3).tokens.tolist() == TOKENIZER.encode("\0\0\0")
    os.mkfifo(tmp_path / "pipe")
    written = []

    def write():
        with open(tmp_path / "pipe", "wb", buffering=0) as pipe:
            while True:
                written.append(pipe.write(b"to be " * 1000))

    def write_until_nobody_reads():
        with pytest.raises(BrokenPipeError):
            write()

    writer = threading.Thread(target=write_until_nobody_reads, daemon=True)
    writer.start()
    got = load_text(tmp_path / "pipe", max_tokens=50).tokens.tolist()
    writer.join(10)
    assert not writer.is_alive() and sum(written) < 2 * corpus.BLOCK
    assert got == TOKENIZER.encode("to be " * 100)[:50]
