"""Notebook 11: training."""
