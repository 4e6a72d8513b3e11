"""AdaLoRA: LoRA in the form of singular values, with a budget of ranks that moves between the layers in training."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from veneer.adapter import WeightAdapter
from veneer.config import check_positive
from veneer.errors import ConfigError, StateError, VeneerWarning
from veneer.methods.lora import LoraConfig
from veneer.products import LowRank
from veneer.registry import register
from veneer.sites import Site

TRAINED = ("down", "values", "up")


class AdaLora(WeightAdapter):
    r"""Adds a product in the form of a singular value decomposition, and prunes the triplets that matter least.

        W' = W + s up diag(values) down,     s = alpha / (r + 1e-5),  r the rank at the start

    The loss has the term w * mean(||down down^T - I||_F, ||up^T up - I||_F) over all matrices. Of every parameter
    p with gradient g, I = |p g| and |I - mean I| are averaged over the steps; their product, summed over the value and
    averaged over each vector of a triplet, is the triplet's score. Between `tinit` and `total_step - tfinal`, every
    `deltaT` steps, the values of those with the lowest scores are set to zero, ever more of them, until `target_r` are
    left a matrix on average. The last choice stays.

    Trains: down (r, in), values (r, 1), up (out, r); values are zero at the start.
    Cost: r (in + out + 1) parameters, and in training two averages of each.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices a triplet is that of all of them.
    Raises: ConfigError for dropout on bare parameters.
    Source: Zhang et al. 2023, arXiv:2303.10512, eq. 3, 4, 8 to 12 and algorithm 1; scaling and start as in `peft`.
    """

    mask: Tensor

    def __init__(self, site: Site, config: AdaLoraConfig) -> None:
        super().__init__(site, config)
        pattern = config.rank_pattern
        rank = config.init_r if pattern is None else sum(next(iter(pattern.values())))
        self.config = config
        self.starts_as_base = config.init_lora_weights is not False
        self.settled = pattern is not None  # loaded with fewer triplets: no budget is left to move
        self.scaling = (config.lora_alpha if config.lora_alpha > 0 else config.init_r) / (config.init_r + 1e-5)
        self.dropout = self.input_dropout(config.lora_dropout, "lora_dropout")
        self.down = nn.Parameter(torch.empty(*site.batch, rank, site.shape[1]))
        self.values = nn.Parameter(torch.empty(*site.batch, rank, 1))
        self.up = nn.Parameter(torch.empty(*site.batch, site.shape[0], rank))
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool, device="cpu"), persistent=False)
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}  # of importance and of its uncertainty

    def reset(self) -> None:
        nn.init.normal_(self.down, std=0.02 if self.starts_as_base else 1.0)
        nn.init.normal_(self.up, std=0.02 if self.starts_as_base else 1.0)
        nn.init.normal_(self.values, std=0.0 if self.starts_as_base else 1.0)

    def product(self) -> LowRank:
        return LowRank(self.values * self.down, self.up, self.scaling)

    # The budget

    @classmethod
    def penalty(cls, adapters: Sequence[Self], config: AdaLoraConfig) -> Tensor | None:
        if not adapters or not config.orth_reg_weight:
            return None
        distances = [
            torch.linalg.matrix_norm(square - torch.eye(square.shape[-1], dtype=square.dtype, device=square.device))
            for adapter in adapters
            for square in (adapter.down @ adapter.down.mT, adapter.up.mT @ adapter.up)
        ]
        device = distances[0].device
        return config.orth_reg_weight * torch.cat([distance.reshape(-1).to(device) for distance in distances]).mean()

    @classmethod
    @torch.no_grad()
    def allocate(cls, adapters: Mapping[str, Self], config: AdaLoraConfig, step: int) -> None:
        if not adapters or any(adapter.settled for adapter in adapters.values()):
            return
        end = config.last_allocation()
        if step > end:
            for adapter in adapters.values():
                adapter.values.masked_fill_(~adapter.mask[:, None], 0.0)
            return
        if step < config.total_step - config.tfinal:  # type: ignore[operator]  # checked by `last_allocation`
            for adapter in adapters.values():
                adapter.observe(config.beta1, config.beta2)
        if step <= config.tinit and step != end:
            return
        if step % config.deltaT and step != end:
            # Until the next choice the optimiser moves all values, and files hold all.
            config.rank_pattern = None
            for adapter in adapters.values():
                adapter.mask.fill_(True)
            return
        present = sum(adapter.mask.numel() for adapter in adapters.values())
        wanted = config.target_r * len(adapters)
        left = 0.0 if step == end else 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)  # type: ignore[operator]
        surplus = present - int((present - wanted) * left**3 + wanted)
        if surplus > 0:
            scores = {path: adapter.scores() for path, adapter in adapters.items()}
            threshold = torch.cat([score.cpu() for score in scores.values()]).kthvalue(surplus).values
            for path, adapter in adapters.items():
                adapter.mask.copy_(scores[path] > threshold.to(scores[path].device))
                adapter.values.masked_fill_(~adapter.mask[:, None], 0.0)
        config.rank_pattern = cls.pattern(adapters)
        if step == end:
            for adapter in adapters.values():
                adapter.averages.clear()

    @classmethod
    def pattern(cls, adapters: Mapping[str, Self]) -> dict[str, list[bool]]:
        """Which triplets are left, as configuration files name it."""
        return {f"{path}.lora_E": adapter.mask.tolist() for path, adapter in adapters.items()}

    def observe(self, beta1: float, beta2: float) -> None:
        """Takes the importance of every parameter into the averages."""
        for name in TRAINED:
            parameter = self.get_parameter(name)
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            average, uncertainty = self.averages.get(name) or (torch.zeros_like(now), torch.zeros_like(now))
            average = beta1 * average + (1 - beta1) * now
            self.averages[name] = average, beta2 * uncertainty + (1 - beta2) * (now - average).abs()

    def scores(self) -> Tensor:
        """How much each triplet matters, `(r,)`."""
        if not self.averages:
            raise StateError("AdaLoRA has seen no step to choose by: call update_and_allocate after every one, from 0.")
        down, values, up = (torch.mul(*self.averages[name]) for name in TRAINED)
        return (values.squeeze(-1) + down.mean(-1) + up.mean(-2)).reshape(-1, self.mask.numel()).mean(0)

    @classmethod
    def kept(cls, adapters: Mapping[str, Self]) -> dict[str, Tensor]:
        """Pruned triplets are in no file, but trained on: they may come back, and the penalty sees them."""
        kept: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            kept |= {f"{path}:{name}": adapter.get_parameter(name) for name in TRAINED}
            kept[f"{path}:mask"] = adapter.mask
            for name, (average, uncertainty) in adapter.averages.items():
                kept |= {f"{path}:{name}.average": average, f"{path}:{name}.uncertainty": uncertainty}
        return kept

    @classmethod
    def resume(cls, adapters: Mapping[str, Self], config: AdaLoraConfig, kept: Mapping[str, Tensor]) -> None:
        for path, adapter in adapters.items():
            for name in (*TRAINED, "mask"):
                adapter.put(name, kept[f"{path}:{name}"])
            adapter.averages = {
                name: (
                    kept[f"{path}:{name}.average"].to(adapter.down.device),
                    kept[f"{path}:{name}.uncertainty"].to(adapter.down.device),
                )
                for name in TRAINED
                if f"{path}:{name}.average" in kept
            }
        all_left = all(bool(adapter.mask.all()) for adapter in adapters.values())
        config.rank_pattern = None if all_left else cls.pattern(adapters)

    # Layout of peft: the vectors that are left, convolutions flattened.

    def to_file(self) -> dict[str, Tensor]:
        down: Tensor = self.down
        values: Tensor = self.values
        up: Tensor = self.up
        if not bool(self.mask.all()):
            down, values, up = down[..., self.mask, :], values[..., self.mask, :], up[..., self.mask]
        return {"lora_A": down, "lora_E": values, "lora_B": up}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, key, dim in (("down", "lora_A", -2), ("values", "lora_E", -2), ("up", "lora_B", -1)):
            tensor: Tensor = tensors[key]
            whole = self.get_parameter(name).detach()
            if tensor.shape != whole.shape:
                tensor = whole.index_copy(dim, self.mask.nonzero().flatten(), tensor.to(whole))
            self.put(name, tensor)


@register("adalora")
@dataclass
class AdaLoraConfig(LoraConfig):
    """Configuration of `AdaLora`, field by field that of `peft`. `r` has no meaning here.

    Args:
        target_r: Triplets that are left a matrix in the end, on average.
        init_r: Triplets of each matrix at the start.
        tinit: The last step before pruning starts.
        tfinal: Steps at the end in which nothing is pruned any more.
        deltaT: Steps from one choice to the next.
        beta1: Share of the past in the average of the importance.
        beta2: The same for its uncertainty.
        orth_reg_weight: Weight of the term that keeps the vectors orthonormal.
        total_step: Optimiser steps of the whole run; a trainer fills it in if it is none.
        rank_pattern: Which triplets are left, written by training.

    Raises:
        ConfigError: The schedule leaves no step to prune in, or a setting of LoRA makes no sense here.
    """

    adapter: ClassVar[Any] = AdaLora
    peft_name = "ADALORA"
    bias_only = "lora_only"
    patterns = {"alpha_pattern": "lora_alpha"}  # noqa: RUF012  # read only

    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  # as in peft
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        patterns, self.rank_pattern = self.rank_pattern, None  # LoRA's are of another kind
        super().__post_init__()
        self.rank_pattern = patterns
        check_positive(self, "target_r", "init_r", "deltaT", "total_step")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"AdaLoraConfig: {name}={getattr(self, name)!r}; a number in (0, 1) was expected.")
        if self.orth_reg_weight < 0 or min(self.tinit, self.tfinal) < 0:
            raise ConfigError("AdaLoraConfig: orth_reg_weight, tinit and tfinal cannot be negative.")
        if self.target_r > self.init_r:
            raise ConfigError(
                f"AdaLoraConfig: target_r={self.target_r} is above init_r={self.init_r}; ranks are only taken away."
            )
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"AdaLoraConfig: init_lora_weights={self.init_lora_weights!r}; True, or False for random values, was "
                "expected: the method has a start of its own."
            )
        for entry in fields(self):
            other = entry.name in ("use_rslora", "lora_bias") or "variant" in entry.metadata
            if other and (value := getattr(self, entry.name)):
                raise ConfigError(f"AdaLoraConfig: {entry.name}={value!r} is not for AdaLoRA. Leave it out.")
        if self.total_step is not None:
            self.last_allocation()

    def last_allocation(self) -> int:
        """The step of the last choice.

        Raises:
            ConfigError: The number of steps is not known, or leaves none to prune in.
        """
        if self.total_step is None:
            raise ConfigError("AdaLoraConfig: set total_step to the number of optimiser steps of the whole training.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ConfigError(
                f"AdaLoraConfig: tinit={self.tinit}, tfinal={self.tfinal} and total_step={self.total_step} leave no "
                "step to prune in. Lower tinit or tfinal, or train for longer."
            )
        return self.total_step - max(self.tfinal, 1)

    def begin(self, steps: int) -> None:
        if self.total_step is None:
            self.total_step = steps
            self.last_allocation()
        elif self.last_allocation() >= steps:
            warnings.warn(
                f"total_step={self.total_step}, but the training has {steps} steps, so more than target_r="
                f"{self.target_r} triplets a matrix will be left. Leave total_step out to have it filled in.",
                VeneerWarning,
                stacklevel=2,
            )

    def method(self) -> type[AdaLora]:  # type: ignore[override]
        return AdaLora

    def at(self, path: str) -> Self:
        here = super().at(path)
        if self.rank_pattern is None:
            return here
        # peft may have left the adapter's name at the end.
        left = [mask for key, mask in self.rank_pattern.items() if f"{key}.".startswith(f"{path}.lora_E.")]
        return replace(here, rank_pattern={"lora_E": left[0]} if left else None)

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        yield from super().unused(paths)
        if self.r != 8:
            yield f"r={self.r} has no meaning in AdaLoRA. Set init_r and target_r."
