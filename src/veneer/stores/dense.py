"""Plain floating-point tensors, on one device, on several, or offloaded by accelerate."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.stores.store import Store


class DenseStore(Store):
    """Reads and writes tensors that are kept as they are used."""

    quantised = False

    def holds(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not isinstance(weight, Tensor) or weight.is_floating_point()

    def outline(self, module: nn.Module, name: str) -> Tensor:
        return tensor_of(module, name)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return tensor_of(module, name).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        # An offloaded tensor itself has no place of its own.
        owner = owner_of(module, name)
        if is_offloaded(owner):
            return torch.device(owner._hf_hook.execution_device)  # type: ignore[union-attr, arg-type]
        return tensor_of(module, name).device

    def read(self, module: nn.Module, name: str) -> Tensor:
        owner = owner_of(module, name)
        if is_offloaded(owner):
            from accelerate.utils import align_module_device

            with align_module_device(owner):
                return tensor_of(module, name).detach().clone()
        return tensor_of(module, name).detach()

    def write(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        cast = {}
        for name, tensor in tensors.items():
            like = name if name in dict(module.named_parameters()) else "weight"
            cast[name] = tensor.detach().to(device=self.device(module, like), dtype=self.dtype(module, like))
        return shallow_copy(module, cast)


def check_dense(module: nn.Module) -> None:
    """Refuses a layer whose weight is not a plain floating-point tensor.

    Raises:
        TargetError: The weight is packed or of an integer type.
    """
    if not DenseStore().holds(module):
        weight = module.weight
        raise TargetError(
            f"The weight of {type(module).__name__} is kept as {weight.dtype}; no store of this version reads it. "
            "Load the model without quantisation."
        )


def owner_of(module: nn.Module, name: str) -> nn.Module:
    """The module that holds the tensor itself; `name` may reach into children."""
    return module.get_submodule(name.rpartition(".")[0]) if "." in name else module


def tensor_of(module: nn.Module, name: str) -> nn.Parameter:
    """The tensor itself; `name` may reach into children."""
    own = module._parameters.get(name)  # most do not, and the search is slow
    return module.get_parameter(name) if own is None else own


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's tensors elsewhere and fetches them for each call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def shallow_copy(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy that shares everything with `module` except the named tensors; dotted names reach into children."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = dict(module._modules)
    below: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        child, _, rest = name.partition(".")
        if rest:
            below.setdefault(child, {})[rest] = tensor
        else:
            twin._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    for name, inner in below.items():
        twin._modules[name] = shallow_copy(module.get_submodule(name), inner)
    if "_hf_hook" in twin.__dict__:
        _settle(twin, module)
    return twin


def _settle(twin: nn.Module, module: nn.Module) -> None:
    """Frees the copy of a module that accelerate has hooked from the original's hook.

    The hooked forward is bound to the instance, so the copy would run the original. With its tensors on the execution
    device, all the copy needs of the hook is to have its input moved there.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    device = twin.__dict__.pop("_hf_hook").execution_device
    for bound in ("forward", "_old_forward"):
        twin.__dict__.pop(bound, None)
    for name, parameter in twin._parameters.items():
        if parameter is not None and parameter.is_meta:
            twin._parameters[name] = nn.Parameter(DenseStore().read(module, name), requires_grad=False)
    if device is not None:
        add_hook_to_module(twin, AlignDevicesHook(execution_device=device, io_same_device=True))
