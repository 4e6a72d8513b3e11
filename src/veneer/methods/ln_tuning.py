"""LN-tuning: only the normalisation layers are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.registry import register
from veneer.sites import Site, site_of


class LNTuning(WeightAdapter):
    r"""Trains a copy of a norm's scale, and of its bias where it has one.

        y = w * n(x) + b,     w, b trained, n what the layer does without them

    Over other adapters of the same layer, what they change is added to the copy.

    Trains: w (out,) and b (out,), the frozen ones at the start.
    Cost: 2 out parameters, out where there is no bias; the layer's own time.
    Start: equals the base layer exactly. Merge: exact.
    Source: Zhao et al. 2023, arXiv:2312.11420.
    """

    kinds = frozenset({"norm"})

    def __init__(self, site: Site, config: LNTuningConfig) -> None:
        super().__init__(site, config)
        self.layer = copy.deepcopy(site.module).requires_grad_(True)
        # Running statistics are kept once: a layer that has them runs itself, with the trained scale and bias.
        self.has_statistics = bool(self.layer._buffers)
        self.layer._buffers.clear()

    def adapt(self, weight: Tensor) -> Tensor:
        return self.site.view(self.layer.get_parameter("weight")) + (weight - self.site.read())

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        frozen = self.site.bias()
        return bias if frozen is None or bias is None else self.layer.get_parameter("bias") + (bias - frozen)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if base.below or self.has_statistics:
            return super().forward(x, base)
        dtype = self.layer.get_parameter("weight").dtype
        if dtype == self.site.dtype:
            return self.layer(x, *base.args, **base.kwargs)
        return self.layer(x.to(dtype), *base.args, **base.kwargs).to(x.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {f"ln_tuning_layers.{name}": tensor for name, tensor in self.layer.named_parameters()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.put(name.replace("ln_tuning_layers", "layer"), tensor)


def is_norm(path: str, module: nn.Module) -> bool:
    """Whether this is a normalisation layer with a scale."""
    site = site_of(module)
    return site is not None and site.kind == "norm"


@register("ln_tuning")
@dataclass
class LNTuningConfig(ModuleConfig):
    """Configuration of `LNTuning`. `target_modules=None` takes every norm of the model."""

    adapter = LNTuning
    peft_name = "LN_TUNING"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    own_fields = frozenset({"layers_to_transform", "layers_pattern"})
    default_targets = (is_norm,)
