"""X-LoRA: trained LoRA adapters, weighted for every token and layer by what the model itself makes of the text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, put
from veneer.attach import switch_of
from veneer.config import check_positive, check_shares
from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.experts import Combined, ExpertsConfig, Sources
from veneer.methods.lora import Lora
from veneer.registry import register
from veneer.side_networks import alone, beside, cache_of, stack_of
from veneer.sites import Site

_NAME = "internal_xlora_classifier."


class Classifier(Sources):
    """Makes of the last hidden state the weights of all adapters in all layers."""

    config: XloraConfig

    def __init__(self, sites: Mapping[str, Site], config: XloraConfig) -> None:
        super().__init__(sites, config)
        experts, depth = len(config.experts), config.xlora_depth
        widths = [config.hidden_size, *[config.xlora_size] * (depth - 1)]
        widths.append(experts * (len(sites) if config.layerwise_scalings else 1))
        layers: list[nn.Module] = []
        for i in range(depth):
            layers.append(nn.Linear(widths[i], widths[i + 1]))
            if i < depth - 1:
                layers.append(nn.ReLU())
                if config.xlora_dropout_p > 0:
                    layers.append(nn.Dropout(config.xlora_dropout_p))
        self.layers = nn.Sequential(*layers)
        self.numbers = {path: i for i, path in enumerate(sites)}
        self.scalings: Tensor | None = None

    def reset(self) -> None:
        super().reset()
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """`(batch, tokens, width)` to weights `(batch, tokens, layers, adapters)`."""
        config = self.config
        logits = self.layers(hidden.to(next(self.layers.parameters()).dtype))
        weights = logits.unflatten(-1, (-1, len(config.experts))).expand(*logits.shape[:-1], len(self.numbers), -1)
        if config.enable_softmax:
            weights = (weights / config.softmax_temperature).softmax(-1)
        if config.top_k_lora is not None:
            chosen = weights.topk(min(config.top_k_lora, weights.shape[-1]), -1).indices
            weights = weights * torch.zeros_like(weights).scatter(-1, chosen, 1.0)
        if config.enable_softmax_topk:
            left = weights != 0
            weights = weights.masked_fill(~left, float("-inf")).softmax(-1).masked_fill(~left, 0.0)
        return weights

    def to_file(self) -> dict[str, Tensor]:
        return {f"{_NAME}layers.{name}": tensor for name, tensor in self.layers.named_parameters()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            put(self, name.removeprefix(_NAME), tensor)
        if not self.config.trains_experts:
            super().reset()  # reads the adapters, which are in files of their own


class Xlora(Combined):
    r"""Runs the model twice: without adapters, for the weights of the adapters; then with them.

        y = W x + b + g sum_i w_i s_i up_i down_i x,     w = softmax(C(h) / T) for each token

    h is the last hidden state of the model without adapters, C a classifier of `xlora_depth` layers; with
    `layerwise_scalings` every layer has weights of its own. s_i is the scaling of adapter i and g
    `global_scaling_weight`. With a cache, the pass without adapters has one of its own beside the model's, so that
    cached decoding gives the same logits. It costs a forward pass of the model.

    Places: the layers of the adapters, which all have to be on the same ones, and the stack of transformer blocks.
    Trains: the classifier; the adapters too with `use_trainable_adapters`, and then they are in the file. If not, the
    file names their folders, as in `peft`.
    Start: some mixture of the adapters. Merge: impossible, since weights depend on the token.
    Raises: ConfigError for adapters that are not plain LoRA of linear layers.
    Source: Buehler and Buehler 2024, arXiv:2402.07148, section 2.
    """

    kinds = frozenset({"linear", "module"})
    shares = Classifier  # type: ignore[assignment]
    shared: Classifier
    starts_as_base = False
    reads_inputs = True  # its weights are those of rows, which may not be packed
    config: XloraConfig

    def __init__(self, module: nn.Module, site: Site | None, config: XloraConfig) -> None:
        if site is None:  # the stack of blocks
            config = replace(config, experts={}, adapters={})
        super().__init__(module, site, config)  # type: ignore[arg-type]
        self.splits_rows = site is not None  # type: ignore[misc]

    def expert(self, name: str, config: Any) -> Lora:
        return config.method()(self.site, config)

    def reset(self) -> None:
        if self.site is not None:
            super().reset()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site is None:
            return self._weigh(x, base)
        y = base(x)
        weights = self.shared.scalings
        if weights is not None and base.entries is not None:
            weights = weights[base.entries]
        if weights is None or weights.shape[:2] != x.shape[:2]:
            raise StateError(
                f"X-LoRA has no weights for an input of the shape {tuple(x.shape)}: they are made when the whole model "
                "is called, one for each token. Leave layers out that do not get (rows, tokens, width)."
            )
        weights = weights[:, :, self.shared.numbers[self.path], :].to(x.device)
        delta: Tensor | None = None
        for i, expert in enumerate(self.experts.values()):
            down, up = expert.factors()  # type: ignore[operator]
            hidden = F.dropout(x.to(down.dtype) * weights[..., i, None], expert.dropout, expert.training)  # type: ignore[arg-type]
            part = F.linear(F.linear(hidden, down), up * expert.scaling)
            delta = part if delta is None else delta + part
        assert delta is not None
        return y + (self.config.global_scaling_weight * delta).to(y.dtype)

    def _weigh(self, x: Tensor, base: Base) -> Tensor:
        """Runs the blocks without adapters for the weights, then with them."""
        cache = cache_of(base)
        count = len(next(child for child in base.layer.children() if isinstance(child, nn.ModuleList)))
        own = (
            {**base.kwargs, "past_key_values": beside(cache, self.shared, count)} if cache is not None else base.kwargs
        )
        switch = switch_of(base.layer)
        assert switch is not None
        with alone(switch), torch.no_grad():
            hidden = base.layer(x, *base.args, **own)[0]
        self.shared.scalings = self.shared(hidden)
        return base(x)

    def merge_into(self, layer: nn.Module) -> nn.Module:
        raise UnsupportedError(
            "X-LoRA adapters cannot be merged: each token has its own weights. Keep the adapter beside the model."
        )

    def to_file(self) -> dict[str, Tensor]:
        return super().to_file() if self.config.trains_experts else {}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        if self.site is None:
            return
        if self.config.trains_experts:
            super().from_file(tensors)
        else:
            super().reset()


@register("xlora")
@dataclass
class XloraConfig(ExpertsConfig):
    """Configuration of `Xlora`, field by field that of `peft`.

    Args:
        hidden_size: Width of the model; filled in where it has the default.
        adapters: Folders of the trained adapters by their names, or a list of folders.
        enable_softmax: Let the weights of a token sum to one.
        enable_softmax_topk: The same for those that are left with `top_k_lora`.
        layerwise_scalings: Weights for each layer; if not, the same for all.
        xlora_depth: Layers of the classifier.
        xlora_size: Their width.
        xlora_dropout_p: Share that is dropped between them.
        use_trainable_adapters: Train the adapters along.
        softmax_temperature: Divides the logits; the lower, the sharper.
        top_k_lora: Adapters that each token has; none for all.
        scaling_pass_value: Kept for `peft`, whose first pass leaves the adapters out all the same.
        global_scaling_weight: Factor of what the adapters add.

    Raises:
        ConfigError: A size that is not positive, or an adapter that is not plain LoRA.
    """

    adapter = Xlora
    peft_name = "XLORA"
    own_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
            *("experts", "target_parameters"),
        }
    )

    hidden_size: int = 4096
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "hidden_size", "xlora_depth", "xlora_size", "softmax_temperature", "top_k_lora")
        check_shares(self, "xlora_dropout_p")

    @property
    def trains_experts(self) -> bool:  # type: ignore[override]
        return self.use_trainable_adapters

    def _expert(self, name: str, given: Any) -> Any:
        config: Any = super()._expert(name, given)
        if config.method() is not Lora or config.lora_bias:
            raise ConfigError(f"XloraConfig: the adapter {name!r} is not plain LoRA without a bias.")
        return config

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        stack, _ = stack_of(modules, "X-LoRA")
        within = replace(self, target_modules=None)
        config = ExpertsConfig.on(within, root, modules)
        width = getattr(getattr(root, "config", None), "hidden_size", None)
        if width and self.hidden_size not in (4096, width):
            raise ConfigError(f"XloraConfig: hidden_size={self.hidden_size}, but the model has {width}. Leave it out.")
        targets = config.target_modules
        targets = f"{targets}|{re.escape(stack)}" if isinstance(targets, str) else [*targets, stack]
        if self.target_modules not in (None, targets):
            raise ConfigError(
                f"XloraConfig: target_modules={self.target_modules!r}; X-LoRA is where its adapters are. Leave it out."
            )
        return replace(config, hidden_size=width or self.hidden_size, target_modules=targets)

    def to_dict(self) -> dict[str, Any]:
        left = {"target_modules"} if self.use_trainable_adapters else {"target_modules", "experts"}
        return {name: value for name, value in super().to_dict().items() if name not in left}
