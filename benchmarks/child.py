"""A process of its own for one function of a benchmark; started by `harness.apart`."""

import importlib
import json
import sys
from pathlib import Path

from benchmarks.harness import peak_memory


def main(answer: str, module: str, function: str, named: str) -> None:
    """Calls the function and writes what it gave, and the peak memory, to the file `answer`."""
    value = getattr(importlib.import_module(f"benchmarks.{module}"), function)(**json.loads(named))
    Path(answer).write_text(json.dumps({"value": value, "memory": peak_memory()}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
