"""What this machine computes, measured: products of matrices, memory, and what follows for dtype and threads.

A processor without units for bfloat16 computes in it several times as slowly as in float32, and more threads than there
are cores to run them make nothing faster. Both are found out in a fraction of a second, so nothing is assumed.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

CLEARLY = 1.3
"""Half precision is chosen for training where it is at least so many times as fast as float32."""

_FEWER = 1.15
clock: Callable[[], float] = time.perf_counter
"""What is timed by; `time.process_time` leaves out what other programs take, where one thread computes."""

# A product is made so large that its time is not that of the call, and so small that all of them take no time.
_SMALLEST, _WIDEST, _SECONDS, _REPEATS = 2e8, 2048, 0.03, 20
# Where half precision is not made for, it can be a hundred times as slow: a small product tells.
_PROBE = (32, 512, 512)


@dataclass(frozen=True)
class Choice:
    """Dtype of the frozen weights and number of threads for a run.

    Args:
        dtype: `float32` or `bfloat16`.
        threads: Of torch.
        said: One line that gives the reason.
    """

    dtype: Literal["float32", "bfloat16"]
    threads: int
    said: str


def choose(config: Any, device: torch.device | None = None, *, use_cpu: bool = False) -> Choice:
    """The dtype and the number of threads for a model, measured at the model's own widths up to 2,048.

    With several processes nothing is measured, for all must come to the same: the dtype is what the kind of device is
    made for. Threads stay as they are where `OMP_NUM_THREADS` says what is wanted, and on an accelerator.

    Args:
        config: The model's configuration.
        device: Where it is trained; the accelerator if there is one.
        use_cpu: Pass over the accelerator.
    """
    device = device or main_device(use_cpu)
    here = torch.get_num_threads()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dtype: Literal["float32", "bfloat16"] = (
            "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
        )
        return Choice(dtype, here, f"{dtype} on {device.type}: not measured, for several processes must agree.")
    wide = widths(config)
    counts = [here] if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ else _thread_counts(here)
    return _choose(wide, device, tuple(counts))


def main_device(use_cpu: bool = False) -> torch.device:
    """The accelerator, or the processor where there is none."""
    if use_cpu or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def widths(config: Any) -> tuple[int, int]:
    """In and out of a model's widest usual layer, from its configuration; its width alone where it says no more."""
    text = config.get_text_config()
    width = getattr(text, "hidden_size", None) or 1024
    return width, getattr(text, "intermediate_size", None) or 4 * width


def matmul_limit(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    device: torch.device | str = "cpu",
    *,
    gradient: bool = False,
) -> float:
    """Floating-point operations per second of x W^T, the best of several runs with torch's present threads.

    Args:
        dtype: Of both matrices.
        shape: Rows of x, in and out.
        device: Where.
        gradient: Measure g W instead, the gradient by the input.
    """
    rows, inner, outer = shape
    weight = torch.ones(outer, inner, dtype=dtype, device=device)
    x = torch.ones(rows, outer if gradient else inner, dtype=dtype, device=device)
    seconds = best_seconds(lambda: x @ weight if gradient else x @ weight.t(), torch.device(device))
    return 2 * rows * inner * outer / seconds


def memory_limit(device: torch.device | str = "cpu", size: int = 2**26) -> float:
    """Bytes per second that are read and written by a copy of `size` bytes, the best of several runs."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), torch.device(device))


def best_seconds(job: Callable[[], Any], device: torch.device) -> float:
    """The shortest time of a job, after one run that warms up, over some hundredths of a second or three runs."""
    _timed(job, device)
    best, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or (spent < _SECONDS and runs < _REPEATS):
        seconds = _timed(job, device)
        best, spent, runs = min(best, seconds), spent + seconds, runs + 1
    return max(best, 1e-9)


def _timed(job: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = clock()
    job()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return clock() - start


@functools.cache
def _choose(wide: tuple[int, int], device: torch.device, counts: tuple[int, ...]) -> Choice:
    here = torch.get_num_threads()
    wide = (min(wide[0], _WIDEST), min(wide[1], _WIDEST))
    rows = 256
    while 2 * rows * wide[0] * wide[1] < _SMALLEST and rows < 8192:
        rows *= 2
    shape = (rows, *wide)
    try:
        speeds: dict[int, float] = {}
        for count in counts:
            torch.set_num_threads(count)
            speeds[count] = _both_ways(torch.float32, shape, device)
        threads = best_count(speeds)
        torch.set_num_threads(threads)
        least = _both_ways(torch.float32, _PROBE, device) / 2
        others = {dtype: _both_ways(dtype, _PROBE, device) for dtype in _halves(device)}
        others |= {t: _both_ways(t, shape, device) for t, probed in others.items() if probed > least}
    finally:
        torch.set_num_threads(here)
    fast = others.get(torch.bfloat16, 0.0) >= CLEARLY * speeds[threads]
    dtype = torch.bfloat16 if fast else torch.float32
    rates = {torch.float32: speeds[threads], **others}
    place = f"{threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else device.type
    said = f"{_name(dtype)} on {place}: {rates.pop(dtype) / 1e9:,.3g} GFLOP/s"
    said += "".join(f"; {_name(other)} {rate / 1e9:,.3g}" for other, rate in rates.items())
    if len(counts) > 1:
        said += "; float32 on " + ", ".join(f"{n}: {rate / 1e9:,.3g}" for n, rate in speeds.items() if n != threads)
    return Choice("bfloat16" if fast else "float32", threads, said + f" (products of {wide[0]} x {wide[1]}).")


def best_count(speeds: dict[int, float]) -> int:
    """All threads, unless fewer are clearly faster: another number may round sums otherwise.

    >>> best_count({1: 100.0, 2: 190.0, 4: 185.0}), best_count({1: 100.0, 2: 50.0})
    (4, 1)
    """
    fastest = max(speeds, key=lambda count: speeds[count])
    return fastest if speeds[fastest] > _FEWER * speeds[max(speeds)] else max(speeds)


def _both_ways(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """Speed of a forward product and its gradient together."""
    speeds = [matmul_limit(dtype, shape, device, gradient=way) for way in (False, True)]
    return 2 / sum(1 / speed for speed in speeds)


def _halves(device: torch.device) -> Iterator[torch.dtype]:
    yield torch.bfloat16
    if device.type != "cpu":
        # Shown, never chosen: its gradients need a scaled loss.
        yield torch.float16


def _thread_counts(most: int) -> list[int]:
    """
    >>> _thread_counts(1), _thread_counts(2), _thread_counts(12)
    ([1], [1, 2], [3, 6, 12])
    """
    return sorted({max(1, most // part) for part in (1, 2, 4)})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
