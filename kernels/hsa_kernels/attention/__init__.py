"""Chunk attention (Eq. (2), §2.2): the operator, its two forward schedules and its backward pass."""
