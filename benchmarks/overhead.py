"""What is left of an adapter that is merged, disabled or not there: nothing, one hopes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Job, Row, in_turns
from benchmarks.loading import LORA
from benchmarks.models import narrow_llama, tokens

ORDER = 40
QUESTION = "What does a forward pass cost with a merged or a disabled adapter, against the bare model?"
TARGET = 1.02  # 1.0, and two percent for noise


def run(quick: bool) -> Iterator[Row]:
    pairs = 2 if quick else 15
    sizes = [("narrow", 48, 64, 1, 8), ("usual", 6, 384, 16, 32)]
    for name, layers, width, rows, length in [("narrow", 2, 64, 1, 8)] if quick else sizes:
        what = f"{name}: {layers} layers, width {width}, {rows} x {length} tokens"
        for library in ("veneer", "peft"):
            times = in_turns(_jobs(library, layers, width, rows, length), pairs, warm_up=2)
            mine = library == "veneer"
            for state in ("merged", "disabled", "merged and unloaded", "active"):
                yield Row(
                    f"{'Veneer' if mine else 'peft'}, {state}; {what}",
                    "the bare model",
                    times.ratio(state, "bare"),
                    "times the time",
                    TARGET if mine and state != "active" else None,
                    True,
                )


def _jobs(library: str, layers: int, width: int, rows: int, length: int) -> dict[str, Job | Callable[[], Any]]:
    import importlib

    import torch

    package = importlib.import_module(library)
    x = tokens(rows, length)

    def adapted() -> Any:
        return package.get_peft_model(narrow_llama(layers, width), package.LoraConfig(**LORA)).eval()

    def forward(model: Any) -> Callable[[], None]:
        def job() -> None:
            with torch.no_grad():
                for _ in range(10):
                    model(x)

        return job

    merged, active, disabled = adapted(), adapted(), adapted()
    merged.merge_adapter()
    disabled.base_model.disable_adapter_layers() if library == "peft" else disabled.disable_adapter_layers()
    return {
        "bare": forward(narrow_llama(layers, width)),
        "merged": forward(merged),
        "disabled": forward(disabled),
        "merged and unloaded": forward(adapted().merge_and_unload()),
        "active": forward(active),
    }
