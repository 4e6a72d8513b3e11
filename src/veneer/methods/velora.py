"""VeLoRA: LoRA that keeps one number for each group of its inputs until the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from veneer.config import Nested
from veneer.errors import ConfigError
from veneer.methods.lora import Lora, LoraConfig, variant
from veneer.sites import Site


@dataclass(frozen=True)
class VeloraConfig(Nested):
    """How the input is compressed.

    Args:
        num_groups: Numbers that are kept of each token. More come closer to the gradient of LoRA and need more memory;
            as many as inputs are exact.
        scale: Factor of what is reconstructed, and so of the gradient of `down`.
        init_type: The direction that groups are projected on: the mean group of each batch, of the first batch, or a
            random one.

    Raises:
        ConfigError: A number is not positive, or there is no such `init_type`.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups <= 0 or self.scale <= 0:
            raise ConfigError(
                f"VeloraConfig: num_groups={self.num_groups}, scale={self.scale}; positive numbers were expected."
            )


@variant("velora", velora_config=VeloraConfig())
class Velora(Lora):
    r"""LoRA whose gradient for `down` comes from a compressed input.

        x = (x_1, ..., x_G),   z_g = <x_g, v>,   d loss / d down = d loss / d hidden (c z_1 v, ..., c z_G v)^T

    v is a unit vector: the mean of all groups of the batch, normalised, or a random one; c is `scale`. If G does not
    divide the inputs, the last group is filled up with zeros.

    Trains: down (r, in); up (out, r), zero at the start. The last v (in / G,) is kept.
    Cost: as LoRA, but between forward and backward pass G numbers a token are kept in place of the input.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Source: Miles et al. 2024, arXiv:2405.17991, algorithm 1.
    """

    kinds = frozenset({"linear"})
    direction: Tensor

    def __init__(self, site: Site, config: LoraConfig) -> None:
        super().__init__(site, config)
        self.settings: VeloraConfig = config.velora_config
        size = -(-site.shape[1] // self.settings.num_groups)
        self.register_buffer("direction", torch.zeros(size), persistent=False)  # forward writes it; files have it
        self.settled = False  # whether `direction` stays as it is

    def reset(self) -> None:
        super().reset()
        if self.settings.init_type == "random":
            self.direction.copy_(_unit(torch.randn(self.direction.shape)))
            self.settled = True

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().add(x, y)
        x = F.dropout(x.to(self.down.dtype), self.dropout, self.training).to(self.down.device)
        groups = self.settings.num_groups
        if not self.settled:
            with torch.no_grad():
                mean = x.detach().flatten(0, -2).mean(0)
                self.direction.copy_(_unit(_grouped(mean, groups).mean(0)))
            self.settled = self.settings.init_type == "batch_average_once"
        hidden = _Compressed.apply(x, self.down, self.direction.clone(), groups, self.settings.scale)
        if self.bias is None and y.dtype == self.down.dtype:
            rows, flat = hidden.flatten(0, -2), y.reshape(-1, y.shape[-1])
            return torch.addmm(flat, rows, self.up.t(), alpha=self.scaling).view(y.shape)
        delta = F.linear(hidden, self.up, self.bias)
        return y + (self.scaling * delta).to(y.dtype)

    def to_file(self) -> dict[str, Tensor]:
        return {**super().to_file(), "lora_velora_embed": self.direction}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        super().from_file(tensors)
        self.put("direction", tensors["lora_velora_embed"])
        self.settled = self.settings.init_type != "batch_average" and bool(tensors["lora_velora_embed"].any())


def _grouped(x: Tensor, groups: int) -> Tensor:
    """`(..., in)` as `(..., groups, size)`, filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).unflatten(-1, (groups, size))


def _unit(direction: Tensor) -> Tensor:
    """The direction at length 1; all ones where it has none."""
    norm = torch.linalg.vector_norm(direction)
    ones = torch.full_like(direction, direction.numel() ** -0.5)
    return torch.where(norm > 0, direction / norm.clamp_min(torch.finfo(norm.dtype).tiny), ones)


class _Compressed(torch.autograd.Function):
    """x down^T, of which the backward pass sees z and v instead of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, direction: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(_grouped(x, groups) @ direction.to(x.dtype), down, direction)
        ctx.scale = scale
        return F.linear(x, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        compressed, down, direction = ctx.saved_tensors
        grad_x = (grad @ down.to(grad.dtype)).to(compressed.dtype) if ctx.needs_input_grad[0] else None
        # Onto z first, (r, groups), and then along v: the reconstructed input itself is never formed.
        onto = grad.flatten(0, -2).t() @ compressed.flatten(0, -2).to(grad.dtype)
        along = (onto.unsqueeze(-1) * (ctx.scale * direction).to(grad.dtype)).flatten(1)  # (r, groups * size)
        return grad_x, along[:, : down.shape[1]].to(down.dtype), None, None, None
