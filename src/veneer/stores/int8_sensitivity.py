"""Which layers bear int8, and which of their input columns have to stay exact: measured on real inputs.

The error of a layer is that of its output, token by token, relative to what tells the tokens apart. Large activations
often are the same for all tokens, and would hide in ||y|| what is lost of the rest:

    error^2 = mean over tokens of ||y_int8 - y||^2 / max(||y - m||^2, d),
    m the median output, d the median over tokens of ||y - m||^2

Rounding alone gives about 1%. Where a few columns hold activations far above the rest of a row, the scale is theirs and
the rest is lost in its step: they stay exact. Which ones, their share of the rows' fourth moments says; how many, the
error. Source: Dettmers et al. 2022, arXiv:2208.07339, which goes by the size of the activations alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.stores.int8 import Int8Linear

# Tokens of each batch that are looked at.
ROWS = 64
_COLUMNS = (0, 1, 2, 4, 8, 16, 32)


@dataclass
class Inputs:
    """What some layers have been given, all of them the same.

    Attributes:
        paths: The layers.
        parts: (tokens, in) of each batch.
    """

    paths: list[str] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.parts)


@dataclass(frozen=True)
class Found:
    """What a layer bears.

    Args:
        error: Of the layer in int8.
        columns: How many of the leading columns stay exact for that.
    """

    error: float
    columns: int


@dataclass
class Watch:
    """What was seen, and what is to be left out.

    Attributes:
        inputs: By path, the same object for layers of one input.
        mask: (batch, time), zero at padding, for inputs of that shape.
    """

    inputs: dict[str, Inputs] = field(default_factory=dict)
    mask: Tensor | None = None


@contextmanager
def watching(layers: Mapping[str, nn.Module]) -> Iterator[Watch]:
    """Collects the inputs of layers while the model runs."""
    watch = Watch()
    inputs = watch.inputs
    last: weakref.ref[Tensor] | None = None
    owner = Inputs()

    def see(path: str, x: Tensor) -> None:
        nonlocal last, owner
        shared = last is not None and last() is x
        if path not in inputs:
            # Layers of one width that are called with one tensor, one right after the other: query, key, value.
            owner = owner if shared else Inputs()
            owner.paths.append(path)
            inputs[path] = owner
        if inputs[path].paths[0] == path:
            flat = x.detach().reshape(-1, x.shape[-1])
            if watch.mask is not None and watch.mask.shape == x.shape[:-1]:
                flat = flat[watch.mask.reshape(-1).to(flat.device) != 0]
            chosen = torch.linspace(0, len(flat) - 1, min(ROWS, len(flat))).long()
            inputs[path].parts.append(flat[chosen.to(flat.device)])
        last = weakref.ref(x)

    def hook(path: str) -> object:
        return lambda module, args: see(path, args[0])

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]  # type: ignore[arg-type]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def leading_columns(x: Tensor) -> Tensor:
    """The columns of x (n, in) by their share of the rows' fourth moments, largest first."""
    wide = x.double()
    return (wide / wide.square().mean(1, keepdim=True).sqrt().clamp_min(1e-30)).pow(4).sum(0).argsort(descending=True)


@torch.no_grad()
def examine(layer: nn.Module, x: Tensor, order: Tensor, tolerance: float, bits: int = 8) -> Found:
    """The fewest exact columns with which the error is within the tolerance; the most there may be if none is."""
    exact = _exact(layer, x)
    apart = _apart(exact.float())
    found = Found(float("inf"), 0)
    for count in _COLUMNS:
        if count > len(order) // 4:  # from here on it would hardly be an int8 layer
            break
        quantised = Int8Linear.from_linear(layer, order[:count], bits)
        quantised.bias = None  # type: ignore[assignment]
        lost = (quantised(x) - exact).float().square().sum(1)
        found = Found(float((lost / apart).mean().sqrt()), count)
        if found.error <= tolerance:
            break
    return found


def _apart(y: Tensor) -> Tensor:
    """How far each row of y (n, out) is from the others, squared; its length where they are all the same."""
    distance = (y - y.median(0).values).square().sum(1)
    typical = distance.median()
    if not typical > 0:
        distance, typical = y.square().sum(1), distance.new_tensor(torch.finfo(y.dtype).tiny)
    return distance.clamp_min(typical)


def _exact(layer: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return F.linear(x, weight if isinstance(layer, nn.Linear) else weight.t())
