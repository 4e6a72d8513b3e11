"""Choosing what is trained: scores of the entries of frozen weights, and the choice of the best of them."""
