"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products with one rule for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.adapter import Shared
from veneer.config import check_positive
from veneer.errors import ConfigError
from veneer.methods.bottleneck import AroundNorm, Bottleneck, BottleneckConfig
from veneer.registry import register
from veneer.sites import Site


class Rule(Shared):
    """The matrices A_i, `(n, n, n)`, that all layers have in common; trained."""

    def __init__(self, sites: Mapping[str, Site], config: CompacterConfig) -> None:
        super().__init__(sites, config)
        self.compacter_rule = nn.Parameter(torch.empty(config.terms, config.terms, config.terms))

    def reset(self) -> None:
        nn.init.normal_(self.compacter_rule, std=0.01)


class KroneckerLinear(nn.Module):
    """y = W x + b with W = sum_i A_i kron (s_i t_i^T), which is never formed.

    With x as n pieces x_b and y as n pieces y_a:   y_a = sum_i s_i sum_b A_i[a, b] (t_i . x_b)

    Args:
        inputs: Width of x.
        outputs: Width of y.
        terms: n; divides both.
    """

    def __init__(self, inputs: int, outputs: int, terms: int) -> None:
        super().__init__()
        for width in (inputs, outputs):
            if width % terms:
                raise ConfigError(
                    f"terms={terms} does not divide {width}, the width of the layer or of its bottleneck. Choose a "
                    "divisor, or another bottleneck_size."
                )
        self.s = nn.Parameter(torch.empty(terms, outputs // terms))
        self.t = nn.Parameter(torch.empty(terms, inputs // terms))
        self.bias = nn.Parameter(torch.empty(outputs))

    def reset(self) -> None:
        for factor in (self.s, self.t):  # Glorot's rule for each vector as a matrix with one column
            bound = (6 / (factor.shape[1] + 1)) ** 0.5
            nn.init.uniform_(factor, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        pieces = x.unflatten(-1, (self.t.shape[0], -1))  # (..., n, inputs / n)
        along = torch.einsum("iab,...bi->...ai", rule.to(x.dtype), pieces @ self.t.mT)  # (..., n, n), by piece and term
        return (along @ self.s).flatten(-2) + self.bias


class Compacter(Bottleneck):
    r"""A bottleneck adapter with very few parameters: both matrices are sums of n Kronecker products.

        h' = h + W_up f(W_down h + b_down) + b_up,     W = sum_i A_i kron (s_i t_i^T),     A_i (n, n)

    The A_i are one set for all layers and both matrices; s_i and t_i are vectors of each matrix's own.

    Trains: A (n, n, n), once; for both matrices s and t, d + m numbers each; the biases.
    Cost: 3 (d + m) parameters a place, and n^3; about 2 d n multiply-adds a token.
    Start: the A_i are near zero, so the outputs change slightly. Merge: impossible, f is not linear.
    Raises: ConfigError where n does not divide d or m.
    Source: Karimi Mahabadi et al. 2021, arXiv:2106.04647, eq. 4 to 6. Its 0.047% of T5-base (`compacter++`, after the
    feed-forward part only) counts m = 24 and all norms (`train_norms`).
    """

    shares = Rule
    shared: Rule
    starts_as_base = False

    def layers(self, inputs: int, size: int, config: CompacterConfig) -> tuple[nn.Module, nn.Module]:  # type: ignore[override]
        return KroneckerLinear(inputs, size, config.terms), KroneckerLinear(size, self.width, config.terms)

    def reset(self) -> None:
        self.down.reset()
        self.up.reset()

    def branch(self, x: Tensor) -> Tensor:
        rule = self.shared.compacter_rule
        inner = self.activation(self.down(x.to(self.up.bias.dtype), rule))
        return self.scaled(self.up(self.dropout(inner), rule))


class CompacterAroundNorm(AroundNorm, Compacter):
    """`Compacter` with `around_norm`."""


@register("compacter++", target_modules="ffn-output")
@register("compacter")
@dataclass
class CompacterConfig(BottleneckConfig):
    """Configuration of `Compacter`; `compacter++` is its smaller variant.

    Args:
        terms: n, the number of Kronecker products and the side of the shared matrices.

    Raises:
        ConfigError: As `BottleneckConfig`.
    """

    adapter = Compacter
    peft_name = "COMPACTER"
    around = CompacterAroundNorm
    learning_rates = {"classification": 1e-2, "causal-lm": 3e-3}  # noqa: RUF012  # read only

    reduction: int = 32
    terms: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "terms")
