"""What pictures need of Jupyter: turns between threads, and notebooks that are saved with them."""
