"""The tiny models and data sets of whole runs."""

from training.conftest import (  # noqa: F401
    _one_thread,
    answers,
    classify,
    classify_into,
    decoder,
    encoder,
    reviews,
    write,
)
