"""LoRA: low-rank adaptation, with rsLoRA's scaling and a bias."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import inits
from veneer.adapter import Base, WeightAdapter
from veneer.config import WeightConfig, check_expression, planned, register
from veneer.errors import ConfigError
from veneer.sites import LinearSite, Site


class Lora(WeightAdapter):
    r"""Adds a product of two thin matrices to the weight.

        W' = W + s up down,     b' = b + s bias,     s = alpha / r,  or alpha / sqrt(r) with rsLoRA

    Trains: down (r, in); up (out, r), zero at the start; with `lora_bias` also bias (out,), zero at the start.
    Cost: r (in + out) parameters, and 2 r (in + out) multiply-adds a token; the product up down is never formed.
    Dropout acts on the input of down, in training only.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own down and up.
    Raises: ConfigError for dropout or a bias on places that cannot have them.
    Source: Hu et al. 2021, arXiv:2106.09685, eq. 3; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2.
    """

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        if site.kind in ("embedding", "parameter"):
            if config.lora_bias:
                raise ConfigError(f"lora_bias=True: {site.kind} places have no bias to add to. Leave it out of them.")
            if config.lora_dropout and site.kind == "parameter":
                raise ConfigError("lora_dropout: a bare parameter has no input of its own to drop from; set it to 0.")
        self.scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.config = config
        self.down = nn.Parameter(torch.empty(*site.batch, config.r, in_features))
        self.up = nn.Parameter(torch.empty(*site.batch, out_features, config.r))
        self.bias = nn.Parameter(torch.empty(out_features)) if config.lora_bias else None
        # An embedding's input is an index, of which nothing can be dropped (peft does the same).
        self.dropout = config.lora_dropout if site.kind != "embedding" else 0.0

    def reset(self) -> None:
        inits.start(self.config.init_lora_weights, self.down, self.up, self.site.kind)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def adapt(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * (self.up @ self.down)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if self.bias is None:
            return bias
        return self.scaling * self.bias if bias is None else bias + self.scaling * self.bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        return self.add(x, base(x))

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s (up down x + bias), y the layer's output without it."""
        if x.is_floating_point():
            x = F.dropout(x.to(self.down.dtype), self.dropout, self.training)
        if self.bias is None and type(self.site) is LinearSite and y.dtype == self.down.dtype:
            # One product that adds onto y: no tensor for the delta, none for its scaling.
            hidden = F.linear(x.to(self.down.device), self.down).reshape(-1, self.down.shape[0])
            return torch.addmm(y.reshape(-1, y.shape[-1]), hidden, self.up.t(), alpha=self.scaling).view(y.shape)
        delta = self.site.apply_factored(x.to(self.down.device), self.down, self.up)
        if self.bias is not None:
            delta = self.site.add_bias(delta, self.bias)
        return y + (self.scaling * delta).to(y.dtype)

    # Layout of peft: lora_A is down, lora_B is up; convolutions keep their kernel's shape in A; embeddings are bare
    # tensors; a stack of n matrices is unrolled, with the index of the matrix slow in A's rows and fast in B's columns.

    def to_file(self) -> dict[str, Tensor]:
        down: Tensor = self.down
        up: Tensor = self.up
        if self.site.kind == "embedding":
            return {"lora_embedding_A": down, "lora_embedding_B": up}
        if self.site.kind == "conv":
            kernel = self.site.module.get_parameter("weight").shape[1:]
            down, up = down.reshape(-1, *kernel), up.reshape(*up.shape, *[1] * (len(kernel) - 1))
        elif self.site.batch:
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        bias = {} if self.bias is None else {"lora_B.bias": self.bias}
        return {"lora_A.weight": down, "lora_B.weight": up, **bias}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        down = tensors.get("lora_A.weight", tensors.get("lora_embedding_A"))
        up = tensors.get("lora_B.weight", tensors.get("lora_embedding_B"))
        assert down is not None
        assert up is not None
        if self.site.batch:
            up = up.unflatten(1, (-1, *self.site.batch)).permute(2, 0, 1).contiguous()
        self.put("down", down.reshape(self.down.shape))
        self.put("up", up.reshape(self.up.shape))
        if self.bias is not None:
            self.put("bias", tensors["lora_B.bias"])


VARIANTS: dict[str, type[Lora]] = {}
"""Methods that are LoRA with a twist, and that files of `peft` tell by a setting of LoRA's; by name."""


def variant(name: str, **preset: Any) -> Callable[[type[Lora]], type[Lora]]:
    """Class decorator that enters a variant of LoRA, in the module of that name, under the method name.

    Args:
        name: Name of the method and of its module.
        preset: The settings of `LoraConfig` that ask for it.
    """

    def enter(cls: type[Lora]) -> type[Lora]:
        VARIANTS[name] = cls
        register(name, **preset)(LoraConfig)
        return cls

    return enter


def variant_field(default: Any, module: str) -> Any:
    """A setting of `LoraConfig` that, unless it has its default, asks for the variant in the module of that name."""
    return field(default=default, metadata={"variant": module})


@register("lora")
@dataclass
class LoraConfig(WeightConfig):
    """Configuration of `Lora`, field by field that of `peft`.

    Args:
        r: Rank.
        lora_alpha: Numerator of the scaling.
        lora_dropout: Share of the input that is dropped in training.
        use_rslora: Scale by alpha / sqrt(r).
        lora_bias: Train a bias beside `up`.
        init_lora_weights: Starting values: True (Kaiming-uniform down, zero up), `"gaussian"`, `"orthogonal"`, or False
            for a random, non-zero up (for tests).
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        alpha_pattern: The same for `lora_alpha`.
        use_dora: Split the weight into lengths and directions (method `dora`).
        target_parameters: Bare parameters to adapt, such as `"experts.gate_up_proj"`.
        ensure_weight_tying: Train one copy for all modules that share a weight with one in `modules_to_save`.

    Raises:
        ConfigError: A rank that is not positive, a dropout outside [0, 1), or a setting not in this version.
    """

    adapter = Lora
    peft_name = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False
    megatron_config: dict[str, Any] | None = planned(None, "Megatron's parallel layers")
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = planned(None, "training single tokens beside LoRA")
    loftq_config: dict[str, Any] = planned(dict, "LoftQ")
    eva_config: Any = planned(None, "EVA")
    corda_config: Any = planned(None, "CorDA")
    lora_ga_config: Any = planned(None, "LoRA-GA")
    use_dora: bool = variant_field(False, "dora")
    velora_config: Any = planned(None, "VeLoRA")
    alora_invocation_tokens: list[int] | None = planned(None, "aLoRA")
    use_qalora: bool = planned(False, "QA-LoRA")
    qalora_group_size: int = 16
    monteclora_config: Any = planned(None, "MonteCLoRA")
    layer_replication: Any = planned(None, "layer replication")
    use_bdlora: Any = planned(None, "BD-LoRA")
    arrow_config: Any = planned(None, "Arrow")
    kasa_config: Any = planned(None, "KaSA")

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("r", self.r), *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items())]:
            if rank <= 0:
                raise ConfigError(f"LoraConfig: {where}={rank!r}; a positive whole number was expected.")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"LoraConfig: lora_dropout={self.lora_dropout!r}; a share in [0, 1) was expected.")
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            check_expression("rank_pattern or alpha_pattern", pattern)
        inits.check(self.init_lora_weights)

    def method(self) -> type[Lora]:
        """`Lora`, or the variant that a setting such as `use_dora` asks for.

        Raises:
            ConfigError: Two variants are asked for at once.
        """
        asked = [
            (entry.name, entry.metadata["variant"])
            for entry in fields(self)
            if "variant" in entry.metadata and getattr(self, entry.name) not in (entry.default, None)
        ]
        if not asked:
            return Lora
        if len(asked) > 1:
            raise ConfigError(f"LoraConfig: {' and '.join(name for name, _ in asked)} cannot be combined. Choose one.")
        module = asked[0][1]
        importlib.import_module(f"veneer.methods.{module}")
        return VARIANTS[module]

    def at(self, path: str) -> Self:
        rank = _pattern(self.rank_pattern, path, self.r)
        alpha = _pattern(self.alpha_pattern, path, self.lora_alpha)
        return self if (rank, alpha) == (self.r, self.lora_alpha) else replace(self, r=rank, lora_alpha=alpha)

    def unused(self, paths: Collection[str]) -> Iterator[str]:
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            if idle := [pattern for pattern in patterns if not any(_matches(pattern, path) for path in paths)]:
                yield f"{name}: {idle} match none of the adapted modules."

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter configuration") -> LoraConfig:
        # peft writes settings of its run, which the adapter does not depend on.
        return super().from_dict({k: v for k, v in values.items() if k != "runtime_config"}, where)  # type: ignore[return-value]


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, path)), default)


def _matches(pattern: str, path: str) -> bool:
    """Whether the pattern matches the end of the path at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
