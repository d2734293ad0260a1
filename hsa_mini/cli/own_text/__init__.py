"""The two commands for a text of one's own: `index` reads it once, `ask` asks about it."""
