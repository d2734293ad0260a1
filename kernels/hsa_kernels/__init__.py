"""Triton kernels: each the twin of a reference operation."""
