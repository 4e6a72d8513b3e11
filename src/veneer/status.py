"""What stands where on a model, and in which state."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from veneer.adapted import Switch, wrappers
from veneer.attach import switch_of
from veneer.errors import StateError


@dataclass
class TunerLayerStatus:
    """State of one adapted module.

    Attributes:
        name: Its path.
        module_type: Class of the frozen module.
        enabled: Whether adapters are enabled.
        active_adapters: Those active here.
        merged_adapters: Those merged here.
        requires_grad: By adapter: whether its parameters are trained; `"irregular"` if only some are.
        available_adapters: All adapters here.
        devices: By adapter: where its parameters are.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """State of the whole model; attributes as in `TunerLayerStatus`, over all layers."""

    base_model_type: str
    num_adapter_layers: int
    total_params: int
    trainable_params: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | str]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted module, outer before inner.

    Raises:
        StateError: The model has no adapters.
    """
    _switch(model)
    return [
        TunerLayerStatus(
            name=wrapper.path,
            module_type=type(wrapper.frozen_layer).__name__,
            enabled=wrapper.switch.enabled,
            active_adapters=[name for name in wrapper.switch.active if name in wrapper.adapters],
            merged_adapters=[name for name in wrapper.switch.merged if name in wrapper.adapters],
            requires_grad={
                name: _one([p.requires_grad for p in a.parameters()]) for name, a in wrapper.adapters.items()
            },
            available_adapters=sorted(wrapper.adapters),
            devices={name: sorted({p.device.type for p in a.parameters()}) for name, a in wrapper.adapters.items()},
        )
        for wrapper in wrappers(model)
    ]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of the whole model.

    Raises:
        StateError: The model has no adapters.
    """
    layers = get_layer_status(model)
    switch = _switch(model)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    base = getattr(model, "get_base_model", lambda: model)()
    parameters = list(model.parameters())
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        num_adapter_layers=len(layers),
        total_params=sum(p.numel() for p in parameters),
        trainable_params=sum(p.numel() for p in parameters if p.requires_grad),
        enabled=switch.enabled,
        active_adapters=list(switch.active),
        merged_adapters=list(switch.merged),
        requires_grad={n: _one([la.requires_grad[n] for la in layers if n in la.requires_grad]) for n in names},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
    )


def _switch(model: nn.Module) -> Switch:
    switch = switch_of(model)
    if switch is None:
        raise StateError(f"This {type(model).__name__} has no adapters. Call get_peft_model first.")
    return switch


def _one(values: list[bool | str]) -> bool | str:
    """The value that all agree on, or `"irregular"`."""
    return values[0] if len(set(values)) == 1 else "irregular"
