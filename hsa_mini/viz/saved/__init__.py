"""Pictures without Jupyter: a canvas and its values in one HTML file."""
