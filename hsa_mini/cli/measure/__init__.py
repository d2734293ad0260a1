"""Commands that measure models."""
