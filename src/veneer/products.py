"""Products of a linear layer and of the thin matrices beside it, forward and backward written by hand.

    y = W x + b + s up down x,    down (r, in),  up (out, r),  r much smaller than in and out

Three things make this faster than the same lines under autograd:

- Thin products are several times as fast one way round as the other: `down @ x.t()` is (r, n) and reads x along its
  rows, and so does `hidden @ g` for the gradient of `up`; autograd takes `g.t() @ hidden`.
- The parts of a sum are added onto one tensor where they are made: y, and the gradient of x.
- Layers that are called one after the other with the same input (query, key, value; gate, up) run as one: their
  hidden activations and the gradients of their `down` are one product, and their gradients of x are one sum.

Nothing is kept for the backward pass but x, in the form in which the layer's store has it, and the hidden activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.errors import UnsupportedError

if TYPE_CHECKING:
    from veneer.sites import LinearSite


@dataclass(frozen=True)
class LowRank:
    """The matrix scale * up down, which changes a weight.

    Args:
        down: (r, in).
        up: (out, r).
        scale: What the product is multiplied by.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0


def add_low_rank(x: Tensor, y: Tensor, matrix: LowRank) -> Tensor:
    """y + scale * up down x, in the type of y.

    Args:
        x: (..., in).
        y: (..., out).
        matrix: The thin matrices, in one type; x is brought to it.
    """
    x = x.to(matrix.down.device, matrix.down.dtype)
    if not allowed_by_hand(x):
        return y + (matrix.scale * F.linear(F.linear(x, matrix.down), matrix.up)).to(y.dtype)
    flat = _Add.apply(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), matrix.down, matrix.up, matrix.scale)
    return flat.view(y.shape)


def run_layers(
    x: Tensor, sites: Sequence[LinearSite], matrices: Sequence[LowRank], pending: object = None
) -> tuple[Tensor, ...]:
    """What each layer, with its matrix added to the weight, makes of x.

    Args:
        x: (..., in).
        sites: Layers for which `runs_by_hand` says so, all of one store.
        matrices: One a layer, all of one type.
        pending: Kept until the backward pass through the layers has been done, or cannot come any more.
    """
    factors = [tensor for matrix in matrices for tensor in (matrix.down, matrix.up)]
    scales = tuple(matrix.scale for matrix in matrices)
    return _Layers.apply(x, tuple(sites), scales, pending, *factors)


def runs_by_hand(site: LinearSite, x: Tensor, down: Tensor) -> bool:
    """Whether the layer may be run by `run_layers` for this input: it is frozen, and nothing else happens in it."""
    layer = site.module
    if not site.is_plain or is_hooked(layer) or not allowed_by_hand(x):
        return False
    trained = any(tensor is not None and tensor.requires_grad for tensor in layer._parameters.values())
    return not trained and x.device == down.device == site.device and x.dtype == site.dtype


def is_hooked(layer: nn.Module) -> bool:
    """Whether a call of the layer runs more than its class says: hooks of others, or a `forward` put in its place."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in vars(layer)


def allowed_by_hand(x: Tensor) -> bool:
    """Whether functions with a backward pass of their own may be used now."""
    # Compilers fuse better what they can see; autocast and the transforms of torch.func follow plain operations only.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return not torch._C._are_functorch_transforms_active()


def _hidden(down: Tensor, x: Tensor) -> Tensor:
    """down x for each row of x: (r, n)."""
    return down @ x.t()


def _add_onto(y: Tensor, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """Adds scale * up hidden to y (n, out), which changes."""
    if y.dtype == up.dtype:
        return y.addmm_(hidden.t(), up.t(), alpha=scale)
    return y.add_((hidden.t() @ up.t()).mul_(scale))


class _Add(torch.autograd.Function):
    """y + s up down x, with y from elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        hidden = _hidden(down, x)  # (r, n)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.scale = scale
        if y.dtype == up.dtype:
            return torch.addmm(y, hidden.t(), up.t(), alpha=scale)
        return y + (hidden.t() @ up.t()).mul_(scale).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, down, up = ctx.saved_tensors
        wide = g.to(up.dtype)
        if torch.is_grad_enabled():  # of the gradient too: hidden has no graph
            hidden = _hidden(down, x)
        grad_hidden = (up.t() @ wide.t()) * ctx.scale  # (r, n)
        needs_x, _, needs_down, needs_up, _ = ctx.needs_input_grad
        return (
            grad_hidden.t() @ down if needs_x else None,
            g,
            grad_hidden @ x if needs_down else None,
            (hidden @ wide).t() * ctx.scale if needs_up else None,
            None,
        )


class _Layers(torch.autograd.Function):
    """Several frozen layers of one input, each with a thin product: y_i = W_i x + b_i + s_i up_i down_i x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sites: tuple[LinearSite, ...], scales: tuple[float, ...], pending: object, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        flat = x.reshape(-1, x.shape[-1])  # (n, in)
        downs, ups = factors[::2], factors[1::2]
        down = downs[0] if len(downs) == 1 else torch.cat(downs)
        hidden = _hidden(down, flat.to(down.dtype))  # (sum of r, n)
        outputs: list[Tensor] = []
        kept: tuple[Tensor, ...] = ()
        for site, up, part, scale in zip(sites, ups, hidden.split([d.shape[0] for d in downs]), scales, strict=True):
            y, form = site.product(flat)
            # The input itself, if that is what is kept: its own graph goes on then.
            kept = kept or tuple(x if tensor is flat else tensor for tensor in form)
            outputs.append(_add_onto(y, part, up, scale).view(*x.shape[:-1], -1))
        ctx.set_materialize_grads(False)
        ctx.sites, ctx.scales, ctx.shape, ctx.pending = sites, scales, x.shape, pending
        # What x becomes is of no use where only it is asked for a gradient.
        needed = any(ctx.needs_input_grad[4::2])
        ctx.save_for_backward(hidden, *factors, *(kept if needed else ()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sites: tuple[LinearSite, ...] = ctx.sites
        hidden, *saved = ctx.saved_tensors
        ctx.pending = None
        factors, kept = saved[: 2 * len(sites)], saved[2 * len(sites) :]
        if torch.is_grad_enabled():
            return _twice(ctx, factors, kept, grads)
        downs, ups = factors[::2], factors[1::2]
        ranks = [down.shape[0] for down in downs]
        needs_x, needs_down = ctx.needs_input_grad[0], any(ctx.needs_input_grad[4::2])
        grad_hidden = torch.empty_like(hidden)  # (sum of r, n)
        grad_x: Tensor | None = None
        grad_ups: list[Tensor | None] = []
        parts = zip(sites, ups, hidden.split(ranks), grad_hidden.split(ranks), ctx.scales, grads, strict=True)
        for number, (site, up, part, grad_part, scale, grad) in enumerate(parts):
            if grad is None:  # this output was not used
                grad_part.zero_()
                grad_ups.append(None)
                continue
            g = grad.reshape(-1, grad.shape[-1])
            wide = g.to(up.dtype)
            if needs_x or needs_down:
                torch.mm(up.t(), wide.t(), out=grad_part)
                grad_part.mul_(scale)
            grad_ups.append((part @ wide).mul_(scale).t() if ctx.needs_input_grad[5 + 2 * number] else None)
            if needs_x:
                grad_x = site.transposed(g, grad_x)
        grad_downs: Sequence[Tensor | None] = [None] * len(sites)
        if needs_down:
            x = sites[0].store.recover(tuple(kept)).reshape(-1, ctx.shape[-1])
            grad_downs = (grad_hidden @ x.to(hidden.dtype)).split(ranks)
        if grad_x is not None:
            _add_onto(grad_x, grad_hidden, (downs[0] if len(downs) == 1 else torch.cat(downs)).t(), 1.0)
            grad_x = grad_x.view(ctx.shape)
        by_factor = [grad for pair in zip(grad_downs, grad_ups, strict=True) for grad in pair]
        return grad_x, None, None, None, *by_factor


def _twice(
    ctx: Any, factors: Sequence[Tensor], kept: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients as functions of everything, for gradients of gradients."""
    sites: tuple[LinearSite, ...] = ctx.sites
    if sites[0].store.quantised or not kept:
        raise UnsupportedError(
            f"Gradients of gradients were asked for through {type(sites[0].module).__name__}, whose input is not kept "
            "exactly. Load the base model without quantisation, or call backward without create_graph."
        )
    (x,) = kept
    outputs = []
    for site, down, up, scale in zip(sites, factors[::2], factors[1::2], ctx.scales, strict=True):
        y = F.linear(x, site.read(), site.bias())
        outputs.append(y + (scale * F.linear(F.linear(x.to(down.dtype), down), up)).to(y.dtype))
    used = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [tensor for tensor in (x, *factors) if tensor.requires_grad]
    found = iter(
        torch.autograd.grad([y for y, _ in used], wanted, [g for _, g in used], create_graph=True, allow_unused=True)
    )
    grad_x, *by_factor = [next(found) if tensor.requires_grad else None for tensor in (x, *factors)]
    return grad_x, None, None, None, *by_factor
