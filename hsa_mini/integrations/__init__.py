"""This package inside others, and models of others in this one. `convert` needs no extra, each
other module needs one; importing the package needs none.
"""
