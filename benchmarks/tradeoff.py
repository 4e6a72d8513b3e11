"""All output and sparse methods at about equal parameter budgets, against LoRA, full tuning and the head alone.

A run is `veneer train` as it comes, with the method's own learning rate, in a process of its own; three seeds decide
head, adapter, split and order. `SIZES` says which setting brings a method near the budget, that of LoRA with r=8 on
query and value: of its candidates the one with the nearest number of parameters is taken, counted on a model without
weights. Methods of these kinds that the table does not know run as they come, and say so; what is left out says why. A
method that cannot be trained here has a row with the reason.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Spread, apart

ORDER = 68
QUESTION = "What do output and sparse methods reach with as many parameters as LoRA?"


@dataclass(frozen=True)
class Task:
    """A model and data.

    Args:
        kind: `classification` or `causal-lm`.
        model: A sample model.
        train: How many examples are trained on.
        held_out: How many are held out.
        epochs: How often.
    """

    kind: str
    model: str
    train: int
    held_out: int
    epochs: int


TASKS = {
    "movie-sentiment": Task("classification", "minilm", 2000, 1000, 2),
    "tweets": Task("causal-lm", "smollm2", 160, 100, 1),
}
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
    seeds = SEEDS[:1] if quick else SEEDS
    for data, task in TASKS.items():
        limits = (16, 16) if quick else (task.train, task.held_out)
        names = ["lora", "fish_mask"] if quick else compared()
        fitted = settings(task, names)
        known: dict[str, dict[int, float]] = {}
        for name in names:
            what, method = f"{data}, {task.model}: {name}", fitted[name]
            found: list[dict[str, Any]] = []
            try:
                for seed in seeds:
                    named = {"data": data, "method": method, "seed": seed, "limit": limits[0], "held_out": limits[1]}
                    done = apart("tradeoff", "whole", **named)
                    found.append({**done.value, "memory": done.memory})
            except RuntimeError as error:  # the others are worth knowing all the same
                reason = str(error).strip().splitlines()[-1]
                yield Row(what, "nothing", Spread.of([float("nan")]), "failed", score={"failed": reason[:200]})
                continue
            known[name] = {seed: each["score"] for seed, each in zip(seeds, found, strict=True)}
            told = {"trained": f"{found[0]['trained']:,}", "settings": _told(method)}
            if name != "lora" and "lora" in known:
                less = [known[name][seed] - known["lora"][seed] for seed in known[name] if seed in known["lora"]]
                told["less LoRA"] = f"{statistics.median(less):+.3f}"
            memory = {"Veneer": statistics.median(each["memory"] for each in found)}
            figure = Spread.of([each["score"] for each in found])
            yield Row(what, f"{len(seeds)} seeds", figure, found[0]["name"], memory=memory, score=told)


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
    return _counted(task.model, f"{method['name']}:{settings}", task.kind)


@functools.cache
def _counted(model: str, method: str, kind: str) -> int:
    from veneer.commands.model_tree import inspect_model

    try:
        return inspect_model(model, method, None, kind).trained or 0
    except Exception:  # a method that cannot be put on this model says so when it is run
        return UNKNOWN


def _linear(task: Task) -> list[tuple[int, ...]]:
    """Shapes of what `all-linear` means."""
    from veneer.commands.model_tree import inspect_model

    report = inspect_model(task.model, None, "all-linear", task.kind)
    return [report.sites[path][1] for path in report.matched or ()]


def _entries(task: Task) -> int:
    return sum(rows * columns for rows, columns in _linear(task))


def _rows(task: Task) -> int:
    return sum(shape[0] for shape in _linear(task))


def _told(method: dict[str, Any]) -> str:
    told = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in method.items()]
    return ", ".join(told[1:]) or "as it comes"


def whole(data: str, method: dict[str, Any], seed: int, limit: int, held_out: int) -> dict[str, Any]:
    """One run: its held-out score, the score's name, and how many parameters were trained."""
    from rich.console import Console

    from veneer.evaluation.report import score
    from veneer.options import DataOptions, ModelOptions, OutputOptions, RunOptions
    from veneer.training.run import train

    task = TASKS[data]
    with tempfile.TemporaryDirectory() as folder:
        section = DataOptions(data, max_length=128, limit=limit, validation_limit=held_out)
        if task.kind == "causal-lm":
            section = _tweets(Path(folder) / "data", limit, held_out)
        result = train(
            RunOptions(
                task=task.kind,  # type: ignore[arg-type]
                model=ModelOptions(task.model, dtype="float32"),
                data=section,
                method=method,
                training={"num_train_epochs": task.epochs, "seed": seed, "save_strategy": "no"},
                output=OutputOptions(str(Path(folder) / "run")),
            ),
            console=Console(quiet=True),
        )
    name, value = score(result.after)
    return {"name": name, "score": value, "trained": result.trained_parameters}


def _tweets(folder: Path, limit: int, held_out: int) -> Any:
    """The demo's tweets: one word says their feeling."""
    from veneer.evaluation import demo
    from veneer.options import DataOptions

    train, held = demo._write_tweets(folder, demo.Sizes(tweets=limit, held_out_tweets=held_out))
    return DataOptions(str(train), validation=str(held))
