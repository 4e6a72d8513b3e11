"""LoftQ: LoRA on a quantised weight, starting as what quantising lost."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer import inits
from veneer.adapter import Base, WeightAdapter
from veneer.inits.loftq import loftq, quantised
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@variant("loftq", init_lora_weights="loftq")
class Loftq(Lora):
    r"""Adds a low-rank product to the quantised weight, so that both together start close to the weight.

        W' = q(W - s up_0 down_0) + s up down,     up_0 down_0 = 0 with one iteration

    q quantises and comes back, to 4 or 8 bits; the frozen weight itself stays as it is, so this shows on any base what
    the adapter does on the quantised one. down and up start as the best rank r of W - q(W), after `loftq_iter` rounds.

    Trains: down (r, in), up (out, r).
    Cost: LoRA's, and q of the whole weight a call.
    Start: the best approximation of the base layer of this form. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if r > min(in, out).
    Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """

    starts_as_base = False
    before_down: Tensor | None
    before_up: Tensor | None

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        several = config.loftq_config.loftq_iter > 1
        self.register_buffer("before_down", torch.empty_like(self.down) if several else None)
        self.register_buffer("before_up", torch.empty_like(self.up) if several else None)
        self.bits = config.loftq_config.loftq_bits

    def begin(self, seen: Mapping[str, Tensor]) -> None:
        self._remember(*loftq(self._start(self.down, self.up, seen)))

    def _remember(self, down: Tensor, up: Tensor) -> None:
        if self.before_down is not None:
            self.put("before_down", down)
            self.put("before_up", up)

    def frozen(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        wide = inits.start.wide(weight)
        rest = wide
        if self.before_down is not None and self.before_up is not None:
            rest = wide - self.scaling * (self.before_up.to(wide.dtype) @ self.before_down.to(wide.dtype))
        rounded = quantised(rest.detach(), self.bits)
        if weight.requires_grad:  # changed by an adapter below: let its gradient through the rounding
            rounded = wide + (rounded - wide).detach()
        return rounded.to(weight.dtype)

    def adapt(self, weight: Tensor) -> Tensor:
        return super().adapt(self.frozen(weight))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind == "parameter":
            return WeightAdapter.forward(self, x, base)
        y = self.site.apply(x, self.frozen(base.weight()), base.bias(), base.args, base.kwargs)
        return self.add(x, y)

    @property
    def optional(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"start_A", "start_B"}) if self.before_down is not None else frozenset()

    def _start_to_file(self) -> dict[str, Tensor]:
        if self.before_down is None or self.before_up is None:
            return {}
        return {"start_A": self.before_down, "start_B": self.before_up}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        if self.before_down is None:
            return
        if "start_A" in tensors:
            self._remember(tensors["start_A"], tensors["start_B"])
        else:
            self._remember(*loftq(self._start(torch.empty_like(self.down), torch.empty_like(self.up), {})))
