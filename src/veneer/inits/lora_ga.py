"""LoRA-GA: the factors start so that their first step goes where full fine-tuning would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from veneer.config import Nested
from veneer.errors import ConfigError, StateError
from veneer.inits.kaiming import kaiming
from veneer.inits.start import SEED, Start, low_rank, wide

if TYPE_CHECKING:
    from veneer.preparation import Run

HELD = 2**30
"""Bytes of gradients that are averaged at a time; with more, the data is run several times."""


@dataclass(frozen=True)
class LoraGAConfig(Nested):
    """Settings of LoRA-GA.

    Args:
        direction: Which of the 2r leading singular vectors of the gradient go where: `"ArB2r"` the first r to down and
            the others to up, `"A2rBr"` the other way round, `"ArBr"` alternating from up on, `"random"` the same r,
            drawn at random, to both.
        scale: Length of up: `"stable"`, by out^(1/4) / sqrt(gamma); `"weight_svd"`, by the largest singular value of
            the weight over that of the gradient; `"gd_scale"`, both factors over the adapter's scaling; `"unit"`.
        stable_gamma: gamma.

    Raises:
        ConfigError: gamma is not positive.
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stable_gamma <= 0:
            raise ConfigError(f"LoraGAConfig: stable_gamma={self.stable_gamma}; a positive number was expected.")


def lora_ga(start: Start) -> None:
    """up = c U_I diag(S_I), down = V_J^T, of the singular triplets U S V^T of the gradient of the loss by the weight.

    The sets I and J of r indices and the length c are as `LoraGAConfig` says. Until data has been seen, the start is
    the default one.

    Source: Wang et al. 2024, arXiv:2407.05000, theorems 3.1 and 3.2; the factor S_I as in `peft`.
    """
    if not start.seen:
        kaiming(start)
        return
    r, settings = start.rank, start.settings
    u, s, vh = (start.seen[name].to(start.up.device) for name in ("u", "s", "vh"))
    if s.shape[-1] != 2 * r:
        raise ConfigError(
            f"lora_ga_config: {s.shape[-1]} directions of the gradient are known, and {2 * r} were expected. Prepare "
            "the model with the configuration that it is used with."
        )
    both = torch.randperm(2 * r, generator=torch.Generator().manual_seed(SEED))[:r]
    first, second = torch.arange(r), torch.arange(r, 2 * r)
    ups, downs = {
        "ArBr": (2 * first, 2 * first + 1),
        "A2rBr": (first, second),
        "ArB2r": (second, first),
        "random": (both, both),
    }[settings.direction]
    values = s[..., ups]
    down, up = vh[..., downs, :], u[..., ups] * values.unsqueeze(-2)
    if settings.scale == "stable":
        up = up * (up.shape[-2] ** 0.25 / settings.stable_gamma**0.5)
    elif settings.scale == "weight_svd":
        largest = low_rank(start.weight(), r, 4)[1][..., 0]
        length = torch.where(values[..., 0] > 0, largest / values[..., 0], torch.ones_like(largest))
        up = up * length[..., None, None]
    elif settings.scale == "gd_scale":
        down, up = down / start.scaling, up / start.scaling
    start.fill(down, up)


def prepare(adapters: Mapping[str, Any], config: Any, run: Run) -> None:
    """Makes the starting values of all adapters from gradients on the data."""
    for path, seen in observe(adapters, config, run):
        adapters[path].begin(seen)


def observe(adapters: Mapping[str, Any], config: Any, run: Run) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The 2r leading singular triplets of the mean gradient for every place, as `lora_ga` takes them.

    Raises:
        ConfigError: 2r is more than the gradient's rank can be.
        StateError: A weight takes no part in the loss.
    """
    for group in _groups(adapters):
        sums: dict[str, Tensor] = {}
        counts = dict.fromkeys(group, 0)

        def see(path: str, gradient: Tensor, sums: dict[str, Tensor] = sums, counts: dict[str, int] = counts) -> None:
            sums[path] = sums[path].add_(gradient) if path in sums else wide(gradient).clone()
            counts[path] += 1

        run.gradients(see, paths=group)
        for path in group:
            if path not in sums:
                raise StateError(f"init_lora_weights='lora_ga': {path} takes no part in the loss. Leave it out.")
            yield path, _decompose(adapters[path], sums.pop(path) / counts[path])


def _decompose(adapter: Any, gradient: Tensor) -> dict[str, Tensor]:
    r, most = adapter.down.shape[-2], min(gradient.shape[-2:])
    if 2 * r > most:
        raise ConfigError(
            f"init_lora_weights='lora_ga': r={r}, but the layer is {tuple(gradient.shape)}; at most {most // 2} was "
            "expected, half its rank. Lower r, or give the layer another one in rank_pattern."
        )
    u, s, vh = low_rank(gradient, min(4 * r, most), 4)
    return {"u": u[..., : 2 * r].clone(), "s": s[..., : 2 * r].clone(), "vh": vh[..., : 2 * r, :].clone()}


def _groups(adapters: Mapping[str, Any]) -> Iterator[list[str]]:
    """Paths whose gradients are held at the same time."""
    group: list[str] = []
    size = 0
    for path, adapter in adapters.items():
        rows, columns = adapter.site.shape
        more = 4 * rows * columns * (adapter.site.batch[0] if adapter.site.batch else 1)
        if group and size + more > HELD:
            yield group
            group, size = [], 0
        group.append(path)
        size += more
    if group:
        yield group
