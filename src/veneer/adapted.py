"""The one wrapper: a frozen module with named adapters on it.

All wrappers of a model share one `Switch`, which says what is active, so switching costs the same for any number of
layers. Merging never touches the frozen layer: the merged one is another module, and unmerging drops it, bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base, WeightAdapter
from veneer.errors import StateError, UnsupportedError
from veneer.shared_inputs import SharedInputs
from veneer.sites import LinearSite, ParameterSite, Site, site_of

BASE = "__base__"
"""In a mixed batch: the name for rows that use the frozen model."""


@dataclass
class Switch:
    """What is active, for all wrappers of one model.

    Attributes:
        active: Names of the adapters in use, lowest first.
        enabled: False while adapters are disabled.
        rows: In a mixed batch, the adapter of each row; otherwise none.
        copies: In a mixed batch, how many rows generation may make of each (beams, returned sequences).
        merged: Names of the adapters that are merged into the layers.
        trained: Names of the adapters whose parameters are trained.
        inputs: What the model was called with, while an adapter is loaded that looks at it.
        shared: Which layers read the same input.
    """

    active: tuple[str, ...] = ()
    enabled: bool = True
    rows: tuple[str, ...] | None = None
    copies: int = 1
    merged: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()
    inputs: Mapping[str, Any] | None = None
    shared: SharedInputs = field(default_factory=SharedInputs)


class Adapted(nn.Module):
    """A frozen module and the adapters on it.

    Args:
        layer: The module.
        switch: Shared with all other wrappers of the model.
        path: Where the module stands in the model; used in messages and in files.
        site: The module as a matrix, where it is one.
    """

    def __init__(self, layer: nn.Module, switch: Switch, path: str, site: Site | None = None) -> None:
        super().__init__()
        self.base_layer = layer
        self.adapters = nn.ModuleDict()
        self.switch = switch
        self.path = path
        self.site = site if site is not None else site_of(layer)
        # The frozen layer, while `base_layer` is a merged one. In a list, so that it is no submodule.
        self._frozen: list[nn.Module] = []

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of their layers (`weight.dtype`, `attention_type`), and find the layer's own here.
        # Private ones stay apart: hooks and flags that others keep on a module belong to that module alone.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    @property
    def place(self) -> str:
        """Path of what is adapted: the module, or the bare parameter in it."""
        return f"{self.path}.{self.site.parameter}" if isinstance(self.site, ParameterSite) else self.path

    @property
    def frozen_layer(self) -> nn.Module:
        """The layer without any adapter, merged or not."""
        return self._frozen[0] if self._frozen else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        switch = self.switch
        if switch.rows is not None:
            return self._mixed(switch.rows, args, kwargs)
        if not switch.enabled:
            return self.frozen_layer(*args, **kwargs)
        if self._frozen:
            return self.base_layer(*args, **kwargs)
        return self._run([name for name in switch.active if name in self.adapters], args, kwargs)

    def _run(
        self,
        names: Sequence[str],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        members: Tensor | None = None,
        owners: Mapping[str, Tensor] | None = None,
        entries: Tensor | None = None,
    ) -> Any:
        """Runs the layer with a stack of adapters.

        Args:
            names: The adapters, lowest first.
            args: The layer's arguments.
            kwargs: The layer's arguments.
            members: Numbers of the model's rows that run here, where these are not all.
            owners: In a mixed batch that is not split, which entries each adapter acts on.
            entries: In a mixed batch that is split, which entries run here.
        """
        if not names:
            return self.frozen_layer(*args, **kwargs)
        x, rest, kwargs = _first(args, kwargs)
        names = sorted(names, key=lambda name: bool(self.adapters[name].outermost))
        stack = [self.adapters[name] for name in names]
        inputs = self.switch.inputs
        if inputs is not None and members is not None:  # those rows of the model's inputs that run here
            inputs = {k: v[members.to(v.device)] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}
        wrapper = self if members is None and len(stack) == 1 and self._may_share() else None
        each = () if owners is None else [owners[name] for name in names]
        base = Base(self.frozen_layer, self.site, stack, rest, kwargs, inputs, wrapper, each)  # type: ignore[arg-type]
        base.entries = entries
        y = base(x)
        return y if base.rest is None else (y, *base.rest)

    def _may_share(self) -> bool:
        """Whether it may be noted what this wrapper was called with, to run it together with others."""
        # Copies for parallel threads come and go; compilers see no notes.
        copy = "_is_replica" in self.__dict__
        return isinstance(self.site, LinearSite) and not copy and not torch.compiler.is_compiling()

    def alone(self) -> WeightAdapter | None:
        """The adapter, if exactly one is in use here, beside the layer."""
        switch = self.switch
        if self._frozen or not switch.enabled or switch.rows is not None:
            return None
        names = [name for name in switch.active if name in self.adapters]
        adapter = self.adapters[names[0]] if len(names) == 1 else None
        return adapter if isinstance(adapter, WeightAdapter) else None

    def _mixed(self, rows: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs each row with its own adapter; rows of one adapter run together."""
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(rows):
            groups.setdefault(name if name in self.adapters else BASE, []).append(row)
        if len(groups) == 1:
            (name,) = groups
            return self._run([] if name == BASE else [name], args, kwargs)
        if not any(self.adapters[name].splits_rows for name in groups if name != BASE):
            x = _first(args, kwargs)[0]
            per_row = self._inputs_per_row(x, len(rows))
            own = {name: torch.zeros(len(rows), dtype=torch.bool, device=x.device) for name in groups if name != BASE}
            for name in own:
                own[name][groups[name]] = True
            return self._run(list(own), args, kwargs, owners={n: o.repeat_interleave(per_row) for n, o in own.items()})
        if len(args) != 1 or any(isinstance(value, Tensor) for value in kwargs.values()):
            raise UnsupportedError(
                f"{self.path} ({type(self.base_layer).__name__}) takes several tensors, so its batch cannot be split "
                "by adapter. Run the adapters one after the other, or use ones that leave this module out."
            )
        (x,) = args
        per_row = self._inputs_per_row(x, len(rows))
        y = None
        for name, members in groups.items():
            rows_here = index = torch.tensor(members, device=x.device)
            if per_row > 1:
                index = (index[:, None] * per_row + torch.arange(per_row, device=x.device)).flatten()
            here = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device).index_fill(0, index, True)
            some = (x.index_select(0, index),)
            part = self._run([] if name == BASE else [name], some, kwargs, rows_here, entries=here)
            if y is None:
                y = part.new_empty(x.shape[0], *part.shape[1:])
            y = y.index_copy(0, index, part.to(y.dtype))
        return y

    def _inputs_per_row(self, x: Tensor, rows: int) -> int:
        """How many entries of the first axis belong to one row: copies of it, or (batch, time) flattened."""
        count, remainder = divmod(x.shape[0], rows)
        flattened = count > 1 and x.dim() == 2 and x.is_floating_point()
        if remainder == 0 and (count in (1, self.switch.copies) or flattened):
            return count
        raise StateError(
            f"{self.path} got an input of shape {tuple(x.shape)} in a mixed batch of {rows} rows: adapter_names needs "
            "one name for each row of the batch, and a module whose first axis is the batch."
        )

    # Merging

    def merge(
        self,
        names: Sequence[str],
        check: Callable[[Adapted, nn.Module], None] | None = None,
        rounded: Callable[[Adapted, float, float], None] | None = None,
    ) -> nn.Module:
        """A layer that does alone what the frozen layer does with these adapters. Changes nothing.

        Args:
            names: The adapters, lowest first; those that this module does not have are passed over.
            check: Called with the wrapper and the merged layer; raises where that must not be used.
            rounded: Of a quantised layer, called with the wrapper and two lengths relative to the weight's: of what the
                adapters change, and of what is lost where the weight is quantised again.

        Raises:
            UnsupportedError: A method cannot be merged.
        """
        layer = self.frozen_layer
        names = [name for name in names if name in self.adapters]
        quantised = bool(names) and self.site is not None and self.site.store.quantised
        if quantised:  # rounded once, after all of them
            layer = self.site.store.plain(layer)  # type: ignore[union-attr]
        for name in names:
            try:
                layer = self.adapters[name].merge_into(layer)  # type: ignore[operator]
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.path}, adapter {name!r}: {error}") from error
        if check is not None:
            check(self, layer)
        return self._quantised_again(layer, rounded) if quantised else layer

    def _quantised_again(self, layer: nn.Module, rounded: Callable[[Adapted, float, float], None] | None) -> nn.Module:
        """The plain layer in the form that the frozen one has."""
        assert self.site is not None
        exact = site_of(layer)
        assert exact is not None
        merged = self.site.write(exact.read(), exact.bias())
        if rounded is not None:
            weight, wanted = self.site.read(), exact.read()
            length = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
            lost = self.site.on(merged).read().to(wanted) - wanted
            rounded(self, float((wanted - weight).norm() / length), float(lost.norm() / length))
        return merged

    def hold(self, layer: nn.Module) -> None:
        """Runs `layer` in place of the frozen one."""
        if layer is not self.frozen_layer:
            self._frozen = [self.frozen_layer]
            self.base_layer = layer

    def release(self) -> None:
        """Goes back to the frozen layer."""
        if self._frozen:
            self.base_layer = self._frozen.pop()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapted:
        super()._apply(fn, recurse)
        for layer in self._frozen:
            layer._apply(fn)  # follows the model to another device or dtype
        return self


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A layer's input and its other arguments; the input may be named, as in `attention(hidden_states=...)`."""
    if args:
        return args[0], args[1:], kwargs
    name = next(iter(kwargs))
    return kwargs[name], (), {k: v for k, v in kwargs.items() if k != name}


def wrappers(root: nn.Module) -> Iterator[Adapted]:
    """All wrappers of a model, outer before inner."""
    # Not `root.modules()`: it makes a name for each module and looks into adapters too, and this is asked often.
    seen: set[int] = set()
    left: list[nn.Module] = [root]
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, Adapted):
            yield module
            left.append(module.base_layer)
        else:  # a module without children is no wrapper
            left += [child for child in reversed(module._modules.values()) if child is not None and child._modules]


def adapters_of(root: nn.Module, name: str) -> Iterator[tuple[Adapted, Adapter]]:
    """Wrapper and adapter for every place where the named adapter stands."""
    for wrapper in wrappers(root):
        adapter = wrapper.adapters._modules.get(name)
        if adapter is not None:
            yield wrapper, adapter  # type: ignore[misc]
