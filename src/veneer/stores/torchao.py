"""Layers whose weight is a quantised tensor of torchao."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from veneer.errors import UnsupportedError
from veneer.stores.dense import shallow_copy
from veneer.stores.store import Store


class TorchAoStore(Store):
    """`nn.Linear` with a weight of torchao's: int8, or int4 codes of which it keeps each in a byte."""

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and isinstance(module._parameters.get("weight"), TorchAOBaseTensor)

    def outline(self, module: nn.Module, name: str) -> Tensor:
        tensor = module.get_parameter(name)
        if isinstance(tensor, TorchAOBaseTensor) and not hasattr(tensor, "dequantize"):
            raise UnsupportedError(
                f"torchao gives no gradient through a {type(tensor).__name__}, and does not turn it back into a plain "
                "tensor. Quantise the model with Int8WeightOnlyConfig, IntxWeightOnlyConfig, or with bitsandbytes."
            )
        return torch.empty(tensor.shape, device="meta")

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return module.get_parameter(name).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        return module.get_parameter(name).device

    @torch.no_grad()
    def read(self, module: nn.Module, name: str) -> Tensor:
        tensor = module.get_parameter(name)
        return tensor.dequantize() if isinstance(tensor, TorchAOBaseTensor) else tensor.detach()

    @torch.no_grad()
    def write(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        cast = {k: v.detach().to(self.device(module, k), self.dtype(module, k)) for k, v in tensors.items()}
        if "weight" in cast:
            cast["weight"] = _like(module.get_parameter("weight"), cast["weight"].contiguous())
        return shallow_copy(module, cast)


def _like(old: Tensor, weight: Tensor) -> Tensor:
    """The weight, quantised as the old one is.

    Raises:
        UnsupportedError: Its form cannot be made again.
    """
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
    from torchao.quantization.granularity import PerGroup, PerRow

    if isinstance(old, Int8Tensor) and old.act_quant_kwargs is None:
        group = old.block_size[-1]
        return Int8Tensor.from_hp(weight, PerRow() if group == weight.shape[-1] else PerGroup(group))
    if isinstance(old, IntxUnpackedToInt8Tensor) and old.activation_quantization is None:
        return IntxUnpackedToInt8Tensor.from_hp(weight, tuple(old.block_size), old.target_dtype)
    raise UnsupportedError(
        f"A {type(old).__name__} cannot be written again, so nothing can be merged into it. Keep the adapter beside "
        "the model, or merge into the model in full precision."
    )
