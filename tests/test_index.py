"""An index: the text of a user's own, read once, completed after any end, and asked many times."""

import json
import os
import pty
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import assert_close, call
from material import tiny, words

from hsa_mini import HSAModel
from hsa_mini.data import own_text
from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.files.lock import locked
from hsa_mini.index import build, texts
from hsa_mini.index.ask import MAX_CHARACTERS, ask, find
from hsa_mini.index.build import build_index
from hsa_mini.index.stored import LEFT_OUT, Index, read_index, to_read
from hsa_mini.index.texts import encode_files, find_files, ordered
from hsa_mini.inference.prefill import prefill
from hsa_mini.paths import shipped_models

CPU = torch.device("cpu")
BLOCK = 200  # tokens between two moments at which an index is saved


def book(folder: Path, count: int = 600) -> Path:
    """A text of `count` words as a file: about 2.5 tokens a word."""
    path = folder / "book.txt"
    path.write_text(words(count))
    return path


def made(path: Path, folder: Path, **options) -> Index:
    return build_index(tiny(), path, folder, checkpoint="tiny", **options)[0]


def tensors(index: Index) -> dict[str, torch.Tensor]:
    """All that the memory holds."""
    memory = index.memory
    chunks = memory.chunks
    caches = [part for cache in (*memory.lower, *memory.upper) for part in cache]
    held = (chunks.k, chunks.v, chunks.landmarks, memory.tail, *caches)
    return {str(i): tensor for i, tensor in enumerate(held)}


def mini() -> HSAModel:
    return HSAModel.from_pretrained(shipped_models()["mini"])


def test_an_index_holds_the_memory_of_one_prefill(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BLOCK", BLOCK)
    path = book(tmp_path)
    made(path, tmp_path / "index")
    index = read_index(tmp_path / "index", CPU)
    ids = load_tokenizer().encode_ordinary(path.read_text())
    assert index.text.tokens.tolist() == ids and index.complete
    want = prefill(tiny(), torch.tensor([ids[:-LEFT_OUT]])).memory
    assert_close(tensors(index), tensors(Index(index.text, want, "")), 1e-5)


@pytest.mark.parametrize("blocks", [0, 1, 2, 5])
@pytest.mark.parametrize("kill", [False, True])
def test_a_reading_that_was_stopped_is_completed_and_nothing_is_read_twice(
    tmp_path, monkeypatch, blocks, kill
):
    """Ctrl-C saves what was read. SIGKILL leaves what was saved before."""
    monkeypatch.setattr(build, "BLOCK", BLOCK)
    path = book(tmp_path)
    whole = made(path, tmp_path / "whole")
    left = [blocks]

    def stopped(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os._exit(9) if kill else signal.raise_signal(signal.SIGINT)
        return prefill(*arguments, **options)

    folder = tmp_path / "index"
    with monkeypatch.context() as patch:
        patch.setattr(build, "prefill", stopped)
        if not kill:
            with pytest.raises(KeyboardInterrupt):
                made(path, folder, save_seconds=1e9)
        elif (child := os.fork()) == 0:
            made(path, folder, save_seconds=0)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if blocks:
        assert read_index(folder, CPU).memory.position == blocks * BLOCK
    else:
        assert not (folder / "index").exists()
    index, read, _ = build_index(tiny(), path, folder, checkpoint="tiny")
    assert read == to_read(whole.text) - blocks * BLOCK
    assert [path.name for path in folder.iterdir()] == ["index"]
    for got, want in zip(tensors(index).values(), tensors(whole).values()):
        assert torch.equal(got, want)


def test_of_a_text_that_has_grown_only_the_new_part_is_read(tmp_path):
    """Words at the end of the last file, which change how its last word is encoded, and new files,
    whatever their names.
    """
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text(words(100, "b"))
    (folder / "c.txt").write_text(words(100, "c") + "hel")
    before = made(folder, tmp_path / "index")
    (folder / "c.txt").write_text(words(100, "c") + "hello, and more")
    (folder / "a.py").write_text("def f():\n    pass\n" * 20)
    index, read, _ = build_index(tiny(), folder, tmp_path / "index", checkpoint="tiny")
    assert index.text.names == ["b.txt", "c.txt", "a.py"]
    assert (
        read == index.memory.position - before.memory.position == len(index.text) - len(before.text)
    )
    assert "hello, and more<|endoftext|>def f()" in load_tokenizer().decode(
        index.text.tokens.tolist()
    )
    want = prefill(tiny(), torch.from_numpy(index.text.tokens[None, :-LEFT_OUT].astype("int64")))
    assert_close(tensors(index), tensors(Index(index.text, want.memory, "")), 1e-5)
    stamp = (tmp_path / "index" / "index" / "manifest.json").stat().st_ino
    assert build_index(tiny(), folder, tmp_path / "index", checkpoint="tiny")[1] == 0
    assert (tmp_path / "index" / "index" / "manifest.json").stat().st_ino == stamp


@pytest.mark.parametrize("change", ["edited", "shorter", "removed"])
def test_another_text_is_refused_by_file_and_line_and_restart_reads_it(tmp_path, change):
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = words(300).splitlines(keepends=True)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("".join(lines))
    made(folder, tmp_path / "index")
    if change == "edited":
        (folder / "b.txt").write_text("".join([*lines[:4], "Another line.\n", *lines[4:]]))
    elif change == "shorter":
        (folder / "b.txt").write_text("".join(lines[:4]))
    else:
        (folder / "b.txt").unlink()
    line = 1 if change == "removed" else r"[345]"
    with pytest.raises(ValueError, match=f"^TEXT: from '[ab].txt', line ({line}|[0-9]+) on"):
        made(folder, tmp_path / "index")
    index = made(folder, tmp_path / "index", restart=True)
    want = encode_files(ordered(find_files(folder, without=tmp_path)[0], []))
    assert index.text.same_as(want) and index.complete


def test_every_token_has_its_file_and_line(tmp_path):
    """Windows line ends and empty files too; the first token of a line stands at its beginning."""
    contents = {"a.txt": "", "b.txt": "one\r\ntwo\r\n\r\nfour MARK\r\n", "sub/c.txt": "MARK\nlast"}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    text = encode_files(ordered(find_files(tmp_path, without=tmp_path / "x")[0], []))
    mark = load_tokenizer().encode_ordinary("MARK")
    assert text.names == ["b.txt", "sub/c.txt"]
    found = [
        text.lines(i, i + len(mark))
        for i in range(len(text))
        if text.tokens[i + 1 : i + len(mark)].tolist() == mark[1:]
    ]
    assert found == [("b.txt", 4, 4), ("sub/c.txt", 1, 1)]
    assert text.lines(0, len(text)) == ("b.txt", 1, 5)
    assert text.lines(len(text) - 1, len(text) + 99) == ("sub/c.txt", 2, 2)


def test_what_is_no_text_is_skipped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "binary").write_bytes(b"x" * 9000 + b"\0")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden").write_text("text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("text")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "index.json").write_text("{}")
    (tmp_path / "link").symlink_to("a.txt")
    os.mkfifo(tmp_path / "pipe")
    found, skipped = find_files(tmp_path, without=tmp_path / "own")
    assert list(found) == ["a.txt"] and skipped == 4
    assert own_text.find_files([str(tmp_path)]) == [  # training walks through it alike
        tmp_path / name for name in ("a.txt", "binary", "latin", "own/index.json")
    ]


def test_mini_answers_and_says_where_it_found_the_answer(tmp_path):
    parts = [words(500, str(i)).splitlines(keepends=True) for i in range(4)]
    hidden = (
        " The secret code of QXZB is 482913. ",
        " The secret code of WQNH is 394149. ",
        " The number 48291307 is given to BCDF. ",
        " The number of BCDF is given to GHJK. ",
    )
    for part, sentence in zip(parts, hidden):
        part[9] += sentence
    path = tmp_path / "book.txt"
    path.write_text("".join(line for part in parts for line in part))
    lines = path.read_text().splitlines()
    model = mini()
    index, _, _ = build_index(model, path, tmp_path / "index", checkpoint="mini")
    questions = {
        "What is the secret code of WQNH?": ("394149", "394149"),
        "what is the secret code of QXZB": ("482913", "482913"),
        "What are the secret codes of WQNH and QXZB?": (
            "394149. The secret code of QXZB is 482913",
            "394149",
        ),
        "Which names are given the number 48291307?": ("BCDF, GHJK", "48291307"),
    }
    before = {name: x.clone() for name, x in tensors(index).items()}
    for question, (answer, sought) in questions.items():
        reply = ask(model, index, question)
        assert (reply.answer, reply.trained) == (answer, True)
        best = reply.chunks[0]
        assert sought in "".join(lines[best.line - 1 : best.last_line])
        assert 0 < sum(chunk.score for chunk in reply.chunks) <= 1
    assert not ask(model, index, "Who wrote this?").trained
    assert_close(tensors(index), before, 0)
    best = find(model, index, "The secret code of QXZB is ").chunks[0]
    assert "QXZB" in "".join(lines[best.line - 1 : best.last_line])
    passage = index.text.tokens[1000:1128].tolist()
    found = find(model, index, load_tokenizer().decode(passage))
    assert {chunk.chunk for chunk in found.chunks} & {15, 16, 17}
    assert found.answer is None


def test_a_text_shorter_than_a_chunk_can_be_asked(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("The secret code of QXZB is 482913.")
    model = mini()
    index, read, _ = build_index(model, path, tmp_path / "index", checkpoint="mini")
    assert read == 1
    reply = ask(model, read_index(tmp_path / "index", CPU), "What is the secret code of QXZB?")
    assert reply.answer == "482913" and reply.chunks == []
    assert find(model, index, "QXZB").chunks == []


# ---- the commands


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a model, a text and its index, in which commands run."""
    tiny().save_pretrained(tmp_path / "model")
    book(tmp_path)
    build_index(
        tiny(), tmp_path / "book.txt", tmp_path / "index", checkpoint=str(tmp_path / "model")
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


INDEX = ("--checkpoint", "model", "--device", "cpu")


def refused(capfd, *words: str) -> str:
    """The one line that refuses a command."""
    status, out, err = call(capfd, *words)
    assert (status, out) == (2, "") and err.count("\n") == 1, err
    return err.removeprefix(f"hsa-mini {words[0]}: error: ").strip()


def test_the_commands_say_what_they_read_and_found(place, capfd):
    (place / "texts").mkdir()
    (place / "texts" / "a.txt").write_text(words(300))
    (place / "texts" / "x.bin").write_bytes(b"\0")
    status, out, _ = call(capfd, "index", "texts", "new", *INDEX)
    assert status == 0 and "of 1 file; 1 binary files" in out and " tokens/s)" in out
    for words_ in (("new", "A question?"), ("new", "--chunks", "2", "A question?")):
        status, out, err = call(capfd, "ask", *words_, "--json", "r.json")
        result = json.loads((place / "r.json").read_text())
        assert status == 0 and f"answer     {result['answer']}" in out and "note: " in err
        (best, *_) = result["chunks"]
        assert best["file"] == "a.txt" and f"a.txt:{best['line']}" in out
    status, out, err = call(capfd, "ask", "new", "--retrieve-only", "A phrase", "--json", "-")
    assert status == 0 and json.loads(out)["answer"] is None and err == ""


def test_what_cannot_be_indexed_is_refused_and_nothing_is_left(place, capfd):
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes("café".encode("latin-1"))
    (place / "binary").write_bytes(b"x\0")
    (place / "thesis").mkdir()
    (place / "thesis" / "thesis.tex").write_text("years of work")
    os.mkfifo(place / "fifo")
    cases = {
        ("empty.txt", "new"): "TEXT: empty.txt holds no text, accepted is at least one token",
        ("latin.txt", "new"): "TEXT: latin.txt is no UTF-8 text; accepted is a UTF-8 text file, or",
        ("binary", "new"): "TEXT: binary is no UTF-8 text; accepted is a UTF-8 text file, or",
        ("fifo", "new"): "TEXT: fifo is no regular file",
        ("/dev/zero", "new"): "TEXT: /dev/zero is no regular file",
        ("nowhere", "new"): "TEXT: cannot read nowhere (No such file or directory)",
        ("", "new"): "TEXT: got '', accepted is",
        ("book.txt", "thesis"): "DIR: thesis holds 'thesis.tex'; accepted is a new or empty",
        ("book.txt", "book.txt"): "DIR: got book.txt (it is a file)",
        ("thesis", "index"): "TEXT: from 'book.txt', line 1 on, it differs from what index has",
    }
    before = sorted(place.rglob("*"))
    for words_, message in cases.items():
        assert message in refused(capfd, "index", *words_, *INDEX)
    assert sorted(place.rglob("*")) == before


def test_what_cannot_be_asked_is_refused(place, capfd):
    other_model = tiny()
    other_model.norm.weight.data += 1
    other_model.save_pretrained(place / "other")
    path = place / "index" / "index" / "index.json"
    assert "DIR: model holds no index" in refused(capfd, "ask", "model", "A question?")
    for question in ("", "  ", "x" * (MAX_CHARACTERS + 1), "\udcff"):
        assert "QUESTION: got " in refused(capfd, "ask", "index", question)
    other = refused(capfd, "ask", "index", "A question?", "--checkpoint", "other")
    assert other.startswith("DIR: index holds an index that other weights made")
    assert "--json: got a file without QUESTION" in refused(
        capfd, "ask", "index", "--json", "r.json"
    )
    other = refused(capfd, "index", "book.txt", "index", "--checkpoint", "other")
    assert other.startswith("DIR: index holds an index that other weights made")
    with locked(place / "index", "DIR"):
        held = refused(capfd, "index", "book.txt", "index", *INDEX)
        assert f"DIR: index is in use by process {os.getpid()}" in held
    text = path.read_text()
    for name in os.listdir(path.parent):
        file = path.with_name(name)
        content = file.read_bytes()
        file.write_bytes(content[:-2] + b"\1" + content[-1:])
        for words_ in (("ask", "index", "A question?"), ("index", "book.txt", "index", *INDEX)):
            message = refused(capfd, *words_)
            assert message.startswith("DIR: ") and (name in message or name == "manifest.json")
        file.write_bytes(content)
    assert path.read_text() == text and call(capfd, "ask", "index", "A question?")[0] == 0


def test_an_unfinished_index_is_refused_until_it_is_completed(place, capfd, monkeypatch):
    left = [2]

    def stopped(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return prefill(*arguments, **options)

    monkeypatch.setattr(build, "BLOCK", BLOCK)
    monkeypatch.setattr(build, "prefill", stopped)
    status, _, err = call(capfd, "index", "book.txt", "new", *INDEX)
    assert status == 130 and "what was read is kept: the same command goes on" in err
    assert f"DIR: new has read {BLOCK} of " in refused(capfd, "ask", "new", "A question?")
    assert call(capfd, "index", "book.txt", "new", *INDEX)[0] == 0
    assert call(capfd, "ask", "new", "A question?")[0] == 0


def test_a_text_of_too_many_tokens_or_files_is_refused(place, capfd, monkeypatch):
    monkeypatch.setattr(texts, "MAX_TOKENS", 100)
    assert "TEXT: got more than 100 tokens" in refused(capfd, "index", "book.txt", "new", *INDEX)
    monkeypatch.setattr(texts, "MAX_FILES", 3)
    assert "holds more than 3 files" in refused(capfd, "index", ".", "new", *INDEX)
    assert not (place / "new").exists()


@pytest.mark.parametrize("key, status", [(b"\x04", 0), (b"\x03", 130)])
def test_on_a_terminal_questions_are_asked_until_a_key_ends_it(place, key, status):
    environment = os.environ | {"TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
    child, main = pty.fork()
    if child == 0:
        words_ = [sys.executable, "-m", "hsa_mini", "ask", "index"]
        os.execve(sys.executable, words_, environment)
    seen = b""
    deadline = time.monotonic() + 120
    for sent in (b"Who?\n", b"\n", b"x" * 40 + b"\n", key):
        while not seen.endswith(b"? "):
            assert time.monotonic() < deadline, seen
            seen += os.read(main, 4096)
        os.write(main, sent)
        seen += b" "
    with suppress(OSError):  # until the terminal is closed
        while True:
            if select.select([main], [], [], 1)[0]:
                seen += os.read(main, 4096)
                continue
            assert time.monotonic() < deadline, seen
            if b"interrupted" not in seen:  # `input` may miss a key just before it waits for one
                os.write(main, key)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status, seen
    assert seen.count(b"\nanswer  ") == 2 and b"Traceback" not in seen
