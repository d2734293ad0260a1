"""Chunk attention (Eq. (2), §2.2).

The operator, its two forward schedules and its backward pass.
"""
