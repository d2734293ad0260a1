"""Pictures for the notebooks and the demo. They show numbers that are computed elsewhere."""

from hsa_mini.viz.widgets import Control, explore, explore_map, make_figure, show

__all__ = ["Control", "explore", "explore_map", "make_figure", "show"]
