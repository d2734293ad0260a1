"""Retrieval (Eq. (1), §2.2): the operator, the streaming top-K kernel and its backward pass."""
