"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Base, WeightAdapter, onto
from veneer.config import ModuleConfig, check_positive, check_shares
from veneer.registry import register
from veneer.sites import Site


class LoHa(WeightAdapter):
    r"""Adds the elementwise product of two low-rank matrices, whose rank may be r^2.

        W' = W + s (up1 down1) * (up2 down2),     s = alpha / r

    With `use_effective_conv2d`, on kernels of several elements, down_i (r, in, kernel) is itself a product: a core
    (r, r, kernel) times (r, in).

    Trains: up1, up2 (out, r); down1, down2 (r, in), the last zero at the start; with effective convolutions the cores.
    Cost: 2 r (in + out) parameters. The change has a factorisation of rank r^2; where that takes fewer operations a
    token than (out, in), it is run like LoRA, otherwise the adapted weight is formed once a call.
    `rank_dropout` drops rows of the change in training and scales the others up, `module_dropout` all of it.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    On a stack of n matrices every matrix has factors of its own.
    Source: Hyeon-Woo et al. 2021, arXiv:2108.06098, proposition 1; convolutions: its proposition 3 and Yeh et al. 2023,
    arXiv:2309.14859, section 3.
    """

    def __init__(self, site: Site, config: LoHaConfig) -> None:
        super().__init__(site, config)
        out_features, in_features = site.shape
        self.config = config
        self.scaling = config.alpha / config.r
        self.starts_as_base = config.init_weights
        r, self.kernel = config.r, cored_kernel(site) if config.use_effective_conv2d else ()
        self.thin = site.kind != "parameter" and 3 * r**2 * (in_features + out_features) < in_features * out_features
        columns = in_features // math.prod(self.kernel)
        self.up1 = nn.Parameter(torch.empty(*site.batch, out_features, r))
        self.down1 = nn.Parameter(torch.empty(*site.batch, r, columns))
        self.up2 = nn.Parameter(torch.empty(*site.batch, out_features, r))
        self.down2 = nn.Parameter(torch.empty(*site.batch, r, columns))
        if self.kernel:
            self.core1 = nn.Parameter(torch.empty(r, r, *self.kernel))
            self.core2 = nn.Parameter(torch.empty(r, r, *self.kernel))

    def reset(self) -> None:
        for up, down in ((self.up1, self.down1), (self.up2, self.down2)):
            # In files up lies transposed beside a core, and is spread by its other side.
            spread(up, up.shape[-2 if self.kernel else -1])
            spread(down, down.shape[-1])
        if self.kernel:
            for core in (self.core1, self.core2):
                spread(core, core[0].numel())
        if self.starts_as_base:
            nn.init.zeros_(self.down2)

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up1, scaled, and down1, up2, down2, with the cores multiplied in."""
        down1: Tensor = self.down1
        down2: Tensor = self.down2
        if self.kernel:
            down1, down2 = with_core(self.core1, down1), with_core(self.core2, down2)
        return self.scaling * self.up1, down1, self.up2, down2

    def adapt(self, weight: Tensor) -> Tensor:
        return onto(HadamardProduct.apply(*self.factors()), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        up1, down1, up2, down2 = self.factors()
        if self.training:
            up1 = drop_rows(up1, self.config.rank_dropout, self.config.module_dropout)
        if not self.thin:
            weight = onto(HadamardProduct.apply(up1, down1, up2, down2), base.weight())
            return self.site.apply(x, weight, base.bias(), base.args, base.kwargs)
        down = (down1.unsqueeze(1) * down2).flatten(0, 1)  # (r^2, in)
        up = (up1.unsqueeze(2) * up2.unsqueeze(1)).flatten(1)  # (out, r^2)
        return self.site.add_factored(x, base(x), down, up)

    # Layout of peft: a is up and b is down; beside a core both have the rank first. Kernels of one axis get a second.

    def to_file(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i in ("1", "2"):
            up = getattr(self, f"up{i}")
            tensors |= {f"hada_w{i}_a": up.t() if self.kernel else up, f"hada_w{i}_b": getattr(self, f"down{i}")}
            if self.kernel:
                tensors[f"hada_t{i}"] = two_axes(getattr(self, f"core{i}"))
        return tensors

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for i in ("1", "2"):
            up = tensors[f"hada_w{i}_a"]
            self.put(f"up{i}", up.t() if self.kernel else up)
            self.put(f"down{i}", tensors[f"hada_w{i}_b"])
            if self.kernel:
                core = getattr(self, f"core{i}")
                self.put(f"core{i}", tensors[f"hada_t{i}"].reshape(core.shape))


class HadamardProduct(torch.autograd.Function):
    """(a b) * (c d). Keeps the factors for the backward pass, not the two products."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        ctx.save_for_backward(a, b, c, d)
        return (a @ b).mul_(c @ d)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        a, b, c, d = ctx.saved_tensors
        left = (c @ d).mul_(gradient)
        da, db = left @ b.mT, a.mT @ left
        right = (a @ b).mul_(gradient)
        return da, db, right @ d.mT, c.mT @ right


def cored_kernel(site: Site) -> tuple[int, ...]:
    """Sizes of the kernel of a convolution that sees more than one element; empty for all else."""
    kernel = tuple(site.module.get_parameter("weight").shape[2:]) if site.kind == "conv" else ()
    return kernel if any(size > 1 for size in kernel) else ()


def with_core(core: Tensor, down: Tensor) -> Tensor:
    """`(r, in * kernel)` from a core `(r, r, *kernel)` and down `(r, in)`."""
    return torch.einsum("ijk,jc->ick", core.flatten(2), down).flatten(1)


def two_axes(core: Tensor) -> Tensor:
    return core.unsqueeze(-1) if core.dim() == 3 else core


def spread(parameter: Tensor, fan_in: int) -> None:
    """Uniform between -1/sqrt(fan in) and 1/sqrt(fan in), as torch starts a linear layer."""
    nn.init.uniform_(parameter, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))


def drop_rows(up: Tensor, rank_dropout: float, module_dropout: float, *, rescale: bool = True) -> Tensor:
    """`(out, r)` with some of its rows zero, or all of them."""
    if rank_dropout:
        kept = (torch.rand(up.shape[:-1], device=up.device) >= rank_dropout).to(up.dtype).unsqueeze(-1)
        if rescale:
            kept = kept / kept.mean().clamp_min(1 / kept.numel())
        up = up * kept
    if module_dropout:
        up = up * (torch.rand((), device=up.device) >= module_dropout).to(up.dtype)
    return up


@register("loha")
@dataclass
class LoHaConfig(ModuleConfig):
    """Configuration of `LoHa`, field by field that of `peft`.

    Args:
        r: Rank of both products.
        alpha: Numerator of the scaling.
        rank_dropout: Share of the rows of the change that are dropped in training.
        module_dropout: How often a layer's whole change is dropped in training.
        use_effective_conv2d: On kernels of several elements, share the factors between the elements.
        init_weights: False for a random start that changes the outputs (for tests).
        rank_pattern: Rank by module name or regular expression, where it differs from `r`.
        alpha_pattern: The same for `alpha`.

    Raises:
        ConfigError: A rank that is not positive, or a dropout outside [0, 1).
    """

    adapter = LoHa
    peft_name = "LOHA"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only
    patterns = {"rank_pattern": "r", "alpha_pattern": "alpha"}  # noqa: RUF012  # read only

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "r", "rank_pattern")
        check_shares(self, "rank_dropout", "module_dropout")
