"""Any weight method written as LoRA: the change that it makes to each weight, cut to a rank by its singular values.

What is low-rank by its definition (LoRA in any scaling, and starts such as PiSSA's) is converted without loss, by its
factors. Of all else the dense change D = adapt(W) - W is decomposed, one layer at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from veneer import checkpoint
from veneer.adapted import Adapted
from veneer.adapter import Adapter, BiasOnly, WeightAdapter
from veneer.config import ModuleConfig
from veneer.errors import ConfigError, UnsupportedError
from veneer.inits.start import wide
from veneer.methods.lora import Lora, LoraConfig
from veneer.model import PeftModel
from veneer.sites import ParameterSite
from veneer.trained_copy import TrainedCopy


class Conversion(tuple[LoraConfig, dict[str, Tensor]]):
    """A configuration and its tensors, by their names in a file; to be unpacked into these two, as in `peft`.

    Attributes:
        ranks: Rank by place.
        errors: What part of the change is lost, in Frobenius norm, by place; 0 where nothing is.
        error: The same of all places together.
    """

    ranks: dict[str, int]
    errors: dict[str, float]
    error: float

    @property
    def config(self) -> LoraConfig:
        return self[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self[1]


@dataclass(frozen=True)
class Part:
    """The change at one place: factors, and what they lose.

    Args:
        down: `(r, in)`, or `(n, r, in)` for a stack.
        up: `(out, r)`, or `(n, out, r)`.
        bias: The change of the bias, `(out,)`, or none.
        lost: Squared Frobenius norm of what the product lacks.
        total: The same of the whole change.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    lost: float
    total: float

    @property
    def rank(self) -> int:
        return self.down.shape[-2]


Decompose = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def convert_to_lora(
    model: PeftModel,
    rank: float | Mapping[str, float],
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
    max_rank: int | None = None,
) -> Conversion:
    """A LoRA adapter that does, as nearly as its rank allows, what an adapter of another method does.

    Args:
        model: The adapted model; it is not changed.
        rank: A whole number is the rank of every place. A number from 0 to 1 (as 1.0) is the share of the energy, the
            sum of the squared singular values, that every place keeps, in the lowest rank that does. A mapping gives
            either by place, as `rank_pattern` does; `""` stands for all others.
        adapter_name: The adapter.
        progressbar: Show how far it is.
        compile_kwargs: Compile the decomposition with these arguments of `torch.compile`.
        max_rank: No place gets a higher rank than this.

    Returns:
        Configuration and tensors of the new adapter, and what was lost.

    Raises:
        UnsupportedError: The method changes outputs and not weights, or a place that LoRA cannot adapt.
        ConfigError: `rank` is none of these, or there is no adapter of that name.
    """
    if not isinstance(model, PeftModel):
        raise UnsupportedError(
            f"convert_to_lora takes a PeftModel, not a {type(model).__name__}: it needs a configuration."
        )
    model._known([adapter_name])
    root, config = model.get_base_model(), model.peft_config[adapter_name]
    assert isinstance(config, ModuleConfig)
    decompose: Decompose = _svd if compile_kwargs is None else torch.compile(_svd, **compile_kwargs)
    keyed = list(checkpoint._keyed_wrappers(root, adapter_name))
    places = {key: (wrapper, a) for key, wrapper, a in keyed if not isinstance(a, TrainedCopy | BiasOnly)}
    cap = _cap(rank, [wrapper.place for wrapper, _ in places.values()], max_rank)
    if not places:
        raise UnsupportedError(f"Adapter {adapter_name!r} changes no weight, so there is nothing to write as LoRA.")
    parts: dict[str, Part] = {}
    for key, (wrapper, adapter) in track(places.items(), "Converting to LoRA", disable=not progressbar):
        parts[key] = _part(wrapper, adapter, cap(wrapper.place), decompose)
    new = _config(config, {places[key][0].place: part for key, part in parts.items()})
    # Copies of whole modules, and biases that are trained beside the method, are the same for every method.
    copied = tuple(f"{checkpoint.PREFIX}{key}." for key, _, adapter in keyed if isinstance(adapter, TrainedCopy))
    biases = {f"{checkpoint.PREFIX}{key}" for key, _ in checkpoint._with_bias((key, a) for key, _, a in keyed)}
    tensors = {
        key: tensor.clone()
        for key, tensor in checkpoint.adapter_tensors(root, adapter_name).items()
        if key.startswith(copied) or key.removesuffix("_delta") in biases
    }
    for key, part in parts.items():
        wrapper, _ = places[key]
        own = _lora(wrapper, new, part)
        tensors |= {f"{checkpoint.PREFIX}{key}.{name}": tensor for name, tensor in own.to_file().items()}
    result = Conversion((new, tensors))
    result.ranks = {places[key][0].place: part.rank for key, part in parts.items()}
    result.errors = {places[key][0].place: _share(part.lost, part.total) for key, part in parts.items()}
    result.error = _share(sum(part.lost for part in parts.values()), sum(part.total for part in parts.values()))
    return result


def save_as_lora(
    path: str | Path,
    model: PeftModel,
    rank: float | Mapping[str, float],
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
    max_rank: int | None = None,
) -> Conversion:
    """`convert_to_lora`, written into a folder.

    Args:
        path: The folder.
        model: As there.
        rank: As there.
        adapter_name: As there.
        progressbar: As there.
        compile_kwargs: As there.
        max_rank: As there.

    Raises:
        CheckpointError: The files could not be written.
    """
    converted = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs, max_rank)
    config = replace(converted.config, inference_mode=True)
    root = model.get_base_model()
    checkpoint.save(root, adapter_name, config, Path(path), tensors=converted.tensors)
    return converted


def without_start(model: PeftModel, name: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA adapter whose factors start as part of the weight, as one of twice the rank that starts at zero.

        up down - start_up start_down = (up | -start_up) (down; start_down)

    Raises:
        ConfigError: The adapter does not start so.
    """
    config: Any = model.peft_config[name]
    root = model.get_base_model()
    keyed = list(checkpoint._keyed(root, name))
    if not any(isinstance(adapter, Lora) and adapter.start_down is not None for _, adapter in keyed):
        raise ConfigError(
            f"path_initial_model_for_weight_conversion: adapter {name!r} did not start as part of the weight, so there "
            "is nothing to convert. Leave it out."
        )
    # Twice the rank at the same scaling.
    more = math.sqrt(2) if config.use_rslora else 2
    new = replace(
        config,
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={pattern: 2 * rank for pattern, rank in config.rank_pattern.items()},
        alpha_pattern={pattern: more * alpha for pattern, alpha in config.alpha_pattern.items()},
    )
    tensors = checkpoint.adapter_tensors(root, name)
    for key, adapter in keyed:
        if isinstance(adapter, Lora):
            down, up = (factor.detach() for factor in adapter.factors())
            own = adapter.layout(down, up)
            for start in ("start_A", "start_B"):
                tensors.pop(f"{checkpoint.PREFIX}{key}.{start}", None)
            tensors |= {f"{checkpoint.PREFIX}{key}.{part}": tensor for part, tensor in own.items()}
    return new, tensors


def _cap(
    rank: float | Mapping[str, float], places: Iterable[str], max_rank: int | None
) -> Callable[[str], tuple[float, int | None]]:
    """By place: the rank or the share to keep, and the highest rank."""
    patterns = rank if isinstance(rank, Mapping) else {"": rank}
    for pattern, value in patterns.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (value > 0 if whole else isinstance(value, float) and 0 < value <= 1):
            where = f"rank[{pattern!r}]" if isinstance(rank, Mapping) else "rank"
            raise ConfigError(f"{where}={value!r}; a positive whole number or a share, up to 1.0, was expected.")
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"max_rank={max_rank!r}; a positive whole number was expected.")
    named = {pattern: value for pattern, value in patterns.items() if pattern}
    probe = LoraConfig(rank_pattern=dict.fromkeys(named, 1))
    if idle := list(probe.unused(list(places))):
        raise ConfigError(f"rank: {idle[0]}")

    def find(place: str) -> tuple[float, int | None]:
        for pattern, value in named.items():
            if LoraConfig(r=2, rank_pattern={pattern: 1}).at(place).r == 1:
                return value, max_rank
        if "" not in patterns:
            raise ConfigError(f'rank: nothing is said for {place}. Give one for all others under "".')
        return patterns[""], max_rank

    return find


def _part(wrapper: Adapted, adapter: Adapter, cap: tuple[float, int | None], decompose: Decompose) -> Part:
    """The change that an adapter makes, as factors."""
    site, direct = wrapper.site, type(adapter).merge_into is WeightAdapter.merge_into
    try:
        # Methods with a way of merging of their own, or with none, which say so.
        merged = None if direct else adapter.merge_into(wrapper.frozen_layer)
    except UnsupportedError as error:
        raise UnsupportedError(f"{wrapper.place}: {error}") from error
    if site is None or site.kind not in Lora.kinds:
        kind = "" if site is None else f"{site.kind} "
        raise UnsupportedError(
            f"{wrapper.place} is a {kind}layer, which LoRA cannot adapt. Merge the adapter into the model instead, or "
            "leave such layers out of its targets."
        )
    weight, before = wide(site.read().detach()), site.bias()
    if merged is not None:
        held = site.on(merged)
        delta, bias = wide(held.read()) - weight, _change(before, held.bias())
    else:
        assert isinstance(adapter, WeightAdapter)
        bias = _change(before, adapter.adapt_bias(None if before is None else wide(before)))
        if isinstance(adapter, Lora) and type(adapter).adapt is Lora.adapt:
            return _exact(adapter, cap, bias)
        delta = adapter.adapt(weight) - weight
    u, s, vh = decompose(delta)
    rank = _rank(s, cap)
    lost, total = (float(part.double().square().sum()) for part in (s[..., rank:], s))
    return Part(vh[..., :rank, :], u[..., :rank] * s[..., None, :rank], bias, lost, total)


def _exact(adapter: Lora, cap: tuple[float, int | None], bias: Tensor | None) -> Part:
    """Of a product of factors, that product; decomposed where the rank is too high."""
    down, up = (wide(factor.detach()) for factor in adapter.factors())
    up = adapter.scaling * up
    # Of W = up down, the singular values are those of the small matrix R_up R_down^T.
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    total = float(s.double().square().sum())
    rank = _rank(s, cap)
    if isinstance(cap[0], int) and rank >= down.shape[-2]:
        return Part(down, up, bias, 0.0, total)
    left = float(s[..., rank:].double().square().sum())
    return Part(vh[..., :rank, :] @ q_down.mT, q_up @ (u[..., :rank] * s[..., None, :rank]), bias, left, total)


def _svd(delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return u, s, vh


def _rank(s: Tensor, cap: tuple[float, int | None]) -> int:
    """How many of the singular values, `(k,)` or `(n, k)`, are kept."""
    wanted, most = cap
    if not bool(s.any()):
        return 1
    if isinstance(wanted, int):
        rank = wanted
    else:
        energy = s.double().square()
        if energy.dim() > 1:  # of a stack, all matrices have the same rank
            energy = energy.sum(0)
        kept = energy.cumsum(0)
        rank = int((kept < wanted * kept[-1] * (1 - 1e-12)).sum()) + 1
    return max(1, min(rank, s.shape[-1], most or rank))


def _change(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """What has to be added to a bias, or none for nothing."""
    if after is None:
        return None
    change = wide(after) if before is None else wide(after) - wide(before)
    return change if bool(change.any()) else None


def _share(lost: float, total: float) -> float:
    return math.sqrt(lost / total) if total else 0.0


def _config(old: ModuleConfig, parts: Mapping[str, Part]) -> LoraConfig:
    """The configuration of the new adapter; its scaling is one everywhere."""
    common = Counter(part.rank for part in parts.values()).most_common(1)[0][0]
    other = {path: part.rank for path, part in parts.items() if part.rank != common}
    bias = getattr(old, "bias", "none")
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=other,
        alpha_pattern=dict(other),
        lora_bias=any(part.bias is not None for part in parts.values()),
        bias="lora_only" if bias.endswith("_only") else bias,
        target_modules=old.target_modules,
        target_parameters=getattr(old, "target_parameters", None),
        exclude_modules=old.exclude_modules,
        layers_to_transform=old.layers_to_transform,
        layers_pattern=old.layers_pattern,
        modules_to_save=old.modules_to_save,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
    )


def _lora(wrapper: Adapted, config: LoraConfig, part: Part) -> Lora:
    """An adapter for the place that holds these factors."""
    assert wrapper.site is not None
    if config.lora_bias and (wrapper.site.kind == "embedding" or isinstance(wrapper.site, ParameterSite)):
        raise UnsupportedError(
            f"{wrapper.place}: the adapter changes biases, and LoRA has none on {wrapper.site.kind} places. Convert an "
            "adapter without it, or merge it into the model."
        )
    with torch.device("meta"):
        lora = Lora(wrapper.site, config.at(wrapper.place))
    lora.down, lora.up = (nn.Parameter(factor.contiguous()) for factor in (part.down, part.up))
    if lora.bias is not None:
        lora.bias = nn.Parameter(part.up.new_zeros(wrapper.site.shape[0]) if part.bias is None else part.bias)
    return lora
