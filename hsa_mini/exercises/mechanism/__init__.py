"""Notebooks 01 to 05: the mechanism."""
