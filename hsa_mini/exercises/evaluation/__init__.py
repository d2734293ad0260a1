"""Notebooks 12 and 13: what a trained model can do."""
