"""The picture of `explore`: drawings that the browser keeps and shows again by itself."""

import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import matplotlib
import traitlets
from matplotlib.figure import Figure

HERE = Path(__file__).parent
SCRIPTS = (HERE.parent / "player.js", HERE / "frames.js")
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Frames(anywidget.AnyWidget):
    """The drawing of the present values, and in the browser those of the values around them.

    While nobody moves a control, the browser asks for drawings one by one: `make(places)` returns
    them as `frame` has them. It keeps them until a cell runs, which may change what is drawn.

    frame: of each control its place (see `place_of`); the drawing as SVG; the line of text below
    it; how many cells had run. controls: the controls. play: the
    numbers of those that can be played.
    """

    _esm = "".join(script.read_text(encoding="utf-8") for script in SCRIPTS)
    frame = traitlets.Dict().tag(sync=True)
    controls = traitlets.List().tag(sync=True, **ipywidgets.widget_serialization)
    play = traitlets.List().tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)

    def answer(self, lock, make: Callable[[Sequence], dict[str, Any]]) -> None:
        """From now on answer the browser with `make`, but never wait for the lock to do it."""

        def reply(_widget, content: dict, _buffers) -> None:
            if not lock.acquire(blocking=False):
                return self.send({"busy": True})
            try:
                began = time.thread_time()
                frame = make(content["places"])
                self.send({"frame": frame, "seconds": time.thread_time() - began})
            except Exception:  # is shown when a control stands there
                self.send({"failed": content["places"]})
            finally:
                lock.release()

        self.on_msg(reply)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element whose texts are texts."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(file, format="svg", dpi=figure.dpi, metadata=METADATA)
    text = file.getvalue()
    return text[text.index("<svg") :]
