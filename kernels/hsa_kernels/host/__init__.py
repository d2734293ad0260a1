"""Chunks that stay in pinned host memory."""
