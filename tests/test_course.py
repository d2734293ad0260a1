"""The course as a whole: the start page's tables and search, the headers of all notebooks, and how
much of their code draws.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from material import TINY, tiny, word_tokens

from hsa_mini import HSAConfig, HSAModel, course
from hsa_mini.evaluation import search
from hsa_mini.evaluation.demo import find_needle
from hsa_mini.evaluation.results import PUBLISHED
from hsa_mini.evaluation.search import NeedleSearch
from hsa_mini.lab.claims import CLAIMS, NOT_REPRODUCED, REPRODUCED

pytest.importorskip("anywidget")
pytest.importorskip("triton")

from hsa_mini.viz import make_figure
from hsa_mini.viz.course.course_map import course_map
from hsa_mini.viz.course.needle import explore_needle, picture_of, summary

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
MAX_DRAWING = 0.2
DRAWN_ON = {"figure", "axes", "ax"}

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


# ---- The tables


ENTRIES = [*course.read_course()["paper"], *course.read_course()["claims"]]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry["heading"])


@each_entry
def test_an_entry_names_a_heading_code_and_a_test_that_exist(entry):
    text = (FOLDER / f"{entry['notebook']}.py").read_text(encoding="utf-8")
    headings = re.findall(r"^# #{2,3} (.+)$", text, re.MULTILINE)
    assert headings.count(entry["heading"]) == 1
    if "code" in entry:
        module, name = entry["code"].split(":")
        assert callable(getattr(importlib.import_module(module), name))
    if entry["test"]:
        path, name = entry["test"].split("::")
        functions = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def test_every_claim_has_a_verdict_and_those_of_the_laboratory_are_all_there():
    claims = course.read_course()["claims"]
    assert [entry["lab"] for entry in claims if "lab" in entry] == [claim.name for claim in CLAIMS]
    assert {entry["task"] for entry in claims if "task" in entry} == PUBLISHED.keys()
    stated = {entry["verdict"] for entry in claims if "verdict" in entry}
    assert stated == {REPRODUCED, course.NOT_ATTEMPTED}
    for entry, (_, verdict, _, test) in zip(claims, course.claim_rows()):
        assert verdict in course.VERDICTS
        assert (verdict == course.NOT_ATTEMPTED) == (test is None), entry


@pytest.mark.parametrize(("share", "verdict"), [(75, REPRODUCED), (74, NOT_REPRODUCED)])
def test_a_task_is_reproduced_from_the_share_of_the_paper_on(monkeypatch, share, verdict):
    row = {"tokens": 1 << 24, "accuracy": share / 100}
    monkeypatch.setattr(course, "by_length", lambda rows: [row])
    assert course.verdict_of_task("mq_niah") == verdict


def test_symbols_are_fields_and_arguments_of_the_code():
    fields = {field for _, _, field in course.read_course()["sizes"] if field}
    assert fields <= HSAConfig.__dataclass_fields__.keys()
    letters = {letter for letter, _, _ in course.read_course()["sizes"]}
    for _, _, operation, argument, shape in course.read_course()["tensors"]:
        function = getattr(importlib.import_module("hsa_mini.reference"), operation)
        assert argument in inspect.signature(function).parameters
        assert set(re.findall(r"\w", shape)) <= letters


def test_a_table_is_markdown_and_links_lead_to_headings():
    assert course.table(("a", "b"), [(1, 2)]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert course.link("02_chunks", "Move it") == "[02 Move it](02_chunks.ipynb#Move-it)"
    assert course.link("02_chunks") == "[02 chunks](02_chunks.ipynb)"


# ---- The headers


@pytest.fixture(scope="module")
def headers():
    return course.read_headers(FOLDER)


@each_notebook
def test_a_header_has_the_form_of_all_and_leads_back_and_on(headers, source):
    """What a reader will be able to do, minutes, needs, and then one line of links."""
    own = next(header for header in headers if header.name == source.stem)
    cell = jupytext.read(source).cells[0].source
    assert 3 <= len(own.able) <= 6
    assert 5 <= own.minutes <= 40
    assert re.fullmatch(r"(\d+|a|one|two|half a) (seconds|minutes?)", own.run)
    assert all(needed < own.name for needed in own.needs)
    assert cell.rstrip().splitlines()[-1] == course.way(headers, own.name)


def test_the_map_shows_every_notebook_and_what_it_needs(headers):
    ax = make_figure().subplots()
    assert course_map(ax, headers).startswith(f"{len(headers)} notebooks")
    shown = [text.get_text() for text in ax.texts]
    assert {header.name.replace("_", " ") for header in headers} <= set(shown)
    assert shown.count("") == sum(len(header.needs) for header in headers)  # arrows
    table = course.notebook_table(headers)
    assert all(f"]({header.name}.ipynb)" in table for header in headers)


def test_a_header_without_a_part_is_refused(tmp_path):
    text = (FOLDER / "01_why.py").read_text(encoding="utf-8")
    (tmp_path / "01_why.py").write_text(text.replace("**Needs:**", "Needs:", 1), encoding="utf-8")
    with pytest.raises(ValueError, match=r"01_why\.py lacks a part of its header"):
        course.read_headers(tmp_path)


# ---- No more than a fifth of the code draws


def drawing_share(code: str) -> float:
    """The share of the lines of statements that draw.

    A statement draws if it uses a figure or axes, or a name imported from `hsa_mini.viz` (but the
    names of numbers and colours in `style`). A function that does draws as a whole; of a loop, only
    the statements that do.
    """
    tree = ast.parse(code)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    viz = [node for node in nodes if str(node.module).startswith("hsa_mini.viz")]
    viz = [node for node in viz if node.module != "hsa_mini.viz.style"]
    names = DRAWN_ON | {alias.asname or alias.name for node in viz for alias in node.names}

    def draws(node: ast.AST) -> bool:
        used = {getattr(part, "id", getattr(part, "arg", None)) for part in ast.walk(node)}
        return bool(used & names)

    def lines(body: list) -> set[int]:
        found: set[int] = set()
        for node in body:
            if isinstance(getattr(node, "body", None), list) and not isinstance(
                node, ast.FunctionDef
            ):
                found |= lines(node.body)
            elif draws(node):
                found |= set(range(node.lineno, node.end_lineno + 1))
        return found

    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    every = {line for node in statements for line in range(node.lineno, node.end_lineno + 1)}
    return len(lines(tree.body)) / len(every)


def test_lines_that_draw_are_counted():
    code = "\n".join(
        (
            "from hsa_mini.viz import show",
            "def draw(figure):",
            "    figure.subplots()",
            "for i in range(3):",
            "    x = i",
            "    show(x)",
            "x = 1",
            "x += 1",
        )
    )
    assert drawing_share(code) == 3 / 8


@each_notebook
def test_no_more_than_a_fifth_of_the_code_draws(source):
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    assert drawing_share("\n\n".join(cells)) <= MAX_DRAWING


# ---- The search


TEXT = np.tile(word_tokens(), 3)[:3000].astype(np.uint16)


def searched(folder: Path, model: HSAModel | None = None) -> NeedleSearch:
    return NeedleSearch(model or tiny(), TEXT, folder)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_search_finds_what_reading_everything_finds(tmp_path, depth):
    found = searched(tmp_path / "m").find(depth=depth, seed=3)
    whole = find_needle(tiny(), TEXT, tokens=len(TEXT), depth=depth, seed=3)
    for name in ("question", "expected", "answer", "needle_chunks", "retrieved_chunks"):
        assert getattr(found, name) == getattr(whole, name)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=0, atol=1e-5)
    assert np.array_equal(found.ids, whole.ids)


def test_a_short_text_is_not_stored(tmp_path):
    searched(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_text_is_read_once_for_its_model_and_anew_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MIN_STORED_TOKENS", 100)
    read: list[int] = []

    def count(model, text) -> int:
        read.clear()
        NeedleSearch(model, text, tmp_path / "m", read.append).find(seed=1)
        return sum(read)

    model = tiny()
    assert [count(model, TEXT) for _ in range(2)] == [3000, 0]
    assert [count(tiny(window=TINY.window + 1), TEXT), count(model, TEXT)] == [3000, 3000]
    assert [count(model, TEXT[::-1]), count(model, TEXT)] == [3000, 3000]
    stored = NeedleSearch(model, TEXT, tmp_path / "m").find(seed=2)
    assert np.array_equal(stored.scores, searched(tmp_path / "other", model).find(seed=2).scores)


def test_a_strangers_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "MIN_STORED_TOKENS", 100)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="path: "):
        searched(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_widget_shows_the_finding_of_its_controls(tmp_path):
    explorer = explore_needle(searched(tmp_path / "m").find, depth=(0.0, 1.0, 0.25), seed=(0, 9))
    explorer.controls["depth"].value = 0.5
    explorer.controls["seed"].value = 4
    finding = searched(tmp_path / "m").find(depth=0.5, seed=4)
    data = explorer.picture.data
    scores = np.frombuffer(data["scores"], "<f4").reshape(data["shape"])
    assert np.array_equal(scores, finding.scores)
    assert (data["kept"], data["needle"]) == (finding.retrieved_chunks, finding.needle_chunks)
    assert explorer.picture.chunk == finding.needle_chunks[0]
    needle = "".join(data["texts"][str(chunk)] for chunk in finding.needle_chunks)
    assert finding.needle_text in needle
    assert picture_of(finding) == data
    assert explorer.summary.value.startswith(finding.question)
    assert "wrong, it is" in summary(finding)  # a random model
