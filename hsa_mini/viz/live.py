"""A picture of something that is under way: drawn anew in the place where it was first shown."""

from collections.abc import Callable

from IPython.display import display

from hsa_mini.viz.widgets import as_display, make_figure


class LivePicture:
    """`draw(figure, *values)` draws, and returns one line that says what is seen; `alt` says what the picture shows."""

    def __init__(
        self, draw: Callable[..., str], *, alt: str, size: tuple[float, float] = (8.5, 3.6)
    ) -> None:
        self.draw = draw
        self.alt = alt
        self.figure = make_figure(*size)
        self._place = None

    def paint(self, *values) -> None:
        """Show the picture of these values, in the place of the one before."""
        self.figure.clear()
        data, options = as_display(self.figure, f"{self.alt} {self.draw(self.figure, *values)}")
        if self._place is None:
            self._place = display(data, display_id=True, **options)
        else:
            self._place.update(data, **options)
