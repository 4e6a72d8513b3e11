"""Peak memory of a training step of a ladder side network, against LoRA's, on the same model and batch.

Every method has a process of its own, which does the same with a narrow model first: what it holds after that
(libraries, compiled kernels) is taken off, and so is what the model itself takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.harness import Row, Spread, apart
from benchmarks.memory import MAPPED, MODELS, QUICK

ORDER = 91
QUESTION = "How much memory does a step of a ladder side network take beside the model, against one of LoRA?"
METHODS = {
    "LoRA": "lora:r=8",
    "LoRA, all linear": "lora:r=8,target_modules=all-linear",
    "ladder": "ladder:reduction=8",
}
ROWS, LENGTH = 4, 256


def run(quick: bool) -> Iterator[Row]:
    name, sizes = next(iter((QUICK if quick else MODELS).items()))
    length = 64 if quick else LENGTH
    peaks = {
        label: apart("side", "step", variables=MAPPED, sizes=sizes, method=method, rows=ROWS, length=length).value
        for label, method in METHODS.items()
    }
    for label in list(METHODS)[:-1]:
        yield Row(
            f"{name}, {ROWS} x {length} tokens, ladder",
            label,
            Spread.of([peaks["ladder"] / peaks[label]]),
            "times the memory",
            memory={"ladder": peaks["ladder"], label: peaks[label]},
        )


def step(sizes: dict[str, int], method: str, rows: int, length: int) -> float:
    """Two steps on a Llama with random weights; peak memory in bytes beside the model."""
    import gc

    import psutil

    from benchmarks.harness import peak_memory

    _steps(QUICK["a narrow Llama"], method, 2, 16)
    gc.collect()
    start = psutil.Process().memory_info().rss
    held = _steps(sizes, method, rows, length)
    return float(peak_memory() - start - held)


def _steps(sizes: dict[str, int], method: str, rows: int, length: int) -> int:
    """The bytes that the model itself takes."""
    import torch

    import veneer
    from benchmarks.memory import build, held

    torch.manual_seed(0)
    model = build(sizes, "float32")
    weights: int = held(model)
    adapted = veneer.get_peft_model(model, method).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    ids: Any = torch.randint(0, sizes["vocab_size"], (rows, length))
    for _ in range(2):
        # The body alone, as in the benchmark of memory: all methods have the same head.
        loss = adapted.get_base_model().model(ids, use_cache=False).last_hidden_state.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights
