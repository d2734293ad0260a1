"""For `make notebooks`: what an .ipynb keeps of a widget is its picture."""

from nbconvert.preprocessors import Preprocessor

VIEW = "application/vnd.jupyter.widget-view+json"


class KeepStills(Preprocessor):
    """Drop the state of widgets, and their views that have a PNG beside them.

    A view points at a widget that lived in the kernel of that run: JupyterLab would show an error in its place, and its id
    is a new one in every run.
    """

    def preprocess(self, notebook, resources):
        notebook.metadata.pop("widgets", None)
        return super().preprocess(notebook, resources)

    def preprocess_cell(self, cell, resources, index):
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output["data"].pop(VIEW, None)
        return cell, resources
