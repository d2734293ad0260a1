"""The course in a real JupyterLab.

Stored pictures are visible before anything runs, all cells run, and the keyboard moves a picture.

Works on a copy of the notebooks, with settings of its own. CHROMIUM names the browser if it is not
on the PATH.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("jupyterlab")
expect = sync_api.expect

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted(path.name for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FOUND = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
CHROMIUM = os.environ.get("CHROMIUM") or next(FOUND, None)
START_SECONDS = 60
OPEN_SECONDS = 60
RUN_SECONDS = 300
REDRAW_SECONDS = 20

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not CHROMIUM, reason="no Chromium: set CHROMIUM to its path, or apt-get install chromium"
    ),
    pytest.mark.skipif(not NOTEBOOKS, reason="no notebooks"),
]

IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"
PROMPTS = ".jp-CodeCell .jp-InputPrompt"
SLIDER = ".jp-OutputArea [role=slider]"
# A string that changes whenever the picture of a slider is redrawn: the address of an image, or the
# pixels of a canvas.
PICTURE = """slider => {
  const picture = slider.closest('.widget-vbox').querySelector('img, canvas');
  return picture.tagName === 'IMG' ? picture.src : picture.toDataURL();
}"""
# "none" puts every cell into the page. By default JupyterLab leaves out the cells that are not
# visible.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that runs on a copy of the notebooks until the tests end."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        ROOT / "notebooks", home / "root" / "notebooks", ignore=shutil.ignore_patterns(".*")
    )
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
    command += ["--LabApp.news_url=", f"--ServerApp.root_dir={home / 'root'}"]
    log = (home / "log").open("w")
    server = subprocess.Popen(command, cwd=home, env=_environment(home), stdout=log, stderr=log)
    try:
        _wait_for(f"{address}/api/status", server, home / "log")
        yield address
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
        "PYTHONPATH": path,
    }


def _wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=NOTEBOOKS)
def page(request, lab, browser):
    """One notebook, opened and idle. Its kernel is shut down afterwards to free its memory."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{lab}/doc/tree/notebooks/{request.param}?reset")
    page.wait_for_selector(IDLE, timeout=OPEN_SECONDS * 1000)
    page.name = request.param
    yield page
    page.close()
    for session in json.load(urllib.request.urlopen(f"{lab}/api/sessions")):
        urllib.request.urlopen(
            urllib.request.Request(f"{lab}/api/sessions/{session['id']}", method="DELETE")
        ).close()


def menu(page, name: str, entry: str) -> None:
    page.locator(".lm-MenuBar-item", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-item", has=page.get_by_text(entry, exact=True)).click()


def run_all(page, cells: int) -> None:
    """Clear all outputs, run all cells, and wait until every code cell has its number."""
    menu(page, "Edit", "Clear Outputs of All Cells")
    expect(page.locator(".jp-OutputArea-output")).to_have_count(0)
    menu(page, "Run", "Run All Cells")
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


def test_a_notebook_runs_and_answers_to_the_keyboard(page):
    stored = json.loads((ROOT / "notebooks" / page.name).read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in stored if cell["cell_type"] == "code"]
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]
    )
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
