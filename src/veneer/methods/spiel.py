"""SpIEL: a sparse delta that drops its smallest entries in training and grows others where the gradient is large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from veneer.adapter import Base, Renewed
from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import ConfigError
from veneer.methods.sparse import Sparse, check_positions, size
from veneer.registry import register
from veneer.sites import Site


class Spiel(Sparse):
    r"""Adds trained values to entries of the weight, and moves some of them every `interval` steps.

        W'_i = W_i + v_i     for the chosen entries i

        drop:  the k entries of the smallest |v|
        grow:  the k others of the largest |sum g|, over the gradients of `accumulation` steps, from zero
        k = p K (1 - t / T),     at the first time K

    The sums are kept for the K entries whose gradient is largest in the first of these steps; in no other step is the
    gradient of an entry formed that is not trained.

    Trains: values (K,), K = density in out, zero at the start. Frozen between the moves: indices (K,), random at the
    start.
    Cost: K parameters and K positions; one (out, in) temporary a call.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError if no entry is left, or if the number of training steps is not known.
    Source: Ansell et al. 2024, arXiv:2401.16405, section 3, SpIEL-AG. The optimiser's averages of a grown entry begin
    with its gradient, as there.
    """

    order: Tensor

    def __init__(self, site: Site, config: SpielConfig) -> None:
        count = int(config.density * size(site))
        if count < 1:
            raise ConfigError(
                f"SpielConfig: density={config.density} leaves no entry of a weight of shape {tuple(site.shape)} to "
                "train. Raise it, or leave this layer out."
            )
        super().__init__(site, config, count)
        self.register_buffer("order", torch.empty(count, dtype=torch.int64), persistent=False)
        self.watching = False
        self.candidates: Tensor | None = None  # positions
        self.sums: Tensor | None = None  # of their gradients

    def reset(self) -> None:
        self.put("indices", torch.randperm(size(self.site))[: self.indices.numel()])
        self.put("order", self.indices.argsort())
        torch.nn.init.zeros_(self.values)

    def rising(self) -> tuple[Tensor, Tensor]:
        # An entry keeps its place among the values, by which the optimiser knows it, so the indices are in no order.
        return self.values[self.order], self.indices[self.order]

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not (self.watching and self.training and torch.is_grad_enabled()):
            return super().forward(x, base)
        weight = base.weight()
        if weight.requires_grad:
            weight.register_hook(self.see)
        else:
            weight.requires_grad_(True).register_post_accumulate_grad_hook(self._take)
        return self.site.apply(x, self.adapt(weight), base.bias(), base.args, base.kwargs)

    def _take(self, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None
        self.see(gradient)

    @torch.no_grad()
    def see(self, gradient: Tensor) -> None:
        """Takes the gradient of the dense weight into the sums."""
        flat = gradient.reshape(-1).float()
        if self.candidates is None or self.sums is None:
            self.candidates = flat.abs().topk(self.values.numel()).indices
            self.sums = flat[self.candidates]
        else:
            self.sums = self.sums + flat[self.candidates]

    @classmethod
    def allocate(cls, adapters: Mapping[str, Self], config: SpielConfig, step: int) -> Sequence[Renewed]:
        if config.total_steps is None:
            raise ConfigError("SpielConfig: total_steps is None; set it to the number of training steps.")
        phase = step % config.interval
        if phase == 0 and step < config.total_steps:
            for adapter in adapters.values():
                adapter.watching = True
        if phase != config.accumulation:
            return ()
        share = 1.0 if step == phase else config.replaced * max(0.0, 1 - step / config.total_steps)
        return [adapter.move(share, config.accumulation) for adapter in adapters.values()]

    @torch.no_grad()
    def move(self, share: float, steps: int) -> Renewed:
        """Replaces this share of the entries, as far as there are better ones."""
        candidates, sums = self.candidates, self.sums
        self.watching, self.candidates, self.sums = False, None, None
        if candidates is None or sums is None:  # the layer took no part in the loss
            nothing = torch.empty(0, dtype=torch.int64, device=self.values.device)
            return Renewed(self.values, nothing, self.values[nothing])
        slots = self.values.abs().topk(int(share * self.values.numel()), largest=False).indices
        stay = torch.ones_like(self.values, dtype=torch.bool).index_fill_(0, slots, False)
        allowed = ~torch.isin(candidates, self.indices[stay].long())
        candidates, sums = candidates[allowed], sums[allowed]
        best = sums.abs().topk(min(slots.numel(), sums.numel())).indices
        candidates, sums = candidates[best], sums[best]
        # What would be dropped and grown again stays as it is.
        old = self.indices[slots].long()
        slots, new = slots[~torch.isin(old, candidates)], ~torch.isin(candidates, old)
        slots, candidates, sums = slots[: int(new.sum())], candidates[new], sums[new]
        self.indices[slots] = candidates.to(self.indices.dtype)
        self.values[slots] = 0
        self.put("order", self.indices.argsort())
        return Renewed(self.values, slots, sums / steps)

    @classmethod
    def kept(cls, adapters: Mapping[str, Self]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            if adapter.watching:
                kept[f"{path}:watching"] = torch.ones(())
            if adapter.candidates is not None and adapter.sums is not None:
                kept |= {f"{path}:candidates": adapter.candidates, f"{path}:sums": adapter.sums}
        return kept

    @classmethod
    def resume(cls, adapters: Mapping[str, Self], config: SpielConfig, kept: Mapping[str, Tensor]) -> None:
        for path, adapter in adapters.items():
            adapter.watching = f"{path}:watching" in kept
            seen = (kept.get(f"{path}:{name}") for name in ("candidates", "sums"))
            adapter.candidates, adapter.sums = (None if t is None else t.to(adapter.values.device) for t in seen)

    def to_file(self) -> dict[str, Tensor]:
        return {"sparse_values": self.values, "sparse_indices": self.indices}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        values, indices = tensors["sparse_values"], tensors["sparse_indices"]
        order = indices.argsort()
        check_positions(indices[order], values, self.site)
        self.put("values", values)
        self.put("indices", indices)
        self.put("order", order)


@register("spiel")
@dataclass
class SpielConfig(ModuleConfig):
    """Configuration of `Spiel`.

    Args:
        density: Share of the entries of every layer that are trained.
        interval: Steps from one move to the next.
        accumulation: Steps over which gradients are added up before a move.
        replaced: Share p of the entries that is replaced; it falls to zero over the training.
        total_steps: Number T of training steps; the trainer fills it in.

    Raises:
        ConfigError: A share outside (0, 1], or steps that are not positive or do not fit into one another.
    """

    adapter = Spiel
    peft_name = "SPIEL"
    default_targets = ("all-linear",)

    density: float = 0.01
    interval: int = 100
    accumulation: int = 5
    replaced: float = 0.2
    total_steps: int | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "density", "interval", "accumulation", "replaced", "total_steps")
        for name in ("density", "replaced"):
            if getattr(self, name) > 1:
                raise ConfigError(f"SpielConfig: {name}={getattr(self, name)!r}; a share in (0, 1] was expected.")
        if self.accumulation >= self.interval:
            raise ConfigError(
                f"SpielConfig: accumulation={self.accumulation} and interval={self.interval}: gradients are added up "
                "before each move, so they must take fewer steps than there are between two."
            )

    def begin(self, steps: int) -> None:
        if self.total_steps is None:
            self.total_steps = steps
