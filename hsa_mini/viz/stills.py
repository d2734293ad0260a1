"""What an .ipynb keeps of a picture: the still image and its caption, not the widget."""

from nbconvert.preprocessors import Preprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_output

VIEW = "application/vnd.jupyter.widget-view+json"


def keep_stills(notebook: NotebookNode) -> None:
    """Drop the state of widgets; put the PNG beside a view, with its text, in place of the view.

    A view points at a widget in the kernel of that run. Without the kernel, JupyterLab would show
    an error instead. Its id would also be a new one in every run.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [still for output in cell.outputs for still in _stills(output)]


def _stills(output: NotebookNode) -> list[NotebookNode]:
    data = output.get("data", {})
    if "image/png" not in data or data.pop(VIEW, None) is None:
        return [output]
    return [output, new_output("display_data", {"text/plain": data.pop("text/plain")})]


class KeepStills(Preprocessor):
    """`keep_stills` for `make notebooks`."""

    def preprocess(self, nb, resources):
        keep_stills(nb)
        return nb, resources
