"""One published method a file: its configuration, its mathematics, its paper.

A module here registers itself when it is imported; see docs/how-to-add-a-method.md.
"""
