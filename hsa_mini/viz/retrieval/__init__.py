"""The retrieval explorer: one question to one text, and where the model looked, token by token.

`asking` hides a needle in a text, reads both once and asks; `stored` takes the text of an index
instead. `trace` reads out what the HSA layers did, and `what_if` changes it; `picture` packs this
for the canvas; `explorer` is the widget. Only `explorer` needs Jupyter.
"""
