"""PEANuT: the change of the weight is a small network's function of the weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import ModuleConfig, check_positive
from veneer.errors import ConfigError, nearest
from veneer.registry import register
from veneer.sites import Site


class Peanut(WeightAdapter):
    r"""Adds to every column of the weight what a network with one narrow layer or more makes of it.

        W' = W + s up h,     h_0 = f(down W)
        h_i = f(encoder_i h_(i-1))                           for i = 1 .. depth
        h_(depth+i) = f(decoder_i h_(depth+i-1)) + h_(depth-i)     for i = 1 .. depth,     h the last of them

    Trains: down (r, out); up (out, r), zero at the start; encoders and decoders (r, r).
    Cost: 2 r out + 2 depth r^2 parameters; r in (out + 2 depth r) multiply-adds a call for h, and r (in + out) a token.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has its own network.
    Source: Zhong et al. 2024, arXiv:2410.01870, eq. 4 to 6 (its W is the transpose).
    """

    def __init__(self, site: Site, config: PeanutConfig) -> None:
        super().__init__(site, config)
        out_features, r = site.shape[0], config.r
        self.config = config
        self.starts_as_base = config.init_weights
        self.activation = activation(config.act_fn)
        self.down = nn.Parameter(torch.empty(*site.batch, r, out_features))
        self.up = nn.Parameter(torch.empty(*site.batch, out_features, r))
        for name in ("encoders", "decoders"):
            squares = [nn.Parameter(torch.empty(*site.batch, r, r)) for _ in range(config.depth)]
            self.add_module(name, nn.ParameterList(squares))

    def reset(self) -> None:
        for tensor in self.parameters():
            bound = 0.0 if tensor is self.up and self.config.init_weights else tensor.shape[-1] ** -0.5
            nn.init.uniform_(tensor, -bound, bound)

    def hidden(self, weight: Tensor) -> Tensor:
        """h, `(r, in)`."""
        states = [self.activation(self.down @ weight.to(self.down.dtype))]
        for encoder in self.encoders:  # type: ignore[union-attr]
            states.append(self.activation(encoder @ states[-1]))
        hidden = states.pop()
        for decoder in self.decoders:  # type: ignore[union-attr]
            hidden = self.activation(decoder @ hidden) + states.pop()
        return hidden

    def adapt(self, weight: Tensor) -> Tensor:
        return onto(self.up @ (self.config.scaling * self.hidden(weight)), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return super().forward(x, base)
        return self.site.add_factored(x, base(x), self.hidden(base.weight()), self.up, self.config.scaling)

    # Layout of peft.

    def to_file(self) -> dict[str, Tensor]:
        squares = {
            f"peanut_{name}.{i}.weight": tensor
            for name in ("encoders", "decoders")
            for i, tensor in enumerate(self.get_submodule(name).parameters())
        }
        return {"peanut_A.weight": self.down, "peanut_B.weight": self.up, **squares}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        names = {"A": "down", "B": "up"}
        for key, tensor in tensors.items():
            inner = key.removeprefix("peanut_").removesuffix(".weight")
            self.put(names.get(inner, inner), tensor)


def activation(name: str) -> nn.Module:
    """The function of that name in transformers.

    Raises:
        ConfigError: There is none, or it has parameters of its own, which no file would hold.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"act_fn={name!r} is no activation of transformers.{nearest(name, list(ACT2FN))}")
    function: nn.Module = ACT2FN[name]
    if any(True for _ in function.parameters()):
        raise ConfigError(
            f"act_fn={name!r} has parameters of its own, which adapter files do not hold. Choose another."
        )
    return function


@register("peanut")
@dataclass
class PeanutConfig(ModuleConfig):
    """Configuration of `Peanut`, field by field that of `peft`.

    Args:
        r: Width of the network.
        depth: Pairs of further layers, encoder and decoder.
        act_fn: The activation, by its name in transformers.
        scaling: Factor of the change.
        init_weights: True starts with up = 0, False with a random network (for tests).

    Raises:
        ConfigError: A width that is not positive, a negative depth, or an unknown activation.
    """

    adapter = Peanut
    peft_name = "PEANUT"

    r: int = 32
    depth: int = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r")
        if self.depth < 0:
            raise ConfigError(f"PeanutConfig: depth={self.depth}; zero or a positive number was expected.")
        activation(self.act_fn)
