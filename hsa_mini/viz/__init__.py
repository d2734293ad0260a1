"""Pictures for the notebooks and the demo. They show numbers that are computed elsewhere.

The names below are those of `hsa_mini.viz.widgets` and of the retrieval explorer. They are imported
when they are first used, because the widgets need Jupyter, and the demo's picture needs matplotlib
alone.
"""

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from hsa_mini.viz.retrieval.explorer import explore_retrieval
    from hsa_mini.viz.widgets import Control, explore, explore_map, make_figure, show

__all__ = ["Control", "explore", "explore_map", "explore_retrieval", "make_figure", "show"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "retrieval.explorer" if name == "explore_retrieval" else "widgets"
    return getattr(importlib.import_module(f"hsa_mini.viz.{module}"), name)
