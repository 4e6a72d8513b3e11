"""The places that every method is tried on, and the settings that it is tried with.

A method whose test module names no `SETTINGS` is tried with its defaults, so none can be forgotten.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from packed_layers import PackedLinear
from veneer.config import PeftConfig
from veneer.method_strings import parse_method
from veneer.model import PeftModel
from veneer.preparation import prepare
from veneer.registry import methods


def said_of(name: str, what: str, otherwise: Any) -> Any:
    """What the method's test module, `tests/methods/test_<name>.py`, says under a name."""
    try:
        module = importlib.import_module(f"methods.test_{name}")
    except ModuleNotFoundError:
        return otherwise
    return getattr(module, what, otherwise)


def settings_of(name: str) -> list[dict[str, Any]]:
    """`SETTINGS` of the method's test module; the defaults where it has none."""
    return said_of(name, "SETTINGS", [{}])


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Matrix(nn.Module):
    """A module that multiplies by a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.table.t())


class FeedForward(nn.Module):
    """A module that is no matrix, of which the width is seen from its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """Stacked expert weights, one expert a row of the input."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.stack = nn.Parameter(torch.randn(4, 8, 6) if transposed else torch.randn(4, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.stack if self.is_transposed else self.stack.transpose(-1, -2)
        return torch.einsum("bni,nio->bno", x, weight)


class RMSNorm(nn.Module):
    """As model families write it: a scale and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True)
class Spot:
    """A layer and an input batch of four rows for it.

    Args:
        name: For test ids and the support table.
        kind: Kind of its site.
        layer: Makes the layer.
        batch: Makes the input.
        parameter: Name of the bare parameter that is adapted, where that is what is adapted.
    """

    name: str
    kind: str
    layer: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    parameter: str | None = None

    def model(self, dtype: torch.dtype = torch.float64) -> Model:
        model = Model(self.layer())
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model.to(dtype)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        x = self.batch()
        return x.to(dtype) if x.is_floating_point() else x


def _image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(4, *shape)


SPOTS = [
    Spot("Linear", "linear", lambda: nn.Linear(8, 6), _image(5, 8)),
    Spot("Linear without bias", "linear", lambda: nn.Linear(8, 6, bias=False), _image(8)),
    Spot("Conv1D (transformers)", "linear", lambda: Conv1D(6, 8), _image(5, 8)),
    Spot("Conv1d", "conv", lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), _image(6, 9)),
    Spot("Conv2d", "conv", lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2), _image(6, 7, 7)),
    Spot("Conv2d with groups", "conv", lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), groups=2), _image(6, 7, 7)),
    Spot("Conv2d, depthwise", "conv", lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), _image(6, 5, 5)),
    Spot(
        "Conv2d, circular",
        "conv",
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular", bias=False),
        _image(6, 5, 5),
    ),
    Spot("Conv3d", "conv", lambda: nn.Conv3d(4, 6, 2), _image(4, 4, 4, 4)),
    Spot(
        "Embedding", "embedding", lambda: nn.Embedding(11, 6, padding_idx=0), lambda: torch.arange(12).view(4, 3) % 11
    ),
    Spot("LayerNorm", "norm", lambda: nn.LayerNorm(8), _image(5, 8)),
    Spot("RMSNorm", "norm", lambda: RMSNorm(8), _image(5, 8)),
    Spot("GroupNorm", "norm", lambda: nn.GroupNorm(2, 6), _image(6, 5)),
    Spot("module", "module", FeedForward, _image(5, 8)),
    Spot("parameter", "parameter", Matrix, _image(5, 8), "table"),
    Spot("experts", "parameter", lambda: Experts(False), _image(4, 8), "stack"),
    Spot("experts, transposed", "parameter", lambda: Experts(True), _image(4, 8), "stack"),
]


@dataclass(frozen=True)
class Quantised(Spot):
    """A linear layer with 64 inputs and outputs that some store keeps quantised.

    Args:
        rounding: How much of a weight's length quantising it may take: half a step over the usual size of an entry.
        computes_in_int8: Whether activations and gradients are rounded as well.
    """

    rounding: float = 0.0
    computes_in_int8: bool = False

    def model(self, dtype: torch.dtype = torch.float32) -> Model:
        return Model(self.layer())

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.batch()


def dense() -> nn.Linear:
    """What is quantised."""
    layer = nn.Linear(64, 64)
    nn.init.normal_(layer.weight, std=0.2)
    return layer.requires_grad_(False)


def _bits_and_bytes(bits: int) -> nn.Module:
    import bitsandbytes as bnb

    layer = (
        bnb.nn.Linear4bit(64, 64, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    )
    layer.load_state_dict(dense().state_dict())
    return layer.to("cpu")


def _int8() -> nn.Module:
    from veneer.stores.int8 import Int8Linear

    return Int8Linear.from_linear(dense())


def _nf4_int8() -> nn.Module:
    from veneer.stores.nf4_int8 import Nf4Int8Linear

    return Nf4Int8Linear.from_linear4bit(_bits_and_bytes(4))


def _torchao(bits: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = nn.Sequential(dense())
    four = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(model, four if bits == 4 else Int8WeightOnlyConfig())
    return model[0]


def _hqq() -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    return HQQLinear(dense(), BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=torch.float32, device="cpu")


QUANTISED = [
    Quantised("int8", "linear", _int8, _image(5, 64), rounding=0.015, computes_in_int8=True),
    Quantised("bitsandbytes NF4", "linear", lambda: _bits_and_bytes(4), _image(5, 64), rounding=0.15),
    Quantised("NF4, int8", "linear", _nf4_int8, _image(5, 64), rounding=0.15, computes_in_int8=True),
    Quantised("bitsandbytes int8", "linear", lambda: _bits_and_bytes(8), _image(5, 64), rounding=0.015),
    Quantised("torchao int8", "linear", lambda: _torchao(8), _image(5, 64), rounding=0.015),
    Quantised("torchao int4", "linear", lambda: _torchao(4), _image(5, 64), rounding=0.2),
    Quantised("HQQ", "linear", _hqq, _image(5, 64), rounding=0.2),
    Quantised("GPTQ", "linear", lambda: PackedLinear(dense(), awq=False), _image(5, 64), rounding=0.2),
    Quantised("AWQ", "linear", lambda: PackedLinear(dense(), awq=True), _image(5, 64), rounding=0.2),
]


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Name and settings of every method that attaches to one module."""
    return [
        (name, {**preset, **settings})
        for name, cls, preset in methods()
        if name
        == parse_method({"name": name}).method().__module__.rpartition(".")[2]  # others are presets of one class
        for settings in settings_of(name)
    ]


def config(name: str, settings: dict[str, Any], spot: Spot) -> PeftConfig:
    """The configuration that targets the spot's layer or parameter."""
    target = {"target_parameters": [f"layer.{spot.parameter}"]} if spot.parameter else {"target_modules": ["layer"]}
    return parse_method({"name": name, **settings, **target})


def supported(name: str, settings: dict[str, Any], spot: Spot) -> bool:
    """Whether the method says that it makes sense on this spot; the contract holds it to both answers."""
    cls = parse_method({"name": name}).method()
    if cls.kinds and spot.kind not in cls.kinds:
        return False
    if not said_of(name, "fits", lambda settings, spot: True)(settings, spot):  # sizes that have to divide, and such
        return False
    if spot.parameter:
        return spot.kind in cls.kinds and not settings.get("lora_bias")
    if spot.kind == "embedding" and settings.get("lora_bias"):
        return False
    return not cls.kinds or spot.kind in cls.kinds


def show_data(model: PeftModel, spot: Spot, name: str = "default") -> None:
    """Lets an adapter that needs data see a batch of it."""
    x = spot.input(next(model.parameters()).dtype)
    prepare(model, [(x,)], name, loss=lambda model, batch: model(*batch).square().sum())


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Makes every trainable parameter random and non-zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.05)
