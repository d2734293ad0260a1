"""For `make notebooks`: an .ipynb keeps the picture of a widget, not the widget."""

from nbconvert.preprocessors import Preprocessor

VIEW = "application/vnd.jupyter.widget-view+json"


class KeepStills(Preprocessor):
    """Drop the state of widgets, and the views of widgets that have a PNG beside them.

    A view points at a widget in the kernel of that run. Without the kernel, JupyterLab would show
    an error instead. Its id would also be a new one in every run.
    """

    def preprocess(self, nb, resources):
        nb.metadata.pop("widgets", None)
        return super().preprocess(nb, resources)

    def preprocess_cell(self, cell, resources, index):
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output["data"].pop(VIEW, None)
        return cell, resources
