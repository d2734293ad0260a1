"""The retrieval explorer as a widget: type a needle and a question, and follow every token."""

import base64
import threading
from collections.abc import Callable
from pathlib import Path

import anywidget
import traitlets
from tqdm import tqdm

from hsa_mini.hsa_model import HSAModel
from hsa_mini.viz.plots import needle_strip
from hsa_mini.viz.retrieval.asking import (
    MAX_BYTES,
    Asked,
    ReadText,
    ask,
    check_question,
    haystack_of,
    read_text,
)
from hsa_mini.viz.retrieval.picture import make_picture, summary
from hsa_mini.viz.widgets import caption, make_figure, picture_metadata, to_png

HERE = Path(__file__).parent
NEEDLE = "The secret code of QXZB is 482913."
QUESTION = "What is the secret code of QXZB?"
MAX_SHOWN = 100_000  # characters of a haystack that the text area receives


def explore_retrieval(
    model: HSAModel,
    text: str | Path,
    *,
    needle: str = NEEDLE,
    question: str = QUESTION,
    depth: float = 0.5,
) -> "RetrievalExplorer":
    """A needle hidden in `text`, a question, and where the model looked for its answer.

        explore_retrieval(HSAModel.from_pretrained("mini"), Path("my.txt"))

    text: the haystack, or the path of a UTF-8 file, of at most 4 MiB. depth: where the needle
    stands, from 0 (the beginning) to 1 (the end). All three can be changed in the picture. Raises
    ValueError for what cannot be asked, and MemoryError for a text that does not fit.
    """
    return RetrievalExplorer(model, haystack_of(text), needle, question, depth)


class RetrievalExplorer(anywidget.AnyWidget):
    """What `explore_retrieval` returns.

    data: the picture (see `make_picture`); the browser keeps what is selected in it. form: what the
    fields hold. status: one line on what is going on, or what the widget needs. done: the number of
    the last request from the browser that was dealt with.
    """

    _esm = "".join(
        (HERE / name).read_text(encoding="utf-8") for name in ("levels.js", "explorer.js")
    )
    _css = HERE / "explorer.css"
    data = traitlets.Dict().tag(sync=True)
    form = traitlets.Dict().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    done = traitlets.Int(0).tag(sync=True)

    def __init__(
        self, model: HSAModel, haystack: str, needle: str, question: str, depth: float
    ) -> None:
        super().__init__()
        self.model = model
        self.asked: Asked
        self._text: ReadText | None = None
        # Messages arrive in a thread of their own, while a cell may call `ask`.
        self._lock = threading.Lock()
        with tqdm(desc="reading", unit=" tokens", unit_scale=True, delay=3) as bar:

            def progress(read: int, total: int) -> None:
                bar.total = total
                bar.update(read - bar.n)

            self.ask(haystack, needle, question, depth, progress=progress)
        self.on_msg(self._receive)

    def ask(
        self,
        haystack: str | None,
        needle: str,
        question: str,
        depth: float,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> Asked:
        """Ask, and show the answer; haystack: None is the one that is there.

        The text is read again only if it, the needle or its depth has changed. Raises ValueError
        for what cannot be asked; the picture then stays as it is.
        """
        check_question(question)  # before the text is read
        with self._lock:
            text = self._text
            if haystack is None and text is not None:
                haystack = text.haystack
            wanted = (haystack, needle, depth)
            if text is None or (text.haystack, text.needle, text.depth) != wanted:
                text = read_text(self.model, *wanted, progress)
            asked = ask(self.model, text, question)
            self._text = text
            self.asked = asked
            with self.hold_sync():
                self.data = make_picture(asked, self.model.config.chunk_size)
                self.form = {
                    "haystack": text.haystack if len(text.haystack) <= MAX_SHOWN else None,
                    "characters": len(text.haystack),
                    "max_bytes": MAX_BYTES,
                    "needle": needle,
                    "question": question,
                    "depth": depth,
                }
                self.status = f"{asked.verdict} The text has {len(text.ids):,} tokens."
        return asked

    def _receive(self, _widget, content: dict, buffers: list) -> None:
        """A request of the browser: the haystack is in the buffers if it has changed."""

        def progress(read: int, total: int) -> None:
            self.status = f"Reading the text: {read:,} of {total:,} tokens."

        self.status = "Asking."
        try:
            haystack = bytes(buffers[0]).decode() if buffers else None
            values = (content[name] for name in ("needle", "question", "depth"))
            self.ask(haystack, *values, progress=progress)
        except Exception as error:
            # An error in a callback would be shown nowhere.
            reason = " ".join(str(error).split()) or type(error).__name__
            self.status = f"The picture shows the last question. {reason}"
        self.done = content["request"]

    def _repr_mimebundle_(self, **kwargs):
        """The widget for a live notebook; a still picture and its text for every other reader."""
        asked = self.asked
        S = self.model.config.chunk_size
        token = len(asked.ids) - asked.answer_tokens - 1
        layers = asked.trace.layers
        needle = asked.text.needle_tokens
        figure = make_figure(11, 2.4 * len(layers) + 0.4)
        needle_strip(
            figure,
            [layer.scores[token].max(axis=0) for layer in layers],
            list(
                range(needle.start // S, min((needle.stop - 1) // S + 1, layers[0].scores.shape[2]))
            ),
            [sorted({*layer.indices[token].flatten().tolist()} - {-1}) for layer in layers],
            S,
        )
        bundle = super()._repr_mimebundle_(**kwargs)
        data = dict(bundle[0] if isinstance(bundle, tuple) else bundle or {})
        text = f"{asked.verdict} {summary(asked, token, len(layers) - 1, S)}"
        data["text/plain"] = caption(text)
        data["image/png"] = base64.b64encode(to_png(figure)).decode()
        return data, picture_metadata(text)
