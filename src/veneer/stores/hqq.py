"""Layers of HQQ."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn

from veneer.stores.store import Store


class HqqStore(Store):
    """`HQQLinear`: codes of 1 to 8 bits with a scale and a zero for each group, both fitted to the weight."""

    def holds(self, module: Any) -> bool:
        return isinstance(module, HQQLinear)

    def outline(self, module: Any, name: str) -> Tensor:
        return torch.empty(module.meta["shape"], device="meta") if name == "weight" else getattr(module, name)

    def dtype(self, module: Any, name: str) -> torch.dtype:
        return module.compute_dtype

    def device(self, module: Any, name: str) -> torch.device:
        return module.W_q.device

    @torch.no_grad()
    def read(self, module: Any, name: str) -> Tensor:
        return module.dequantize() if name == "weight" else getattr(module, name).detach()

    @torch.no_grad()
    def write(self, module: Any, tensors: Mapping[str, Tensor]) -> nn.Module:
        cast = {k: v.detach().to(module.W_q.device, module.compute_dtype) for k, v in tensors.items()}
        bias = cast.get("bias", module.bias)
        if "weight" not in cast:
            twin = copy.copy(module)
            twin.__dict__["_buffers"] = dict(module._buffers)
            twin.__dict__["_parameters"] = dict(module._parameters)
            twin.bias = bias
            return twin
        return HQQLinear.from_weights(
            cast["weight"],
            None if bias is None else nn.Parameter(bias, requires_grad=False),
            {"offload_meta": False, **copy.deepcopy(module.quant_config)},
            compute_dtype=module.compute_dtype,
            device=str(module.W_q.device),
        )
