"""One training run in a process of its own, which may be killed in the middle of it.

Run by `runpy` with `request` in its globals: `options` (sections of a run), `log` (where output goes), `kill_at` (the
number of the file operation before which it ends, or none), `count_to` (file that receives how many there were).
"""

import os
import signal
import sys
from typing import Any

OPERATIONS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")


def count_operations(kill_at: int | None) -> dict[str, int]:
    """Counts changes to the file system, and ends the process for good right before one of them."""
    counter = {"operations": 0}

    def counted(name: str) -> Any:
        original = getattr(os, name)

        def operation(*args: Any, **kwargs: Any) -> Any:
            counter["operations"] += 1
            if counter["operations"] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return operation

    for name in OPERATIONS:
        setattr(os, name, counted(name))
    return counter


def main(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
    from veneer.training.run import train

    torch.set_num_threads(1)
    options = request["options"]
    counter = count_operations(request.get("kill_at"))
    train(
        RunOptions(
            task=options["task"],
            model=ModelOptions(**options["model"]),
            data=DataOptions(**options["data"]),
            output=OutputOptions(**options["output"]),
            method=options["method"],
            training=options["training"],
        )
    )
    if "count_to" in request:
        with open(request["count_to"], "w", encoding="utf-8") as file:
            file.write(str(counter["operations"]))
    sys.stdout.flush()


if "request" in globals():
    main(globals()["request"])
