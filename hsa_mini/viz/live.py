"""A picture of a computation in progress: redrawn in the place where it was first shown."""

from collections.abc import Callable, Iterable

from IPython.display import display

from hsa_mini.viz.widgets import as_display, make_figure


class LivePicture:
    """A picture that can be redrawn with new values.

    `draw(figure, *values)` draws and returns one line of text: what can be seen. `alt` describes
    the picture in words.
    """

    def __init__(
        self, draw: Callable[..., str], *, alt: str, size: tuple[float, float] = (8.5, 3.6)
    ) -> None:
        self.draw = draw
        self.alt = alt
        self.figure = make_figure(*size)
        self._places: list = []

    def paint(self, *values) -> None:
        """Show the picture of these values, in place of the previous one."""
        self.figure.clear()
        text = f"{self.alt} {self.draw(self.figure, *values)}"
        shown = as_display(self.figure, text)
        if self._places:
            for place, (data, options) in zip(self._places, shown):
                place.update(data, **options)
        else:
            places = [display(data, display_id=True, **options) for data, options in shown]
            self._places = [place for place in places if place]  # outside of Jupyter there is none

    def follow(self, computation: Iterable) -> None:
        """Show every value that a computation yields, as it comes."""
        for value in computation:
            self.paint(value)
