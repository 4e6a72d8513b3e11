"""`python -m benchmarks`: runs benchmarks, records them, redraws the page."""

import argparse
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

import benchmarks
from benchmarks import pages, records
from benchmarks.harness import CLOCK, Row
from benchmarks.records import RAISED
from veneer.allocation import keep_freed_memory

# Read by transformers, tokenizers and glibc when they are imported or a process starts: their remarks and bars are not
# what is measured, and no measurement may wait for a network.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # For both sides alike: what `veneer.keep_freed_memory` does, for processes that are started.
    **RAISED,
}


def found() -> dict[str, ModuleType]:
    """Every module that asks a question, in the order in which they are run and shown."""
    modules = {
        info.name: importlib.import_module(f"benchmarks.{info.name}")
        for info in pkgutil.iter_modules(benchmarks.__path__)
        if not info.name.startswith("_")
    }
    return dict(sorted(((n, m) for n, m in modules.items() if hasattr(m, "QUESTION")), key=lambda item: item[1].ORDER))


def run(name: str, module: ModuleType, quick: bool, options: str = "") -> None:
    """Runs one benchmark, printing its rows as they come; records it unless it was only tried.

    Args:
        name: Its name.
        module: Its module.
        quick: Whether it is only tried.
        options: Those of the command line that change what is measured.
    """
    print(f"\n{name}: {module.QUESTION}", flush=True)
    load = records.load_average()
    rows: list[Row] = []
    for row in module.run(quick):
        rows.append(row)
        print(f"  {line(row)}", flush=True)
    if not quick:
        records.append(records.record(name, rows, load, options))


def line(row: Row) -> str:
    """A row on the terminal."""
    spread = f" ({row.figure.low:.3g} to {row.figure.high:.3g})" if row.figure.count > 1 else ""
    aim = "" if row.target is None else f"; target {row.target:g}: {'reached' if row.reached else 'not reached'}"
    more = "".join(
        f"; {name} {dict(values)}" for name, values in (("memory", row.memory), ("score", row.score)) if values
    )
    return f"{row.what}, against {row.peer}: {row.figure.median:.3g}{spread} {row.unit}{aim}{more}"


def redraw() -> None:
    """Draws tables and plots from the latest record of each benchmark."""
    modules = found()
    entries = {name: entry for name in modules if (entry := records.latest(name)) is not None}
    for name in pages.redraw(entries):
        print(f"docs/benchmarks.md has no place for {name}: add <!-- {name} --> and <!-- end of {name} -->.")
    for name, entry in entries.items():
        if hasattr(modules[name], "draw"):
            modules[name].draw(entry)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=benchmarks.__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run; all if none is named")
    parser.add_argument("--quick", action="store_true", help="a few small runs of each; records nothing")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; fewer than cores where others compute too")
    parser.add_argument("--busy", action="store_true", help="count processor time, where others use the machine too")
    parser.add_argument("--redraw", action="store_true", help="run nothing, only draw the page from the records")
    parser.add_argument("--list", action="store_true", help="show what there is")
    chosen = parser.parse_args(arguments)
    keep_freed_memory()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if chosen.threads:
        # Read when torch is imported, here and in the processes that are started.
        os.environ["OMP_NUM_THREADS"] = str(chosen.threads)
    if chosen.busy:
        os.environ[CLOCK] = "processor"
    warnings.simplefilter("ignore")
    modules = found()
    if unknown := [name for name in chosen.names if name not in modules]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(modules)}")
    if chosen.list:
        for name, module in modules.items():
            print(f"{name:16}{module.QUESTION}")
        return 0
    if not chosen.redraw:
        threads = f" --threads {chosen.threads}" if chosen.threads else ""
        for name in chosen.names or modules:
            run(name, modules[name], chosen.quick, threads + (" --busy" if chosen.busy else ""))
    if not chosen.quick:
        redraw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
