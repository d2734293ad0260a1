"""Settings of `make site`: the executed notebooks as pages that run no notebook and load nothing from other hosts."""

import shutil
from pathlib import Path

import nbformat
from docutils import nodes
from latex2mathml.converter import convert

from hsa_mini import HSAModel
from hsa_mini.course import part_of
from hsa_mini.viz import explore_retrieval

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("[0-9][0-9]_*.ipynb"))
START = NOTEBOOKS[0].stem
CHARACTERS = 50_000  # of the course's own text, in which the explorer's page searches
NEEDLE = "The secret code of LMRK is 271828."
RIGHT = "What is the secret code of LMRK?"
MADE_UP = "What is the secret code of WQNH?"

project = "hsa-mini"
html_title = "hsa-mini: the course"
root_doc = START
extensions = ["myst_nb"]
exclude_patterns = [".*", "*.py"]
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # so that links in printed tables are followed
nb_render_image_options = {"alt": "A picture. The text below it says what it shows."}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_heading_slug_func = "hsa_mini.course.anchor"
html_theme = "furo"
pygments_dark_style = "github-dark"
html_math_renderer = "mathml"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_search_summary = False  # browsers let no page that is opened from a file read another one
html_use_index = False
html_show_copyright = False


def setup(app):
    app.add_html_math_renderer("mathml", (math, None), (math, None))
    app.connect("source-read", complete)
    app.connect("build-finished", make_index)


def math(writer, node):
    """MathML, which browsers draw by themselves."""
    if isinstance(node, nodes.math_block):
        writer.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    else:
        writer.body.append(convert(node.astext()))
    raise nodes.SkipNode


def complete(app, name, source):
    """The list of pages in the start page, and the picture in the explorer's."""
    if name == START:
        notebook = nbformat.reads(source[0], as_version=4)
        notebook.cells.append(nbformat.v4.new_markdown_cell(contents()))
        source[0] = nbformat.writes(notebook)
    if name == "explorer":
        source[0] += f"\n```{{raw}} html\n{explorer().fragment()}```\n"


def contents() -> str:
    """The notebooks in their parts, as the table of contents that every page shows."""
    parts = {"start": ["self", "explorer"]}
    for path in NOTEBOOKS[1:]:
        parts.setdefault(part_of(path.stem[:2]), []).append(path.stem)
    tree = "```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    return "\n".join(tree.format(part, "\n".join(names)) for part, names in parts.items())


def explorer():
    """Two questions to the course's own text: the needle answers the first and not the second."""
    cells = [cell for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    text = "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    model = HSAModel.from_pretrained("mini")
    return explore_retrieval(model, text[:CHARACTERS], needle=NEEDLE, question=RIGHT).saved([MADE_UP])


def make_index(app, error):
    """The start page is also the page that a folder shows."""
    if error is None:
        shutil.copy(app.outdir / f"{START}.html", app.outdir / "index.html")
