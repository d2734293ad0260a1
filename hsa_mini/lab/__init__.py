"""The laboratory: variants of the mechanism at equal parameters, data, steps and seeds, and what became of the paper's claims."""
