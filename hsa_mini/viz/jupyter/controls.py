"""The sliders, menus and check boxes above a picture, and their names for screen readers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets

from hsa_mini.checks import quoted


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


def make_control(name: str, control) -> ipywidgets.DOMWidget:
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
    values = values_of(offers)
    numbers = all(isinstance(value, int | float) for value in values)
    choice = ipywidgets.SelectionSlider if numbers else ipywidgets.Dropdown
    return choice(**{"value": values[0], **options}, options=list(offers))


def values_of(options: Sequence) -> list:
    """The values of a menu, whose entries may be `(label, value)` pairs."""
    return [option[1] if isinstance(option, tuple) else option for option in options]


def place_of(control: ipywidgets.DOMWidget, value) -> Any:
    """Where a control stands at a value, as the browser knows it: the number of the entry of a menu
    or of a slider over listed numbers, and otherwise the value.
    """
    return values_of(control.options).index(value) if hasattr(control, "options") else value


def value_at(control: ipywidgets.DOMWidget, place) -> Any:
    """The value of a control that stands at a place; see `place_of`."""
    return values_of(control.options)[place] if hasattr(control, "options") else place


class Labels(anywidget.AnyWidget):
    """Invisible: gives every slider a name, which ipywidgets does not do."""

    _esm = Path(__file__).parent / "labels.js"
