"""Saved pictures in a browser that has no network and no Jupyter."""

import re
from pathlib import Path

import pytest
from material import words

from hsa_mini import HSAModel
from hsa_mini.viz import explore_map, explore_retrieval

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

pytestmark = pytest.mark.browser

QUESTION = "What is the secret code of QXZB?"
MADE_UP = "What is the secret code of WQNH?"
MARKUP = "</script><img src=x onerror=alert(1)>"
SUMMARY = ".hsa-summary"
CHOSEN = ".hsa-token[aria-checked=true]"
# The page is not wider than the window.
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture
def open_file(browser):
    """A function that opens a file without a network: path, options -> page. page.errors holds
    what the console complains of, and what the page wanted to load.
    """
    contexts = []

    def open_page(path: Path, **options):
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("console", lambda line: line.type == "error" and page.errors.append(line.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("dialog", lambda dialog: page.errors.append(dialog.message))
        page.on("request", lambda request: page.errors.append(request.url))
        page.goto(path.as_uri())
        assert page.errors.pop(0) == path.as_uri()
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("saved") / "explorer.html"
    model = HSAModel.from_pretrained("mini")
    needle = f"The secret code of QXZB is 482913. {MARKUP}"
    explorer = explore_retrieval(model, words(800), needle=needle, question=QUESTION)
    explorer.save_html(file, questions=[MADE_UP])
    return file


def test_a_saved_explorer_answers_to_keys_and_mouse_without_a_network(saved, open_file):
    page = open_file(saved)
    expect(page.locator(".hsa-token.right")).to_have_text(list("482913"))
    assert page.locator("img").count() == 0  # markup stays text
    assert MARKUP in page.locator(".hsa").text_content()

    page.locator(CHOSEN).focus()
    seen = {page.locator(SUMMARY).text_content()}
    for digit in "482913":
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == digit
        seen.add(page.locator(SUMMARY).text_content())
    page.keyboard.press("ArrowUp")
    expect(page.locator(SUMMARY)).to_contain_text("HSA layer 0")
    page.locator(".hsa-token").first.click()
    expect(page.locator(SUMMARY)).to_contain_text("token 1 of the question")
    assert len(seen) == 7

    canvas = page.get_by_role("slider", name="Scores of all chunks")
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    canvas.focus()
    page.keyboard.press("Home")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    page.keyboard.press("Enter")  # into a chunk that no token keeps
    page.keyboard.press("End")
    expect(canvas).to_have_attribute("aria-valuetext", re.compile("^Token 63 of chunk 0 “.+”"))

    page.get_by_label("Stored").select_option(MADE_UP)
    expect(page.locator(".hsa-tokens strong")).to_have_text("✗ wrong")
    expect(page.get_by_text("made up")).to_be_visible()
    for name in ("Ask", "Drop chunk", "Undo"):
        assert page.get_by_role("button", name=name).count() == 0  # a model would have to answer
    assert page.errors == []


def test_a_saved_explorer_fits_a_phone_and_follows_a_dark_browser(saved, open_file):
    page = open_file(saved, viewport={"width": 390, "height": 800}, color_scheme="dark")
    page.wait_for_selector(CHOSEN)
    assert page.evaluate(FITS)
    background = "getComputedStyle(document.querySelector('{}')).backgroundColor"
    for place in ("body", ".hsa"):
        assert page.evaluate(background.format(place)) == "rgb(17, 17, 17)"
    page.emulate_media(color_scheme="light")
    expect(page.locator("body")).to_have_attribute("data-jp-theme-light", "true")
    assert page.evaluate(background.format(".hsa")) == "rgb(255, 255, 255)"
    assert page.errors == []


def test_a_saved_page_cannot_load_anything(saved, open_file):
    page = open_file(saved)
    page.wait_for_selector(CHOSEN)
    load = """() => new Promise(done => {
      const image = new Image();
      image.onload = image.onerror = event => done(event.type);
      image.src = 'data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==';
    })"""
    assert page.evaluate(load) == "error"
    assert any("Content Security Policy" in line for line in page.errors)


def test_a_saved_score_map_moves_by_arrow_keys(open_file, tmp_path):
    numbers = ([[0.5, -1.0], [0.25, 2.0]], [[0], [1]], [[1.0], [1.0]])
    explore_map(lambda: numbers, alt="Two chunks").save_html(tmp_path / "map.html")
    page = open_file(tmp_path / "map.html")
    canvas = page.get_by_role("slider", name="Two chunks")
    canvas.focus()
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    page.keyboard.press("ArrowRight")
    expect(canvas).to_have_attribute("aria-valuetext", "Token 1 keeps chunk 1 with 1.00.")
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before
    assert page.errors == []
