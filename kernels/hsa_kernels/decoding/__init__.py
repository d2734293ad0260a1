"""Decoding: one new token against the whole memory."""
