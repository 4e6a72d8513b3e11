"""What the commands of `veneer` do, and how their arguments are written; `cli.py` only calls it."""
