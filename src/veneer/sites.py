"""A frozen layer, seen as one matrix.

Every layer that a weight method can adapt maps an input to an output through a weight `W` of shape `(out, in)`:

    Linear        y = W x + b
    Conv1D        the same, stored transposed (transformers' GPT-2)
    Conv1d/2d/3d  the same on each patch: in = channels per group * kernel elements
    Embedding     the same on a one-hot input: in = vocabulary, out = width
    norm          y = W * normalised(x) + b, with W of shape (channels, 1)
    parameter     a bare tensor of the module, (out, in), or a stack (n, out, in) such as expert weights

so a method written for matrices serves all of them. `site_of` finds the view that fits a module.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from veneer import stores
from veneer.errors import TargetError, UnsupportedError
from veneer.products import LowRank, add_low_rank


class Site:
    """A layer as a matrix. Subclasses say how the stored tensor and the matrix relate, and how the layer runs.

    Attributes:
        module: The layer.
        shape: `(out, in)`.
        batch: `()`, or `(n,)` for a stack of n matrices.
    """

    kind: ClassVar[str]
    name = "weight"  # of the tensor within the module

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.store = stores.store_of(module)
        matrix = self.view(self.store.outline(module, self.name)).shape
        self.batch = tuple(matrix[:-2])
        self.shape = (matrix[-2], matrix[-1])

    def on(self, module: nn.Module) -> Site:
        """The same view of another layer of this shape."""
        return type(self)(module)

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return self.store.device(self.module, self.name)

    @property
    def dtype(self) -> torch.dtype:
        return self.store.dtype(self.module, self.name)

    def view(self, stored: Tensor) -> Tensor:
        """The stored tensor as `(out, in)`."""
        return stored

    def unview(self, weight: Tensor) -> Tensor:
        """`(out, in)` as the layer stores it. The inverse of `view`."""
        return weight

    def read(self) -> Tensor:
        """The weight, `(out, in)`, dequantised, without gradient."""
        return self.view(self.store.read(self.module, self.name))

    def bias(self) -> Tensor | None:
        """The bias, `(out,)`, or none."""
        if getattr(self.module, "bias", None) is None:
            return None
        return self.store.read(self.module, "bias")

    def write(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A layer like this one that holds this weight and bias. This one is not changed."""
        tensors = {self.name: self.unview(weight)}
        if bias is not None:
            if not self.can_hold_bias():
                raise UnsupportedError(
                    f"{type(self.module).__name__} has no place for a bias, so an adapter with a bias cannot be "
                    "merged into it. Keep the adapter beside the model, or leave this layer out of its targets."
                )
            tensors["bias"] = bias
        return self.store.write(self.module, tensors)

    def can_hold_bias(self) -> bool:
        return "bias" in self.module._parameters

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The layer's output with another weight, `(out, in)`, and bias, `(out,)` or none."""
        if stores.is_offloaded(stores.owner_of(self.module, self.name)):
            raise UnsupportedError(
                f"{type(self.module).__name__} is offloaded: its weights are put in place by a hook, which would undo "
                "the adapted ones. Keep this layer on a device (`device_map`), or leave it out of the targets."
            )
        tensors = {self.name: self.unview(weight).to(self.dtype)}
        owns_bias = getattr(self.module, "bias", None) is not None
        if owns_bias and bias is not None:
            tensors["bias"] = bias.to(self.dtype)
        y = functional_call(self.module, tensors, (x, *args), dict(kwargs or {}))
        return y if owns_bias or bias is None else self.add_bias(y, bias)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """Adds `(out,)` to a layer output."""
        return y + self.per_channel(bias, y)

    def apply_factored(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """`apply(x, up @ down, None)` without forming the product; `down` is `(r, in)` and `up` is `(out, r)`."""
        return self.apply(x, up @ down, None)

    def add_factored(self, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
        """y + scale * apply_factored(x, down, up), in the type of y, an output of the layer."""
        if x.is_floating_point():
            x = x.to(down.dtype)
        return y + (scale * self.apply_factored(x.to(down.device), down, up)).to(y.dtype)

    def per_channel(self, factor: Tensor, y: Tensor) -> Tensor:
        """`(out,)` in the shape in which it multiplies a layer output."""
        return factor.to(y.dtype)

    def _runs(self, *plain: type[nn.Module]) -> bool:
        """Whether the layer runs exactly what one of these classes runs, so that it may be computed directly."""
        return type(self.module).forward in [cls.forward for cls in plain]


class LinearSite(Site):
    kind = "linear"

    @property
    def is_plain(self) -> bool:
        """Whether the layer computes `F.linear` of its input, and nothing else."""
        return self.store.quantised or self._runs(nn.Linear, *_conv1d_classes())

    def can_hold_bias(self) -> bool:
        return self.store.quantised or super().can_hold_bias()

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if not self.is_plain:
            return super().apply(x, weight, bias, args, kwargs)
        return F.linear(x.to(weight.device), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def apply_factored(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return F.linear(F.linear(x, down), up)

    def add_factored(self, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
        return add_low_rank(x, y, LowRank(down, up, scale))

    # The layer's two products without a graph, as the store computes them.

    def product(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """W x + b, and what `store.recover` makes x of again."""
        return self.store.product(self.module, x)

    def transposed(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        """W^T g; added to `onto`, which changes, if that is given."""
        if onto is not None and not self.store.quantised:
            return onto.addmm_(g, self.read())
        back = self.store.transposed(self.module, g)
        return back if onto is None else onto.add_(back)


class TransposedLinearSite(LinearSite):
    """transformers' `Conv1D`: a linear layer that stores `(in, out)`."""

    def product(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.linear(x, self.read(), self.bias()), (x,)

    def transposed(self, g: Tensor, onto: Tensor | None = None) -> Tensor:
        return g @ self.read() if onto is None else onto.addmm_(g, self.read())

    def view(self, stored: Tensor) -> Tensor:
        return stored.t()

    def unview(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()


class ConvSite(Site):
    """A convolution; with groups, the matrix is that of one output channel on the channels of its own group."""

    kind = "conv"
    module: _ConvNd

    def view(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def unview(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.store.outline(self.module, self.name).shape)

    def apply(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        if not self._runs(nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return super().apply(x, weight, bias, args, kwargs)
        return self._convolve(x, self.unview(weight).to(x.dtype), None if bias is None else bias.to(x.dtype))

    def apply_factored(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        kernel = self.module.weight.shape[1:]
        groups = self.module.groups
        # Every group of output channels sees its own input channels through the same r filters.
        filters = down.reshape(-1, *kernel).repeat(groups, *[1] * len(kernel))  # (groups * r, in / groups, *kernel)
        hidden = self._convolve(x, filters, None)
        pointwise = up.reshape(*up.shape, *[1] * (len(kernel) - 1))  # (out, r, 1, ...)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 2]
        return convolve(hidden, pointwise, groups=groups)

    def per_channel(self, factor: Tensor, y: Tensor) -> Tensor:
        return factor.to(y.dtype).reshape(-1, *[1] * (self.module.weight.dim() - 2))

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.module._conv_forward(x, weight, bias)  # knows padding modes


class EmbeddingSite(Site):
    kind = "embedding"
    module: nn.Embedding

    @property
    def is_plain(self) -> bool:
        """Whether it is known all that the layer does with the rows that it looks up."""
        return self._runs(nn.Embedding) or hasattr(self.module, "embed_scale")

    def given(self, x: Tensor, rows: Tensor) -> Tensor:
        """The layer's output where these are the rows that it looks up for x."""
        y = self.without_padding(x, rows)
        # Some models multiply the looked-up rows (Gemma, BART): theirs is the only further step that is known.
        return y if self._runs(nn.Embedding) else y * self.module.embed_scale  # type: ignore[operator]

    def view(self, stored: Tensor) -> Tensor:
        return stored.t()

    def unview(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    def can_hold_bias(self) -> bool:
        return False

    def apply_factored(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if not self.is_plain:
            return super().apply_factored(x, down, up)
        return self.given(x, F.linear(F.embedding(x, down.t()), up))

    def without_padding(self, x: Tensor, y: Tensor) -> Tensor:
        """Keeps gradients out of the padding row, which is looked up but never trained."""
        if self.module.padding_idx is None:
            return y
        return torch.where((x == self.module.padding_idx).unsqueeze(-1), y.detach(), y)


class NormSite(Site):
    """A normalisation layer: each channel is scaled, so the matrix is one column."""

    kind = "norm"

    def view(self, stored: Tensor) -> Tensor:
        return stored.unsqueeze(-1)

    def unview(self, weight: Tensor) -> Tensor:
        return weight.squeeze(-1)

    def per_channel(self, factor: Tensor, y: Tensor) -> Tensor:
        channels_first = isinstance(self.module, nn.GroupNorm | _BatchNorm)
        return factor.to(y.dtype).reshape(-1, *[1] * (y.dim() - 2)) if channels_first else factor.to(y.dtype)


class ParameterSite(Site):
    """A bare tensor of a module that is no layer of its own, such as the stacked weights of experts.

    A stack is stored `(n, out, in)`, or `(n, in, out)` where the module says `is_transposed`. The adapted tensor
    takes the stored one's place for the length of one call of the module.
    """

    kind = "parameter"

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name = name
        self.parameter = name  # by which the frozen module knows it; wrappers of others may lie between
        while self.parameter.startswith("base_layer."):
            self.parameter = self.parameter.removeprefix("base_layer.")
        super().__init__(module)

    def on(self, module: nn.Module) -> Site:
        return ParameterSite(module, self.name)

    def bias(self) -> Tensor | None:
        return None

    def can_hold_bias(self) -> bool:
        return False

    def _transposed(self) -> bool:
        owner = stores.owner_of(self.module, self.name)
        return bool(getattr(owner, "is_transposed", False)) and self.store.outline(self.module, self.name).dim() == 3

    def view(self, stored: Tensor) -> Tensor:
        return stored.transpose(-1, -2) if self._transposed() else stored

    def unview(self, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2).contiguous() if self._transposed() else weight


def _conv1d_classes() -> tuple[type[nn.Module], ...]:
    # No model can hold a Conv1D of transformers before transformers is imported.
    module = sys.modules.get("transformers.pytorch_utils")
    return (module.Conv1D,) if module is not None else ()


def site_of(module: nn.Module) -> Site | None:
    """The module as a matrix, or none where it is not one.

    Raises:
        TargetError: The module looks like one, but its weight is kept in a way that no store understands.
    """
    if stores.quantised_store(module) is not None:
        return LinearSite(module)
    if module._parameters.get("weight") is None:  # computed anew for each call, as weight_norm does
        return None
    if isinstance(module, nn.Linear):
        return LinearSite(module)
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return ConvSite(module)
    if isinstance(module, nn.Embedding):
        return EmbeddingSite(module)
    if isinstance(module, _conv1d_classes()):
        return TransposedLinearSite(module)
    if _is_norm(module):
        return NormSite(module)
    return None


def _is_norm(module: nn.Module) -> bool:
    # Model families bring RMSNorm classes of their own; all are named so and scale by one vector.
    named_norm = type(module).__name__.endswith("Norm") or isinstance(module, _BatchNorm)
    return named_norm and module.get_parameter("weight").dim() == 1


def parameter_site(module: nn.Module, name: str) -> ParameterSite:
    """The bare parameter `name` of `module` as a matrix or a stack of matrices.

    Raises:
        TargetError: There is no such parameter, or it has neither two nor three dimensions.
    """
    parameter = dict(module.named_parameters()).get(name)
    if parameter is None:
        raise TargetError(f"{type(module).__name__} has no parameter {name!r}; it has {list(module._parameters)}.")
    if parameter.dim() not in (2, 3):
        raise TargetError(
            f"Parameter {name!r} of {type(module).__name__} has shape {tuple(parameter.shape)}; a matrix (out, in) or "
            "a stack of matrices (n, out, in) was expected."
        )
    if stores.quantised_store(stores.owner_of(module, name)) is not None:
        raise TargetError(
            f"Parameter {name!r} of {type(module).__name__} is kept quantised, as codes that no method adapts. Name "
            "the layer in target_modules."
        )
    return ParameterSite(module, name)
