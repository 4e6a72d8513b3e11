"""What a method is: one module attached to one place of a frozen model.

An `Adapter` is given the input of its place and a `Base`, which stands for all that lies below it: the frozen
layer, or the frozen layer with other adapters already on it. Stacking is therefore function composition.

A `WeightAdapter` says how the layer's weight changes (`adapt`, `adapt_bias`). Forward, merging, mixed batches
and export all follow from that one definition; a method overrides `forward` only where it knows a cheaper way
to the same values, and the contract tests hold it to the definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from veneer.config import PeftConfig
    from veneer.sites import Site

WEIGHT_KINDS = frozenset({"linear", "conv", "embedding", "parameter"})


class Base:
    """All that lies below an adapter, for one call.

    Calling it runs the layer with the adapters below. A weight adapter may instead ask for `weight()` and `bias()`,
    the frozen tensors as the adapters below have changed them.

    Args:
        layer: The frozen layer.
        site: The layer as a matrix; none for modules that are not one.
        below: Adapters between the layer and the caller, lowest first.
        args: Further positional arguments of the layer's call.
        kwargs: Keyword arguments of the layer's call.
    """

    def __init__(
        self,
        layer: nn.Module,
        site: Site | None,
        below: Sequence[Adapter] = (),
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.layer = layer
        self.site = site
        self.below = below
        self.args = args
        self.kwargs = kwargs or {}
        self.rest: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.below:
            under = Base(self.layer, self.site, self.below[:-1], self.args, self.kwargs)
            y = self.below[-1](x, under)
            self.rest = under.rest
            return y
        y = self.layer(x, *self.args, **self.kwargs)
        if isinstance(y, tuple):  # attention modules and whole blocks return (hidden states, ...)
            y, self.rest = y[0], y[1:]
        return y

    def weight(self) -> Tensor:
        """The weight, `(out, in)`, as the adapters below have changed it."""
        assert self.site is not None
        weight = self.site.read()
        for adapter in self._weight_adapters():
            weight = adapter.adapt(weight)
        return weight

    def bias(self) -> Tensor | None:
        """The bias, `(out,)` or none, as the adapters below have changed it."""
        assert self.site is not None
        bias = self.site.bias()
        for adapter in self._weight_adapters():
            bias = adapter.adapt_bias(bias)
        return bias

    def _weight_adapters(self) -> list[WeightAdapter]:
        adapters = []
        for adapter in self.below:
            if not isinstance(adapter, WeightAdapter):
                raise UnsupportedError(
                    f"A {type(adapter).__name__} adapter changes outputs, not the weight, so no method that needs the "
                    "adapted weight can lie above it. Name the output adapter last in `set_adapter([...])`."
                )
            adapters.append(adapter)
        return adapters


class Adapter(nn.Module):
    """One method on one place.

    Args:
        site: The frozen layer as a matrix; none where the method attaches to any module.
        config: The method's configuration, resolved for this place.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of sites that the method makes sense on; empty for methods that attach to any module."""

    def __init__(self, site: Site | None, config: PeftConfig) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor, base: Base) -> Tensor:
        raise NotImplementedError

    def reset(self) -> None:
        """Writes the starting values that the configuration asks for. Loading skips this."""

    def merge_into(self, layer: nn.Module) -> nn.Module:
        """A layer that alone does what `layer` with this adapter does. `layer` itself is not changed.

        Raises:
            UnsupportedError: The method cannot be written as a change of the layer's tensors.
        """
        raise UnsupportedError(
            f"{type(self).__name__} adapters cannot be merged: they change the layer's output by a function that no "
            "change of its weight can express. Keep the adapter beside the model, or `unload()` it."
        )

    def to_file(self) -> dict[str, Tensor]:
        """Tensors as an adapter file names and shapes them. `from_file` is the inverse."""
        return dict(self.named_parameters())

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors over; names and shapes have been checked against `to_file` before."""
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put(self, name: str, tensor: Tensor) -> None:
        """Fills one parameter, replacing it where it was created without memory."""
        owner, _, leaf = name.rpartition(".")
        old = self.get_submodule(owner)._parameters[leaf]
        assert old is not None
        if old.is_meta:
            device = tensor.device if self.site is None else self.site.device
            tensor = tensor.to(device, old.dtype, copy=True)  # not the caller's memory, which may be another adapter's
            parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
            self.get_submodule(owner)._parameters[leaf] = parameter
        else:
            with torch.no_grad():
                old.copy_(tensor)


class WeightAdapter(Adapter):
    """A method that changes the layer's weight, its bias, or both."""

    kinds = WEIGHT_KINDS
    site: Site

    def __init__(self, site: Site, config: PeftConfig) -> None:
        super().__init__(site, config)

    def adapt(self, weight: Tensor) -> Tensor:
        """The adapted weight, `(out, in)`; for a stack of matrices `(n, out, in)`. The definition of the method."""
        return weight

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        """The adapted bias, `(out,)`, or none for none. The other half of the definition."""
        return bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return self.site.apply(x, self.adapt(base.weight()), self.adapt_bias(base.bias()), base.args, base.kwargs)

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> nn.Module:
        site = self.site.on(layer)
        weight, bias = site.read(), site.bias()
        # Low-precision weights are adapted in float32 and rounded once, when they are written.
        wide = torch.promote_types(weight.dtype, torch.float32)
        adapted = self.adapt(weight.to(wide))
        adapted_bias = self.adapt_bias(None if bias is None else bias.to(wide))
        return site.write(adapted, adapted_bias)
