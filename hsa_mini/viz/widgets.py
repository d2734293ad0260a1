"""Interactive and still pictures, with an image for readers without a kernel and a text beside it.

`explore` redraws one matplotlib figure into one image widget. `explore_map` sends its numbers to a
canvas once. The canvas then reacts to mouse and arrow keys by itself. Neither uses pyplot, so
figures do not pile up in memory, and notebooks run without a display.
"""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from hsa_mini.checks import quoted
from hsa_mini.viz.jupyter.turns import TURNS
from hsa_mini.viz.plots import score_map, weight_bars
from hsa_mini.viz.style import as_array

DPI = 110
MIN_SCALE = 0.7  # labels stay readable
PATIENCE_SECONDS = 0.5
BUSY = "The kernel is busy. The picture follows."
HERE = Path(__file__).parent
CANVAS = (HERE / "canvas.js").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Control:
    """What one control offers, where it starts, and what is written beside it.

    offers is one of three things:
    - a tuple `(low, high)` or `(low, high, step)` makes a slider. If all numbers are integers, the
      slider moves in integers and the default step is 1; otherwise the default step is 0.1;
    - a list makes a menu of words, or a slider over the listed numbers. Its entries may be
      `(label, value)` pairs;
    - `bool` makes a check box.
    """

    offers: tuple | Sequence | type
    start: Any = None
    label: str = ""


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


def picture_metadata(alt: str) -> dict:
    """Of a PNG in JupyterLab: what it shows, and that it is drawn on white."""
    return {"image/png": {"alt": alt}, "needs_background": "light"}


def caption(text: str) -> str:
    """The text in lines that fit below a picture."""
    return textwrap.fill(text, 110)


def explore(
    draw: Callable[..., str], *, alt: str, size: tuple[float, float] = (8.5, 3.6), **controls
) -> "FigureExplorer":
    """A picture with controls.

    `draw(figure, **values)` draws and returns one line of text: what can be seen. Each further
    keyword names an argument of `draw`; its value is a `Control`, or only the `offers` of one.
    `alt` describes the picture in words. An error of the first drawing is raised, so that a broken
    notebook stops.

        explore(draw, alt="...", token=(0, 11), K=Control((1, 3), start=2), how=["a", "b"])
    """
    return FigureExplorer(draw, alt, size, controls)


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
        self.controls = {name: _make_control(name, control) for name, control in controls.items()}
        self.summary = ipywidgets.Label(layout=ipywidgets.Layout(height="auto"))
        TURNS.include_cells()
        with TURNS.lock:
            self._painted = self.values
            self.paint(self._painted)  # an error is not caught: the first drawing must work
        box = ipywidgets.Box([picture], layout=ipywidgets.Layout(overflow="auto"))
        box.add_class("hsa-picture")
        super().__init__([*self.controls.values(), box, self.summary, Labels(alt=alt)])
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
        """The widget for a live notebook; the picture and its summary for every other reader."""
        data = dict(super()._repr_mimebundle_(**kwargs) or {})
        png, summary = self.still()
        text = f"{self.alt} {summary}"
        data["text/plain"] = caption(text)
        data["image/png"] = base64.b64encode(png).decode()
        return data, picture_metadata(text)


class FigureExplorer(Explorer):
    """What `explore` returns: one figure, redrawn into one image widget."""

    def __init__(
        self, draw: Callable[..., str], alt: str, size: tuple[float, float], controls: dict
    ) -> None:
        self.draw = draw
        self.figure = make_figure(*size)
        # Where there is less room, the picture scrolls.
        width = f"{MIN_SCALE * DPI * size[0]:.0f}px"
        layout = ipywidgets.Layout(max_width="100%", min_width=width, align_self="flex-start")
        picture = ipywidgets.Image(format="png", layout=layout)
        super().__init__(controls, picture, alt)

    def paint(self, values: dict[str, Any]) -> None:
        self.figure.clear()
        summary = self.draw(self.figure, **values)
        self.picture.value = to_png(self.figure)
        self.summary.value = summary

    def still(self) -> tuple[bytes, str]:
        return self.picture.value, self.summary.value


class MapExplorer(Explorer):
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


class Labels(anywidget.AnyWidget):
    """Invisible: gives the image a text and every slider a name, which ipywidgets does not do."""

    _esm = HERE / "labels.js"
    alt = traitlets.Unicode().tag(sync=True)


def _make_control(name: str, control) -> ipywidgets.DOMWidget:
    """The widget of a `Control`, or of its `offers`. Raises ValueError for a wrong tuple."""
    control = control if isinstance(control, Control) else Control(control)
    offers = control.offers
    options: dict[str, Any] = {
        "description": control.label or name.replace("_", " "),
        "style": {"description_width": "12em"},
        "layout": ipywidgets.Layout(width="min(40em, 100%)"),
    }
    if control.start is not None:
        options["value"] = control.start
    if offers is bool:
        return ipywidgets.Checkbox(**{"value": False, **options})
    if isinstance(offers, tuple):
        if len(offers) not in (2, 3):
            raise ValueError(
                f"{name}: got {quoted(offers)}, accepted are (low, high) and (low, high, step)"
            )
        low, high = offers[:2]
        whole = all(isinstance(number, int) for number in offers)
        slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        step = offers[2] if len(offers) == 3 else 1 if whole else 0.1
        return slider(**{"value": low, **options}, min=low, max=high, step=step)
    values = [option[1] if isinstance(option, tuple) else option for option in offers]
    numbers = all(isinstance(value, int | float) for value in values)
    choice = ipywidgets.SelectionSlider if numbers else ipywidgets.Dropdown
    return choice(**{"value": values[0], **options}, options=list(offers))
