"""Notebooks 06 to 08: the kernels."""
