"""Saved pictures and the static site in a browser that has no network and no Jupyter."""

import re
from pathlib import Path

import pytest
from material import build_site, words

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
    what the console complains of, and what the page wanted to load from elsewhere.
    """
    contexts = []

    def open_page(path: Path, **options):
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.errors = []
        page.on("console", lambda line: line.type == "error" and page.errors.append(line.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("dialog", lambda dialog: page.errors.append(dialog.message))
        here = path.parent.as_uri()
        page.on("request", lambda wish: wish.url.startswith(here) or page.errors.append(wish.url))
        page.goto(path.as_uri())
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


# ---- The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    return build_site(tmp_path_factory.mktemp("site"))


def test_the_site_opens_from_a_file_and_its_search_finds_the_landmarks(site, open_file):
    page = open_file(site / "index.html")
    page.get_by_role("link", name="03 · Which chunks").first.click()
    expect(page.locator("h1")).to_contain_text("Which chunks matter to this token?")
    page.locator("input[name=q]").first.fill("landmark")
    page.keyboard.press("Enter")
    found = page.locator("#search-results li a")
    expect(found.filter(has_text="What does a chunk say about itself?").first).to_be_visible()
    expect(found.nth(13)).to_be_visible()  # each of the notebooks
    found.filter(has_text="Which chunks matter").first.click()
    expect(page.locator("h1")).to_contain_text("Which chunks matter to this token?")
    assert page.errors == []


def test_the_explorer_of_the_site_answers_to_keys_and_follows_its_theme(site, open_file):
    page = open_file(site / "explorer.html")
    expect(page.locator(".hsa-tokens strong")).to_have_text("✓ right")
    before = page.locator(SUMMARY).text_content()
    page.locator(CHOSEN).focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(SUMMARY).text_content() != before
    background = "getComputedStyle(document.querySelector('.hsa')).backgroundColor"
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    for _ in range(2):  # the browser's theme, then the two others
        page.locator(".theme-toggle:visible").first.click()
        dark = page.locator("body").get_attribute("data-theme") == "dark"
        expect(page.locator("body")).to_have_attribute("data-jp-theme-light", str(not dark).lower())
        want = "rgb(17, 17, 17)" if dark else "rgb(255, 255, 255)"
        assert page.evaluate(background) == want
    page.get_by_label("Stored").select_option(index=1)
    expect(page.locator(".hsa-tokens strong")).to_have_text("✗ wrong")
    assert page.errors == []


def test_no_page_of_the_site_is_wider_than_a_phone(site, open_file):
    for path in sorted(site.glob("*.html")):
        page = open_file(path, viewport={"width": 390, "height": 800}, color_scheme="dark")
        assert page.evaluate(FITS), path.name
        for picture in page.locator(".cell_output img").all():
            assert "invert" in picture.evaluate("image => getComputedStyle(image).filter")
        assert page.errors == []
