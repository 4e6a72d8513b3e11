"""Quantised layers without their numbers, for estimates.

What a form keeps of a weight, what its products need meanwhile and how long they take does not follow from shapes:
every package packs and multiplies in its own way. So one layer of each size is made, from random weights, and asked. In
a simulated step every other one of that size is an `OutlineLinear`, whose products are single operations, which
`simulation` times on the layer that was made.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from veneer import quantised_bases
from veneer.evaluation.simulation import Recorder
from veneer.stores import Store, int8_kernels, quantised_store

# The layers that were made, by what stands for them in operations.
_MADE: dict[str, nn.Module] = {}


class OutlineLinear(nn.Module):
    """A frozen linear layer in some form, of which only sizes are known.

    Args:
        linear: The plain layer, on the meta device.
        key: Under which operations find the layer of its form and size that was made.
        size: Bytes of what that keeps besides its bias.
    """

    def __init__(self, linear: nn.Linear, key: str, size: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.key = linear.in_features, linear.out_features, key
        self.dtype = linear.weight.dtype
        self.kept = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return _Outlined.apply(x, self)


def replace(base: nn.Module, paths: Iterable[str], name: str, device: torch.device) -> None:
    """Puts outlines in the place of linear layers on the meta device.

    Args:
        base: The model; changed in place.
        paths: The layers.
        name: Their form, one of `quantised_bases.FORMS`.
        device: Where the run computes.
    """
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        owner = base.get_submodule(parent)
        linear: Any = owner._modules[leaf]
        # A layer that bitsandbytes has put there holds its weight's type too, as long as it has no device.
        size = (linear.out_features, linear.in_features, linear.bias is not None, linear.weight.dtype)
        key, kept = _make(name, size, device)
        owner._modules[leaf] = OutlineLinear(linear, key, kept)


def load(name: str, device: torch.device) -> None:
    """Imports and compiles what layers of a form run on."""
    if name in ("int8", "nf4-int8"):
        int8_kernels.compile_steps(int8_kernels.weight_bits())
    with torch.no_grad():
        layer = quantised_bases.quantised_layer(name, nn.Linear(64, 64, device=device))
        _store(layer).product(layer, torch.ones(64, 64, device=device))


def hidden(model: nn.Module) -> int:
    """Numbers of weights that outlines stand for, beyond the bytes that they keep as parameters."""
    layers = [module for module in model.modules() if isinstance(module, OutlineLinear)]
    return sum(layer.in_features * layer.out_features - layer.kept.numel() for layer in layers)


@functools.cache
def _make(name: str, size: tuple[int, int, bool, torch.dtype], device: torch.device) -> tuple[str, int]:
    """Makes a layer of this form and size. Its key, and the bytes that it keeps."""
    rows, columns, bias, dtype = size
    linear = nn.Linear(columns, rows, bias=bias, device=device, dtype=dtype).requires_grad_(False)
    recorder = Recorder()
    _operation()  # counters of operations that begin from now on know it
    with recorder(), torch.no_grad():
        made = quantised_bases.quantised_layer(name, linear)
    key = f"{name} {size} {device}"
    _MADE[key] = made.eval()
    del linear
    return key, recorder.live.total()


# ---- What is asked of the layer that was made ----


def _store(layer: nn.Module) -> Store:
    store = quantised_store(layer)
    assert store is not None
    return store


def _run(given: list[Tensor], key: str, what: str) -> list[Tensor]:
    """Does one thing with the layer that was made.

    Args:
        given: What it is done with.
        key: The layer.
        what: `product` gives W x + b, and what is kept of x where that is not x; `product again` the same where the
            product before was with this x; `transposed` W^T g, `recover` x of what is kept of it, `read` W.
    """
    layer = _MADE[key]
    store = _store(layer)
    if what.startswith("product"):
        # Without its past, nothing is known of an input that was quantised before.
        x = given[0] if what == "product again" else given[0].detach()
        y, kept = store.product(layer, x)
        return [y, *(tensor for tensor in kept if tensor is not x)]
    if what == "transposed":
        return [store.transposed(layer, given[0].detach())]
    return [store.recover(tuple(given)) if what == "recover" else store.read(layer, "weight")]


@dataclass(frozen=True)
class _Answer:
    """What came of it.

    Args:
        results: Size and type of each.
        working: Bytes that were needed besides, meanwhile.
        kept: Bytes that were left for the backward pass, besides the results.
    """

    results: tuple[tuple[torch.Size, torch.dtype], ...]
    working: int
    kept: int


@functools.cache
def _ask(what: str, key: str, given: tuple[tuple[torch.Size, torch.dtype], ...]) -> _Answer:
    """Does it with ones; `what` may also be `call`, the layer under autograd."""
    layer = _MADE[key]
    device = _store(layer).device(layer, "weight")
    with _disable_current_modes(), torch.device(device):
        tensors = [torch.ones(size, dtype=dtype) for size, dtype in given]

        def run() -> list[Tensor]:
            if what == "call":
                with torch.enable_grad():
                    return [layer(tensors[0].requires_grad_())]
            with torch.no_grad():
                return _run(tensors, key, what)

        run()  # what is made once for all calls is none of this one's
        recorder = Recorder()
        with recorder():
            results = run()
        kept = recorder.live.total() - sum(t.numel() * t.element_size() for t in results)
        working = recorder.peak.total() - recorder.live.total()
    return _Answer(tuple(map(_sized, results)), working, max(0, kept))


def _sized(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


# ---- The same in a simulated step ----


@functools.cache
def _operation() -> Callable[[list[Tensor], str, str], list[Tensor]]:
    """What is asked of a layer, as one operation of torch's; registered when it is first needed, in one place."""
    operation = torch.library.custom_op("veneer::outlined", _run, mutates_args=())

    @operation.register_fake
    def _(given: list[Tensor], key: str, what: str) -> list[Tensor]:
        answer = _ask(what, key, tuple(map(_sized, given)))
        return [given[0].new_empty(size, dtype=dtype) for size, dtype in answer.results]

    @register_flop_formula(torch.ops.veneer.outlined)
    def _(given: list[torch.Size], key: str, what: str, **named: Any) -> int:
        layer: Any = _MADE[key]
        products = what == "transposed" or what.startswith("product")
        return 2 * given[0][0] * layer.in_features * layer.out_features if products else 0

    return operation


class OutlineStore(Store):
    """`OutlineLinear`, which does what the store of its form does, without numbers."""

    def __init__(self) -> None:
        self._key = ""
        self._input: weakref.ref[Tensor] | None = None  # of the last product

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, OutlineLinear)

    def outline(self, module: nn.Module, name: str) -> Tensor:
        layer = _layer_of(module)
        size = (layer.out_features, layer.in_features)
        return torch.empty(size if name == "weight" else size[:1], device="meta")

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return _layer_of(module).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        return _layer_of(module).kept.device

    def read(self, module: nn.Module, name: str) -> Tensor:
        layer = _layer_of(module)
        return self._simulate("read", layer.key, layer.kept.detach())[0] if name == "weight" else layer.bias.detach()

    def product(self, module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        owner = x if x._base is None else x._base
        again = self._input is not None and self._input() is owner
        self._input, self._key = weakref.ref(owner), _layer_of(module).key
        y, *kept = self._simulate("product again" if again else "product", self._key, x)
        return y, tuple(kept) or (x,)

    def transposed(self, module: nn.Module, g: Tensor) -> Tensor:
        return self._simulate("transposed", _layer_of(module).key, g)[0]

    def recover(self, kept: tuple[Tensor, ...]) -> Tensor:
        # All layers of a model are of one form, and one that keeps x itself keeps nothing else.
        return kept[0] if kept[0].is_floating_point() else self._simulate("recover", self._key, *kept)[0]

    @staticmethod
    def _simulate(what: str, key: str, *given: Tensor) -> list[Tensor]:
        if given[0].is_meta:  # while the model is built: nobody looks at memory
            return _operation()(list(given), key, what)
        needed = _ask(what, key, tuple(map(_sized, given))).working
        memory = torch.empty(needed, dtype=torch.uint8, device=given[0].device)
        results = _operation()(list(given), key, what)
        del memory
        return results


class _Outlined(torch.autograd.Function):
    """A layer by itself under autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: OutlineLinear) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, _ = _STORE.product(layer, flat)
        left = _ask("call", layer.key, (_sized(flat),)).kept
        ctx.layer = layer
        ctx.save_for_backward(torch.empty(left, dtype=torch.uint8, device=x.device))
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        back = _STORE.transposed(ctx.layer, g.reshape(-1, g.shape[-1]))
        return back.view(*g.shape[:-1], -1), None


_STORE = OutlineStore()


def _layer_of(module: nn.Module) -> OutlineLinear:
    assert isinstance(module, OutlineLinear)
    return module
