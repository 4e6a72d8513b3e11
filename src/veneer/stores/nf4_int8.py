"""NF4 in memory, int8 in computing: a layer is dequantised and rounded to 8 bits where it runs, for that call only."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.stores.bitsandbytes import BitsAndBytesStore
from veneer.stores.dense import shallow_copy
from veneer.stores.int8 import Int8Linear, Int8Store

_INT8, _NF4 = Int8Store(), BitsAndBytesStore()
_BITS = 7


class Nf4Int8Linear(bnb.nn.Linear4bit):
    r"""A frozen 4-bit layer that multiplies integers, forward and backward.

        y = int8(W) x + b,   W dequantised from NF4; both products as in `Int8Linear`

    Two roundings lie between W and what is multiplied. The second moves an entry by half of 1/63 of its row's largest,
    little beside the first; it is to 7 bits, which every processor multiplies fast (see `int8_kernels`).
    """

    @classmethod
    def from_linear4bit(cls, layer: nn.Module) -> Nf4Int8Linear:
        """The layer with the same tensors."""
        twin = shallow_copy(layer, {})
        twin.__class__ = cls
        assert isinstance(twin, cls)
        return twin

    def integers(self) -> Int8Linear:
        """The layer in int8, made anew."""
        return Int8Linear.from_linear(_NF4.plain(self), bits=_BITS)

    def forward(self, x: Tensor) -> Tensor:
        return _Nf4Int8.apply(x, self, self.bias)


class _Nf4Int8(torch.autograd.Function):
    """Keeps nothing for the backward pass but the layer, which makes its integers once more there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Int8Linear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        y, _ = _INT8.product(layer.integers(), x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        flat = g.reshape(-1, g.shape[-1])
        back = None
        if ctx.needs_input_grad[0]:
            back = _INT8.transposed(ctx.layer.integers(), flat)
            back = back.view(*g.shape[:-1], back.shape[-1])
        return back, None, flat.sum(0) if ctx.needs_input_grad[2] else None


class Nf4Int8Store(BitsAndBytesStore):
    """`Nf4Int8Linear`."""

    rounds_inputs = True

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, Nf4Int8Linear)

    def product(self, module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return _INT8.product(_integers(module), x)

    def transposed(self, module: nn.Module, g: Tensor) -> Tensor:
        return _INT8.transposed(_integers(module), g)

    def recover(self, kept: tuple[Tensor, ...]) -> Tensor:
        return _INT8.recover(kept)


def _integers(module: nn.Module) -> Int8Linear:
    assert isinstance(module, Nf4Int8Linear)
    return module.integers()
