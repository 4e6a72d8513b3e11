"""Switching between two adapters that are loaded: what a server does between requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.harness import Row, Spread, in_turns
from benchmarks.loading import LORA
from benchmarks.models import narrow_llama

ORDER = 30
QUESTION = "How long does `set_adapter` take?"
TIMES = 10  # switches a measurement


def run(quick: bool) -> Iterator[Row]:
    import peft

    import veneer

    layers, pairs = ((2,), 2) if quick else ((12, 48), 9)
    for n in layers:
        models: dict[str, Any] = {}
        for name, library in (("veneer", veneer), ("peft", peft)):
            model = library.get_peft_model(narrow_llama(n), library.LoraConfig(**LORA), adapter_name="one")
            model.add_adapter("two", library.LoraConfig(**LORA))
            models[name] = model
        times = in_turns({name: _switching(model) for name, model in models.items()}, pairs)
        what = f"{n} layers, {7 * n} places"
        once = [1000 * seconds / TIMES for seconds in times["veneer"]]
        yield Row(what, "nothing", Spread.of(once), "ms", target=1, at_most=True)
        yield Row(what, "peft", times.ratio("peft", "veneer"))
        evaluating = {name: _switching(model, inference_mode=True) for name, model in models.items()}
        times = in_turns(evaluating, pairs)
        once = [1000 * seconds / TIMES for seconds in times["veneer"]]
        yield Row(f"{what}, `inference_mode=True`", "nothing", Spread.of(once), "ms", target=1, at_most=True)
        yield Row(f"{what}, `inference_mode=True`", "peft", times.ratio("peft", "veneer"))


def _switching(model: Any, **how: bool) -> Callable[[], None]:
    def switch() -> None:
        for turn in range(TIMES):
            model.set_adapter(("one", "two")[turn % 2], **how)

    return switch
