"""The laboratory: variants of the mechanism with equal parameters, data, steps and seeds, and what
they show about the paper's claims.
"""
