"""Diff pruning: a dense delta behind gates that learn to be zero, pruned to a sparse one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from veneer.adapter import Base, onto
from veneer.config import ModuleConfig, check_positive, own
from veneer.errors import ConfigError
from veneer.methods.sparse import Sparse, check_positions
from veneer.registry import register
from veneer.selection import choice
from veneer.sites import Site

LOW, HIGH = -1.5, 1.5  # the gates are stretched to this range, then cut to [0, 1]


class DiffPruning(Sparse):
    r"""Adds a delta whose entries have gates, and a loss term that closes them; then keeps the largest entries.

        W' = W + z o w,     z = clamp(3 sigmoid(a + log u - log(1 - u)) - 1.5, 0, 1),     u ~ U(0, 1) in training
        loss + lambda sum sigmoid(a)     which is the expected number of open gates
        structured:  z = z_group o z_entry, with one more gate for each weight

    After the share `relaxed` of the steps, the entries of the largest |z w| are kept, `density` of all layers together,
    and trained on as they are, without gates.

    Trains: w (out, in), zero at the start; a - `init_gate` (out, in), zero at the start; `structured` also one for each
    weight.
    Saved, and trained where it is loaded: the values and indices of the entries that are left.
    Cost: 2 in out parameters in training, two or three dense temporaries a call; then `density` of one.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype; gates then are as without noise.
    Raises: ConfigError if the number of training steps is not known.
    Source: Guo, Rush and Kim 2021, arXiv:2012.07463, sections 2.1 to 2.3.
    """

    free = frozenset({"sparse_values", "sparse_indices"})

    mask: Tensor

    def __init__(self, site: Site, config: DiffPruningConfig) -> None:
        super().__init__(site, config, 0)
        self.config = config
        shape = *site.batch, *site.shape
        self.delta: nn.Parameter | None = nn.Parameter(torch.empty(shape))
        self.gates: nn.Parameter | None = nn.Parameter(torch.empty(shape))
        self.group = nn.Parameter(torch.empty(1)) if config.structured else None
        self.register_buffer("mask", torch.empty(0, dtype=torch.bool), persistent=False)  # of what is left, when pruned
        self.resumed = False
        del self.values  # there are none before the adapter is loaded

    def reset(self) -> None:
        assert self.delta is not None
        nn.init.zeros_(self.delta)
        for gates in (self.gates, self.group):
            if gates is not None:
                nn.init.zeros_(gates)

    def open(self, noise: bool = False) -> Tensor:
        """How far each gate is open, from 0 to 1."""
        assert self.gates is not None
        start = self.config.init_gate
        gates = _open(start + self.gates, noise)
        return gates if self.group is None else gates * _open(start + self.group, noise)

    def change(self, noise: bool = False) -> Tensor:
        """What is added to the weight."""
        assert self.delta is not None
        return self.delta * (self.mask if self.mask.numel() else self.open(noise))

    def adapt(self, weight: Tensor) -> Tensor:
        return super().adapt(weight) if self.delta is None else onto(self.change(), weight)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.delta is None:
            return super().forward(x, base)
        weight = onto(self.change(noise=self.training and self.config.noise), base.weight())
        return self.site.apply(x, weight, base.bias(), base.args, base.kwargs)

    @classmethod
    def penalty(cls, adapters: Sequence[Self], config: DiffPruningConfig) -> Tensor | None:
        relaxed = [adapter for adapter in adapters if adapter.gates is not None and not adapter.mask.numel()]
        if not relaxed:
            return None
        terms = [adapter.expected() for adapter in relaxed]
        return config.sparsity_weight * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def expected(self) -> Tensor:
        """The expected number of entries that are not zero."""
        assert self.gates is not None
        start = self.config.init_gate - math.log(-LOW / HIGH)
        count = torch.sigmoid(start + self.gates).sum()
        return count if self.group is None else count * torch.sigmoid(start + self.group).squeeze()

    @classmethod
    @torch.no_grad()
    def allocate(cls, adapters: Mapping[str, Self], config: DiffPruningConfig, step: int) -> None:
        if any(adapter.delta is None or adapter.mask.numel() for adapter in adapters.values()):
            return
        if config.total_steps is None:
            raise ConfigError("DiffPruningConfig: total_steps is None; set it to the number of training steps.")
        if step + 1 < max(1, int(config.relaxed * config.total_steps)):
            return
        changes = {path: adapter.change() for path, adapter in adapters.items()}
        count = max(1, int(config.density * sum(change.numel() for change in changes.values())))
        best = choice.best_of_all({path: change.abs().float().cpu() for path, change in changes.items()}, count)
        for path, adapter in adapters.items():
            change = changes[path]
            mask = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
            mask[best[path].to(change.device)] = True
            adapter.put("mask", mask.view(change.shape))
            adapter.put("delta", change * adapter.mask)

    # What a checkpoint of the training goes on from; files only have what is left.

    @classmethod
    def kept(cls, adapters: Mapping[str, Self]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            if adapter.delta is not None:
                kept |= {f"{path}:{name}": parameter for name, parameter in adapter.named_parameters()}
                kept[f"{path}:mask"] = adapter.mask
        return kept

    @classmethod
    def resume(cls, adapters: Mapping[str, Self], config: DiffPruningConfig, kept: Mapping[str, Tensor]) -> None:
        for path, adapter in adapters.items():
            for name in ("delta", "gates", "group", "mask"):
                if f"{path}:{name}" in kept:
                    adapter.put(name, kept[f"{path}:{name}"])
                    adapter.resumed = True

    def to_file(self) -> dict[str, Tensor]:
        if self.delta is None:
            return {"sparse_values": self.values, "sparse_indices": self.indices}
        if self.delta.is_meta:
            return {"sparse_values": self.delta.flatten(), "sparse_indices": self.indices}
        change = self.change().flatten()
        left = (self.mask.flatten() if self.mask.numel() else change).nonzero().flatten()
        return {"sparse_values": change[left], "sparse_indices": left.to(self.indices.dtype)}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        if self.resumed:  # all of it is there
            self.resumed = False
            return
        check_positions(tensors["sparse_indices"], tensors["sparse_values"], self.site)
        if self.delta is not None:
            dtype, device, trained = self.delta.dtype, self.site.device, self.delta.requires_grad
            self.delta = self.gates = self.group = None
            self.values = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=trained)
            self.put("mask", torch.empty(0, dtype=torch.bool))
        self.put("indices", tensors["sparse_indices"])
        self.put("values", tensors["sparse_values"])


def _open(gates: Tensor, noise: bool) -> Tensor:
    """Stretched hard-concrete gates; without noise at their median."""
    if noise:
        gates = gates + torch.logit(torch.rand_like(gates), eps=torch.finfo(gates.dtype).eps)
    return (torch.sigmoid(gates) * (HIGH - LOW) + LOW).clamp(0, 1)


@register("diff_pruning")
@dataclass
class DiffPruningConfig(ModuleConfig):
    """Configuration of `DiffPruning`.

    Args:
        density: Share of the entries of all layers together that is left in the end.
        sparsity_weight: Factor lambda of the number of open gates in the loss.
        relaxed: Share of the training steps before the delta is pruned. What is left wants a rate that would soon ruin
            a dense model, so the default is about the warm-up.
        structured: Give every weight one more gate, so that whole layers can stay as they are.
        init_gate: What a starts from; 5 is open.
        noise: Draw the gates anew in every training step; False leaves the noise out.
        total_steps: Number of training steps; the trainer fills it in.

    Raises:
        ConfigError: A share outside (0, 1], or a factor that is not positive.
    """

    adapter = DiffPruning
    peft_name = "DIFF_PRUNING"
    learning_rates = {"classification": 5e-3, "causal-lm": 2e-3}  # noqa: RUF012  # of the entries that are left
    default_targets = ("all-linear",)

    density: float = 0.005
    sparsity_weight: float = 1.25e-7
    relaxed: float = 0.1
    structured: bool = False
    init_gate: float = 5.0
    noise: bool = True
    total_steps: int | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "density", "sparsity_weight", "relaxed", "total_steps")
        for name in ("density", "relaxed"):
            if getattr(self, name) > 1:
                raise ConfigError(f"DiffPruningConfig: {name}={getattr(self, name)!r}; a share in (0, 1] was expected.")

    def begin(self, steps: int) -> None:
        if self.total_steps is None:
            self.total_steps = steps
