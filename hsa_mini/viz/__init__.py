"""Pictures for the notebooks and the demo. They show numbers that are computed elsewhere.

The names below are those of `hsa_mini.viz.widgets`. They are imported when they are first used,
because the widgets need Jupyter, and the demo's picture needs matplotlib alone.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hsa_mini.viz.widgets import Control, explore, explore_map, make_figure, show

__all__ = ["Control", "explore", "explore_map", "make_figure", "show"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("hsa_mini.viz.widgets"), name)
