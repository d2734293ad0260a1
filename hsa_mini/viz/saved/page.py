"""A canvas in one HTML file: its script, and its values in a finite number of states.

Nothing is fetched when the file is viewed, and the values are never read as HTML.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import anywidget

from hsa_mini.files.whole_file import check_writable, write_file
from hsa_mini.viz.jupyter.turns import TURNS

HERE = Path(__file__).parent
ID = "hsa-saved"


@dataclass(frozen=True)
class SavedPicture:
    """canvas: the widget that draws. title: what the picture shows, in words. states: its values by
    the names of its traits, for every entry of a menu; a single state has no menu. shared: values
    of all states.
    """

    canvas: anywidget.AnyWidget
    title: str
    states: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the picture as a page of its own. Raises OSError."""
        write_file(path, self.page().encode())

    def page(self) -> str:
        """The HTML of a whole page, which forbids the browser to load anything else."""
        digest = base64.b64encode(hashlib.sha256(self._script().encode()).digest()).decode()
        # Styles are allowed in general, because bars get their length from an attribute.
        policy = (
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'"
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n</head>\n<body>\n<h1>{escape(self.title)}</h1>\n"
            f"{self.fragment()}</body>\n</html>\n"
        )

    def fragment(self) -> str:
        """The HTML of the picture inside a page that holds no other."""
        values = json.dumps({"states": self.states, "shared": self.shared}, default=_in_json)
        packed = base64.b64encode(gzip.compress(values.encode(), mtime=0)).decode()
        style = (HERE / "page.css").read_text(encoding="utf-8") + getattr(self.canvas, "_css", "")
        return (
            f'<div id="{ID}">\n<style>{style}</style>\n'
            "<noscript>This picture needs JavaScript.</noscript>\n"
            f'<script type="application/gzip">{packed}</script>\n'
            f'<script type="module">{self._script()}</script>\n</div>\n'
        )

    def _script(self) -> str:
        return self.canvas._esm + (HERE / "page.js").read_text(encoding="utf-8")


class CanvasExplorer:
    """What explorers share whose `picture` is a canvas; `alt` says what it shows."""

    alt: str
    picture: anywidget.AnyWidget

    def save_html(self, path: str | Path) -> None:
        """Write the picture into one HTML file, for readers without Python or a network.

        Keys and mouse move it as they do here. The controls above it are not in the file.

        Raises ValueError for a path that cannot be written.
        """
        check_writable("path", Path(path))
        own = self.picture.trait_names(sync=True)
        with TURNS.lock:
            values = {
                name: getattr(self.picture, name)
                for name in set(own) - set(anywidget.AnyWidget.class_trait_names())
                if not name.startswith("_")
            }
        SavedPicture(self.picture, self.alt, {"": values}).write(Path(path))


def _in_json(value: object) -> dict[str, str]:
    """Bytes, which JSON does not know."""
    if not isinstance(value, bytes):
        raise TypeError(f"value: got {type(value).__name__}, accepted is what JSON knows, or bytes")
    return {"base64": base64.b64encode(value).decode()}
