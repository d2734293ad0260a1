"""How `make lab` saves a notebook: with its pictures, and for the kernel that its .py names."""

import json
from pathlib import Path

import nbformat
from jupytext import AsyncTextFileContentsManager

from hsa_mini.viz.stills import keep_stills


class CourseContentsManager(AsyncTextFileContentsManager):
    """Jupytext's manager, which writes the .py beside an .ipynb too.

    A saved notebook keeps still pictures, which need no kernel. If a .py stands beside it, it keeps
    the name of the kernel that it had, whichever kernel of the reader's ran it. So the header of
    the .py stays as it is.
    """

    async def save(self, model, path=""):
        if model["type"] == "notebook" and model.get("content"):
            notebook = nbformat.from_dict(model["content"])
            keep_stills(notebook)
            pinned = _pinned_kernel(Path(self._get_os_path(path)))
            if pinned:
                notebook.metadata.kernelspec = pinned
            model = {**model, "content": notebook}
        return await super().save(model, path)


def _pinned_kernel(file: Path) -> dict | None:
    """The kernel that a stored notebook names, if it is one of a pair."""
    if not (file.is_file() and file.with_suffix(".py").is_file()):
        return None
    return json.loads(file.read_text(encoding="utf-8"))["metadata"].get("kernelspec")
