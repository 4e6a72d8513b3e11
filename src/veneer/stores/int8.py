"""Linear layers whose weight is kept in 8 bits and which multiply integers, forward and backward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from veneer.errors import UnsupportedError
from veneer.stores.dense import shallow_copy
from veneer.stores.int8_kernels import product, quantise, quantise_weight
from veneer.stores.store import Store


class Int8Linear(nn.Linear):
    r"""A frozen linear layer in int8.

        W = diag(c) W8 + W_o,   x = diag(s) x8 + x_o
        y = diag(s) (x8 W8^T) diag(c) + x_o W_o^T + b

    One scale c an output channel, one scale s a token, both symmetric. A few input columns o may stay exact: those in
    which activations are so large that the rest of a row would be lost in the step of its scale.
    The gradient by x is the same kind of product, W8 from the other side, with c multiplied into the gradient first.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is one.
        outliers: How many input columns stay exact.
        bits: Of the weight, 7 or 8; some processors are fast with 7 only (`int8_kernels`). Inputs have 8.
        device: Of the tensors.
        dtype: Of bias and exact columns, and of what the layer computes.

    Attributes:
        weight: int8 (out, in), up to 2^(bits - 1) - 1 in size, zero in the exact columns.
        scale: c, (out,), in float32 whatever the layer's type.
        outliers: o, (k,), the exact columns.
        outlier_weight: W_o without its zeros, (out, k).

    Source: Dettmers et al. 2022, arXiv:2208.07339; here the exact columns are chosen once, and the backward pass is in
    int8 too.
    """

    scale: Tensor
    outliers: Tensor
    outlier_weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        outliers: int = 0,
        bits: int = 8,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        shape = (out_features, in_features)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8, device=device), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, device=device, dtype=torch.float32))
        self.register_buffer("outliers", torch.arange(outliers, device=device))
        self.register_buffer("outlier_weight", torch.zeros(out_features, outliers, device=device, dtype=dtype))
        empty = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @classmethod
    def from_linear(cls, linear: nn.Module, outliers: Tensor | None = None, bits: int = 8) -> Int8Linear:
        """The layer in int8, with the bias of `linear` itself.

        Args:
            linear: An `nn.Linear`, or transformers' `Conv1D`, which stores its weight the other way round.
            outliers: Input columns that stay exact.
            bits: Of the weight.
        """
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]
        weight = weight if isinstance(linear, nn.Linear) else weight.t()
        chosen = torch.tensor([], dtype=torch.long) if outliers is None else outliers
        with torch.device("meta"):  # every tensor is replaced
            layer = cls(weight.shape[1], weight.shape[0], bias=False, bits=bits, dtype=weight.dtype)
        layer._buffers["outliers"] = chosen.to(weight.device)
        layer._keep(weight)
        layer._parameters["bias"] = linear._parameters.get("bias")
        return layer.train(linear.training)

    def _keep(self, weight: Tensor) -> None:
        """Holds this weight; the exact columns stay the same ones."""
        exact = weight[:, self.outliers]
        codes, scale = quantise_weight(weight, _without(self.outliers, weight.shape[1]), self.bits)
        self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
        self._buffers["scale"] = scale.squeeze(1).float()
        self._buffers["outlier_weight"] = exact

    @property
    def dtype(self) -> torch.dtype:
        """The type that the layer computes in."""
        return self.outlier_weight.dtype

    def dequantised(self) -> Tensor:
        """The weight that the integers stand for, (out, in)."""
        weight = self.weight.to(self.dtype).mul_(self.scale.to(self.dtype).unsqueeze(1))
        weight[:, self.outliers] = self.outlier_weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():  # put in its place for one call, by torch.func.functional_call
            return F.linear(x, self.weight, self.bias)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Int8.apply(x, self.weight, self.bits, self.scale, self.bias, self.outliers, self.outlier_weight)

    def reset_parameters(self) -> None:
        """Nothing: the layer is frozen."""

    def extra_repr(self) -> str:
        exact = f", {len(self.outliers)} exact columns" if len(self.outliers) else ""
        return f"{super().extra_repr()}{exact}, int8{f', weight of {self.bits} bits' if self.bits != 8 else ''}"

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:  # its exponent would not fit into 16 bits
            self.scale = scale.to(self.scale.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight, outliers = state.get(f"{prefix}weight"), state.get(f"{prefix}outliers")
        if weight is not None and weight.dtype != torch.int8:
            *_, errors = rest
            errors.append(
                f"{prefix}weight is {weight.dtype}, and the layer keeps int8. Load it into the plain model, and "
                "quantise that."
            )
            return
        if outliers is not None and len(outliers) != len(self.outliers):
            self.outliers = self.outliers.new_empty(len(outliers))
            self.outlier_weight = self.outlier_weight.new_empty(self.out_features, len(outliers))
        if weight is not None and not weight.is_meta and self.bits < 8:
            self.bits = 7 if int(weight.abs().amax()) < 2**6 else 8  # products with larger ones would be wrong
        super()._load_from_state_dict(state, prefix, *rest)


def _without(columns: Tensor, count: int) -> Tensor | None:
    """(count,): 1, and 0 for these columns; none where there are none."""
    if not len(columns):
        return None
    return torch.ones(count, device=columns.device).index_fill_(0, columns, 0.0)


class _Memo(threading.local):
    """The last input that was quantised, for the layers that are given the same one (query, key, value; gate, up).

    Holds the result only as long as the input lives.
    """

    source: weakref.ref[Tensor] | None = None
    key: tuple[Any, ...] = ()
    columns: Tensor
    result: tuple[Tensor, Tensor]

    def quantise(self, x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or x.is_inference():
            return quantise(x, _without(columns, x.shape[1]))
        # A flattened input is another tensor each time, but of one memory, which lives as long as what it is a view of.
        owner = x if x._base is None else x._base
        key = (x.data_ptr(), x._version, x.shape, x.stride(), x.dtype, x.device)
        known = self.source is not None and self.source() is owner and key == self.key
        if not known or not torch.equal(columns, self.columns):
            result = quantise(x, _without(columns, x.shape[1]))
            self.source = weakref.ref(owner, self._forget)
            self.key, self.columns, self.result = key, columns, result
        return self.result

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if source is self.source:
            self.source = None
            del self.columns, self.result


_MEMO = _Memo()


def _forward(
    x: Tensor, weight: Tensor, bits: int, scale: Tensor, bias: Tensor | None, outliers: Tensor, outlier_weight: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """W x + b for rows x (n, in), and the form in which x is kept."""
    with torch.autocast(x.device.type, enabled=False):
        x8, token = _MEMO.quantise(x, outliers)
        y = product(x8, token, weight.t(), bits, x.dtype, scale, bias)
        if not len(outliers):
            return y, (x8, token)
        exact = x[:, outliers]  # (n, k)
        return y.addmm_(exact, outlier_weight.t().to(x.dtype)), (x8, token, outliers, exact)


def _backward(g: Tensor, weight: Tensor, bits: int, scale: Tensor, outliers: Tensor, outlier_weight: Tensor) -> Tensor:
    """W^T g for rows g (n, out)."""
    with torch.autocast(g.device.type, enabled=False):
        g8, token = quantise(g, scale)
        back = product(g8, token, weight, bits, g.dtype)
        if len(outliers):
            back[:, outliers] = g @ outlier_weight.to(g.dtype)
        return back


class _Int8(torch.autograd.Function):
    """An `Int8Linear` under autograd. Keeps nothing for the backward pass but the layer's own tensors."""

    @staticmethod
    def forward(x: Tensor, *layer: Any) -> Tensor:
        y, _ = _forward(x.reshape(-1, x.shape[-1]), *layer)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, ctx.bits, scale, _, outliers, outlier_weight = inputs
        ctx.save_for_backward(weight, scale, outliers, outlier_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        flat = g.reshape(-1, g.shape[-1])
        back = None
        if ctx.needs_input_grad[0]:
            weight, *rest = ctx.saved_tensors
            back = _backward(flat, weight, ctx.bits, *rest)
            back = back.view(*g.shape[:-1], back.shape[-1])
        bias = flat.sum(0) if ctx.needs_input_grad[4] else None
        return back, None, None, None, bias, None, None


class Int8Store(Store):
    """`Int8Linear`."""

    rounds_inputs = True

    def holds(self, module: nn.Module) -> bool:
        return isinstance(module, Int8Linear)

    def outline(self, module: nn.Module, name: str) -> Tensor:
        return torch.empty(module.get_parameter(name).shape, device="meta")

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return _layer(module).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        return module.get_parameter(name).device

    def read(self, module: nn.Module, name: str) -> Tensor:
        return _layer(module).dequantised() if name == "weight" else module.get_parameter(name).detach()

    @torch.no_grad()
    def write(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
        device, dtype = self.device(module, "weight"), self.dtype(module, "weight")
        cast = {name: tensor.detach().to(device, dtype) for name, tensor in tensors.items()}
        weight = cast.pop("weight", None)
        twin = _layer(shallow_copy(module, cast))
        twin.__dict__["_buffers"] = dict(module._buffers)
        if weight is not None:
            twin._keep(weight)
        return twin

    def product(self, module: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        layer = _layer(module)
        return _forward(x, layer.weight, layer.bits, layer.scale, layer.bias, layer.outliers, layer.outlier_weight)

    def transposed(self, module: nn.Module, g: Tensor) -> Tensor:
        layer = _layer(module)
        return _backward(g, layer.weight, layer.bits, layer.scale, layer.outliers, layer.outlier_weight)

    def recover(self, kept: tuple[Tensor, ...]) -> Tensor:
        x8, token, *exact = kept
        x = x8.to(token.dtype).mul_(token)
        if exact:
            outliers, values = exact
            x[:, outliers] = values.to(x.dtype)
        return x


def _layer(module: nn.Module) -> Int8Linear:
    if not isinstance(module, Int8Linear):
        raise UnsupportedError(f"{type(module).__name__} is not kept in int8 by Veneer; Int8Linear was expected.")
    return module
