"""The retrieval explorer as a widget: type a needle and a question, and follow every token."""

import base64
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from tqdm import tqdm

from hsa_mini.checks import check_integer
from hsa_mini.files.whole_file import check_writable
from hsa_mini.hsa_model import HSAModel
from hsa_mini.viz.jupyter.turns import TURNS
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
from hsa_mini.viz.retrieval.picture import make_picture, shown_words, summary
from hsa_mini.viz.retrieval.stored import look_up, open_index
from hsa_mini.viz.retrieval.what_if import Change, Effect, what_if
from hsa_mini.viz.saved.page import SavedPicture
from hsa_mini.viz.widgets import caption, make_figure, picture_metadata, to_png

HERE = Path(__file__).parent
SCRIPTS = ("../player.js", "levels.js", "zoom.js", "what_if.js", "compare.js", "explorer.js")
NEEDLE = "The secret code of QXZB is 482913."
QUESTION = "What is the secret code of QXZB?"
MAX_SHOWN = 100_000  # characters of a haystack that the text area receives
MAX_SAVED_WORDS = 1 << 20  # tokens of a text, all of whose words a saved page holds


def explore_retrieval(
    model: HSAModel,
    text: str | Path,
    *,
    needle: str = NEEDLE,
    question: str = QUESTION,
    depth: float = 0.5,
    other: HSAModel | None = None,
) -> "RetrievalExplorer":
    """A needle hidden in `text`, a question, and where the model looked for its answer.

        explore_retrieval(HSAModel.from_pretrained("mini"), Path("my.txt"))

    text: the haystack, or the path of a UTF-8 file, of at most 4 MiB. depth: where the needle
    stands, from 0 (the beginning) to 1 (the end). All three can be changed in the picture. other: a
    second model, which is asked the same, to be compared.

    text may also be the folder of an index that `hsa-mini index` has made with this model, of a
    text of any length. It is not read again: the needle is not hidden in it, but looked up.

    Raises ValueError for what cannot be asked, and MemoryError for a text that does not fit.
    """
    sizes = [one.config.chunk_size for one in (model, other) if one is not None]
    if len(set(sizes)) > 1:
        raise ValueError(f"other: got chunks of {sizes[1]} tokens, accepted are {sizes[0]}")
    if isinstance(text, Path) and text.is_dir():
        if other is not None:
            raise ValueError("other: got a second model, accepted is none beside an index")
        return RetrievalExplorer([model], open_index(model, text), needle, question, depth)
    models = [model] if other is None else [model, other]
    return RetrievalExplorer(models, haystack_of(text), needle, question, depth)


class RetrievalExplorer(anywidget.AnyWidget):
    """What `explore_retrieval` returns.

    data: the picture (see `make_picture`); the browser keeps what is selected in it. second: that
    of the second model, or nothing. asked: what each model has answered. form: what the fields
    hold. effect: that of the last change (see `what_if`). opened: the words of the last chunk that
    the browser asked for. status: one line on what is going on, or what the widget needs. done: the
    number of the last request from the browser that was dealt with.
    """

    _esm = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    _css = HERE / "explorer.css"
    data = traitlets.Dict().tag(sync=True)
    second = traitlets.Dict().tag(sync=True)
    form = traitlets.Dict().tag(sync=True)
    effect = traitlets.Dict().tag(sync=True)
    opened = traitlets.Dict().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    done = traitlets.Int(0).tag(sync=True)

    def __init__(
        self,
        models: list[HSAModel],
        text: str | ReadText,
        needle: str,
        question: str,
        depth: float,
    ) -> None:
        super().__init__()
        self.models = models
        self.asked: list[Asked] = []
        TURNS.include_cells()
        with tqdm(desc="reading", unit=" tokens", unit_scale=True, delay=3) as bar:

            def progress(read: int, total: int) -> None:
                bar.total = total
                bar.update(read - bar.n)

            self.ask(text, needle, question, depth, progress=progress)
        self.on_msg(self._receive)

    def ask(
        self,
        haystack: str | ReadText | None,
        needle: str,
        question: str,
        depth: float,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Asked]:
        """Ask, and show the answers of the models; haystack: None is the one that is there, a
        `ReadText` one that an index holds.

        The text is read again only if it, the needle or its depth has changed. Raises ValueError
        for what cannot be asked; the picture then stays as it is.
        """
        check_question(question)  # before the text is read
        with TURNS.lock:
            texts = self._texts(haystack, needle, depth, progress)
            self.asked = [ask(model, text, question) for model, text in zip(self.models, texts)]
            with self.hold_sync():
                self.effect = {}
                for name, value in self._values(self.asked, needle, depth).items():
                    setattr(self, name, value)
        return self.asked

    def _texts(self, haystack: str | ReadText | None, needle, depth, progress) -> list[ReadText]:
        """The text as each model has read it; see `ask`."""
        if isinstance(haystack, ReadText):
            return [look_up(haystack, needle)]
        texts = [asked.text for asked in self.asked]
        if haystack is None:
            haystack = texts[0].haystack
        if texts and texts[0].haystack == haystack:
            if texts[0].stored:
                return [look_up(texts[0], needle)]
            if (texts[0].needle, texts[0].depth) == (needle, depth):
                return texts
        return [read_text(model, haystack, needle, depth, progress) for model in self.models]

    def _values(self, asked: list[Asked], needle: str, depth: float) -> dict[str, Any]:
        """What the browser gets for a question, by trait."""
        text = asked[0].text
        S = self.models[0].config.chunk_size
        first, *others = (make_picture(one, S) for one in asked)
        where = ""
        if text.stored:
            where = f" The needle is {'looked up, not hidden' if text.needle else 'not in it'}."
        return {
            "second": others[0] if others else {},
            "data": first,
            "form": {
                "haystack": text.haystack if len(text.haystack) <= MAX_SHOWN else None,
                "characters": len(text.haystack),
                "max_bytes": MAX_BYTES,
                "needle": needle,
                "question": asked[0].question,
                "depth": depth,
            },
            "status": f"{asked[0].verdict} The text has {len(text.ids):,} tokens.{where}",
        }

    def save_html(self, path: str | Path, *, questions: Sequence[str] = ()) -> None:
        """Write the picture into one HTML file, for readers without Python or a network.

        Keys and mouse move through every token, layer and chunk, but nothing new can be asked.
        questions: more questions to the same text, which the file offers in a menu. The file holds
        the words of the text, and about 1 MB for a question.

        Raises ValueError for what cannot be asked, and for a path that cannot be written.
        """
        check_writable("path", Path(path))
        for question in questions:
            check_question(question)
        self.saved(questions).write(Path(path))

    def saved(self, questions: Sequence[str] = ()) -> SavedPicture:
        """What `save_html` writes."""
        needle, depth = (self.form[name] for name in ("needle", "depth"))
        with TURNS.lock:
            asked = [self.asked]
            for question in questions:
                asked.append(
                    [ask(one, old.text, question) for one, old in zip(self.models, asked[0])]
                )
            states = {}
            for one in asked:
                values = self._values(one, needle, depth)
                values["form"]["haystack"] = None  # its words are stored below
                states[one[0].question] = values
        ids = self.asked[0].text.ids
        S = self.models[0].config.chunk_size
        words = shown_words(ids, 0, len(ids) if len(ids) <= MAX_SAVED_WORDS else 0)
        shared = {"words": [words[i : i + S] for i in range(0, len(words), S)]}
        return SavedPicture(self, "Where a model looked for its answer", states, shared)

    def what_if(self, change: Change, model: int = 0) -> Effect:
        """Show the effect of a change on the answer of one of the models. Raises ValueError as
        `what_if.what_if`.
        """
        with TURNS.lock:
            effect = what_if(self.models[model], self.asked[model], change)
            picture = self.second if model else self.data
            words = picture["tokens"][-len(effect.after) :]
            self.effect = {**asdict(effect), "line": effect.line, "words": words}
        return effect

    def _open(self, chunk: int, model: int) -> None:
        """Send the words of a chunk."""
        with TURNS.lock:
            S = self.models[model].config.chunk_size
            asked = self.asked[model]
            ids = [*asked.text.ids, *asked.ids]
            check_integer("chunk", chunk, 0, len(ids) // S - 1)
            words = shown_words(ids, chunk * S, (chunk + 1) * S)
            self.opened = {"chunk": chunk, "model": model, "words": words}

    def _receive(self, _widget, content: dict, buffers: list) -> None:
        """A request of the browser: the words of a chunk, a change, or a question; the haystack is
        in the buffers if it has changed.
        """

        def progress(read: int, total: int) -> None:
            self.status = f"Reading the text: {read:,} of {total:,} tokens."

        try:
            if "change" in content:
                self.what_if(Change.of(content["change"]), content["model"])
            elif "chunk" in content:
                self._open(content["chunk"], content["model"])
            else:
                self.status = "Asking."
                haystack = bytes(buffers[0]).decode() if buffers else None
                values = (content[name] for name in ("needle", "question", "depth"))
                self.ask(haystack, *values, progress=progress)
        except Exception as error:
            # An error in a callback would be shown nowhere.
            reason = " ".join(str(error).split()) or type(error).__name__
            if "change" in content:
                self.effect = {**self.effect, "error": f"The bars show the last change. {reason}"}
            else:
                self.status = f"The picture shows the last question. {reason}"
        self.done = content["request"]

    def _repr_mimebundle_(self, **kwargs):
        """The widget for a live notebook; a still picture and its text for every other reader."""
        asked = self.asked[0]
        S = self.models[0].config.chunk_size
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
