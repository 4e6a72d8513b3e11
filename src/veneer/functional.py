"""Adapters on models without a `PeftModel` around them, and an adapter's tensors by their names in files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from veneer import checkpoint
from veneer.adapted import Switch, adapters_of
from veneer.attach import attach, let_train, switch_of
from veneer.config import PeftConfig
from veneer.method_strings import parse_method
from veneer.model import PeftModel
from veneer.replication import replicated


def inject_adapter_in_model(
    peft_config: PeftConfig | str | Mapping[str, Any],
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """Puts an adapter on a model and returns the model itself, without a `PeftModel` around it.

    Raises:
        TargetError, ConfigError: The configuration does not fit the model, which is left as it was.
    """
    switch = switch_of(model) or Switch()
    config = parse_method(peft_config)
    with replicated(model, config):
        attach(model, adapter_name, config, switch, start=not low_cpu_mem_usage)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    switch.active = (adapter_name,)
    for _, adapter in adapters_of(model, adapter_name):
        let_train(adapter, True)
    return model


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **kwargs: Any
) -> dict[str, Tensor]:
    """An adapter's tensors under the names they have in a file."""
    root, prefix = _root(model)
    return checkpoint.adapter_tensors(root, adapter_name, prefix)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **kwargs: Any
) -> None:
    """Fills an adapter with tensors that `get_peft_model_state_dict` gave.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape; nothing is changed.
    """
    root, prefix = _root(model)
    checkpoint.fill(root, adapter_name, peft_model_state_dict, prefix=prefix)


def load_peft_weights(model_id: str | Path, device: str | None = None, **hub: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter under the names they have in its file.

    Raises:
        CheckpointError: The file is missing, truncated or corrupted.
    """
    tensors, _ = checkpoint.read(model_id, **hub)
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}


def _root(model: nn.Module) -> tuple[nn.Module, str]:
    return (model.get_base_model(), checkpoint.PREFIX) if isinstance(model, PeftModel) else (model, "")
