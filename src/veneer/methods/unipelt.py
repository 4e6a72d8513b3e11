"""UniPELT: LoRA, prefixes and bottlenecks, each times a gate that sees the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from veneer.adapter import Adapter, Base, Shared
from veneer.attention import configs_of, hooks
from veneer.composites import CompositeConfig, Part
from veneer.config import ModuleConfig, check_positive
from veneer.experts import Known
from veneer.methods.bottleneck import BottleneckConfig
from veneer.methods.lora import LoraConfig
from veneer.methods.prefix_tuning import PrefixTuning, PrefixTuningConfig
from veneer.prompting.prefixes import PREFIXES, Prefix
from veneer.registry import register
from veneer.side_networks import beside, stack_of
from veneer.sites import Site

GATED = ("lora", "prefix", "bottleneck")


class Gates(Shared):
    """The gates of each block while it runs, `(rows, tokens, 3)`, by its path."""

    def __init__(self, sites: Mapping[str, Site], config: GateConfig) -> None:
        super().__init__(sites, config)
        self.now: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "now": {}}  # copies are made between calls

    def of(self, path: str, part: str) -> Tensor:
        """The gate of a part within a block, `(rows, tokens, 1)`."""
        block = max((block for block in self.now if path.startswith(f"{block}.")), key=len)
        index = GATED.index(part)
        return self.now[block][..., index : index + 1]


class Gate(Adapter):
    """On a block: makes its gates, and changes nothing."""

    kinds = frozenset({"module"})
    splits_rows = False
    shares = Gates
    shared: Gates

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        return cls(module, config)

    def __init__(self, module: nn.Module, config: GateConfig) -> None:
        super().__init__(None, config)
        settings: Any = configs_of(module)[0]
        self.blocks = int(settings.num_hidden_layers)
        self.causal = any(getattr(part, "is_causal", False) for part in module.modules())
        self.index: Any = next((m.layer_idx for m in module.modules() if getattr(m, "layer_idx", None) is not None), 0)
        self.weight = nn.Parameter(torch.empty(len(GATED), int(settings.hidden_size)))

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.path = path

    def reset(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        each = torch.sigmoid(x.to(self.weight.dtype) @ self.weight.mT)  # (rows, tokens, 3)
        given = [*base.args, *base.kwargs.values()]
        cache = next((value for value in given if isinstance(value, Cache)), None)
        own = beside(cache, self.shared, self.blocks)
        seen = each if own is None else own.update(each[:, None], each[:, None], self.index)[0][:, 0]
        mask = base.kwargs.get("attention_mask", next((v for v in base.args if isinstance(v, Tensor)), None))
        may = attended(mask, each.shape[1], seen.shape[1], self.causal, each)
        self.shared.now[self.path] = (may @ seen) / may.sum(-1, keepdim=True).clamp_min(1)
        return base(x)

    def to_file(self) -> dict[str, Tensor]:
        return {"unipelt_gate": self.weight}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("weight", tensors["unipelt_gate"])


def attended(mask: Tensor | None, queries: int, keys: int, causal: bool, like: Tensor) -> Tensor:
    """Which tokens each token may attend to, `(rows or 1, queries, keys)`, as ones and zeros.

    Args:
        mask: As blocks get it: `(rows, 1, queries, keys)`, true or zero where it may; `(rows, keys)`; or none for all.
        queries: Number of new tokens.
        keys: Number of all tokens.
        causal: Whether no token may attend to later ones.
        like: Of the type and on the device of the result.
    """
    if mask is not None and mask.dim() == 4:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return allowed[:, 0, :, -keys:].to(like)
    whole = torch.ones(1, queries, keys, dtype=like.dtype, device=like.device)
    if causal:
        whole = whole.tril(keys - queries)
    return whole if mask is None else whole * mask[:, None, -keys:].to(like)


class GatedPrefix(PrefixTuning):
    """Prefixes that are attended to by themselves, so that each query has a gate of its own."""

    gate: Tensor | None = None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        keys, values = self.shared.of_layer(self.index)
        layer: Any = base.layer
        assert self.gate is not None
        prefix = Prefix(keys, values, base.rows, gate=self.gate.unsqueeze(-1), bias=self._bias(layer, base.kwargs))
        base.kwargs = {**base.kwargs, PREFIXES: [*base.kwargs.get(PREFIXES, ()), prefix]}
        with hooks([layer.config]):
            return base(x)


class GatedPrefixConfig(PrefixTuningConfig):
    """Configuration of `GatedPrefix`."""

    adapter = GatedPrefix


class UniPelt(Part):
    r"""Puts LoRA on queries and values, prefixes into attention and a bottleneck behind the feed-forward part, gated.

        y = W x + b + g_1 s up down x,     h' = h + g_3 (up f(down h)),
        attention(Q, K, V) + g_2 attention(Q, P_K, P_V),
        g_t = mean over all u that t may attend to of sigmoid(gate x_u),     x the input of the block

    The mean is over the tokens that the attention mask lets a token see, itself included: in a causal model those
    before it, so that no gate knows the future; padding never counts. With a cache, the terms of the mean are kept in
    it beside keys and values, so that cached decoding gives the same logits. In the paper one mean over the whole text
    gates all of it, each part has its gate where it stands, and prefixes are scaled before they are joined to the real
    keys; with a gate for each query they are attended to by themselves. The text begins at position 0.

    Trains: what `lora`, `prefix_tuning` and `bottleneck` train; for each block a gate (3, d), N(0, .02).
    Start: not the base model, since prefixes start at random. Merge: impossible.
    Source: Mao et al. 2022, arXiv:2110.07577, section 3.
    """

    splits_rows = False

    def __init__(self, module: nn.Module, site: Site | None, config: UniPeltConfig) -> None:
        super().__init__(module, site, config)
        self.splits_rows = False  # type: ignore[misc]

    def join(self, shared: Shared, path: str) -> None:
        super().join(shared, path)
        self.path = path

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.name == "gate":
            return self.inner(x, base)
        gates: Any = self.shared.parts["gate"]
        gate: Tensor = gates.of(self.path, self.name)
        if base.entries is not None:  # another adapter of the place has the batch split
            gate = gate[base.entries]
        if isinstance(self.inner, GatedPrefix):
            self.inner.gate = gate
            return self.inner(x, base)
        y = base(x)
        delta = self.inner(x, Known(base, y)) - y
        gate = gate.reshape(*y.shape[:-1], 1).to(y.dtype)
        if base.rows is not None:
            gate = gate * base.rows.reshape(-1, *[1] * (y.dim() - 1))
        return y + gate * delta


class GateConfig(ModuleConfig):
    """Configuration of `Gate`."""

    adapter = Gate

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        return replace(self, target_modules=stack_of(modules, "UniPELT")[1])


@register("unipelt")
@dataclass
class UniPeltConfig(CompositeConfig):
    """Configuration of `UniPelt`.

    Args:
        r: Rank of LoRA.
        lora_alpha: Numerator of its scaling.
        num_virtual_tokens: Length of the prefixes.
        reduction: Width of the model over that of the bottleneck.

    Raises:
        ConfigError: A size that is not positive.
    """

    adapter = UniPelt
    peft_name = "UNIPELT"
    learning_rates = {"classification": 2e-3, "causal-lm": 1e-3}  # noqa: RUF012  # read only

    r: int = 8
    lora_alpha: float = 16
    num_virtual_tokens: int = 10
    reduction: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "num_virtual_tokens", "reduction")

    def parts(self) -> dict[str, ModuleConfig]:
        return {
            "gate": GateConfig(),
            "lora": LoraConfig(r=self.r, lora_alpha=self.lora_alpha),
            "prefix": GatedPrefixConfig(num_virtual_tokens=self.num_virtual_tokens),
            "bottleneck": BottleneckConfig(reduction=self.reduction, target_modules="ffn-output", non_linearity="relu"),
        }
