"""A saved picture holds the values that it showed, and loads and interprets nothing else."""

import base64
import gzip
import hashlib
import json
import re

import pytest
from material import words

from hsa_mini import HSAModel
from hsa_mini.viz import explore_map, explore_retrieval
from hsa_mini.viz.retrieval.picture import shown_words

MARKUP = "</script><img src=x onerror=alert(1)>"
QUESTION = "What is the secret code of QXZB?"
SECOND = f"Where is {MARKUP}?"


@pytest.fixture(scope="module")
def explorer():
    model = HSAModel.from_pretrained("mini")
    needle = f"The secret code of QXZB is 482913. {MARKUP}"
    text = f"{MARKUP} {words(600)} {MARKUP}"
    return explore_retrieval(model, text, needle=needle, question=QUESTION)


@pytest.fixture(scope="module")
def page(explorer, tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("saved") / "new" / "page.html"
    explorer.save_html(file, questions=[SECOND])
    return file.read_text(encoding="utf-8")


def values_in(page: str) -> dict:
    """What the script of a page unpacks."""
    (packed,) = re.findall(r'<script type="application/gzip">([A-Za-z0-9+/=]+)</script>', page)

    def revive(value: dict):
        return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value

    return json.loads(gzip.decompress(base64.b64decode(packed)), object_hook=revive)


def in_json(value):
    """The value as it looks after JSON: keys are text."""
    if isinstance(value, dict):
        return {str(key): in_json(entry) for key, entry in value.items()}
    return [in_json(entry) for entry in value] if isinstance(value, list | tuple) else value


def test_a_saved_explorer_holds_what_each_question_showed_and_the_words_of_every_chunk(
    explorer, page
):
    saved = values_in(page)
    assert list(saved["states"]) == [QUESTION, SECOND]
    for question in (SECOND, QUESTION):
        explorer.ask(None, explorer.form["needle"], question, 0.5)
        state = saved["states"][question]
        assert state["data"] == in_json(explorer.data)
        assert state["status"] == explorer.status
        assert state["form"]["question"] == question
    ids = explorer.asked[0].text.ids
    stored = saved["shared"]["words"]
    assert [len(chunk) for chunk in stored[:-1]] == [64] * (len(ids) // 64)
    assert [word for chunk in stored for word in chunk] == shown_words(ids, 0, len(ids))


def test_a_saved_page_forbids_to_load_anything_and_runs_its_own_script_alone(explorer, page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    (script,) = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    assert "://" not in page and "onerror" not in page
    explorer.ask(None, explorer.form["needle"], QUESTION, 0.5)
    assert len(explorer.saved().page()) < 1 << 20


def test_what_cannot_be_asked_or_written_is_refused_and_nothing_is_written(explorer, tmp_path):
    with pytest.raises(ValueError, match="^question: got no text"):
        explorer.save_html(tmp_path / "page.html", questions=[" "])
    with pytest.raises(ValueError, match="^path: got .*it is a folder"):
        explorer.save_html(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_canvas_with_a_slider_is_saved_as_it_stands(tmp_path):
    scores = [[0.5, -1.0], [0.25, 2.0], [1.0, 3.0]]
    numbers = (scores, [[0], [1], [1]], [[1.0], [1.0], [1.0]])
    picture = explore_map(lambda: numbers, alt=f"Scores & {MARKUP}", token=2)
    picture.save_html(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    saved = values_in(page)["states"][""]
    assert saved == {"data": in_json(picture.picture.data), "token": 2, "alt": picture.alt}
    assert "<title>Scores &amp; &lt;/script&gt;" in page and "<img" not in page
