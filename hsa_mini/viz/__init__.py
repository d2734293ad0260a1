"""Pictures for the notebooks and the demo: matplotlib and ipywidgets, no mathematics of their own."""

from hsa_mini.viz.widgets import Control, explore, explore_map, make_figure, show

__all__ = ["Control", "explore", "explore_map", "make_figure", "show"]
