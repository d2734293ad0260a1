"""Reading texts of one's own once, and asking about them many times.

`texts` finds and encodes the files, `stored` is the index as a folder, `build` reads the text into
it, `ask` answers questions and finds chunks.
"""
