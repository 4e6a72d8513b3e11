"""A model's frozen layers in fewer bits.

Third-party forms are made where a model is loaded; what is made here is Veneer's own: `int8`, which also computes in
8-bit integers (`stores/int8.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from veneer import units
from veneer.adapted import wrappers
from veneer.allocation import release_freed_memory
from veneer.errors import ConfigError, StateError
from veneer.products import is_hooked
from veneer.stores import int8_kernels, quantised_store
from veneer.stores.int8 import Int8Linear
from veneer.stores.int8_sensitivity import Inputs, examine, leading_columns, watching
from veneer.targets import walk

Kind = Literal["int8"]
# Of a layer's output, relative; rounding alone gives about half of the first.
TOLERANCE, LIMIT = 0.02, 0.05


@dataclass(frozen=True)
class LayerForm:
    """How one linear layer is kept.

    Args:
        exact: Why it stays as it was; none if it is quantised.
        columns: Input columns that stay exact in a quantised layer.
        error: Relative error of its output in int8, if it was measured.
    """

    exact: str | None = None
    columns: tuple[int, ...] = ()
    error: float | None = None


@dataclass
class Quantization:
    """What became of a model. Given back as `plan`, it gives another copy of the model the same form.

    Args:
        kind: The form.
        layers: Every linear layer, by path.
        bits: Of the weights.
        bytes_before: Parameters and buffers of the model before.
        bytes_after: The same afterwards.
        compute: How this machine multiplies the integers.
    """

    kind: Kind
    layers: dict[str, LayerForm] = field(default_factory=dict)
    bits: int = 8
    bytes_before: int = 0
    bytes_after: int = 0
    compute: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """The inverse of `to_dict`."""
        layers = {
            path: LayerForm(**{**form, "columns": tuple(form["columns"])}) for path, form in values["layers"].items()
        }
        return cls(**{**values, "layers": layers})

    def lines(self) -> list[str]:
        """For a terminal: what was converted, what was not and why, and how it is computed."""
        kept: dict[str, list[str]] = {}
        for path, form in self.layers.items():
            if form.exact is not None:
                kept.setdefault(form.exact, []).append(path)
        quantised = {path: form for path, form in self.layers.items() if form.exact is None}
        columns = sum(bool(form.columns) for form in quantised.values())
        size = f"{units.size(self.bytes_before)} before, {units.size(self.bytes_after)} now"
        first = (
            f"{self.kind}: {len(quantised)} of {len(self.layers)} linear layers, weights of {self.bits} bits, "
            f"{columns} with exact columns; {size}."
        )
        errors = {path: form.error for path, form in quantised.items() if form.error is not None}
        if errors:
            worst = max(errors, key=lambda path: errors[path])
            first += f" Largest error of a layer's output: {100 * errors[worst]:.1f}% ({worst})."
        lines = [first]
        for reason, paths in kept.items():
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            lines.append(f"Kept exact, {reason}: {shown}.")
        return [*lines, f"{self.kind}: {self.compute}."]


def quantize(
    model: nn.Module,
    kind: Kind = "int8",
    *,
    batches: Iterable[Any] | None = None,
    plan: Quantization | None = None,
    exact: Sequence[str] = (),
    bits: int | None = None,
    tolerance: float = TOLERANCE,
    limit: float = LIMIT,
) -> Quantization:
    """Replaces the linear layers of a frozen model by ones with fewer bits, one after the other.

    Heads, tied weights and layers that something else than a call reads stay as they are. With `batches`, every
    layer's error is measured on the inputs that it gets from them: input columns with outliers are kept exact where
    the error would be above `tolerance`, and the whole layer where it still is above `limit`. Without, all are
    converted unseen.

    Args:
        model: Changed in place. Adapters come afterwards.
        kind: `int8`: one scale an output channel, activations in 8 bits with one scale a token.
        batches: A few real batches, each a mapping, a tuple or a tensor to call the model with.
        plan: What an earlier call returned: the same layers and columns, and nothing is measured.
        exact: Further layers to leave as they are, by path or the end of a path.
        bits: Of the weights, 7 or 8. None is 8, or 7 where this machine multiplies fast with 7 only. The model keeps
            what it was given, whatever machine it runs on later; so does a plan.
        tolerance: Relative error of a layer's output up to which no column is kept exact.
        limit: Relative error above which a layer is kept exact.

    Raises:
        ConfigError: `kind` or `bits` is unknown, a name in `exact` matches nothing, or the plan is of another model.
        StateError: The model has adapters.
    """
    if kind != "int8":
        raise ConfigError(f"kind is {kind!r}. Expected 'int8'; other forms are chosen where the model is loaded.")
    if bits not in (None, *int8_kernels.BITS):
        raise ConfigError(f"bits is {bits!r}. Expected 7, 8, or None to choose what is fast on this machine.")
    if plan is not None and bits not in (None, plan.bits):
        raise ConfigError(f"bits is {bits}, and the plan has {plan.bits}. Leave bits out to follow the plan.")
    if any(True for _ in wrappers(model)):
        raise StateError("The model has adapters. Quantise the base model first, and put the adapters on it then.")
    layers = dict(_linears(model))
    if bits is None:
        bits = int8_kernels.weight_bits() if plan is None else plan.bits
    result = Quantization(kind, bits=bits, bytes_before=_bytes(model), compute=int8_kernels.compile_steps(bits))
    if plan is None:
        reasons = _reasons(model, layers, exact)
        paths = list(layers)
        for path in reasons:
            del layers[path]
        found = {path: LayerForm(exact=reason) for path, reason in reasons.items()}
        if batches is None:
            layers.clear()  # nothing but the model may hold a layer that is converted, or it would stay in memory
            for path in paths:
                if path not in reasons:
                    _convert(model, path, LayerForm(), bits)
                    found[path] = LayerForm()
        else:
            found |= _measured(model, layers, batches, bits, tolerance, limit)
        result.layers = {path: found[path] for path in paths}
    else:
        strange = sorted(plan.layers.keys() ^ layers.keys())
        if plan.kind != kind or strange:
            raise ConfigError(
                f"plan: it was made for another model or kind: {', '.join(strange[:3]) or plan.kind} is in one and not "
                "in the other. Give the plan of this model, or batches to measure anew."
            )
        layers.clear()
        for path, form in plan.layers.items():
            if form.exact is None:
                _convert(model, path, form, bits)
        result.layers = dict(plan.layers)
    result.bytes_after = _bytes(model)
    release_freed_memory()  # of the layers as they were
    return result


def quantisable(model: nn.Module) -> list[str]:
    """The layers that `quantize` converts where nothing is measured."""
    layers = dict(_linears(model))
    reasons = _reasons(model, layers, ())
    return [path for path in layers if path not in reasons]


def _measured(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Iterable[Any],
    bits: int,
    tolerance: float,
    limit: float,
) -> Iterator[tuple[str, LayerForm]]:
    """Runs the model, then examines and converts the layers that have the same input, group by group.

    Takes what it converts out of `layers`, so that it goes out of memory.
    """
    training = model.training
    model.eval()
    with watching(layers) as watch, torch.no_grad():
        count = 0
        for batch in batches:
            watch.mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _call(model, batch)
            count += 1
    model.train(training)
    if count == 0:
        raise ConfigError("batches: there is none. Give a few real batches, or None to convert without looking.")
    groups: list[Inputs] = []
    inputs = watch.inputs
    for path in layers:
        if path not in inputs:
            yield path, LayerForm(exact="not reached by the batches that were shown")
        elif inputs[path].paths[0] == path:
            groups.append(inputs[path])
    del inputs, watch
    for group in groups:
        x = group.rows
        group.parts.clear()
        order = leading_columns(x)
        found = {path: examine(layers[path], x, order, tolerance, bits) for path in group.paths}
        borne = {path: each for path, each in found.items() if each.error <= limit}
        # The same columns for all: their input is then quantised once.
        columns = tuple(sorted(order[: max((each.columns for each in borne.values()), default=0)].tolist()))
        for path, each in found.items():
            if path in borne:
                form = LayerForm(columns=columns, error=each.error)
                layers.pop(path)
                _convert(model, path, form, bits)
            else:
                form = LayerForm(exact=f"error above {100 * limit:g}% in int8", error=each.error)
            yield path, form


def _convert(model: nn.Module, path: str, form: LayerForm, bits: int) -> None:
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    columns = torch.tensor(form.columns, dtype=torch.long)
    owner._modules[leaf] = Int8Linear.from_linear(owner._modules[leaf], columns, bits)  # type: ignore[arg-type]


def _call(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: there(value) for name, value in batch.items()})
    elif isinstance(batch, tuple | list):
        model(*map(there, batch))
    else:
        model(there(batch))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every plain linear layer."""
    for path, module in walk(model):
        if isinstance(module, _classes()):
            yield path, module


def _classes() -> tuple[type[nn.Module], ...]:
    transformers = sys.modules.get("transformers.pytorch_utils")  # before it is imported, no model has its layers
    return (nn.Linear,) if transformers is None else (nn.Linear, transformers.Conv1D)


def _reasons(model: nn.Module, layers: Mapping[str, nn.Module], exact: Sequence[str]) -> dict[str, str]:
    """The layers that stay as they are, and why."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    # What lies outside of the body of a transformers model is a head.
    prefix = getattr(model, "base_model_prefix", "")
    body = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    reasons: dict[str, str] = {}
    for path, layer in layers.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        if any(path == name or path.endswith(f".{name}") for name in exact):
            reasons[path] = "as asked for"
        elif layer is output or not path.startswith(body):
            reasons[path] = "a head"
        elif quantised_store(layer) is not None:
            reasons[path] = "quantised already"
        elif type(layer).forward not in [cls.forward for cls in _classes()] or is_hooked(layer):
            reasons[path] = "more than a linear layer"
        elif uses[id(layer._parameters["weight"])] > 1:
            reasons[path] = "its weight is that of another module too"
        elif isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            reasons[path] = f"read by {type(parent).__name__} without a call"
    unmatched = [name for name in exact if not any(p == name or p.endswith(f".{name}") for p in layers)]
    if unmatched:
        raise ConfigError(f"exact: no linear layer is named {unmatched[0]!r}. They are: {', '.join(layers)}.")
    return reasons


def _bytes(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
