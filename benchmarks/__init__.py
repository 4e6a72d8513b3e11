"""How fast and how large Veneer is beside the peer it can be compared with: one file a question.

    python -m benchmarks                 run all, record the results, redraw docs/benchmarks.md
    python -m benchmarks imports loading run these only
    python -m benchmarks --quick         see that all of them run; records nothing

A benchmark is a module with a `QUESTION`, the `ORDER` in which it is run and shown, and `run(quick)`, which yields
rows; its table stands between its markers in docs/benchmarks.md.
"""
