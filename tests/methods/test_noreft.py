"""Settings of NoReFT for the contract; its formula is held to in `test_loreft.py`."""

SETTINGS = [
    {"r": 2, "prefix_positions": 1, "suffix_positions": 2},
    {"r": 3, "prefix_positions": 0, "tied_weights": False},
]
