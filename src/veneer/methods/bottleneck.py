"""Bottleneck adapters: a small network with a residual connection, after attention and after the feed-forward part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.config import ModuleConfig, check_positive, check_shares, own
from veneer.errors import ConfigError
from veneer.methods.ln_tuning import LNTuningConfig
from veneer.outputs import OutputAdapter
from veneer.registry import register
from veneer.sites import Site

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "leakyrelu": nn.LeakyReLU,
}


class Bottleneck(OutputAdapter):
    r"""Passes the output of a module through a narrow layer and adds it back.

        h' = h + s (up f(down h + b_down) + b_up),     h the module's output, before residual sum and norm

    With `around_norm`, for norms after the residual sum u as AdapterHub has it: y = norm(u + s up f(down norm(u))).

    Trains: down (m, d), up (d, m), zero at the start, and both biases; s where it is learned.
    Cost: 2 m d + m + d parameters a place; m = d / reduction. The paper's shares count the norms too (`train_norms`).
    Start: equals the base module exactly. Merge: impossible, f is not linear.
    Source: Houlsby et al. 2019, arXiv:1902.00751, section 2.1 (both places); Pfeiffer et al. 2021, arXiv:2005.00247
    (after the feed-forward part only).
    """

    down: Any
    up: Any

    def __init__(self, module: nn.Module, site: Site | None, config: BottleneckConfig) -> None:
        super().__init__(module, site, config)
        self.size = config.bottleneck_size or max(1, self.width // config.reduction)
        self.down, self.up = self.layers(self.width, self.size, config)
        self.activation = ACTIVATIONS[config.non_linearity]()
        self.dropout = nn.Dropout(config.dropout)
        sizes = {"learned": 1, "channel": self.width}
        s = config.scaling
        self.scaling: float | nn.Parameter = nn.Parameter(torch.empty(sizes[s])) if isinstance(s, str) else s

    def layers(self, inputs: int, size: int, config: BottleneckConfig) -> tuple[nn.Module, nn.Module]:
        """The two layers."""
        return nn.Linear(inputs, size), nn.Linear(size, self.width)

    def reset(self) -> None:
        nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)

    def branch(self, x: Tensor) -> Tensor:
        """What is added for these inputs, `(..., d)`, in the adapter's type."""
        return self.scaled(self.up(self.dropout(self.activation(self.down(x.to(self.up.bias.dtype))))))

    def scaled(self, inner: Tensor) -> Tensor:
        return inner if not isinstance(self.scaling, Tensor) and self.scaling == 1 else self.scaling * inner

    def change(self, h: Tensor, x: Tensor) -> Tensor:
        return h + self.branch(h).to(h.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {name if name == "scaling" else f"adapter_{name}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file({name.removeprefix("adapter_"): tensor for name, tensor in tensors.items()})


class AroundNorm(Bottleneck):
    """A bottleneck with `around_norm`."""

    kinds = frozenset({"norm"})
    splits_rows = True

    def forward(self, x: Tensor, base: Base) -> Tensor:
        delta = self.branch(self.output(x, base))
        return base(x + delta.to(x.dtype))


@register("seq_bn", target_modules="ffn-output", non_linearity="relu")
@register("pfeiffer", target_modules="ffn-output", non_linearity="relu")
@register("double_seq_bn")
@register("houlsby")
@register("bottleneck")
@dataclass
class BottleneckConfig(ModuleConfig):
    """Configuration of `Bottleneck`; `houlsby` and `pfeiffer` are its two published placements.

    AdapterHub's names for them are `double_seq_bn` and `seq_bn`.

    Args:
        reduction: Width of the model over width of the bottleneck.
        bottleneck_size: Width of the bottleneck, where it is given directly.
        non_linearity: The function between the two layers.
        dropout: Share of the bottleneck that is dropped in training.
        scaling: Factor s of what is added; `learned` for a trained one, `channel` for one for each channel.
        train_norms: Also train all norms of the model, as the papers on adapters do.
        around_norm: The targets are norms, which lie within the adapter.

    Raises:
        ConfigError: A reduction or size that is not positive, a dropout outside [0, 1), or norms that are to be trained
            and lie within adapters.
    """

    adapter: ClassVar[Any] = Bottleneck
    peft_name = "BOTTLENECK"
    default_targets = (["self-attention-output", "ffn-output"],)
    learning_rates = {"classification": 2e-3, "causal-lm": 1e-3}  # noqa: RUF012  # read only
    around: ClassVar[type[Bottleneck]] = AroundNorm

    reduction: int = 16
    bottleneck_size: int | None = None
    non_linearity: Literal["relu", "gelu", "swish", "tanh", "leakyrelu"] = "gelu"
    dropout: float = 0.0
    scaling: float | Literal["learned", "channel"] = 1.0
    train_norms: bool = own(False)
    around_norm: bool = own(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "reduction", "bottleneck_size")
        check_shares(self, "dropout")
        if self.around_norm and self.train_norms:
            raise ConfigError(
                f"{type(self).__name__}: train_norms=True with around_norm=True would put two adapters on one norm. "
                "Leave one of them out."
            )

    def method(self) -> type[Adapter]:
        return self.around if self.around_norm else self.adapter

    def companions(self) -> Sequence[ModuleConfig]:
        return [LNTuningConfig(modules_to_save=self.modules_to_save)] if self.train_norms else []
