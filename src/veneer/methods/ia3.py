"""(IA)^3: activations are scaled, channel by channel."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import structure
from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig, check_expression
from veneer.errors import ConfigError, TargetError
from veneer.registry import register
from veneer.sites import ConvSite, EmbeddingSite, Site


class IA3(WeightAdapter):
    r"""Multiplies every channel of the layer's output, or of its input in feed-forward places, by a trained number.

        y = l * (W x + b)          W' = diag(l) W,   b' = l * b
        y = W (l * x) + b          W' = W diag(l),   b' = b         in feed-forward places

    The input of a norm's scale is what it has normalised. On a stack of n matrices every matrix has its own l.

    Trains: scale l (out,), or (in,) in feed-forward places; ones at the start.
    Cost: as many parameters, and one multiplication for each number of the output or input.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Source: Liu et al. 2022, arXiv:2205.05638, section 3.3.
    """

    kinds = frozenset({"linear", "conv", "embedding", "norm", "parameter"})

    def __init__(self, site: Site, config: IA3Config) -> None:
        super().__init__(site, config)
        self.config = config
        self.feedforward = bool(config.feedforward_modules)
        channels = site.shape[1] if self.feedforward and site.kind != "norm" else site.shape[0]
        self.axes: list[int] = []  # of a kernel
        if isinstance(site, ConvSite):
            self.axes = [1] * (site.module.weight.dim() - 2)
            channels = site.module.in_channels if self.feedforward else site.module.out_channels
        self.scale = nn.Parameter(torch.empty(*site.batch, channels))

    def reset(self) -> None:
        if self.config.init_ia3_weights:
            nn.init.ones_(self.scale)
        else:
            nn.init.normal_(self.scale)

    def adapt(self, weight: Tensor) -> Tensor:
        if not self.feedforward or self.site.kind == "norm":
            return self.scale.unsqueeze(-1) * weight
        if isinstance(self.site, ConvSite):
            conv = self.site.module
            # Every output channel sees the input channels of its group, each through all elements of the kernel.
            scale = self.scale.view(conv.groups, -1).repeat_interleave(conv.out_channels // conv.groups, 0)
            return weight * scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        return weight * self.scale.unsqueeze(-2)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        return bias if bias is None or self.feedforward else self.scale * bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        site = self.site
        if site.kind == "parameter" or (site.kind == "norm" and self.feedforward):
            return super().forward(x, base)
        if isinstance(site, EmbeddingSite):
            y = base(x)
            scale = F.embedding(x, self.scale.unsqueeze(-1)) if self.feedforward else self.scale
            return site.without_padding(x, (y * scale).to(y.dtype))
        if self.feedforward:
            return base((x.to(self.scale.device) * self.scale.view(-1, *self.axes)).to(x.dtype))
        y = base(x)
        wide = y.to(self.scale.dtype)
        return (wide * site.per_channel(self.scale, wide)).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        if self.site.kind == "conv":
            return {"ia3_l": self.scale.view(1, -1, *self.axes)}
        return {"ia3_l": self.scale.unsqueeze(-2 if self.feedforward else -1)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("scale", tensors["ia3_l"].reshape(self.scale.shape))


@register("ia3")
@dataclass
class IA3Config(ModuleConfig):
    """Configuration of `IA3`, field by field that of `peft`.

    `target_modules=None` takes the key and value projections and the outputs of the feed-forward parts, as the paper
    does; where keys and values come from one projection with the queries, all of it.

    Args:
        feedforward_modules: Those of the targets whose input is scaled: ends of their paths, or one regular expression.
            None takes the outputs of the feed-forward parts, found from the model's structure.
        fan_in_fan_out: Kept for `peft`'s files; how a layer stores its weight is seen from the layer.
        init_ia3_weights: Start with ones; False starts with random numbers (for tests).

    Raises:
        ConfigError: `feedforward_modules` is not set and cannot be found.
    """

    adapter = IA3
    peft_name = "IA3"
    own_fields = frozenset({"layers_to_transform", "layers_pattern"})
    default_targets = (["attention-keys", "attention-values", "ffn-output"],)
    learning_rates = {"classification": 1e-2, "causal-lm": 3e-3}  # noqa: RUF012  # 3e-3: section 3.5 of the paper

    feedforward_modules: list[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            check_expression("feedforward_modules", self.feedforward_modules)
        elif self.feedforward_modules is not None:
            self.feedforward_modules = sorted(self.feedforward_modules)

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        if isinstance(self.feedforward_modules, str):
            return self
        if self.feedforward_modules is not None:
            found = {path for path in paths if any(self._matches(name, path) for name in self._names())}
        elif all(structure.in_attention(path, modules) for path in paths):
            found = set()
        else:
            try:
                found = set(structure.place("ffn-output", modules))
            except TargetError as error:
                raise ConfigError(
                    "IA3Config: which of the targets are feed-forward outputs cannot be seen from this model. Name "
                    "them in feedforward_modules; [] scales the output of every target."
                ) from error
        return replace(self, feedforward_modules=self._spelled([path for path in paths if path in found], paths))

    def _spelled(self, outputs: Sequence[str], paths: Sequence[str]) -> list[str] | str:
        """These paths as `peft` reads them: some of the names that are targets, or else an expression."""
        targets = self.target_modules if isinstance(self.target_modules, list) else []
        names = tuple(name for name in targets if any(path.endswith(name) for path in outputs))
        if all(path.endswith(names) == (path in outputs) for path in paths):
            return list(names)
        return "|".join(re.escape(path) for path in outputs)

    def at(self, path: str) -> Self:
        here = [name for name in self._names() if self._matches(name, path)]
        return replace(super().at(path), feedforward_modules=here)

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        idle = [name for name in self._names() if not any(self._matches(name, path) for path in paths)]
        if idle:
            yield f"feedforward_modules: {idle} match none of the adapted modules."

    def _names(self) -> list[str]:
        said = self.feedforward_modules or []
        return [said] if isinstance(said, str) else said

    def _matches(self, name: str, path: str) -> bool:
        """Whether this part of `feedforward_modules` means the path; as in `peft`, the end of a word will do."""
        if isinstance(self.feedforward_modules, str):
            return re.fullmatch(name, path) is not None
        return path.endswith(name)
