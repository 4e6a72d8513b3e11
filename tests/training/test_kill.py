"""A run may be killed at any moment: it goes on from its last complete checkpoint to the same adapter, bit for bit."""

import dataclasses
import itertools
import json
import multiprocessing
import random
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from veneer.options import RunOptions
from veneer.training import checkpoints

JOB = Path(__file__).with_name("job.py")
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_steps": 3,
    "save_total_limit": 2, "lr_scheduler_type": "cosine", "logging_steps": 2,
}  # fmt: skip


class Runs:
    """Starts runs in processes that are cheap, because they are forked from one that has imported everything."""

    def __init__(self, folder: Path, options: RunOptions) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["veneer.training.run"])
        self.folder = folder
        self.options = dataclasses.asdict(options)

    def start(self, name: str, output: dict[str, Any] | None = None, **request: Any) -> Any:
        place = {"folder": str(self.folder / name), **(output or {})}
        job = {"options": {**self.options, "output": place}, "log": str(self.folder / f"{name}.log"), **request}
        process = self.context.Process(
            target=runpy.run_path, args=(str(JOB),), kwargs={"init_globals": {"request": job}}
        )
        process.start()
        return process

    def wait(self, process: Any, name: str) -> None:
        process.join(120)
        assert process.exitcode == 0, (self.folder / f"{name}.log").read_text()[-3000:]

    def finish(self, name: str) -> None:
        """Goes on with a killed run, or starts anew what was killed too early to have a checkpoint."""
        folder = self.folder / name
        checkpoints.clean(folder)  # as resuming does; here only to see what is there
        for _, checkpoint in checkpoints.steps(folder):
            assert checkpoints.defect(checkpoint) is None
        resumable = bool(checkpoints.steps(folder))
        self.wait(self.start(name, {"resume": True} if resumable else {"overwrite": True}), name)

    def adapter(self, name: str) -> tuple[dict[str, Any], bytes]:
        """Header and tensors of the adapter's file; safetensors writes the header's keys in random order."""
        raw = (self.folder / name / "adapter_model.safetensors").read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        return json.loads(raw[8:end]), raw[end:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture
def runs(place: Path, classify: Callable[..., RunOptions]) -> Runs:
    runs = Runs(place, classify(**SETTINGS))
    if not (place / "count").exists():
        runs.wait(runs.start("whole", count_to=str(place / "count")), "whole")
    return runs


def test_a_run_killed_at_a_file_operation_resumes_to_the_same_adapter(runs: Runs, place: Path) -> None:
    operations = int((place / "count").read_text())
    # Spread over the run, from the first thing it writes to the last, by chance within each stretch.
    draw = random.Random(5)
    stretches = [round(operations * i / 5) for i in range(6)]
    for low, high in itertools.pairwise(stretches):
        kill_at = draw.randint(low + 1, high)
        name = f"operation-{kill_at}"
        process = runs.start(name, kill_at=kill_at)
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, (place / f"{name}.log").read_text()[-3000:]
        runs.finish(name)
        assert runs.adapter(name) == runs.adapter("whole"), f"killed at operation {kill_at} of {operations}"
        left = [entry.name for entry in (place / name).iterdir() if entry.name.startswith(".")]
        assert not left


def test_a_run_killed_between_steps_resumes_to_the_same_adapter(runs: Runs, place: Path) -> None:
    process = runs.start("moment")
    folder = place / "moment"
    patience = time.monotonic() + 120
    while len(checkpoints.steps(folder)) < 2 and process.is_alive() and time.monotonic() < patience:
        time.sleep(0.005)
    time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "results.json").exists()
    runs.finish("moment")
    assert runs.adapter("moment") == runs.adapter("whole")
    assert checkpoints.steps(folder)[-1][0] == 14
