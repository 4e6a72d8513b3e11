"""All output and sparse methods at about equal parameter budgets, against LoRA, full tuning and the head alone.

Every method is trained on movie sentiment as `veneer compare` does it, with its own learning rate, on one base model;
three seeds decide head, adapter, split and order. `SIZES` says which setting brings a method near the budget, that of
LoRA with r=8 on query and value: of its candidates the one with the nearest number of parameters is taken, counted on a
model without weights. Methods of these kinds that the table does not know run as they come, and say so; what is left
out says why. A method that cannot be trained here has a row with the reason. What has finished is kept in
`outputs/tradeoff` until the whole table is there, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import functools
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.comparisons import Task, compare
from benchmarks.harness import ROOT, Row, Spread, apart

ORDER = 68
QUESTION = "What do output and sparse methods reach with as many parameters as LoRA?"

KIND = "classification"
TASK = Task("minilm", "movie-sentiment", train=1000, held_out=500, epochs=2, batch=16)
SEEDS = (0, 1, 2)
REFERENCES = ("lora", "full", "head")

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
BUDGET = "budget"
UNKNOWN = 2**62
# By method: the setting that decides about its size and what is tried of it. `BUDGET` stands for the number of
# parameters itself, none for methods whose size is what it is.
SIZES: dict[str, tuple[str, Sequence[Any] | str] | None] = {
    "houlsby": ("bottleneck_size", WIDTHS),
    "pfeiffer": ("bottleneck_size", WIDTHS),
    "parallel": ("bottleneck_size", WIDTHS),
    "scaled_parallel": ("bottleneck_size", WIDTHS),
    "adapterplus": ("bottleneck_size", WIDTHS),
    "compacter": ("bottleneck_size", (8, 32, 96, 192, 384)),
    "compacter++": ("bottleneck_size", (8, 32, 96, 192, 384)),
    "invertible": ("reduction", (1, 2, 4, 8, 16)),
    "loreft": ("r", RANKS),
    "noreft": ("r", RANKS),
    "direft": ("r", RANKS),
    "ladder": ("reduction", (4, 8, 12, 16, 24, 32)),
    "shadow": ("r", RANKS),
    "ssf": None,
    "sparse": ("density", BUDGET),
    "snip": ("count", BUDGET),
    "fish_mask": ("count", BUDGET),
    "gps": ("count", (1, 2, 3, 4, 6, 8)),  # of every neuron
    "lt_sft": ("count", BUDGET),
    "shira": ("r", RANKS),
    "spiel": ("density", BUDGET),
    "diff_pruning": ("density", BUDGET),
    "supertuning": ("sparsity", BUDGET),
    "mam": ("bottleneck_size", WIDTHS),
    "unipelt": ("r", RANKS),
}
# What else a method needs to come near the budget, or to have a size at all.
FIXED: dict[str, dict[str, Any]] = {
    "mam": {"num_virtual_tokens": 4},
    "supertuning": {"target_modules": "all-linear"},
    "unipelt": {"num_virtual_tokens": 2, "reduction": 64},
}
LEFT_OUT = {
    "bottleneck": "is houlsby",
    "double_seq_bn": "is houlsby",
    "seq_bn": "is pfeiffer",
    "par_bn": "is scaled_parallel",
    "lily": "is a low-rank method",
    "llama_adapter": "is a prefix method",
    "fusion": "combines trained adapters",
    "xlora": "combines trained adapters",
    "arrow": "combines trained adapters",
    "poly": "routes between several tasks",
}


def run(quick: bool) -> Iterator[Row]:
    yield from of_model(TASK, quick)


def of_model(task: Task, quick: bool) -> Iterator[Row]:
    """All methods on one model."""
    if quick:
        task = replace(task, train=16, held_out=16, epochs=1, batch=8)
    fitted = settings(task, ["lora", "fish_mask"] if quick else compared())
    kept = ROOT / "outputs" / f"tradeoff-{task.model}{'-quick' if quick else ''}"
    by_seed: dict[int, dict[str, Any]] = {}
    for seed in SEEDS[:1] if quick else SEEDS:
        named = {"folder": str(kept / f"seed-{seed}"), "task": asdict(task), "methods": list(fitted.values())}
        by_seed[seed] = apart("tradeoff", "trained", seed=seed, **named).value
    for name, method in fitted.items():
        what, found = f"{task.model}: {name}", [by_seed[seed][name] for seed in by_seed]
        if failed := next((each["failed"] for each in found if "failed" in each), None):
            yield Row(what, "nothing", Spread.of([float("nan")]), "failed", score={"failed": failed[:200]})
            continue
        told = {"trained": f"{found[0]['trained']:,}", "settings": _told(method)}
        against = [by_seed[seed]["lora"] for seed in by_seed]
        if name != "lora" and not any("failed" in each for each in against):
            less = [a["accuracy"] - b["accuracy"] for a, b in zip(found, against, strict=True)]
            told["less LoRA"] = f"{statistics.median(less):+.3f}"
        yield Row(what, f"{len(found)} seeds", Spread.of([each["accuracy"] for each in found]), "accuracy", score=told)
    shutil.rmtree(kept, ignore_errors=True)


def compared() -> list[str]:
    """The references, then every registered output and sparse method that is not left out."""
    from veneer.adapter import WeightAdapter
    from veneer.config import ModuleConfig
    from veneer.methods.sparse import Sparse
    from veneer.registry import methods

    names = list(REFERENCES)
    for name, cls, _ in methods():
        kind = cls.adapter
        prompts = hasattr(cls, "num_virtual_tokens")
        known = isinstance(kind, type) and issubclass(cls, ModuleConfig) and not prompts
        output = known and not issubclass(kind, WeightAdapter)
        sparse = isinstance(kind, type) and issubclass(kind, Sparse)
        if (output or sparse or name in SIZES) and name not in LEFT_OUT and name not in names:
            names.append(name)
    return names


def settings(task: Task, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each method with the setting that brings it near the budget."""
    one, two = (_trained(task, {"name": "lora", "r": rank}) for rank in (1, 2))
    head = 2 * one - two  # of new classes: the same for all methods
    budget = _trained(task, {"name": "lora"}) - head
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        found[name] = {"name": name, **FIXED.get(name, {})}
        size = SIZES.get(name)
        if size is None:
            continue
        setting, candidates = size
        if isinstance(candidates, str):
            share = budget / _entries(task)
            value: Any = {"count": budget, "density": share, "sparsity": 1 - share}[setting]
            found[name][setting] = value
            continue
        if name == "gps":  # what is chosen is only known where there is data
            sizes = {value: value * _rows(task) for value in candidates}
        else:
            sizes = {value: _trained(task, {**found[name], setting: value}) - head for value in candidates}
        best = min(sizes, key=lambda value: abs(sizes[value] - budget))
        if sizes[best] < UNKNOWN - head:
            found[name][setting] = best
    return found


def _trained(task: Task, method: dict[str, Any]) -> int:
    """How many parameters a method trains, counted on a model without weights; very many where it cannot be."""
    settings = ",".join(f"{key}={value}" for key, value in method.items() if key != "name")
    return _counted(task.model, f"{method['name']}:{settings}")


@functools.cache
def _counted(model: str, method: str) -> int:
    from veneer.commands.model_tree import inspect_model

    try:
        return inspect_model(model, method, None, KIND).trained or 0
    except Exception:  # a method that cannot be put on this model says so when it is run
        return UNKNOWN


def _linear(task: Task) -> list[tuple[int, ...]]:
    """Shapes of what `all-linear` means."""
    from veneer.commands.model_tree import inspect_model

    report = inspect_model(task.model, None, "all-linear", KIND)
    return [report.sites[path][1] for path in report.matched or ()]


def _entries(task: Task) -> int:
    return sum(rows * columns for rows, columns in _linear(task))


def _rows(task: Task) -> int:
    return sum(shape[0] for shape in _linear(task))


def _told(method: dict[str, Any]) -> str:
    told = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in method.items()]
    return ", ".join(told[1:]) or "as it comes"


def trained(folder: str, task: dict[str, Any], methods: list[dict[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """All methods with one seed: held-out accuracy and how many parameters were trained, or what failed, by name."""
    figures: dict[str, dict[str, Any]] = {}
    for method, result in zip(methods, compare(Task(**task), methods, folder, seed=seed), strict=True):
        if isinstance(result, str):
            figures[method["name"]] = {"failed": result.strip().splitlines()[-1]}
        else:
            figures[method["name"]] = {"accuracy": result.after["accuracy"], "trained": result.trained_parameters}
    return figures
