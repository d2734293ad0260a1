"""The static site: its pages, pictures and links are there, and it loads nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from material import build_site

pytest.importorskip("furo")
pytest.importorskip("myst_nb")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


class Page(HTMLParser):
    """What a page loads, where its links lead, the names of its places, and its pictures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.pictures: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            self.pictures.append(values["src"])
        if "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") not in ("next", "prev", "index", "search"):
            self.loads.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return build_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Page]:
    return {path.name: Page(path) for path in site.glob("*.html")}


def test_every_notebook_has_a_page_with_all_its_pictures_and_the_start_page_is_the_index(
    site, pages
):
    start = NOTEBOOKS[0].stem
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        stills = sum("image/png" in output.get("data", {}) for output in outputs)
        assert len(pages[f"{notebook.stem}.html"].pictures) == stills
    assert (site / "index.html").read_bytes() == (site / f"{start}.html").read_bytes()
    listed = {f"{notebook.stem}.html" for notebook in NOTEBOOKS} | {"explorer.html"}
    for name, page in pages.items():  # in the sidebar, a page does not lead to itself
        own = {start + ".html"} if name == "index.html" else {name}
        assert listed - own <= {urlsplit(link).path for link in page.links}


def test_every_internal_link_leads_to_a_page_and_a_place_in_it(site, pages):
    broken = []
    count = 0
    for name, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme:
                continue
            count += 1
            target = unquote(address.path) or name
            place = unquote(address.fragment)
            there = (site / target).is_file()
            if not there or (place and place not in pages[target].places):
                broken.append((name, link))
    assert broken == []
    assert count > 20 * len(NOTEBOOKS)


def test_pages_load_files_of_the_site_alone(site, pages):
    for page in pages.values():
        for address in page.loads:
            parts = urlsplit(address)
            assert not parts.scheme and not parts.netloc
            assert (site / unquote(parts.path)).is_file()
    sheets = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//|@import", sheets) == []


def test_the_index_of_the_search_finds_the_landmarks(site):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text, re.DOTALL)[1])
    found = set()
    for terms in (index["terms"], index["titleterms"]):
        pages = terms["landmark"]
        found |= set(pages if isinstance(pages, list) else [pages])
    sources = {path.stem: path.with_suffix(".py").read_text(encoding="utf-8") for path in NOTEBOOKS}
    wanted = {name for name, source in sources.items() if "landmark" in source.lower()}
    assert {index["docnames"][page] for page in found} == wanted and len(wanted) > 10


def test_formulas_are_drawn_by_the_browser(site):
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        blocks = sum(text.count("$$") for text in texts) // 2
        page = (site / f"{notebook.stem}.html").read_text(encoding="utf-8")
        assert page.count('<div class="formula"><math') == blocks
