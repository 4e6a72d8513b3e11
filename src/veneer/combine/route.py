"""Models that choose among trained adapters for every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from veneer.config import nested
from veneer.errors import ConfigError, TargetError
from veneer.methods.arrow import ArrowConfig
from veneer.methods.lora import LoraConfig
from veneer.model import PeftModel

ROUTER = "arrow_router"


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | Path],
    arrow_config: ArrowConfig | Mapping[str, Any] | None = None,
    general_adapter_paths: Sequence[str | Path] | None = None,
    **loading: Any,
) -> PeftModel:
    """Loads LoRA adapters, as `task_0`, `task_1`, ..., and puts a router over them that is active.

    Args:
        base_model: The model that they were trained on.
        task_specific_adapter_paths: Folders or hub ids of the experts.
        arrow_config: Settings of the router.
        general_adapter_paths: Adapters of general knowledge, for `use_gks`; they are `gks_0`, ...
        loading: As in `PeftModel.from_pretrained`.

    Raises:
        ConfigError: There is none, or none of general knowledge where that is to be subtracted.
        TargetError: They are not on the same modules.
        CheckpointError: As in `PeftModel.from_pretrained`.
    """
    settings: ArrowConfig = nested(ArrowConfig, arrow_config or {}, "arrow_config")
    tasks = {f"task_{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    general = {f"gks_{i}": path for i, path in enumerate(general_adapter_paths or ())} if settings.use_gks else {}
    if not tasks or (settings.use_gks and not general):
        missing = "general_adapter_paths" if tasks else "task_specific_adapter_paths"
        raise ConfigError(f"create_arrow_model: {missing} is empty; folders of trained LoRA adapters were expected.")
    (first, path), *others = {**tasks, **general}.items()
    model = PeftModel.from_pretrained(base_model, path, first, **loading)
    try:
        for name, path in others:
            model.load_adapter(path, name, **loading)
        places = {name: model._adapters(name) for name in model.peft_config}
        for name, found in places.items():
            if found.keys() != places[first].keys():
                raise TargetError(f"create_arrow_model: {name} and {first} are not on the same modules.")
        lora: Any = model.peft_config[first]
        if not isinstance(lora, LoraConfig):
            raise ConfigError(f"create_arrow_model: {path} is a {lora.peft_type} adapter; LoRA was expected.")
        settings = replace(settings, task_adapter_names=list(tasks), gks_adapter_names=list(general))
        router = LoraConfig(arrow_config=settings, target_modules=lora.target_modules, r=lora.r)
        model.add_adapter(ROUTER, router)
    except Exception:
        model.unload()
        raise
    model.set_adapter(ROUTER, inference_mode=True)
    return model
