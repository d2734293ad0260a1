"""Other mechanisms of retrieval, as variants of the model: HiLS, DashAttention, other landmarks."""
