"""AdapterFusion of adapters that are on a model already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.adapted import adapters_of
from veneer.errors import ConfigError

if TYPE_CHECKING:
    from veneer.model import PeftModel


def fuse(model: PeftModel, adapters: Sequence[str], adapter_name: str = "fusion", **settings: Any) -> None:
    """Adds an adapter that attends to what others give; it is trained next, they stay as they are.

    The others are copied into it: they can be deleted, and its file needs none of theirs.

    Args:
        model: The model that they are on.
        adapters: Their names, two or more.
        adapter_name: The new one's name; it becomes active and trainable.
        settings: Of `FusionConfig`.

    Raises:
        StateError: One is not there, or adapters are merged.
        ConfigError, TargetError: They cannot be combined; the model is left as it was.
    """
    from veneer.methods.fusion import FusionConfig

    model._known(adapters)
    if len(set(adapters)) < 2:
        raise ConfigError(f"fuse: adapters={list(adapters)!r}; two or more different ones were expected.")
    experts = {name: replace(model.peft_config[name], inference_mode=True) for name in adapters}
    root = model.get_base_model()
    task = model.peft_config[adapters[0]].task_type
    model.add_adapter(adapter_name, FusionConfig(**{"experts": experts, "task_type": task, **settings}))
    for name in adapters:
        method = model._methods[name]
        trained = {wrapper.place: a for wrapper, a in adapters_of(root, name) if isinstance(a, method)}
        for path, fusion in model._adapters(adapter_name).items():
            fusion.fill(name, trained[path].to_file())  # type: ignore[operator]
    model.set_adapter(adapter_name)
