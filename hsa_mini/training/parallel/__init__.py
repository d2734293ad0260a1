"""Training on several processes, applied from outside to a model that knows nothing of them."""
