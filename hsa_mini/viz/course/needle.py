"""The search for a needle as a widget: hide it, ask for it, and look where the model looked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import traitlets

from hsa_mini.data.tokenizer import load_tokenizer
from hsa_mini.evaluation.demo import NeedleFinding
from hsa_mini.viz.plots import needle_strip
from hsa_mini.viz.widgets import CANVAS, Explorer, make_figure, to_png

HERE = Path(__file__).parent
ALT = "The scores of all chunks of a long text, one row per layer. Arrow keys move a lens."


def explore_needle(find: Callable[..., NeedleFinding], **controls) -> "NeedleExplorer":
    """Where the model looked for a needle: `find(**values)` hides it and asks for it.

    Each keyword names an argument of `find`; its value is a `Control`, or what one offers. `find`
    runs when a control moves, but not when the lens moves.
    """
    return NeedleExplorer(find, controls)


class NeedleExplorer(Explorer):
    """What `explore_needle` returns; `finding` is what the picture shows."""

    def __init__(self, find: Callable[..., NeedleFinding], controls: dict) -> None:
        self.find = find
        self.finding: NeedleFinding
        canvas = NeedleMap(alt=ALT, layout=ipywidgets.Layout(width="100%"))
        super().__init__(controls, canvas, ALT)

    def paint(self, values: dict[str, Any]) -> None:
        self.finding = self.find(**values)
        with self.picture.hold_sync():
            self.picture.data = picture_of(self.finding)
            self.picture.chunk = self.finding.needle_chunks[0]
        self.summary.value = summary(self.finding)

    def still(self) -> tuple[bytes, str]:
        finding = self.finding
        figure = make_figure(11, 2.4 * len(finding.scores) + 0.4)
        kept = finding.retrieved_chunks
        needle_strip(figure, finding.scores, finding.needle_chunks, kept, finding.chunk_size)
        return to_png(figure), self.summary.value


class NeedleMap(anywidget.AnyWidget):
    """The canvas of `explore_needle`.

    data: what `picture_of` returns. chunk: the middle of the lens.
    """

    _esm = CANVAS + (HERE / "needle_map.js").read_text(encoding="utf-8")
    data = traitlets.Dict().tag(sync=True)
    chunk = traitlets.Int(0).tag(sync=True)
    alt = traitlets.Unicode().tag(sync=True)


def picture_of(finding: NeedleFinding) -> dict[str, Any]:
    """The data of the canvas: shape [L layers, N chunks] and the scores as bytes; the chunks that
    each layer kept; the chunks of the needle; the text of all these chunks.
    """
    S = finding.chunk_size
    shown = {*finding.needle_chunks}.union(*finding.retrieved_chunks)
    texts = {chunk: finding.ids[chunk * S : (chunk + 1) * S].tolist() for chunk in sorted(shown)}
    return {
        "shape": list(finding.scores.shape),
        "tokens": finding.tokens,
        "scores": finding.scores.astype(np.dtype("<f4")).tobytes(),
        "kept": finding.retrieved_chunks,
        "needle": finding.needle_chunks,
        "texts": {str(chunk): load_tokenizer().decode(ids) for chunk, ids in texts.items()},
    }


def summary(finding: NeedleFinding) -> str:
    """One line: the question, the answer, and whether the needle was retrieved."""
    verdict = "right" if finding.correct else f"wrong, it is {finding.expected}"
    layers = [
        str(layer)
        for layer, kept in enumerate(finding.retrieved_chunks)
        if set(kept) & set(finding.needle_chunks)
    ]
    read = f"read by layer {' and '.join(layers)}" if layers else "read by no layer"
    chunks = " and ".join(f"{chunk:,}" for chunk in finding.needle_chunks)
    return (
        f"{finding.question} {finding.answer.rstrip('.')} ({verdict}). The needle stands in "
        f"chunk {chunks} of {finding.scores.shape[1]:,}, {read}."
    )
