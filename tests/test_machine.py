"""What is measured of the machine, and what is chosen by it. How fast it is, is not asserted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from veneer import machine
from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
from veneer.training import folder
from veneer.training.basis import as_begun

CONFIG = T.LlamaConfig(hidden_size=48, intermediate_size=96, num_attention_heads=4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing remembered, and the threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    machine._choose.cache_clear()
    yield
    machine._choose.cache_clear()
    torch.set_num_threads(threads)


def speeds(by: dict[tuple[torch.dtype, int], float]) -> Callable[..., float]:
    def limit(dtype: torch.dtype, *rest: object, **named: object) -> float:
        return by[dtype, torch.get_num_threads()]

    return limit


def test_a_measurement_is_operations_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "best_seconds", lambda job, device: job() is None or 0.5)
    assert machine.matmul_limit(torch.float32, (3, 4, 5)) == 2 * 3 * 4 * 5 / 0.5
    assert machine.matmul_limit(torch.float32, (3, 4, 5), gradient=True) == 2 * 3 * 4 * 5 / 0.5
    assert machine.memory_limit(size=1000) == 2000 / 0.5


def test_a_choice_is_one_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    here = torch.get_num_threads()
    choice = machine.choose(CONFIG, CPU)
    assert torch.get_num_threads() == here  # whoever measures does not set
    assert choice.dtype in ("float32", "bfloat16")
    assert 1 <= choice.threads <= here
    assert "GFLOP/s; " in choice.said
    assert "(products of 48 x 96)." in choice.said


@pytest.mark.parametrize(("half", "expected"), [(40e9, "float32"), (105e9, "float32"), (300e9, "bfloat16")])
def test_half_precision_only_where_it_is_clearly_faster(
    half: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    monkeypatch.setattr(machine, "matmul_limit", speeds({(torch.float32, 1): 100e9, (torch.bfloat16, 1): half}))
    choice = machine.choose(CONFIG, CPU)
    assert (choice.dtype, choice.threads) == (expected, 1)
    assert choice.said.startswith(f"{expected} on 1 thread: ")


@pytest.mark.parametrize(("one", "expected"), [(60e9, 2), (110e9, 2), (200e9, 1)])
def test_fewer_threads_only_where_they_are_clearly_faster(
    one: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    table = {(torch.float32, 1): one, (torch.float32, 2): 100e9, (torch.bfloat16, 1): 1e9, (torch.bfloat16, 2): 1e9}
    monkeypatch.setattr(machine, "matmul_limit", speeds(table))
    assert machine.choose(CONFIG, CPU).threads == expected


def test_threads_that_the_user_has_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    table = {(torch.float32, 2): 100e9, (torch.bfloat16, 2): 1e9}  # one thread is not asked about
    monkeypatch.setattr(machine, "matmul_limit", speeds(table))
    assert machine.choose(CONFIG, CPU).threads == 2


def test_several_processes_do_not_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(machine, "matmul_limit", speeds({}))
    choice = machine.choose(CONFIG, CPU)
    assert (choice.dtype, choice.threads) == ("float32", torch.get_num_threads())
    assert "must agree" in choice.said


def test_a_resumed_run_goes_on_with_what_was_measured(tmp_path: Path) -> None:
    def run(dtype: Any = "measured", **training: Any) -> RunOptions:
        output = OutputOptions(str(tmp_path), resume=True)
        return RunOptions(
            "causal-lm", ModelOptions("tiny", dtype=dtype), DataOptions("x.csv"), output, "lora", training
        )

    assert as_begun(run()) == run()  # there is nothing to go on with, which is said later
    folder.begin(tmp_path, run("bfloat16", threads=3), resume=True)
    assert as_begun(run()) == run("bfloat16", threads=3)
    assert as_begun(run("float32", threads=1)) == run("float32", threads=1)  # who says so means it
