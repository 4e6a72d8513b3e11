"""Layers of GPTQ and AWQ checkpoints: whole numbers packed into 32-bit words.

    GPTQ:  W[o, i] = scales[g(i), o] (q[i, o] - z[g(i), o]),  q packed along the input, z along the output
    AWQ:   the same with g(i) = i // group, q packed along the output, in the order 0 2 4 6 1 3 5 7

Known by their tensors (`qweight`, `qzeros`, `scales`, for GPTQ `g_idx`), whichever package made them.
Source: Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978; files of AutoGPTQ and AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from veneer.errors import UnsupportedError
from veneer.stores.dense import shallow_copy
from veneer.stores.store import Store

_WORD = 32
# Place in a word, counted from its low end, of each of the eight numbers that follow each other in a row.
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class PackedStore(Store):
    """GPTQ of 2, 4 or 8 bits, and AWQ of 4 bits in the layout of its matrix-matrix kernels."""

    def holds(self, module: nn.Module) -> bool:
        return {"qweight", "qzeros", "scales"} <= (module._buffers.keys() | module._parameters.keys())

    def outline(self, module: nn.Module, name: str) -> Tensor:
        if name != "weight":
            return _tensor(module, name)
        _bits(module)
        return torch.empty(_tensor(module, "scales").shape[1], self._inputs(module), device="meta")

    def _inputs(self, module: nn.Module) -> int:
        words = _tensor(module, "qweight").shape[0]
        return words if _is_awq(module) else words * _WORD // _bits(module)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return _tensor(module, "scales").dtype if name == "weight" else _tensor(module, name).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        return _tensor(module, "qweight").device

    @torch.no_grad()
    def read(self, module: nn.Module, name: str) -> Tensor:
        if name != "weight":
            return _tensor(module, name).detach()
        codes, zeros, scales, group = self._unpacked(module)
        return ((codes - zeros[group]) * scales[group]).t().contiguous()

    def _unpacked(self, module: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes (in, out), zeros and scales (groups, out), and the group of each input."""
        scales, bits = _tensor(module, "scales"), _bits(module)
        words, zero_words = _tensor(module, "qweight"), _tensor(module, "qzeros")
        inputs = self._inputs(module)
        if _is_awq(module):
            codes, zeros = (unpack(t, bits, _AWQ_PLACES) for t in (words, zero_words))
            group = torch.arange(inputs, device=words.device) // (inputs // scales.shape[0])
        else:
            codes, zeros = unpack(words.t(), bits).t(), unpack(zero_words, bits)
            if _zeros_are_less_one(module):
                zeros = (zeros + 1) & (2**bits - 1)
            group = _tensor(module, "g_idx").long()
        return codes, zeros[:, : scales.shape[1]], scales, group

    @torch.no_grad()
    def write(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Keeps scales, zeros and groups, which the calibration has found, and rounds to the nearest code.

        Raises:
            UnsupportedError: The layer has no plain bias to write to.
        """
        twin = shallow_copy(module, {})
        twin.__dict__["_buffers"] = dict(module._buffers)
        for name, tensor in tensors.items():
            key = "qweight" if name == "weight" else name
            new = self._packed(module, tensor) if name == "weight" else tensor.detach().to(self.read(module, name))
            if key in twin._buffers:
                twin._buffers[key] = new
            else:
                twin._parameters[key] = nn.Parameter(new, requires_grad=False)
        return twin

    def _packed(self, module: nn.Module, weight: Tensor) -> Tensor:
        _, zeros, scales, group = self._unpacked(module)
        bits = _bits(module)
        wide = weight.detach().to(scales.device).float().t()
        codes = (wide / scales[group].float() + zeros[group]).round().clamp(0, 2**bits - 1).int()
        if _is_awq(module):
            return pack(codes, bits, _AWQ_PLACES)
        return pack(codes.t(), bits).t().contiguous()


def unpack(words: Tensor, bits: int, places: tuple[int, ...] = ()) -> Tensor:
    """Numbers `(n, m * 32 / bits)` out of 32-bit words `(n, m)`; `places` says where in a word each lies."""
    shifts = torch.tensor(places or range(_WORD // bits), device=words.device, dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def pack(codes: Tensor, bits: int, places: tuple[int, ...] = ()) -> Tensor:
    """The inverse of `unpack`."""
    shifts = torch.tensor(places or range(_WORD // bits), device=codes.device, dtype=torch.int32) * bits
    parts = codes.to(torch.int32).unflatten(-1, (-1, _WORD // bits)) << shifts
    return parts.sum(-1, dtype=torch.int32)  # no two have a bit in common


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(module, name)
    return tensor


def _is_awq(module: nn.Module) -> bool:
    """Whether codes are packed along the output: a word then stands for one input."""
    return _tensor(module, "qweight").shape[1] != _tensor(module, "scales").shape[1]


def _bits(module: nn.Module) -> int:
    """How many bits a code has.

    Raises:
        UnsupportedError: Codes go across words, or the layout is another.
    """
    words, scales = _tensor(module, "qweight"), _tensor(module, "scales")
    stated = getattr(module, "bits", None)
    bits = stated if isinstance(stated, int) else _WORD * words.shape[1] // scales.shape[1] if _is_awq(module) else 0
    if not bits:
        bits = _WORD * words.shape[0] // _tensor(module, "g_idx").numel()
    if words.dtype != torch.int32 or bits not in (2, 4, 8) or (_is_awq(module) and bits != 4):
        raise UnsupportedError(
            f"{type(module).__name__} packs {bits}-bit codes into {words.dtype}; GPTQ of 2, 4 or 8 bits and AWQ of 4 "
            "bits in 32-bit words are read. Load the model with another backend, or quantise it to 4 bits."
        )
    return bits


def _zeros_are_less_one(module: nn.Module) -> bool:
    """Whether zeros are stored as one less than they are, as in files of the first version of the format.

    gptqmodel says so of its layers, and others are of the first version.
    """
    told = getattr(module, "qzero_format", None)
    return not callable(told) or told() == 1
