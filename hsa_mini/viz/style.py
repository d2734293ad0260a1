"""How every picture looks: colours, names of numbers, axes, and files.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart. No picture shows
anything by colour only.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hsa_mini.files.whole_file import write_file

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
RED = "#D55E00"
INK = "#222222"
GREY = "#767676"
PALE = "#EDEDED"
HEAT = "cividis"


def as_array(values) -> np.ndarray:
    """A tensor or a list as a NumPy array, without its gradient."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def length_name(tokens: int) -> str:
    """4096 -> 4K, 16777216 -> 16M."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size:
            return f"{tokens / size:g}{unit}"
    return str(tokens)


def perplexity_name(value: float) -> str:
    """At least three digits: 9.5 -> 9.50, 34.82 -> 34.8, 41788.2 -> 41,788."""
    if math.isinf(value):
        return "not finite"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def hide_frame(ax: Axes, *more: str) -> None:
    """Hide the top and the right edge of the axes, and those in `more`."""
    ax.spines[["top", "right", *more]].set_visible(False)


def length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """A horizontal axis in powers of two, with a tick at each length."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [length_name(tokens) for tokens in lengths])
    ax.minorticks_off()


def perplexity_axis(ax: Axes, values: Sequence[float], which: str = "x") -> None:
    """A logarithmic axis that fits the values, with ticks at the smallest and the largest one."""
    low, high = (min(values), max(values)) if values else (10, 100)
    margin = (1.1 * high / low) ** 0.1
    ends = [low, high] if high > 1.005 * low else [low]
    ax.set(**{f"{which}scale": "log", f"{which}lim": (low / margin, high * margin)})
    ax.minorticks_off()
    getattr(ax, f"set_{which}ticks")(ends, list(map(perplexity_name, ends)))


def empty_picture(ax: Axes, why: str) -> None:
    """Axes without ticks, with a text on why they are empty."""
    ax.text(
        0.5, 0.5, why, ha="center", va="center", fontsize=12, color=GREY, transform=ax.transAxes
    )
    ax.set(xticks=[], yticks=[])


def save_figure(path: Path, figure: Figure) -> None:
    """A figure as PNG; the file appears whole or not at all."""
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_file(path, image.getvalue())
