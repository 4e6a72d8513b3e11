"""GLoRA: weight and bias are scaled and shifted, by supports whose form is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from veneer.adapter import WeightAdapter
from veneer.config import WeightConfig, check_positive, own
from veneer.registry import register
from veneer.sites import Site


class Glora(WeightAdapter):
    r"""Scales and shifts the weight and the bias.

        W' = W + W * A + B,     b' = b + b * D + E + W_0 C,     * element by element

    Each of A to E is zero, one number, a vector (a number an output; for C an input), or (not D, E) a product Xd Xu of
    rank r, as `config_A_B`, `config_C` and `config_D_E` choose. W_0 is the frozen layer's own weight. Layers without a
    bias have A and B only, as in `peft`.

    Trains: A, B (out, in) as Xd (out, r) and Xu (r, in); C (in, 1) as Xd (in, r) and Xu (r, 1); D, E (1,); or vectors.
    Xd, vectors and numbers are zero at the start.
    Cost: with the defaults 2 r (in + out) + r (in + 1) + 2 parameters, and 2 r in out multiply-adds a call.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own A and B.
    Source: Chavan et al. 2023, arXiv:2306.07967, eq. 4 and table 1.
    """

    kinds = frozenset({"linear", "conv", "parameter"})

    def __init__(self, site: Site, config: GloraConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.starts_as_base = config.init_weights
        out_features, in_features = site.shape
        for name, form, size, r in (
            ("A", config.config_A_B, (*site.batch, out_features, in_features), config.r),
            ("B", config.config_A_B, (*site.batch, out_features, in_features), config.r),
            ("C", config.config_C, (in_features, 1), config.r),
            ("D", config.config_D_E, (out_features,), 0),
            ("E", config.config_D_E, (out_features,), 0),
        ):
            there = site.bias() is not None or name in "AB"
            self.add_module(name, nn.ParameterDict(_tensors(form, size, r) if there else {}))

    def reset(self) -> None:
        for name in "ABCDE":
            tensors: nn.ParameterDict = self.get_submodule(name)  # type: ignore[assignment]
            for leaf, tensor in tensors.items():
                bound = 0.0 if self.config.init_weights and leaf != "Xu" else tensor.shape[-1] ** -0.5
                nn.init.uniform_(tensor, -bound, bound)

    def support(self, name: str) -> Tensor | None:
        """One of A to E; none where it is zero."""
        tensors: nn.ParameterDict = self.get_submodule(name)  # type: ignore[assignment]
        if "Xd" in tensors:
            return tensors["Xd"] @ tensors["Xu"]
        return tensors.get("X")

    def adapt(self, weight: Tensor) -> Tensor:
        scale, shift = self.support("A"), self.support("B")
        return weight if scale is None or shift is None else torch.addcmul(weight + shift, weight, scale)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None:
            return None
        mix, scale, shift = self.support("C"), self.support("D"), self.support("E")
        adapted = bias if scale is None or shift is None else torch.addcmul(bias + shift, bias, scale)
        return adapted if mix is None else adapted + (self.site.read().to(mix.dtype) @ mix).squeeze(-1)

    # Layout of peft, which also writes the supports that are zero.

    optional = frozenset(f"glora_{name}.zeros" for name in "ABCDE")

    def to_file(self) -> dict[str, Tensor]:
        return {f"glora_{name}": tensor for name, tensor in super().to_file().items()}

    def from_file(self, tensors: dict[str, Tensor]) -> None:  # type: ignore[override]
        for key, tensor in tensors.items():
            if key not in self.optional:
                self.put(key.removeprefix("glora_"), tensor)


def _tensors(form: str, size: tuple[int, ...], r: int) -> dict[str, nn.Parameter]:
    """The tensors of a support of this size."""
    if form == "lora":
        return {
            "Xd": nn.Parameter(torch.empty(*size[:-1], r)),
            "Xu": nn.Parameter(torch.empty(*size[:-2], r, size[-1])),
        }
    if form == "vector":
        return {"X": nn.Parameter(torch.empty(*size[:-1], 1) if len(size) > 1 else torch.empty(size))}
    if form == "constant":
        return {"X": nn.Parameter(torch.empty(*size[:-2], 1, 1) if len(size) > 2 else torch.empty(1))}
    return {}


@register("glora")
@dataclass
class GloraConfig(WeightConfig):
    """Configuration of `Glora`, field by field that of `peft`.

    Args:
        r: Rank of the supports that are products.
        config_A_B: Form of the weight's scale and shift.
        config_C: Form of what the weight gives to the bias.
        config_D_E: Form of the bias's scale and shift.
        init_weights: True starts as the base layer, False with random supports (for tests).

    Raises:
        ConfigError: A form that there is not, or a rank that is not positive.
    """

    adapter = Glora
    peft_name = "GLORA"

    r: int = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"  # noqa: N815  # as in peft
    config_C: Literal["lora", "vector", "none"] = "lora"  # noqa: N815
    config_D_E: Literal["vector", "constant", "none"] = "constant"  # noqa: N815
    init_weights: bool = True
    exclude_modules: list[str] | str | None = own(None)
    layers_to_transform: list[int] | int | None = own(None)
    layers_pattern: list[str] | str | None = own(None)
    fan_in_fan_out: bool = own(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
