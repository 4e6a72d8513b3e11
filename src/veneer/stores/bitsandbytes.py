"""4-bit and 8-bit layers of bitsandbytes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit
from torch import Tensor, nn

from veneer.errors import TargetError
from veneer.stores.dense import shallow_copy
from veneer.stores.store import Store


class BitsAndBytesStore(Store):
    """`Linear4bit` (NF4 or FP4 in blocks, scales quantised once more or not) and `Linear8bitLt` (int8 by row)."""

    def holds(self, module: nn.Module) -> bool:
        if isinstance(module, bnb.nn.Linear8bitLt):
            return module.weight.dtype == torch.int8  # with `has_fp16_weights` it is kept as it is
        return isinstance(module, bnb.nn.Linear4bit)

    def outline(self, module: Any, name: str) -> Tensor:
        if name != "weight":
            return module.get_parameter(name)
        if _in_4_bits(module):
            if module.weight.is_floating_point() and getattr(module, "quant_state", None) is None:
                raise TargetError(
                    f"This {type(module).__name__} is not quantised yet: bitsandbytes does that when the model is "
                    "moved to a device. Call model.to(device) before adapting it."
                )
            bnb.nn.modules.fix_4bit_weight_quant_state_from_module(module)
        return torch.empty(module.out_features, module.in_features, device="meta")

    def dtype(self, module: Any, name: str) -> torch.dtype:
        if name != "weight":
            return module.get_parameter(name).dtype
        if _in_4_bits(module):
            return module.compute_dtype or module.weight.quant_state.dtype
        return torch.float32 if module.bias is None else module.bias.dtype

    def device(self, module: Any, name: str) -> torch.device:
        return module.get_parameter(name).device

    @torch.no_grad()
    def read(self, module: Any, name: str) -> Tensor:
        if name != "weight":
            return module.get_parameter(name).detach()
        if _in_4_bits(module):
            packed, state = module.weight.data, module.weight.quant_state
            if getattr(state, "packing_format_for_cpu", False):  # rearranged for inference on processors with AVX-512
                packed, state = _convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
            return dequantize_4bit(packed, state)
        codes, scale = _codes(module)
        return codes.float() * (scale.float() / 127)[:, None]

    @torch.no_grad()
    def write(self, module: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        rest = {k: v.detach().to(self.device(module, k), self.dtype(module, k)) for k, v in tensors.items()}
        weight = rest.pop("weight", None)
        twin: Any = shallow_copy(module, rest)
        if weight is None:
            return twin
        weight = tensors["weight"].detach().to(weight.device)
        twin._parameters["weight"] = None  # lets go of the layer's own
        if _in_4_bits(module):
            old, state = module.weight, module.weight.quant_state
            packed: Any = bnb.nn.Params4bit(
                weight.to(state.dtype).contiguous(),
                requires_grad=False,
                blocksize=old.blocksize,
                compress_statistics=old.compress_statistics,
                quant_type=old.quant_type,
                quant_storage=old.quant_storage,
                module=twin,
            )
            twin._parameters["weight"] = packed.to(weight.device)
            return twin
        scale = weight.float().abs().amax(1)
        codes = (weight.float() * (127 / scale.clamp_min(torch.finfo(torch.float32).tiny))[:, None]).round().char()
        twin._parameters["weight"] = bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale
        )
        twin.state = copy.copy(module.state)
        twin.state.CB = twin.state.SCB = None
        return twin

    @torch.no_grad()
    def product(self, module: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not _in_4_bits(module):  # rounds activations too, on some devices
            return module(x), (x,)
        return super().product(module, x)


def _in_4_bits(module: Any) -> bool:
    return isinstance(module, bnb.nn.Linear4bit)


def _codes(module: Any) -> tuple[Tensor, Tensor]:
    """Codes and largest value of each row; the layer's first call moves them from the weight to its state."""
    state, weight = module.state, module.weight
    codes = weight.data if weight.CB is None else weight.CB
    return (codes, weight.SCB) if state.SCB is None else (codes if state.CB is None else state.CB, state.SCB)
