"""From scores to the settings of a method: which layers and modules, which ranks, how many entries of each weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.config import ModuleConfig, PeftConfig
from veneer.errors import ConfigError
from veneer.methods.lora import LoraConfig
from veneer.methods.lt_sft import LtSftConfig
from veneer.methods.sparse import SparseConfig, chosen
from veneer.options import SelectOptions
from veneer.selection import choice
from veneer.selection.score_file import Scores, layer_and_name
from veneer.selection.scores import Level
from veneer.sites import site_of
from veneer.targets import exactly, match, walk


@dataclass(frozen=True)
class Chosen:
    """What is trained by the scores.

    Attributes:
        method: The method with it, as `veneer train` takes it.
        counts: By path, how many entries are trained, or the rank; 1 where a module is adapted as the method has it.
        unit: Which of these: `entries`, `rank` or `modules`.
        positions: Of the entries, by path; empty for others.
    """

    method: dict[str, Any]
    counts: dict[str, int]
    unit: str
    positions: Mapping[str, Tensor]

    def shared_with(self, other: Chosen) -> float:
        """Which share of what is trained is trained in the other choice too."""
        if self.unit == "entries":
            total = sum(positions.numel() for positions in self.positions.values())
            common = sum(
                int(torch.isin(positions, other.positions[path]).sum())
                for path, positions in self.positions.items()
                if path in other.positions
            )
            return common / total
        return sum(min(n, other.counts.get(p, 0)) for p, n in self.counts.items()) / sum(self.counts.values())


def criterion_for(config: PeftConfig, given: str | None) -> str:
    """The criterion that is asked for, or the method's own, or SNIP.

    Raises:
        ConfigError: The method chooses by itself, and by nothing else.
    """
    if isinstance(config, LtSftConfig) or not isinstance(config, ModuleConfig):
        raise ConfigError(
            f"method: {config.peft_type} chooses what it trains in a way of its own, so scores are of no use to it. "
            "Train it as it is, or select for sparse, fish_mask, gps, snip, lora or another method on modules."
        )
    if given is not None:
        return given
    return config.criterion if isinstance(config, SparseConfig) else "snip"


def level_for(config: PeftConfig, options: SelectOptions) -> Level:
    """How fine the scores have to be; finer if that is asked for.

    Raises:
        ConfigError: Coarser ones are asked for.
    """
    needed: Level = "parameter" if isinstance(config, SparseConfig) else "module"
    if options.level is None:
        return needed
    if needed == "parameter" != options.level:
        raise ConfigError(
            f"level is {options.level!r}, but {config.peft_type} chooses entries, so each needs a score. Leave level "
            "out, or select for another method."
        )
    return options.level


def check(config: PeftConfig, options: SelectOptions) -> None:
    """Refuses settings that would choose nothing or have no effect.

    Raises:
        ConfigError: So.
    """
    for name in ("examples", "keep_layers", "keep_modules", "max_rank", "round_epochs"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} is {value}. Expected a number above 0.")
    for name in ("refine", "min_rank"):
        if getattr(options, name) < 0:
            raise ConfigError(f"{name} is {getattr(options, name)}. Expected 0 or more.")
    keeps = options.keep_layers is not None or options.keep_modules is not None
    if options.keep_layers is not None and options.keep_modules is not None:
        raise ConfigError("keep_layers and keep_modules both say what is adapted. Leave one of them out.")
    by_rank = isinstance(config, LoraConfig) and not keeps
    if not by_rank and (options.min_rank != 1 or options.max_rank is not None):
        raise ConfigError(
            "min_rank and max_rank are for ranks by score, which LoRA gets where neither keep_layers nor keep_modules "
            "is given. Leave them out."
        )
    if not (by_rank or keeps or isinstance(config, SparseConfig)):
        raise ConfigError(
            f"method: {config.peft_type} trains neither single entries nor ranks by module. Say how many of the best "
            "layers or modules it shall adapt: keep_layers or keep_modules."
        )
    if getattr(config, "target_parameters", None):
        raise ConfigError(
            "method: target_parameters names bare parameters, and only modules are chosen by scores. Leave it out, and "
            "name modules in target_modules."
        )
    if options.scores is not None and options.refine:
        raise ConfigError("scores and refine are both given, but refining scores the model itself. Leave one out.")


def choose(
    root: nn.Module, config: ModuleConfig, method: Mapping[str, Any], scores: Scores, options: SelectOptions, file: Path
) -> Chosen:
    """What of the model is trained by these scores.

    Args:
        root: The base model.
        config: The method.
        method: The same as settings.
        scores: Scores of at least its targets.
        options: How to choose.
        file: Where the scores lie; sparse methods read them there.

    Raises:
        ConfigError: The scores do not cover the targets, or the budget cannot be met.
    """
    modules = dict(walk(root))
    paths = match(root, config, strict=False, modules=modules)
    missing = [path for path in paths if path not in scores.tensors]
    if missing:
        raise ConfigError(
            f"There are no scores for {missing[0]}, which {config.peft_type} adapts. Score the model with its targets: "
            "leave scores out."
        )
    importance = {path: value for path, value in scores.modules().items() if path in set(paths)}
    kept = _kept(importance, options)
    settings = {**method, "target_modules": exactly(kept, modules)}
    if kept != paths:
        settings |= {"layers_to_transform": None, "layers_pattern": None, "exclude_modules": None}
    if isinstance(config, SparseConfig):
        found = scores.of({path: site_of(modules[path]) for path in kept}, scores.criterion)  # type: ignore[misc]
        config = type(config)(**{**_fields(config), "criterion": scores.criterion})
        positions = {path: taken for path, taken in chosen(found, config).items() if taken.numel()}
        settings |= {"criterion": scores.criterion, "scores": str(file.absolute())}
        return Chosen(settings, {path: taken.numel() for path, taken in positions.items()}, "entries", positions)
    if len(kept) < len(paths) or not isinstance(config, LoraConfig):
        return Chosen(settings, dict.fromkeys(kept, 1), "modules", {})
    ranks = _ranks(modules, config, importance, options)
    adapted = [path for path in kept if ranks[path]]
    settings["target_modules"] = exactly(adapted, modules)
    other = {path: rank for path, rank in ranks.items() if rank and rank != config.r}
    settings["rank_pattern"] = other
    # The same scaling everywhere: what is chosen is how much a module may learn, not how fast.
    settings["alpha_pattern"] = {
        path: config.lora_alpha * (math.sqrt(rank / config.r) if config.use_rslora else rank / config.r)
        for path, rank in other.items()
    }
    return Chosen(settings, {path: ranks[path] for path in adapted}, "rank", {})


def _fields(config: SparseConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name not in ("peft_type", "peft_version")}


def _kept(importance: Mapping[str, float], options: SelectOptions) -> list[str]:
    """The best modules, or those of the best layers, in model order."""
    if options.keep_modules is not None:
        _enough(options.keep_modules, len(importance), "keep_modules", "modules")
        best = sorted(importance, key=lambda path: -importance[path])[: options.keep_modules]
        return [path for path in importance if path in set(best)]
    if options.keep_layers is not None:
        layers: dict[int, list[float]] = {}
        for path, value in importance.items():
            layer, _ = layer_and_name(path)
            if layer is not None:
                layers.setdefault(layer, []).append(value)
        _enough(options.keep_layers, len(layers), "keep_layers", "layers")
        means = {layer: sum(values) / len(values) for layer, values in layers.items()}
        kept = set(sorted(means, key=lambda layer: -means[layer])[: options.keep_layers])
        return [path for path in importance if layer_and_name(path)[0] in kept]
    return list(importance)


def _enough(wanted: int, there: int, setting: str, what: str) -> None:
    if wanted > there:
        raise ConfigError(f"{setting} is {wanted}, but the method adapts {there} {what}. Give {there} or less.")


def _ranks(
    modules: Mapping[str, nn.Module], config: LoraConfig, importance: Mapping[str, float], options: SelectOptions
) -> dict[str, int]:
    """Ranks with no more parameters than the method has with its own rank everywhere."""
    shapes = {path: site_of(modules[path]).shape for path in importance}  # type: ignore[union-attr]
    costs = {path: sum(shape) for path, shape in shapes.items()}
    most = options.max_rank if options.max_rank is not None else 4 * config.r
    return choice.ranks(
        importance,
        costs,
        config.r * sum(costs.values()),
        options.min_rank,
        lambda path: min(most, *shapes[path]),
    )
