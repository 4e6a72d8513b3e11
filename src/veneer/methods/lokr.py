"""LoKr: a Kronecker product of two small matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.errors import ConfigError
from veneer.methods.loha import cored_kernel, drop_rows, spread, two_axes, with_core
from veneer.registry import register
from veneer.sites import EmbeddingSite, LinearSite, Site

# Attributes, each with its name in files.
NAMES = {
    "left": "lokr_w1",
    "left_up": "lokr_w1_a",
    "left_down": "lokr_w1_b",
    "right": "lokr_w2",
    "right_up": "lokr_w2_a",
    "right_down": "lokr_w2_b",
    "core": "lokr_t2",
}


class LoKr(WeightAdapter):
    r"""Adds a Kronecker product, with the larger of its factors of low rank.

        W' = W + s left (x) right,     left (l, m), right (k, n),     out = l k, in = m n,     s = alpha / r

    The sides are split as evenly as whole numbers allow, or by `decompose_factor`. On a convolution right spans the
    kernel, (k, n, kernel). right is a product of rank r where that is less than half of its larger side, and so is left
    with `decompose_both`; with `use_effective_conv2d` on kernels of several elements, right's second factor is itself a
    product with a core (r, r, kernel).

    Trains: left, or left_up (l, r) and left_down (r, m); right, or right_up (k, r), right_down (r, n), core.
    Cost: l m + r (k + n) parameters and, on linear layers, about in k + out m multiply-adds a token; embeddings look up
    a row of each factor.
    `rank_dropout` drops rows of the change in training, `module_dropout` all of it.
    Start: left is zero, so it equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of matrices every matrix has factors of its own.
    Source: Yeh et al. 2023, arXiv:2309.14859, section 3.2; Edalati et al. 2022, arXiv:2212.10650, eq. 4.
    """

    left: Tensor | None
    left_up: Tensor
    left_down: Tensor
    right: Tensor | None
    right_up: Tensor
    right_down: Tensor
    core: Tensor | None

    def __init__(self, site: Site, config: LoKrConfig) -> None:
        super().__init__(site, config)
        self.config = config
        self.scaling = config.alpha / config.r
        self.starts_as_base = bool(config.init_weights)
        r = config.r
        kernel = tuple(site.module.get_parameter("weight").shape[2:]) if site.kind == "conv" else ()
        elements = math.prod(kernel)
        out_features, in_features = site.shape[0], site.shape[1] // elements
        left_rows, right_rows = split(out_features, config.decompose_factor)
        left_columns, right_columns = split(in_features, config.decompose_factor)
        self.columns = (left_columns, right_columns)
        self.right_shape = (right_rows, right_columns, *kernel)
        self.kernel = cored_kernel(site) if config.use_effective_conv2d else ()
        shapes: dict[str, tuple[int, ...]] = {}
        if config.decompose_both and r < max(left_rows, left_columns) / 2:
            shapes |= {"left_up": (left_rows, r), "left_down": (r, left_columns)}
        else:
            shapes |= {"left": (left_rows, left_columns)}
        if r >= max(right_rows, right_columns) / 2:
            shapes |= {"right": (right_rows, right_columns * elements)}
        elif self.kernel:
            shapes |= {"right_up": (right_rows, r), "right_down": (r, right_columns), "core": (r, r, *self.kernel)}
        else:
            shapes |= {"right_up": (right_rows, r), "right_down": (r, right_columns * elements)}
        for name in NAMES:
            shape = shapes.get(name)
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(*site.batch, *shape)))
        operations = in_features * right_rows + out_features * left_columns  # a token; twice as many backward
        thin = 3 * operations < out_features * in_features
        self.thin = (isinstance(site, LinearSite) and thin) or (isinstance(site, EmbeddingSite) and site.is_plain)

    def reset(self) -> None:
        for name in NAMES:
            parameter = getattr(self, name)
            if parameter is not None and name != "core":
                # In files up lies transposed beside a core, and is spread by its other side.
                turned = name == "right_up" and self.core is not None
                spread(parameter, parameter.shape[-2 if turned else -1])
        if self.core is not None:
            spread(self.core, self.core[0].numel())
        if self.config.init_weights == "lycoris":
            nn.init.zeros_(self.right_down if self.right is None else self.right)
        elif self.config.init_weights:
            nn.init.zeros_(self.left_up if self.left is None else self.left)

    def factors(self) -> tuple[Tensor, Tensor]:
        """left, scaled, `(l, m)`, and right as a matrix, `(k, n * kernel)`."""
        left = self.left_up @ self.left_down if self.left is None else self.left
        if self.right is not None:
            return self.scaling * left, self.right
        down = self.right_down if self.core is None else with_core(self.core, self.right_down)
        return self.scaling * left, self.right_up @ down

    def adapt(self, weight: Tensor) -> Tensor:
        return onto(kronecker(*self.factors()), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        left, right = self.factors()
        kept = None  # (out, 1)
        if self.training and (self.config.rank_dropout or self.config.module_dropout):
            kept = drop_rows(
                left.new_ones(*self.site.batch, self.site.shape[0], 1),
                self.config.rank_dropout,
                self.config.module_dropout,
                rescale=self.config.rank_dropout_scale,
            )
        if not self.thin:
            delta = kronecker(left, right)
            weight = onto(delta if kept is None else delta * kept, base.weight())
            return self.site.apply(x, weight, base.bias(), base.args, base.kwargs)
        y = base(x)
        if isinstance(self.site, EmbeddingSite):  # a row of the product is one of rows
            x = x.to(left.device)
            first, second = F.embedding(x // self.columns[1], left.t()), F.embedding(x % self.columns[1], right.t())
            delta = self.site.given(x, (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2))
        else:
            hidden = F.linear(x.to(left).unflatten(-1, self.columns), right)  # (..., m, k)
            delta = F.linear(hidden.mT, left).mT.flatten(-2)  # (..., l * k)
        return y + (delta if kept is None else delta * kept.squeeze(-1)).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        tensors = {name: tensor for name in NAMES if (tensor := getattr(self, name)) is not None}
        if self.right is not None and self.site.kind == "conv":
            tensors["right"] = self.right.view(self.right_shape)
        if self.core is not None:
            tensors |= {"right_up": self.right_up.t(), "core": two_axes(self.core)}
        return {NAMES[name]: tensor for name, tensor in tensors.items()}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, in_file in NAMES.items():
            if (own := getattr(self, name)) is not None:
                tensor = tensors[in_file]
                turned = name == "right_up" and self.core is not None
                self.put(name, tensor.t() if turned else tensor.reshape(own.shape))


def split(size: int, factor: int) -> tuple[int, int]:
    """Two whole numbers, the smaller first, whose product is `size`; as close to each other as there are.

    Args:
        size: What is split.
        factor: The first number, where it divides `size`; otherwise the most that the smaller one may be. -1: no limit.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    small = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= max(limit, 1))
    return small, size // small


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """`(l k, m n)` from `(l, m)` and `(k, n)`, or stacks of them."""
    product = left[..., :, None, :, None] * right[..., None, :, None, :]
    return product.flatten(-4, -3).flatten(-2)


@register("lokr")
@dataclass
class LoKrConfig(ModuleConfig):
    """Configuration of `LoKr`, field by field that of `peft`.

    Args:
        r: Rank of the factors that are products themselves.
        alpha: Numerator of the scaling.
        rank_dropout: Share of the rows of the change that are dropped in training.
        module_dropout: How often a layer's whole change is dropped in training.
        use_effective_conv2d: On kernels of several elements, share right's factors between the elements.
        decompose_both: Let left be of low rank too.
        decompose_factor: Size of the smaller sides, where it divides a side; -1 splits evenly.
        rank_dropout_scale: Scale up the rows that are not dropped.
        init_weights: True starts with a left of zero, `"lycoris"` with a right of zero; False starts at random, which
            changes the outputs (for tests).
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        alpha_pattern: The same for `alpha`.

    Raises:
        ConfigError: A rank or factor that is not positive, or a dropout outside [0, 1).
    """

    adapter = LoKr
    peft_name = "LOKR"
    learning_rates = {"classification": 1e-2, "causal-lm": 5e-3}  # noqa: RUF012  # read only
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}  # noqa: RUF012  # read only

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "rank_pattern")
        check_shares(self, "rank_dropout", "module_dropout")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ConfigError(
                f"LoKrConfig: decompose_factor={self.decompose_factor}; a positive whole number, or -1 to split the "
                "sides evenly, was expected."
            )
