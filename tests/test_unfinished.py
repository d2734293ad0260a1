"""Finished lengths of a run: the same run goes on after them, and no other run takes them."""

import json
import os
from pathlib import Path

import pytest
import torch

from hsa_mini.evaluation.perplexity import PerplexityRow
from hsa_mini.evaluation.results import ControlRow, RetrievalRow, check_replaceable
from hsa_mini.evaluation.unfinished import Unfinished, describe_run

RUN = {"checkpoint": "abc", "task": "vt", "lengths": [400, 300], "seed": 1, "border": False}
ROWS = {
    tokens: {
        "rows": [RetrievalRow(tokens, depth, 10, 9, 10, tokens, 1) for depth in (0.0, 0.1111)],
        "control_rows": [ControlRow(tokens, 0.5, 10, 0, 2, tokens, 1, "absent")],
    }
    for tokens in (300, 400)
}


@pytest.fixture
def results(tmp_path) -> Path:
    return tmp_path / "r.json"


def test_the_same_run_goes_on_after_its_finished_lengths(results):
    Unfinished("--out", results, RUN).add(300, **ROWS[300])
    again = Unfinished("--out", results, RUN)
    assert again.rows("rows", RetrievalRow) == ROWS[300]["rows"]
    again.add(400, **ROWS[400])
    again = Unfinished("--out", results, RUN)
    for name, kind in (("rows", RetrievalRow), ("control_rows", ControlRow)):
        assert again.rows(name, kind) == ROWS[400][name] + ROWS[300][name]  # as in RUN
    again.remove()
    assert list(results.parent.iterdir()) == []
    assert Unfinished("--out", results, RUN).lengths == {}


def test_rows_with_a_number_for_each_stretch_come_back_equal(results):
    row = PerplexityRow(300, 2, 50, 1.5, 4.5, (0.1 + 0.2, 2.7), 1)
    Unfinished("--out", results, RUN).add(300, rows=[row])
    assert Unfinished("--out", results, RUN).rows("rows", PerplexityRow) == [row]


@pytest.mark.parametrize("key", RUN)
def test_another_run_is_refused_and_what_differs_is_named(results, key):
    Unfinished("--out", results, RUN).add(300, **ROWS[300])
    before = results.with_name("r.json.unfinished").read_bytes()
    message = rf"^--out: \S+/r.json.unfinished holds .* another run \(other {key}\); accepted is"
    with pytest.raises(ValueError, match=message):
        Unfinished("--out", results, {**RUN, key: "another"})
    assert results.with_name("r.json.unfinished").read_bytes() == before


def test_a_damaged_file_is_refused_by_name(results):
    Unfinished("--out", results, RUN).add(300, **ROWS[300])
    kept = results.with_name("r.json.unfinished")
    content = kept.read_bytes()
    damaged = [
        content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in range(len(content))
    ]
    damaged += [content[:i] for i in range(0, len(content), 40)]
    damaged += [b"[]", b"{}", b"[" * 100_000, b"\xff"]
    refused = 0
    for some in damaged:
        kept.write_bytes(some)
        try:
            rows = Unfinished("--out", results, RUN).rows("rows", RetrievalRow)
            assert json.loads(some) == json.loads(content) and rows == ROWS[300]["rows"]
        except ValueError as error:
            assert str(error).startswith(f"--out: {kept} is damaged; accepted is")
            refused += 1
    assert refused > 0.9 * len(damaged)


def test_a_write_that_fails_keeps_what_was_there(results, monkeypatch):
    unfinished = Unfinished("--out", results, RUN)
    unfinished.add(300, **ROWS[300])

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            unfinished.add(400, **ROWS[400])
    assert [path.name for path in results.parent.iterdir()] == ["r.json.unfinished"]
    assert set(Unfinished("--out", results, RUN).lengths) == {300}


def test_nothing_is_kept_beside_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    unfinished = Unfinished("--out", tmp_path / "pipe", RUN)
    unfinished.add(300, **ROWS[300])
    assert unfinished.rows("rows", RetrievalRow) == ROWS[300]["rows"]
    unfinished.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_it_lies_beside_the_file_that_a_link_names(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/r.json")
    Unfinished("--out", tmp_path / "link", RUN).add(300, **ROWS[300])
    assert (tmp_path / "there" / "r.json.unfinished").is_file()


def test_a_run_is_described_by_all_that_its_rows_depend_on():
    run = describe_run(torch.device("cpu"), seed=1)
    assert run.keys() == {"seed", "hardware", "versions", "commit"}


@pytest.mark.parametrize("content", [None, "", '{"rows": []}', '{"rows": [], "checkpoint": "abc"}'])
def test_results_of_the_same_checkpoint_are_replaced(results, content):
    if content is not None:
        results.write_text(content)
    check_replaceable("--out", results, "abc")


@pytest.mark.parametrize("content", ['{"rows": [], "checkpoint": "d"}', "[]", "{}", "my thesis"])
def test_results_of_another_checkpoint_and_other_files_are_not_replaced(results, content):
    results.write_text(content)
    with pytest.raises(ValueError, match=f"^--out: {results} holds something else than results of"):
        check_replaceable("--out", results, "abc")
