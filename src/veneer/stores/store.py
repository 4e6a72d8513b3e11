"""What a store is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Store:
    """Reads, writes and runs layers that keep their weight in one particular way.

    A store whose package is not imported is never asked: no layer can be of its kind then.
    """

    quantised: ClassVar[bool] = True
    """Whether a tensor that is written comes back rounded. The layers of such a store are linear ones."""

    rounds_inputs: ClassVar[bool] = False
    """Whether a layer rounds its input, by which the last bits of one number can decide about more of the output."""

    def holds(self, module: nn.Module) -> bool:
        """Whether the module keeps its weight in this way."""
        raise NotImplementedError

    def outline(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the stored one's dequantised shape; only its shape means anything."""
        raise NotImplementedError

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """The floating-point type that the layer computes in."""
        raise NotImplementedError

    def device(self, module: nn.Module, name: str) -> torch.device:
        """Where the layer computes."""
        raise NotImplementedError

    def read(self, module: nn.Module, name: str) -> Tensor:
        """A tensor of the layer, dequantised, without gradient."""
        raise NotImplementedError

    def write(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of `module` that shares everything with it except the named tensors, kept in the layer's own form.

        Raises:
            UnsupportedError: The form cannot be written again.
        """
        raise NotImplementedError

    def plain(self, module: nn.Module) -> nn.Linear:
        """A layer that keeps this one's weight and bias as floating-point numbers."""
        weight = self.read(module, "weight")
        bias = None if getattr(module, "bias", None) is None else self.read(module, "bias")
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return layer.train(module.training)

    # A linear layer's two products, without a graph: for those who write forward and backward passes by hand.

    def product(self, module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """W x + b, and what `recover` needs to give x again, in whatever form that is at hand and small."""
        bias = None if getattr(module, "bias", None) is None else self.read(module, "bias").to(x.dtype)
        return F.linear(x, self.read(module, "weight").to(x.dtype), bias), (x,)

    def transposed(self, module: nn.Module, g: Tensor) -> Tensor:
        """W^T g, the gradient by the input."""
        return g @ self.read(module, "weight").to(g.dtype)

    def recover(self, kept: tuple[Tensor, ...]) -> Tensor:
        """The input x of `product`, up to the rounding of the store."""
        (x,) = kept
        return x
