"""Notebooks 09 and 10: the memory and the model."""
