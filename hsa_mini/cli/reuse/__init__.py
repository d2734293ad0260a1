"""Commands that join this package with others."""
