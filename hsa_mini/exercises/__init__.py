"""The exercises of the notebooks: `check_*` runs a reader's function and says what is wrong.

There is one module for each notebook; the training step of 11 has one of its own.
"""
