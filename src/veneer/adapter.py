"""What a method is: one module attached to one place of a frozen model.

An `Adapter` is given the input of its place and a `Base`, which stands for all that lies below it: the frozen
layer, or the frozen layer with other adapters already on it. Stacking is therefore function composition.

A `WeightAdapter` says how the layer's weight changes (`adapt`, `adapt_bias`). Forward, merging, mixed batches
and export all follow from that one definition; a method overrides `forward` only where it knows a cheaper way
to the same values, and the contract tests hold it to the definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import ConfigError, StateError, UnsupportedError
from veneer.products import LowRank, run_layers, runs_by_hand

if TYPE_CHECKING:
    from veneer.adapted import Adapted
    from veneer.preparation import Run
    from veneer.prompting.prompts import Lengthened
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
        inputs: What the whole model was called with, for adapters that say `reads_inputs`.
        wrapper: The layer's wrapper, where the layer may run together with others of the same input.
        members: In a mixed batch that is not split, which of its entries each adapter below acts on, (batch,) bool.

    Attributes:
        rows: Those entries for the adapter that is given this; none for all.
        entries: In a mixed batch that is split, which of its entries run here, (batch,) bool; none for all.
    """

    rows: Tensor | None = None
    entries: Tensor | None = None

    def __init__(
        self,
        layer: nn.Module,
        site: Site | None,
        below: Sequence[Adapter] = (),
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        wrapper: Adapted | None = None,
        members: Sequence[Tensor] = (),
    ) -> None:
        self.layer = layer
        self.site = site
        self.below = below
        self.args = args
        self.kwargs = kwargs or {}
        self.inputs = inputs or {}
        self.wrapper = wrapper
        self.members = members
        self.rest: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.below:
            shared = (self.args, self.kwargs, self.inputs, self.wrapper)
            under = Base(self.layer, self.site, self.below[:-1], *shared, members=self.members[:-1])
            under.rows, under.entries = self.members[-1] if self.members else None, self.entries
            adapter = self.below[-1]
            if not adapter.prepared and adapter.training and torch.is_grad_enabled():
                raise StateError(
                    f"This {type(adapter).__name__} adapter has to see data before it is trained: what it starts from "
                    "is made from real batches. Call veneer.prepare(model, batches) first; `veneer train` does so by "
                    "itself."
                )
            ready = None if self.wrapper is None else self.wrapper.switch.shared.take(self.wrapper, x)
            y = adapter(x, under) if ready is None else ready
            self.rest = under.rest
            if adapter.bias_delta is not None:
                assert self.site is not None
                y = self.site.add_bias(y, adapter.bias_delta)
            return y
        y = self.layer(x, *self.args, **self.kwargs)
        if isinstance(y, tuple):  # attention modules and whole blocks return (hidden states, ...)
            y, self.rest = y[0], y[1:]
        return y

    def plus(self, x: Tensor, matrix: LowRank, dropout: float = 0.0) -> Tensor:
        """What a call gives with a thin product added to the weight, which sees the input through a dropout."""
        site: Any = self.site
        plain = site.kind == "linear" and not (self.below or self.args or self.kwargs or dropout)
        if not plain or site.module is not self.layer or not runs_by_hand(site, x, matrix.down):
            y = self(x)
            if x.is_floating_point():  # an embedding's input is an index
                x = F.dropout(x.to(matrix.down.device, matrix.down.dtype), dropout)
            return site.add_factored(x, y, matrix.down, matrix.up, matrix.scale)
        if self.wrapper is not None:
            return self.wrapper.switch.shared.run(self.wrapper, x, matrix)
        return run_layers(x, [site], [matrix])[0]

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
            bias = adapter.adapted_bias(bias)
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


@dataclass(frozen=True)
class Renewed:
    """Entries of a trained parameter that have begun anew.

    Args:
        parameter: The parameter.
        where: Positions in it.
        gradient: What is known of their gradient, for the averages of the optimiser to begin with.
    """

    parameter: nn.Parameter
    where: Tensor
    gradient: Tensor

    def tell(self, optimizer: torch.optim.Optimizer) -> None:
        """Begins the optimiser's state of these entries anew."""
        squares = {"exp_avg": 1, "exp_avg_sq": 2}
        for name, state in optimizer.state.get(self.parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == self.parameter.shape:
                known = self.gradient.to(state) ** squares[name] if name in squares else torch.zeros_like(self.gradient)
                state[self.where] = known.to(state)


class Shared(nn.Module):
    """What all places of one adapter have in common: random projections, a bank of vectors, a rule.

    Built once for each adapter, from all of its places, and saved once.

    Args:
        sites: The frozen layers as matrices, by the path of their module.
        config: The method's configuration.
    """

    above: str | None = None
    """What the names of its tensors in files begin with, where that is not `base_model.`."""

    optional: frozenset[str] = frozenset()
    """Names of tensors that are written and that a file may lack: `from_file` does without them."""

    derived: frozenset[str] = frozenset()
    """Names of tensors that the configuration determines, and that are not written therefore: a file that has them
    all the same is taken at its word."""

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__()

    def reset(self) -> None:
        """Writes starting values; called before the adapters' own `reset`."""

    def to_file(self) -> dict[str, Tensor]:
        """Tensors as an adapter file names them, after `base_model.`. `from_file` is the inverse."""
        return dict(self.named_parameters())

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            put(self, name, tensor)


class Adapter(nn.Module):
    """One method on one place.

    What is trained is a parameter; what belongs to the adapter and stays as it is, is a buffer.

    Args:
        site: The frozen layer as a matrix; none where the method attaches to any module.
        config: The method's configuration, resolved for this place.
    """

    kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of sites that the method makes sense on, and `"module"` for modules that are no matrix, such as whole
    blocks; empty for methods that attach to anything."""

    shares: ClassVar[type[Shared] | None] = None
    """What the adapters of one name have in common; each finds it as `self.shared`."""

    optional: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors that a file may have and may lack: `from_file` makes what is not given."""

    free: ClassVar[frozenset[str]] = frozenset()
    """Names of tensors in files of which the file says how long they are."""

    starts_as_base: bool = True
    """Whether the model with a new adapter computes what the base model does; where settings decide it, `__init__` says
    so."""

    ties: ClassVar[bool] = False
    """Whether places whose layers share one weight are trained as one. If so, an output layer that has its weight from
    an adapted embedding is adapted too, and every place is told of the first by `tie`."""

    mixes_rows: ClassVar[bool] = False
    """Whether what a row of the batch gets depends on the other rows."""

    splits_rows: ClassVar[bool] = True
    """Whether in a mixed batch the adapter is given its own rows alone. If not, `forward` is given the whole batch and
    is told by `base.rows` which entries are its own."""

    outermost: ClassVar[bool] = False
    """Whether the adapter stands above all others of its place, however they are ordered."""

    sees_others: ClassVar[bool] = False
    """Whether `forward` looks at the other adapters of its place, which it finds as `self.others[0]`, by name."""

    reads_inputs: ClassVar[bool] = False
    """Whether `forward` looks at what the whole model was called with (`base.inputs`)."""

    own_inputs: ClassVar[frozenset[str]] = frozenset()
    """Those arguments of the model's call that are meant for the adapters alone, such as `task_ids`."""

    def __init__(self, site: Site | None, config: Any) -> None:
        super().__init__()
        self.site = site
        self.bias_delta: nn.Parameter | None = None
        self.prepared = True  # False from the start until `prepare`, where the method needs data

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Adapter:
        """The adapter for a module; for methods that look at more of it than its matrix."""
        return cls(site, config)

    @property
    def device(self) -> torch.device | None:
        """Where the adapter computes; none where that cannot be said before it runs."""
        return None if self.site is None else self.site.device

    def tie(self, first: Self) -> None:
        """Trains the tensors of `first`, whose layer has the same weight; called before `reset`."""

    def join(self, shared: Shared, path: str) -> None:
        """Takes what is shared, before `reset`; `path` is that of the adapter's module."""
        self.shared = shared

    def forward(self, x: Tensor, base: Base) -> Tensor:
        raise NotImplementedError

    def reset(self) -> None:
        """Writes the starting values that the configuration asks for. Loading skips this."""

    @classmethod
    def needs_data(cls, config: Any) -> bool:
        """Whether the method, with this configuration, has to see data before it is trained."""
        return False

    @classmethod
    def prepare(cls, adapters: dict[str, Self], config: Any, run: Run) -> Any:
        """Makes from data what the method starts with; called by `preparation.prepare`, after `reset`.

        Args:
            adapters: All adapters of one name, by the path of their place; those that are taken out of it are taken
                off the model.
            config: Their configuration.
            run: Passes batches through the model.

        Returns:
            The configuration as it is from now on, where that is another; otherwise none.
        """

    @classmethod
    def note(cls, inputs: Mapping[str, Any], config: Any) -> Mapping[str, Any]:
        """What follows from the inputs of the model's call for all places alike; it is added to `base.inputs`.

        Called once a call of the model, for methods that say `reads_inputs`.

        Args:
            inputs: What the model was called with, by name.
            config: The configuration of one adapter.
        """
        return {}

    @classmethod
    def shift(cls, config: Any) -> int:
        """By how many positions the text stands later than it would without the adapter."""
        return 0

    @classmethod
    def loss(cls, adapters: Sequence[Self], config: Any, output: Any, text: Lengthened) -> Tensor | None:
        """The loss in place of the model's own, for methods with virtual tokens; none where the model's is right.

        Args:
            adapters: All adapters of one name.
            config: Their configuration.
            output: The model's, with logits of the virtual tokens too.
            text: What it was called with, labels among it.
        """
        return None

    @classmethod
    def penalty(cls, adapters: Sequence[Self], config: Any) -> Tensor | None:
        """A term that is added to the model's loss in training; none where the method has none."""
        return None

    @classmethod
    def allocate(cls, adapters: Mapping[str, Self], config: Any, step: int) -> Sequence[Renewed] | None:
        """Called in every training step after the optimiser's and before gradients are cleared.

        Args:
            adapters: All adapters of one name, by the path of their module.
            config: Their configuration.
            step: The step, from 0.

        Returns:
            Entries of parameters that mean something else from now on, of which the optimiser knows nothing yet.
        """
        return None

    @classmethod
    def kept(cls, adapters: Mapping[str, Self]) -> dict[str, Tensor]:
        """What `allocate` goes by and adapter files do not hold, for the checkpoints of a training run."""
        return {}

    @classmethod
    def resume(cls, adapters: Mapping[str, Self], config: Any, kept: Mapping[str, Tensor]) -> None:
        """Takes over what `kept` gave; called before the adapter's file is read."""

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
        named = self.named_parameters()
        return {name: tensor for name, tensor in named if not name.startswith("shared.") and name != "bias_delta"}

    def expect(self, tensors: Mapping[str, Tensor]) -> None:
        """Told what a file has for this place, before that is checked: for tensors whose sizes the file decides."""

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors over; names and shapes have been checked against `to_file` before."""
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def put(self, name: str, tensor: Tensor) -> None:
        """Fills one parameter or buffer, replacing it where it was created without memory."""
        put(self, name, tensor, self.device)


def put(module: nn.Module, name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """Fills one parameter or buffer of a module.

    Args:
        module: The module.
        name: Path of the tensor in it.
        tensor: The values.
        device: Where a tensor that was created without memory is to lie; where `tensor` lies if none.
    """
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    old: Tensor = table[leaf]
    if not old.is_meta and old.shape == tensor.shape:
        with torch.no_grad():
            old.copy_(tensor)
        return
    # A copy: not the caller's memory, which may be another adapter's.
    made = tensor.detach().to(old.device if device is None and not old.is_meta else device, old.dtype, copy=True)
    table[leaf] = nn.Parameter(made, requires_grad=old.requires_grad) if table is owner._parameters else made


def onto(delta: Tensor, weight: Tensor) -> Tensor:
    """`weight + delta`, in the memory of `delta`, which the caller has just made, where its type can hold the sum."""
    fits = torch.promote_types(delta.dtype, weight.dtype) == delta.dtype
    return delta.add_(weight) if fits else weight + delta


class WeightAdapter(Adapter):
    """A method that changes the layer's weight, its bias, or both."""

    kinds = WEIGHT_KINDS
    site: Site

    dropout: float = 0.0
    """Share of the input that the change of the weight does not see in training."""

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)

    def input_dropout(self, share: float, setting: str) -> float:
        """The share of the input that this place drops: none of an embedding's, which is an index.

        Raises:
            ConfigError: Something is to be dropped from the input of a bare parameter.
        """
        if share and self.site.kind == "parameter":
            raise ConfigError(f"{setting}={share}: a bare parameter has no input of its own to drop from; set it to 0.")
        return share if self.site.kind != "embedding" else 0.0

    def product(self) -> LowRank | None:
        """What is added to the weight, where the method is one thin product: then it needs no other definition.

        Asked anew for each call, and says none where it is more than that in this moment. For a stack of matrices down
        is `(n, r, in)` and up `(n, out, r)`.
        """
        return None

    def adapt(self, weight: Tensor) -> Tensor:
        """The adapted weight, `(out, in)`; for a stack of matrices `(n, out, in)`. The definition of the method."""
        matrix = self.product()
        return weight if matrix is None else onto(matrix.scale * (matrix.up @ matrix.down), weight)

    def adapt_bias(self, bias: Tensor | None) -> Tensor | None:
        """The adapted bias, `(out,)`, or none for none. The other half of the definition."""
        return bias

    def adapted_bias(self, bias: Tensor | None) -> Tensor | None:
        """`adapt_bias`, and the delta on it that configurations with `bias="all"` train beside the method."""
        bias = self.adapt_bias(bias)
        return bias if self.bias_delta is None or bias is None else bias + self.bias_delta

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.site.kind != "parameter" and (matrix := self.product()) is not None:
            return base.plus(x, matrix, self.dropout if self.training else 0.0)
        return self.site.apply(x, self.adapt(base.weight()), self.adapt_bias(base.bias()), base.args, base.kwargs)

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> nn.Module:
        site = self.site.on(layer)
        weight, bias = site.read(), site.bias()
        # Low-precision weights are adapted in float32 and rounded once, when they are written.
        wide = torch.promote_types(weight.dtype, torch.float32)
        adapted = self.adapt(weight.to(wide))
        return site.write(adapted, self.adapted_bias(None if bias is None else bias.to(wide)))


class BiasOnly(WeightAdapter):
    """Carries the `bias_delta` of a layer that the method itself leaves alone."""

    def forward(self, x: Tensor, base: Base) -> Tensor:
        return base(x)

    def to_file(self) -> dict[str, Tensor]:
        return {}
