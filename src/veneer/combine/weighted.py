"""Weighted combinations of LoRA adapters, taken of what they do to the weight rather than of their factors.

With D_i the change that adapter i makes to a weight, and w_i its weight, every combination is a dense change

    D = op(w_1 D_1, ..., w_n D_n)

written as a low-rank adapter again. `cat` keeps the sum exactly, in rank r_1 + ... + r_n; all others cut D to a rank by
its singular values. Adding the factors themselves, as `peft` does, would add products of one adapter's down with
another's up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from veneer.adapted import adapters_of
from veneer.attach import detach
from veneer.errors import ConfigError, UnsupportedError, nearest
from veneer.methods.lora import Lora, LoraConfig
from veneer.targets import exactly, walk

if TYPE_CHECKING:
    from veneer.model import PeftModel

Operation = Callable[[Tensor, float, str], Tensor]


def total(deltas: Tensor, density: float, sign: str) -> Tensor:
    """The plain sum; `deltas` is `(n, out, in)`."""
    return deltas.sum(0)


def magnitude_prune(deltas: Tensor, density: float, sign: str) -> Tensor:
    """The sum of what is left when each keeps its largest entries."""
    return _keep_largest(deltas, density).sum(0)


def dare_linear(deltas: Tensor, density: float, sign: str) -> Tensor:
    """The sum after random entries are dropped and the rest is scaled up. Yu et al. 2023, arXiv:2311.03099."""
    return _keep_random(deltas, density).sum(0)


def ties(deltas: Tensor, density: float, sign: str) -> Tensor:
    """Trim, elect a sign for each entry, average those that agree. Yadav et al. 2023, arXiv:2306.01708, section 4."""
    return _elect(_keep_largest(deltas, density), sign)


def dare_ties(deltas: Tensor, density: float, sign: str) -> Tensor:
    """`ties` with DARE's random dropping in place of trimming."""
    return _elect(_keep_random(deltas, density), sign)


OPERATIONS: dict[str, Operation] = {
    "linear": total,
    "svd": total,
    "magnitude_prune": magnitude_prune,
    "magnitude_prune_svd": magnitude_prune,
    "dare_linear": dare_linear,
    "dare_linear_svd": dare_linear,
    "ties": ties,
    "ties_svd": ties,
    "dare_ties": dare_ties,
    "dare_ties_svd": dare_ties,
}


def combine(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Adds the LoRA adapter that is the weighted combination of others.

    Args:
        model: Holds the adapters.
        adapters: Their names.
        weights: One weight each.
        adapter_name: Name of the new adapter.
        combination_type: `cat`, or a key of `OPERATIONS` (the endings `_svd` are `peft`'s; the result is the same).
        svd_rank: Rank of the new adapter; the largest rank of the given ones if none. Not for `cat`.
        density: Share of the entries that pruning keeps; for the operations that prune.
        majority_sign_method: `total` elects the sign of the larger sum, `frequency` that of the more entries.

    Raises:
        ConfigError: The arguments do not fit each other.
        UnsupportedError: An adapter is not LoRA, or trains whole modules, which have no combination.
    """
    configs = _check(model, adapters, weights, combination_type, svd_rank, density, majority_sign_method)
    concatenates = combination_type == "cat"
    places = _places(model, adapters, weights)
    ranks = [sum(_rank(lora) for lora, _ in found) for found in places.values()]
    largest = max(_rank(lora) for found in places.values() for lora, _ in found)
    rank = max(ranks) if concatenates else largest if svd_rank is None else svd_rank
    # Scaling 1, so that the factors say the whole; every place of any of the adapters is a place of the new one.
    config = replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=exactly(sorted(places), dict(walk(model.get_base_model()))),
        layers_to_transform=None,
        layers_pattern=None,
        exclude_modules=None,
        rank_pattern={},
        alpha_pattern={},
        lora_bias=any(config.lora_bias for config in configs),
        init_lora_weights=True,
    )
    model.add_adapter(adapter_name, config)
    try:
        for wrapper, adapter in adapters_of(model, adapter_name):
            new = cast(Lora, adapter)
            found = places[wrapper.path]
            with torch.no_grad():
                if concatenates:
                    _concatenate(new, found)
                else:
                    deltas = torch.stack([w * lora.scaling * _product(lora) for lora, w in found])
                    dense = OPERATIONS[combination_type](deltas, density or 1.0, majority_sign_method)
                    up, s, down = torch.linalg.svd(
                        dense.float() if dense.dtype.itemsize < 4 else dense, full_matrices=False
                    )
                    kept = min(rank, s.numel())
                    _fill(new, s[:kept].sqrt()[:, None] * down[:kept], up[:, :kept] * s[:kept].sqrt())
                if new.bias is not None:
                    terms = [w * lora.scaling * lora.bias for lora, w in found if lora.bias is not None]
                    new.bias.copy_(torch.stack(terms).sum(0) if terms else torch.zeros_like(new.bias))
    except Exception:
        detach(model.get_base_model(), adapter_name)
        del model.peft_config[adapter_name]
        raise


def _check(
    model: PeftModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination: str,
    rank: int | None,
    density: float | None,
    sign: str,
) -> list[LoraConfig]:
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given; one weight each is needed.")
    if combination not in {"cat", *OPERATIONS}:
        raise ConfigError(
            f"Unknown combination_type {combination!r}.{nearest(combination, ['cat', *OPERATIONS])} "
            f"Known: {', '.join(['cat', *OPERATIONS])}."
        )
    prunes = combination != "cat" and OPERATIONS[combination] is not total
    if prunes and (density is None or not 0 < density <= 1):
        raise ConfigError(f"combination_type={combination!r} needs a density in (0, 1]; {density!r} was given.")
    if density is not None and not prunes:
        raise ConfigError(f"combination_type={combination!r} prunes nothing; leave out density.")
    if combination == "cat" and rank is not None:
        raise ConfigError("combination_type='cat' keeps all ranks; leave out svd_rank.")
    if rank is not None and rank <= 0:
        raise ConfigError(f"svd_rank={rank!r}; a positive whole number was expected.")
    if sign not in ("total", "frequency"):
        raise ConfigError(f"majority_sign_method={sign!r}; 'total' or 'frequency' was expected.")
    configs = [model.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        plain = isinstance(config, LoraConfig) and config.method() is Lora
        if not plain or config.modules_to_save or config.target_parameters:  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"Adapter {name!r} ({config.method().__name__}) cannot be combined: only those of plain LoRA can that "
                "neither train whole modules (modules_to_save) nor bare parameters. Merge it into the model instead."
            )
    return cast(list[LoraConfig], configs)


def _places(model: PeftModel, adapters: Sequence[str], weights: Sequence[float]) -> dict[str, list[tuple[Lora, float]]]:
    """By path: the adapters that stand there, each with its weight."""
    places: dict[str, list[tuple[Lora, float]]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for wrapper, adapter in adapters_of(model, name):
            places.setdefault(wrapper.path, []).append((cast(Lora, adapter), weight))
    return places


def _rank(lora: Lora) -> int:
    return lora.factors()[0].shape[-2]


def _product(lora: Lora) -> Tensor:
    down, up = lora.factors()
    return up @ down


def _concatenate(new: Lora, found: list[tuple[Lora, float]]) -> None:
    down = torch.cat([lora.factors()[0] for lora, _ in found])
    up = torch.cat([w * lora.scaling * lora.factors()[1] for lora, w in found], dim=1)
    _fill(new, down, up)


def _fill(new: Lora, down: Tensor, up: Tensor) -> None:
    """Writes factors of at most the adapter's rank; what is left over is zero."""
    rank = down.shape[0]
    new.down.zero_()
    new.up.zero_()
    new.down[:rank] = down
    new.up[:, :rank] = up


def _keep_largest(deltas: Tensor, density: float) -> Tensor:
    """Each delta's share `density` of largest entries; the rest is zero."""
    flat = deltas.flatten(1)
    count = max(1, int(density * flat.shape[1]))
    index = flat.abs().topk(count, dim=1).indices
    return torch.zeros_like(flat).scatter(1, index, flat.gather(1, index)).view_as(deltas)


def _keep_random(deltas: Tensor, density: float) -> Tensor:
    """Each entry with probability `density`, divided by it, so that the mean is kept."""
    return deltas * torch.bernoulli(torch.full_like(deltas, density)) / density


def _elect(deltas: Tensor, sign: str) -> Tensor:
    """The mean, entry by entry, of the deltas that have the elected sign."""
    votes = deltas.sum(0) if sign == "total" else deltas.sign().sum(0)
    elected = torch.where(votes >= 0, 1.0, -1.0).to(deltas.dtype)
    agrees = deltas.sign() == elected  # a zero agrees with neither sign
    return (deltas * agrees).sum(0) / agrees.sum(0).clamp_min(1)
