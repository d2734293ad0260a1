"""Interactive and still pictures, with an image for readers without a kernel and a text beside it.

`explore` draws one matplotlib figure for every place of its controls, before the reader comes to
it, and the browser shows these drawings by itself. `explore_map` sends its numbers to a canvas
once. The canvas then reacts to mouse and arrow keys by itself. Neither uses pyplot, so figures do
not pile up in memory, and notebooks run without a display.
"""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import traitlets
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hsa_mini.viz.jupyter.controls import Control, Labels, make_control, place_of, value_at
from hsa_mini.viz.jupyter.frames import Frames, to_svg
from hsa_mini.viz.jupyter.turns import TURNS
from hsa_mini.viz.plots import score_map, weight_bars
from hsa_mini.viz.saved.page import CanvasExplorer
from hsa_mini.viz.style import as_array

__all__ = ["Control", "explore", "explore_map", "make_figure", "show"]

DPI = 110
MIN_SCALE = 0.7  # labels stay readable
PATIENCE_SECONDS = 0.5
BUSY = "The kernel is busy. The picture follows."
MAX_DRAWINGS = 1000  # that a picture keeps; one has about 50 KB
HERE = Path(__file__).parent
CANVAS, PLAYER = (
    (HERE / f"{name}.js").read_text(encoding="utf-8") for name in ("canvas", "player")
)


def make_figure(width: float = 8.5, height: float = 3.6) -> Figure:
    """An empty figure of this size in inches. Its layout cuts no label; it draws through Agg."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.set_layout_engine("constrained", wspace=0.06)
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure, colors: int = 256) -> bytes:
    """The figure as the bytes of a PNG file with a palette of `colors` colours.

    256 colours need two fifths of the bytes of a full-colour PNG. 64 colours need a quarter less
    again and suit pictures of marks, lines and words. The palette is chosen by maximum coverage,
    which keeps every colour within a few of 255 steps. A fast octree would turn pale tints white
    and show bands in colour maps.
    """
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    file = io.BytesIO()
    picture.quantize(colors, method=Image.Quantize.MAXCOVERAGE).save(file, format="png")
    return file.getvalue()


def show(figure: Figure, alt: str, *, colors: int = 256) -> None:
    """Display a still figure and its caption `alt`, which describes it. colors: as in `to_png`."""
    for data, options in as_display(figure, alt, colors):
        display(data, **options)


def as_display(figure: Figure, alt: str, colors: int = 256) -> list[tuple[dict, dict]]:
    """The arguments of IPython's `display` for the picture and for the caption below it.

    Most readers of notebooks drop the text of an image, so it is also a caption.
    """
    picture = base64.b64encode(to_png(figure, colors)).decode()
    metadata = picture_metadata(alt)
    return [
        ({"image/png": picture}, {"metadata": metadata, "raw": True}),
        ({"text/plain": caption(alt)}, {"raw": True}),
    ]


def still_bundle(bundle, png: bytes, text: str) -> tuple[dict, dict]:
    """The widget's own bundle for a live notebook; its picture and a text for other readers."""
    data = dict(bundle[0] if isinstance(bundle, tuple) else bundle or {})
    data["text/plain"] = caption(text)
    data["image/png"] = base64.b64encode(png).decode()
    return data, picture_metadata(text)


def picture_metadata(alt: str) -> dict:
    """Of a PNG in JupyterLab: what it shows, and that it is drawn on white."""
    return {"image/png": {"alt": alt}, "needs_background": "light"}


def caption(text: str) -> str:
    """The text in lines that fit below a picture."""
    return textwrap.fill(text, 110)


def explore(
    draw: Callable[..., str],
    *,
    alt: str,
    size: tuple[float, float] = (8.5, 3.6),
    play: str | None = None,
    **controls,
) -> "FigureExplorer":
    """A picture with controls.

    `draw(figure, **values)` draws and returns one line of text: what can be seen. Each further
    keyword names an argument of `draw`; its value is a `Control`, or only the `offers` of one.
    `alt` describes the picture in words. play: the control that a bar plays and steps. An error of
    the first drawing is raised, so that a broken notebook stops.

        explore(draw, alt="...", token=(0, 11), K=Control((1, 3), start=2), how=["a", "b"])
    """
    return FigureExplorer(draw, alt, size, controls, play)


def explore_map(
    compute: Callable[..., tuple], *, alt: str, token: int = 0, **controls
) -> "MapExplorer":
    """A score map in which mouse and arrow keys move the token; controls as in `explore`.

    `compute(**values)` returns scores [T, N] (-inf where a chunk is not visible), indices [T, K]
    (-1: empty slot) and weights [T, K]. It runs when a control moves, but not when the token moves.
    token: the first token to show.
    """
    return MapExplorer(compute, alt, token, controls)


class Explorer(ipywidgets.VBox):
    """Controls above a picture. `controls[name].value = x` moves a control."""

    def __init__(self, controls: dict, picture: ipywidgets.DOMWidget, alt: str) -> None:
        self.alt = alt
        self.picture = picture
        self.controls = {name: make_control(name, control) for name, control in controls.items()}
        self.summary = ipywidgets.Label(layout=ipywidgets.Layout(height="auto"))
        TURNS.include_cells()
        with TURNS.lock:
            self._painted = self.values
            self.paint(self._painted)  # an error is not caught: the first drawing must work
        box = ipywidgets.Box([picture], layout=ipywidgets.Layout(overflow="auto"))
        box.add_class("hsa-picture")
        super().__init__([*self.controls.values(), box, self.summary, Labels()])
        for control in self.controls.values():
            control.observe(self._repaint, "value")

    @property
    def values(self) -> dict[str, Any]:
        """The value of each control, by name."""
        return {name: control.value for name, control in self.controls.items()}

    def paint(self, values: dict[str, Any]) -> None:
        """Draw the picture for these values of the controls."""
        raise NotImplementedError

    def still(self) -> tuple[bytes, str]:
        """The picture as PNG and its summary, for readers without a kernel."""
        raise NotImplementedError

    def _repaint(self, _change) -> None:
        """Draw the latest values. Another thread may have drawn them while this one waited."""
        if not TURNS.lock.acquire(timeout=PATIENCE_SECONDS):
            self.summary.value = BUSY
            TURNS.lock.acquire()
        try:
            values = self.values
            if values != self._painted or self.summary.value == BUSY:
                self._painted = values
                self.paint(values)
        except Exception as error:
            # An error in a callback would not be shown anywhere, so the summary shows it.
            settings = ", ".join(f"{name}={value}" for name, value in values.items())
            self.summary.value = f"Could not draw {settings}: {type(error).__name__}: {error}"
        finally:
            TURNS.lock.release()

    def _repr_mimebundle_(self, **kwargs):
        png, summary = self.still()
        bundle = super()._repr_mimebundle_(**kwargs)
        return still_bundle(bundle, png, f"{self.alt} {summary}")


class FigureExplorer(Explorer):
    """What `explore` returns: one figure, drawn for every place of the controls."""

    def __init__(
        self,
        draw: Callable[..., str],
        alt: str,
        size: tuple[float, float],
        controls: dict,
        play: str | None = None,
    ) -> None:
        self.draw = draw
        self.figure = make_figure(*size)
        self._drawings: dict[tuple, dict] = {}
        self._cells = 0
        self._in_figure: tuple = ()
        # Where there is less room, the picture scrolls.
        least, most = (f"{scale * DPI * size[0]:.0f}px" for scale in (MIN_SCALE, 1))
        layout = ipywidgets.Layout(width="100%", max_width=most, min_width=least)
        super().__init__(controls, Frames(alt=alt, layout=layout), alt)
        self.picture.controls = list(self.controls.values())
        self.picture.play = [number for number, name in enumerate(self.controls) if name == play]
        self.picture.answer(TURNS.lock, self._at)

    def paint(self, values: dict[str, Any]) -> None:
        self.picture.frame = self._drawing(values)
        self.summary.value = ""  # the picture shows its own line

    def still(self) -> tuple[bytes, str]:
        with TURNS.lock:
            if self._in_figure != self._places(self.values):
                self._draw(self.values)
            return to_png(self.figure), self.picture.frame["line"]

    def _drawing(self, values: dict[str, Any]) -> dict:
        """The drawing of these values, which is made anew if a cell has run since."""
        if self._cells != TURNS.cells or len(self._drawings) >= MAX_DRAWINGS:
            self._cells = TURNS.cells
            self._drawings.clear()
        places = self._places(values)
        if places not in self._drawings:
            line = self._draw(values)
            drawing = {"places": list(places), "svg": to_svg(self.figure), "line": line}
            self._drawings[places] = drawing | {"cells": self._cells}
        return self._drawings[places]

    def _draw(self, values: dict[str, Any]) -> str:
        self.figure.clear()
        self._in_figure = self._places(values)
        return self.draw(self.figure, **values)

    def _places(self, values: dict[str, Any]) -> tuple:
        return tuple(place_of(self.controls[name], value) for name, value in values.items())

    def _at(self, places: Sequence) -> dict:
        """The drawing of these places of the controls."""
        found = zip(self.controls.items(), places)
        return self._drawing({name: value_at(control, at) for (name, control), at in found})


class MapExplorer(CanvasExplorer, Explorer):
    """What `explore_map` returns: a `ScoreMap` that gets new numbers when a control moves."""

    def __init__(self, compute: Callable[..., tuple], alt: str, token: int, controls: dict) -> None:
        self.compute = compute
        canvas = ScoreMap(token=token, alt=alt, layout=ipywidgets.Layout(width="100%"))
        super().__init__(controls, canvas, alt)

    def paint(self, values: dict[str, Any]) -> None:
        scores, indices, weights = map(as_array, self.compute(**values))
        self.picture.data = {
            "shape": [*scores.shape, indices.shape[1]],
            "scores": scores.astype("<f4").tobytes(),
            "indices": indices.astype("<i4").tobytes(),
            "weights": weights.astype("<f4").tobytes(),
        }
        self.summary.value = ""  # the canvas shows its own summary

    def still(self) -> tuple[bytes, str]:
        with TURNS.lock:
            scores, indices, weights = map(as_array, self.compute(**self.values))
        token = self.picture.token
        figure = make_figure(11, 4)
        left, right = figure.subplots(1, 2, width_ratios=(2.4, 1))
        score_map(left, scores, indices, token=token)
        kept = {int(i): float(w) for i, w in zip(indices[token], weights[token]) if i >= 0}
        weight_bars(right, [kept.get(i, 0.0) for i in range(scores.shape[1])])
        right.set(title=f"weights of token {token}", ylabel="chunk")
        named = ", ".join(f"chunk {i} with {w:.2f}" for i, w in kept.items())
        words = f"Token {token} keeps {named or 'nothing: no chunk is complete before it'}."
        return to_png(figure), words


class ScoreMap(anywidget.AnyWidget):
    """The canvas of `explore_map`.

    data: shape [T, N, K] and the bytes of scores, indices and weights, all set at once.
    """

    _esm = CANVAS + (HERE / "score_map.js").read_text(encoding="utf-8")
    data = traitlets.Dict().tag(sync=True)
    token = traitlets.Int(0).tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)
