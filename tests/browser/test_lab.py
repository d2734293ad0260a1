"""The course in a real JupyterLab, and the retrieval explorer.

Stored pictures are visible before anything runs, all cells run, and the keyboard moves a picture.
Two controls may move at once. What a reader saves keeps the pictures and the kernel's name.

Works on a copy of the notebooks, with settings of its own.
"""

import functools
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from material import words
from nbformat.v4 import new_code_cell, new_notebook

from hsa_mini import HSAModel
from hsa_mini.index.build import build_index
from hsa_mini.viz.retrieval import asking
from hsa_mini.viz.retrieval.picture import shown_words
from hsa_mini.viz.retrieval.stored import look_up, open_index
from hsa_mini.viz.retrieval.what_if import Change, what_if

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")
expect = sync_api.expect

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
START_SECONDS = 60
OPEN_SECONDS = 60
RUN_SECONDS = 300
REDRAW_SECONDS = 20

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks"),
]

IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
PROMPTS = ".jp-CodeCell .jp-InputPrompt"
SLIDER = ".jp-OutputArea [role=slider]"
# A string that changes whenever the picture of a slider is redrawn: its SVG, or the pixels of a
# canvas.
PICTURE = """slider => {
  const area = slider.closest('.widget-vbox, .jp-OutputArea');
  const picture = area.querySelector('.hsa-frame, canvas');
  return picture.shadowRoot ? picture.shadowRoot.innerHTML : picture.toDataURL();
}"""
# Every text that a line shows from now on, in a list.
WATCH = """line => {
  const seen = [line.textContent];
  const look = () => seen.push(line.textContent);
  new MutationObserver(look).observe(line, { childList: true, subtree: true, characterData: true });
  return seen;
}"""
PRESS_BOTH = """sliders => sliders.forEach(slider => slider.dispatchEvent(
  new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true, cancelable: true })
))"""
# How many colours a canvas has in its last columns, and the colour of its first pixel.
EDGE = """canvas => {
  const pen = canvas.getContext('2d');
  const edge = new Uint32Array(pen.getImageData(canvas.width - 3, 0, 3, canvas.height).data.buffer);
  return [new Set(edge).size, [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3)];
}"""
# How large a drawing is, if 1 is 110 pixels an inch.
SCALE = """frame => {
  const svg = frame.shadowRoot.querySelector('svg');
  return svg.clientWidth / (svg.viewBox.baseVal.width * 110 / 72);
}"""
# "none" puts every cell into the page. By default JupyterLab leaves out the cells that are not
# visible.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
}


# Drawings that overlap in time would say so. The last cell runs while the controls move.
TWO_CONTROLS = new_notebook(
    cells=[
        new_code_cell(
            """
import time
from hsa_mini.viz import explore
running = []
def draw(figure, a, b):
    running.append(a)
    time.sleep(0.02)
    figure.subplots().plot([a, b])
    summary = f"a {a}, b {b}, at once {len(running)}"
    running.pop()
    return summary
"""
        ),
        new_code_cell("explore(draw, alt='Two numbers.', size=(3, 2), a=(0, 40), b=(0, 40))"),
        new_code_cell("running.append('cell'); time.sleep(3); running.pop()"),
    ],
    metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
)


@dataclass(frozen=True)
class Lab:
    """A JupyterLab that runs, and the folder that it shows."""

    address: str
    root: Path

    def shut_down_kernels(self) -> None:
        for session in json.load(urllib.request.urlopen(f"{self.address}/api/sessions")):
            address = f"{self.address}/api/sessions/{session['id']}"
            urllib.request.urlopen(urllib.request.Request(address, method="DELETE")).close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab that runs on a copy of the notebooks until the tests end."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        ROOT / "notebooks", home / "root" / "notebooks", ignore=shutil.ignore_patterns(".*")
    )
    shutil.copy(ROOT / "pyproject.toml", home / "root")  # it pairs each .ipynb with a .py
    nbformat.write(TWO_CONTROLS, home / "root" / "two_controls.ipynb")
    for name, values in SETTINGS.items():
        file = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    command += [f"--ServerApp.root_dir={home / 'root'}"]
    log = (home / "log").open("w")
    server = subprocess.Popen(command, cwd=home, env=_environment(home), stdout=log, stderr=log)
    try:
        _wait_for(f"{address}/api/status", server, home / "log")
        yield Lab(address, home / "root")
    finally:
        server.terminate()  # the server first ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()


def _environment(home: Path) -> dict:
    """The environment of the server: JupyterLab writes into `home` only, and finds this package."""
    folders = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "IPYTHONDIR",
    )
    own = {name: str(home / name.lower()) for name in folders}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **os.environ,
        **own,
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTER_CONFIG_PATH": str(ROOT / "notebooks" / ".jupyter"),
        "PYTHONPATH": path,
        "HSA_MINI_TOKENS": "16384",  # of 00, which otherwise reads a million
    }


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture
def open_notebook(browser, lab):
    """A function that opens a notebook of the lab: path -> page. The kernels are shut down after
    the test to free their memory.
    """
    pages = []

    def open_page(path: str):
        pages.append(browser.new_page(viewport={"width": 1300, "height": 1000}))
        pages[-1].goto(f"{lab.address}/doc/tree/{path}?reset")
        pages[-1].wait_for_selector(IDLE, timeout=OPEN_SECONDS * 1000)
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
    lab.shut_down_kernels()


def menu(page, name: str, entry: str) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-item", has=page.get_by_text(entry, exact=True)).click()


def start_all(page) -> None:
    """Run all cells. JupyterLab drops the request, without a word, until it has met the kernel."""
    begun = page.locator(PROMPTS, has_text=re.compile(r"\[[*\d]+\]:"))
    for _ in range(OPEN_SECONDS // 5):
        menu(page, "Run", "Run All Cells")
        try:
            return begun.first.wait_for(timeout=5000)
        except sync_api.TimeoutError:
            continue
    pytest.fail("no cell began to run")


def run_all(page, cells: int) -> None:
    """Clear all outputs, run all cells, and wait until every code cell has its number."""
    menu(page, "Edit", "Clear Outputs of All Cells")
    expect(page.locator(".jp-OutputArea-output")).to_have_count(0)
    start_all(page)
    numbered = page.locator(PROMPTS, has_text=re.compile(r"\[\d+\]:"))
    expect(numbered).to_have_count(cells, timeout=RUN_SECONDS * 1000)
    page.wait_for_selector(IDLE, timeout=OPEN_SECONDS * 1000)


def press_right(page, slider) -> None:
    """One ArrowRight on a slider moves its picture, and the slider keeps the focus."""
    slider.scroll_into_view_if_needed()
    assert slider.get_attribute("aria-label").strip()
    slider.focus()
    value = slider.get_attribute("aria-valuenow")
    before = slider.evaluate(PICTURE)
    page.keyboard.press("ArrowRight")
    handle = slider.element_handle()
    changed = f"([slider, before]) => ({PICTURE})(slider) !== before"
    page.wait_for_function(changed, arg=[handle, before], timeout=REDRAW_SECONDS * 1000)
    assert slider.get_attribute("aria-valuenow") != value
    assert slider.evaluate("slider => slider === document.activeElement")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_and_answers_to_the_keyboard(open_notebook, name):
    page = open_notebook(f"notebooks/{name}")
    cells = code_cells(name)
    pictures = pictures_of(cells)
    assert pictures > 0
    expect(page.locator(".jp-OutputArea .jp-RenderedImage img")).to_have_count(
        pictures, timeout=OPEN_SECONDS * 1000
    )

    run_all(page, len(cells))
    for kind in ("error", "stderr"):
        output = f".jp-OutputArea [data-mime-type='application/vnd.jupyter.{kind}']"
        assert page.locator(output).all_text_contents() == []
    page.wait_for_selector(f"{SLIDER}[aria-label]", timeout=REDRAW_SECONDS * 1000)
    press_right(page, page.locator(SLIDER).first)
    if any("explore_map(" in "".join(cell["source"]) for cell in cells):
        press_right(page, page.locator("canvas[role=slider]").first)
    assert page.locator(".widget-vbox > .widget-label", has_text="Could not draw").count() == 0


def test_two_controls_move_at_once_and_the_latest_values_win(open_notebook):
    """Also while a cell runs, and just after the kernel's start: then it draws in two threads."""
    page = open_notebook("two_controls.ipynb")
    start_all(page)
    page.wait_for_selector(f"{SLIDER}[aria-label]", timeout=OPEN_SECONDS * 1000)
    said = page.locator(".hsa-line")
    sliders = [page.locator(SLIDER).nth(i).element_handle() for i in (0, 1)]
    seen = page.evaluate_handle(WATCH, said.element_handle())
    for _ in range(20):
        page.evaluate(PRESS_BOTH, sliders)
        page.wait_for_timeout(25)
    expect(said).to_have_text("a 20, b 20, at once 1", timeout=REDRAW_SECONDS * 1000)
    drawn = [text for text in seen.json_value() if text.startswith("a ")]
    assert {text.split(", ")[2] for text in drawn} == {"at once 1"}


def test_what_a_reader_saves_keeps_pictures_and_kernel_name(open_notebook, lab):
    name = "03_retrieval"
    file = lab.root / "notebooks" / f"{name}.ipynb"
    before, source = json.loads(file.read_text()), file.with_suffix(".py").read_text()
    page = open_notebook(f"notebooks/{name}.ipynb")
    run_all(page, len(code_cells(f"{name}.ipynb")))
    views = page.locator(".jp-OutputArea .widget-vbox").count()
    assert views > 0
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.type("# mine\n")
    menu(page, "File", "Save Notebook")
    deadline = time.monotonic() + REDRAW_SECONDS
    while "# mine" not in file.with_suffix(".py").read_text() and time.monotonic() < deadline:
        page.wait_for_timeout(100)
    page.close()
    lab.shut_down_kernels()

    after = json.loads(file.read_text())
    assert after["metadata"]["kernelspec"] == before["metadata"]["kernelspec"]
    assert file.with_suffix(".py").read_text().replace("# mine\n", "", 1) == source
    assert pictures_of(after["cells"]) == pictures_of(before["cells"])
    again = open_notebook(f"notebooks/{name}.ipynb")
    images = again.locator(".jp-OutputArea .jp-RenderedImage img")
    expect(images).to_have_count(pictures_of(before["cells"]), timeout=OPEN_SECONDS * 1000)
    assert again.get_by_text("Error displaying widget").count() == 0


def test_a_narrow_page_cuts_nothing_and_a_dark_one_has_no_white(open_notebook):
    page = open_notebook("notebooks/03_retrieval.ipynb")
    page.set_viewport_size({"width": 800, "height": 900})
    run_all(page, len(code_cells("03_retrieval.ipynb")))
    make_dark(page)
    canvas = page.locator(".jp-OutputArea canvas[role=slider]")
    right_edge, corner = canvas.evaluate(EDGE)
    assert right_edge == 1  # one colour: nothing is cut there
    assert max(corner) < 60
    images = page.locator(".jp-OutputArea :is(img, .hsa-frame)")
    assert images.count() > 1
    for image in images.all():
        assert "invert" in image.evaluate("image => getComputedStyle(image).filter")
    for frame in page.locator(".hsa-frame").all():  # its labels stay readable
        assert frame.evaluate(SCALE) > 0.69


def test_stored_pictures_are_dark_in_the_dark_theme_before_anything_runs(open_notebook):
    page = open_notebook("notebooks/03_retrieval.ipynb")
    make_dark(page)
    images = page.locator(".jp-OutputArea img")
    assert images.count() == pictures_of(code_cells("03_retrieval.ipynb"))
    for image in images.all():
        assert "invert" in image.evaluate("image => getComputedStyle(image).filter")


def code_cells(name: str) -> list[dict]:
    stored = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))["cells"]
    return [cell for cell in stored if cell["cell_type"] == "code"]


def pictures_of(cells: list[dict]) -> int:
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return sum("image/png" in output.get("data", {}) for output in outputs)


# ---- The retrieval explorer

EXPLORER = """
from pathlib import Path
from hsa_mini import HSAModel
from hsa_mini.viz import explore_retrieval
explore_retrieval(HSAModel.from_pretrained("mini"), Path({text!r}))
"""
STATUS = ".hsa-status"
SUMMARY = ".hsa-summary"
CHOSEN = ".hsa-token[aria-checked=true]"


@pytest.fixture
def open_explorer(lab, open_notebook):
    """A function that opens the explorer of a text or an index in a notebook of its own, and keeps
    what the browser's console complains of.
    """
    return functools.partial(_open_explorer, lab, open_notebook)


@pytest.fixture
def explorer(open_explorer):
    return open_explorer(ROOT / "CONTRIBUTING.md")


def _open_explorer(lab, open_notebook, text: Path):
    page = open_cells(lab, open_notebook, EXPLORER.format(text=str(text)))
    page.wait_for_selector(CHOSEN, timeout=RUN_SECONDS * 1000)
    return page


def open_cells(lab, open_notebook, *sources: str):
    """The page of a notebook whose cells have run. Its `errors` are those of the browser."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = new_notebook(cells=list(map(new_code_cell, sources)), metadata=kernel)
    nbformat.write(notebook, lab.root / "cells.ipynb")
    page = open_notebook("cells.ipynb")
    page.errors = []
    page.on("console", lambda line: line.type == "error" and page.errors.append(line.text))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    run_all(page, len(sources))
    return page


def ask(page, want: str, **fields: str) -> None:
    """Fill in fields by their labels, ask by keyboard, and wait for a status that begins so."""
    for name, value in fields.items():
        page.get_by_label(name.replace("_", " ")).and_(page.locator("textarea")).fill(value)
    page.keyboard.press("Control+Enter")
    expect(page.locator(STATUS)).to_have_text(re.compile(want), timeout=RUN_SECONDS * 1000)


def test_the_explorer_asks_a_typed_needle_and_follows_its_tokens_by_keyboard(explorer):
    page = explorer
    needle = "<img src=x onerror=alert(1)> The secret code of WQNH is 394149."
    ask(page, "^Right", Needle_sentence=needle, Question="What is the secret code of WQNH?")
    expect(page.locator(".hsa-token.right")).to_have_text(list("394149"))
    assert page.locator(".hsa img, .hsa script").count() == 0  # markup stays text

    # Every level says that its shares add up to 1: scores, weights, attention, blend, next token.
    expect(page.locator(".hsa h4 small", has_text=re.compile("up to 1.000"))).to_have_count(4)
    assert all("up to 1.000" in chunk for chunk in titles(page))

    page.locator(CHOSEN).focus()
    seen = {page.locator(SUMMARY).text_content()}
    for digit in "394149":
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.textContent") == digit
        seen.add(page.locator(SUMMARY).text_content())
    page.keyboard.press("ArrowUp")
    expect(page.locator(SUMMARY)).to_contain_text("HSA layer 0")
    page.keyboard.press("Home")
    expect(page.locator(SUMMARY)).to_contain_text("token 1 of the question")
    assert len(seen) == 7

    page.get_by_role("slider", name="Scores of all chunks").focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    last = int(
        page.get_by_role("slider", name="Scores of all chunks").get_attribute("aria-valuemax")
    )
    expect(page.get_by_text(f"Chunk {last - 1}: ", exact=False)).to_be_visible()
    page.keyboard.press("Escape")
    assert page.evaluate(
        "document.activeElement === document.body || !document.activeElement.closest('.hsa')"
    )
    assert unnamed(page) == []
    assert page.errors == []


def test_the_explorer_keeps_its_picture_and_says_what_it_needs(lab, explorer):
    page = explorer
    before = page.locator(SUMMARY).text_content()
    ask(page, "^The picture shows the last question. needle: got no text", Needle_sentence=" ")
    needle = "The secret code of QXZB is 482913."
    empty = "^The picture shows the last question. question: got no text"
    ask(page, empty, Needle_sentence=needle, Question="")
    page.get_by_label("Haystack (or a file)").evaluate("area => area.value = 'a'.repeat(1e7)")
    ask(page, "^haystack: got 10,000,000 bytes", Question="Where?")
    assert page.locator(SUMMARY).text_content() == before
    assert page.errors == []

    lab.shut_down_kernels()
    page.get_by_label("Haystack (or a file)").fill("word " * 200)
    ask(page, "^The kernel is busy or has stopped", Question="Where?")
    page.locator(CHOSEN).focus()
    page.keyboard.press("ArrowLeft")  # the picture needs no kernel
    assert page.locator(SUMMARY).text_content() != before
    page.get_by_role("button", name="Drop chunk").first.press("Enter")
    said = page.locator(".hsa-what-if [role=status]")
    expect(said).to_have_text(re.compile("^The kernel is busy or has stopped"))


def test_the_explorer_shows_the_last_of_two_questions_and_wrong_answers_as_wrong(explorer):
    page = explorer
    page.get_by_label("Question", exact=True).fill("What is the secret code of QXZB? ")
    page.keyboard.press("Control+Enter")
    ask(page, "^Wrong", Question="What is the secret code of WQNH?")
    expect(page.locator(".hsa-token.wrong")).to_have_count(7)
    expect(page.locator(".hsa-tokens strong")).to_have_text("✗ wrong")
    assert page.get_by_label("Question", exact=True).input_value().endswith("WQNH?")
    assert page.errors == []


def test_the_explorer_shows_what_a_change_does_to_the_answer(explorer):
    page = explorer
    said = page.locator(".hsa-what-if [role=status]")
    page.get_by_role("button", name="Drop chunk", exact=False).first.focus()
    page.keyboard.press("Space")
    expect(said).to_have_text(re.compile("was 0.999 and is 0.0.*wrong"), timeout=RUN_SECONDS * 1000)
    expect(page.get_by_role("list").locator(".before")).to_have_count(7)
    page.get_by_role("button", name="Undo: chunk", exact=False).focus()
    page.keyboard.press("Enter")
    expect(said).to_have_text(re.compile("was (0.999) and is \\1.*right"))

    page.get_by_label("HSA", exact=True).focus()
    page.keyboard.press("Space")
    expect(said).to_have_text(re.compile("is 0.000.*wrong"))
    page.get_by_role("button", name="Undo all").press("Enter")
    expect(said).to_have_text(re.compile("was (0.999) and is \\1.*right"))
    weight = page.get_by_role("slider", name="Weight of chunk", exact=False).first
    weight.focus()
    page.keyboard.press("Home")  # two changes at once: the last one counts
    page.keyboard.press("End")
    chunk = weight.get_attribute("aria-label").removeprefix("Weight of ")
    expect(page.get_by_role("button", name=f"Undo: {chunk} has weight 1.00")).to_be_visible()
    expect(said).to_have_text(re.compile("is 0.9.*right"))
    page.get_by_label("Chunk to pin").fill("99999")
    page.keyboard.press("Enter")
    expect(said).to_have_text(re.compile("^The bars show the last change. pin: got 99999"))
    assert unnamed(page) == []
    assert page.errors == []


def test_the_explorer_compares_what_is_kept_with_what_is_selected(explorer):
    page = explorer
    said = page.locator(".hsa-compare [role=status]")
    page.get_by_role("button", name="Keep this for comparison").press("Enter")
    expect(said).to_contain_text("Of 8 and 8 chunks, 8 are the same. The weights overlap by 1.000")
    page.locator(CHOSEN).focus()
    page.keyboard.press("ArrowUp")
    want = overlap((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    expect(said).to_contain_text(f"The weights overlap by {want:.3f}")
    page.keyboard.press("ArrowRight")
    expect(said).to_contain_text("Now: token 1 of the answer, HSA layer 0")
    page.get_by_role("button", name="End the comparison").press("Enter")
    expect(said).to_be_empty()
    assert page.errors == []


# The most rectangles that one drawing of a canvas has filled since then.
RECTANGLES = """() => {
  const most = { count: 0 }, pen = CanvasRenderingContext2D.prototype, { fillRect, scale } = pen;
  let filled = 0;
  pen.scale = function (...by) { filled = 0; return scale.apply(this, by); }; // a drawing begins
  pen.fillRect = function (...box) {
    most.count = Math.max(most.count, ++filled);
    return fillRect.apply(this, box);
  };
  return most;
}"""


def test_the_explorer_zooms_from_a_stored_text_to_a_token(open_explorer, tmp_path):
    model = HSAModel.from_pretrained("mini")
    needle = "The secret code of QXZB is 482913."
    file = tmp_path / "text.txt"
    file.write_text(f"{words(6000)} {needle} {words(600, 'more')}", encoding="utf-8")
    build_index(model, file, tmp_path / "index", checkpoint="mini")
    text = look_up(open_index(model, tmp_path / "index"), needle)
    asked = asking.ask(model, text, "What is the secret code of QXZB?")
    scores = asked.trace.layers[1].scores[len(asked.ids) - asked.answer_tokens - 1, 0]
    S = model.config.chunk_size
    assert len(scores) > 128  # so that a cell is a region

    page = open_explorer(tmp_path / "index")
    drawn = page.evaluate_handle(RECTANGLES)
    canvas = page.get_by_role("slider", name="Scores of all chunks")
    canvas.focus()
    page.keyboard.press("Home")
    step = -(-len(scores) // 128)
    want = f"Chunks 0 to {step - 1}, the best one: score {scores[:step].max():.2f}"
    expect(canvas).to_have_attribute("aria-valuetext", re.compile(want))
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowRight")
    want = f"^Chunk 1: score {scores[1]:.2f}"
    expect(canvas).to_have_attribute("aria-valuetext", re.compile(want))
    page.keyboard.press("Enter")  # into a chunk that no token needs to keep
    page.keyboard.press("End")
    word = shown_words(text.ids, 2 * S - 1, 2 * S)[0]
    expect(canvas).to_have_attribute(
        "aria-valuetext", re.compile(f"^Token {S - 1} of chunk 1 “.*{re.escape(word.strip())}”")
    )
    assert page.get_by_role("navigation", name="Zoom").get_by_role("button").count() == 3
    for _ in range(2):
        page.keyboard.press("Backspace")
    expect(canvas).to_have_attribute("aria-valuetext", re.compile("^Chunks 0 to"))
    assert 100 < drawn.evaluate("most => most.count") < 400
    assert unnamed(page) == []
    assert page.errors == []


def overlap(text: str) -> float:
    """Of the weights in the two HSA layers, at the last token of the question."""
    model = HSAModel.from_pretrained("mini")
    needle = "The secret code of QXZB is 482913."
    asked = asking.ask(
        model, asking.read_text(model, text, needle, 0.5), "What is the secret code of QXZB?"
    )
    token = len(asked.ids) - asked.answer_tokens - 1
    first, second = (
        dict(zip(layer.indices[token, 0].tolist(), layer.weights[token, 0].tolist()))
        for layer in asked.trace.layers
    )
    return sum(min(first[chunk], second[chunk]) for chunk in first.keys() & second.keys())


def titles(page) -> list[str]:
    """What every kept chunk says on hover and to a screen reader."""
    found = page.locator(".hsa-chunk:not([hidden]) canvas")
    return [canvas.get_attribute("aria-label") for canvas in found.all()]


def unnamed(page) -> list[str]:
    """The controls of the explorer without an accessible name."""
    return page.evaluate("""() => [...document.querySelectorAll(
      '.hsa :is(button, input, select, textarea, [tabindex="0"])')]
      .filter(node => !(node.ariaLabel || node.labels?.length || node.textContent.trim()))
      .map(node => node.outerHTML)""")


# ---- Play and step, and pictures that redraw by themselves

PROGRAMS = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl
from hsa_mini.viz.programs.explorer import explore_programs
from hsa_mini.viz.programs.record import record

@triton.jit
def add_kernel(x, y, out, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + o, tl.load(x + o) + tl.load(y + o))

x = torch.arange(512.0).view(8, 64)
tensors = dict(x=x, y=x.clone(), out=x.clone())
explore_programs({"add": record(add_kernel, (8,), **tensors, BLOCK=64)}, alt="Rows.")
"""
DRAWINGS = """
from hsa_mini.viz import explore
def draw(figure, a):
    figure.subplots().plot([a, 1])
    return f"a is {a} < <b>{a + 1}</b>"
explore(draw, alt="A line.", size=(6, 2), play="a", a=(0, 12))
"""
# Milliseconds from each of `count` keypresses to the picture, drawn when the event returns.
REDRAWS = """async ([node, key, count]) => {
  const times = [];
  for (let i = 0; i < count; i++) {
    const begun = performance.now();
    node.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
    times.push(performance.now() - begun);
    await new Promise(requestAnimationFrame);
  }
  return times;
}"""
MAX_REDRAW_MS = 16


def make_dark(page) -> None:
    menu(page, "Settings", "Theme")
    page.locator(".lm-Menu-item", has=page.get_by_text("JupyterLab Dark", exact=True)).click()
    page.wait_for_selector("body[data-jp-theme-light='false']", state="attached")


def redraw_ms(page, node, key: str, count: int) -> float:
    return statistics.median(page.evaluate(REDRAWS, [node.element_handle(), key, count]))


def test_programs_of_a_kernel_play_step_and_say_who_moves_a_number(lab, open_notebook):
    page = open_cells(lab, open_notebook, PROGRAMS)
    canvas = page.locator("canvas[role=slider]")
    said = "aria-valuetext"
    canvas.focus()
    assert redraw_ms(page, canvas, "ArrowRight", 5) <= MAX_REDRAW_MS
    expect(canvas).to_have_attribute(
        said, re.compile("program 5 of 8. Move 3 of 3: it stores 64 .*512 bytes loaded, 256.* 64 F")
    )
    for key, step in ((",", 2), (",", 1), (".", 2)):
        page.keyboard.press(key)
        expect(canvas).to_have_attribute(said, re.compile(f"Move {step} of 3"))
    expect(canvas).to_have_attribute(said, re.compile("512 bytes loaded, 0 stored, 0 FLOP"))
    page.keyboard.press("Space")  # from the end of the program: it plays what is left
    expect(canvas).to_have_attribute(said, re.compile("Move 3 of 3"))
    page.get_by_role("button", name="Play").press("Enter")
    expect(canvas).to_have_attribute(said, re.compile("It has not begun"))
    page.get_by_role("button", name="Pause").press("Enter")

    menu_of_kernels = page.locator(".jp-OutputArea label", has_text="Kernel")
    expect(menu_of_kernels).to_be_hidden()  # there is only one
    canvas.hover(position={"x": 10, "y": 42})
    expect(page.get_by_role("tooltip")).to_have_text("x[0, 0]: loaded by program 0")
    canvas.click(position={"x": 10, "y": 42})
    expect(canvas).to_have_attribute("aria-valuenow", "0")
    canvas.focus()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.tagName") != "CANVAS"

    page.set_viewport_size({"width": 800, "height": 900})
    make_dark(page)
    canvas.hover(position={"x": 10, "y": 42})
    right_edge, corner = canvas.evaluate(EDGE)
    assert right_edge == 1 and max(corner) < 60
    assert page.errors == []


def test_drawings_are_fetched_ahead_and_play_without_a_kernel(lab, open_notebook):
    page = open_cells(lab, open_notebook, DRAWINGS)
    slider = page.locator(SLIDER).first
    slider.focus()
    frame = page.locator(".hsa-frame")
    expect(frame).to_have_attribute("data-kept", "13", timeout=RUN_SECONDS * 1000)
    lab.shut_down_kernels()
    assert redraw_ms(page, slider, "ArrowRight", 5) <= MAX_REDRAW_MS
    expect(frame).to_have_attribute("data-shown", "[5]")
    expect(page.locator(".hsa-line")).to_have_text("a is 5 < <b>6</b>")  # markup stays text
    page.get_by_role("button", name="Play").press("Enter")
    expect(page.locator(".hsa-line")).to_have_text("a is 8 < <b>9</b>")
    page.get_by_role("group", name="Play: a").press("Escape")
    shown = frame.get_attribute("data-shown")
    page.wait_for_timeout(800)
    assert frame.get_attribute("data-shown") == shown
    assert frame.get_attribute("aria-label") == "A line."
    page.set_viewport_size({"width": 800, "height": 900})
    make_dark(page)
    assert "invert" in frame.evaluate("frame => getComputedStyle(frame).filter")
    assert frame.evaluate(SCALE) > 0.69


def test_the_explorer_plays_the_answer_token_by_token(explorer):
    page = explorer
    page.get_by_role("button", name="Play").press("Enter")
    for written in (1, 2):
        expect(page.locator(SUMMARY)).to_contain_text(f"token {written} of the answer")
        assert page.locator(".hsa-tokens.playing").count() == 1
    page.get_by_role("button", name="Pause").press("Enter")
    page.get_by_role("button", name="On one answer token").press("Enter")
    expect(page.get_by_role("slider", name="answer token")).to_have_value("3")
    expect(page.locator(CHOSEN)).to_have_text("2")
    assert unnamed(page) == []
    assert page.errors == []


# In one turn of the browser: another token, another layer, K, and a window or none.
MOVE_ALL = """([tokens, layers, K, window_, key, layer]) => {
  const change = (node) => node.dispatchEvent(new Event('change'));
  tokens.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
  layers.value = layer;
  change(layers);
  K.value = 3 + layer;
  change(K);
  window_.checked = layer === 1;
  change(window_);
}"""


def test_the_explorer_is_consistent_when_controls_move_at_once(explorer):
    page = explorer
    model = HSAModel.from_pretrained("mini")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    read = asking.read_text(model, text, "The secret code of QXZB is 482913.", 0.5)
    asked = asking.ask(model, read, "What is the secret code of QXZB?")
    found = [page.locator(".hsa-tokens"), page.locator(".hsa select", has_text="layer 0layer 1")]
    found += [page.get_by_label(name, exact=True) for name in ("K", "Window")]
    controls = [one.first.element_handle() for one in found]
    for _ in range(4):
        page.evaluate(MOVE_ALL, [*controls, "ArrowRight", 1])
        page.evaluate(MOVE_ALL, [*controls, "ArrowLeft", 0])
    page.evaluate(MOVE_ALL, [*controls, "ArrowRight", 0])  # one token on, layer 0, K 3, no window
    expect(page.locator(SUMMARY)).to_contain_text("token 1 of the answer")
    expect(page.locator(SUMMARY)).to_contain_text("HSA layer 0")
    expect(page.locator(CHOSEN)).to_have_text(asked.answer[0])
    expect(page.get_by_role("slider", name="answer token")).to_have_value("1")
    want = what_if(model, asked, Change(top_k=3, window=False)).line
    said = page.locator(".hsa-what-if [role=status]")
    expect(said).to_have_text(want, timeout=RUN_SECONDS * 1000)
    assert page.errors == []
