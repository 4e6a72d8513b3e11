"""Activations that are cheap to compute are not kept for the backward pass, but made again from what is kept anyway.

A gated feed-forward block keeps four tensors of its width for a gradient: what the gate gives, its SiLU, the other
half, and their product, which the next layer wants. SiLU and product follow from the other two. A normalised input
follows from the residual stream. So where autograd keeps the result of such an operation, the recipe is kept instead:
the operation's own node of the graph, which has what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.errors import StateError

# Smaller tensors are not worth the calls.
_SMALLEST = 2**14
_VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"})

Recipe = Callable[[], Tensor]
Kept = tuple[Tensor, int]
"""A tensor and how often it had been changed in place: autograd counts only where no hooks are."""


class Recompute:
    """Within `with recompute():` results of cheap operations are computed anew where a gradient asks for them.

    These are products, SiLU, GELU and casts of what the graph holds anyway. Each form of recipe is tried on the first
    tensor that it would replace, and used from then on if it gives the same numbers to the last bit; so gradients are
    the same to the last bit too. Checkpointed segments keep nothing in any case, and are not touched.

    Args:
        tried: Whether recipes are tried; tensors without numbers cannot be compared.
    """

    def __init__(self, tried: bool = True) -> None:
        self.tried = tried
        self._right: dict[tuple[str, torch.dtype], bool] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, tensor: Tensor) -> Kept | Recipe:
        recipe = self._recipe(tensor) if tensor.numel() >= _SMALLEST and tensor.is_contiguous() else None
        return (tensor, tensor._version) if recipe is None else recipe

    def _recipe(self, tensor: Tensor) -> Recipe | None:
        node: Any = tensor.grad_fn
        while node is not None and node.name() in _VIEWS:
            node = node.next_functions[0][0]
        form = _form(node)
        if form is None:
            return None
        dtype, shape = tensor.dtype, tensor.shape

        def recipe() -> Tensor:
            return _value(node, dtype).view(shape)

        key = form, dtype
        if key not in self._right:
            self._right[key] = not self.tried or torch.equal(_unpack(recipe), tensor)
        return recipe if self._right[key] else None


def _unpack(kept: Kept | Recipe) -> Tensor:
    if callable(kept):
        with torch.no_grad():
            return kept()
    tensor, version = kept
    if tensor._version != version:
        raise StateError(
            f"A tensor of shape {tuple(tensor.shape)} that the backward pass needs was changed in place after it was "
            "computed. Change a copy of it, or change it after the backward pass."
        )
    return tensor


def _form(node: Any) -> str | None:
    """How the result of an operation can be made again; none where it cannot.

    >>> x = torch.ones(2, requires_grad=True)
    >>> _form((F.silu(x) * x).grad_fn)
    'MulBackward0(SiluBackward0(kept), kept)'
    """
    name = "" if node is None else node.name()
    if name in ("SiluBackward0", "GeluBackward0"):
        return f"{name}(kept)"
    if name == "ToCopyBackward0":
        inner = _form(node.next_functions[0][0])
        return None if inner is None else f"{name}({inner})"
    if name != "MulBackward0":
        return None
    before = [function for function, _ in node.next_functions]
    # A factor is kept where the other one has a gradient.
    left, right = (_form(before[i]) or (None if before[1 - i] is None else "kept") for i in (0, 1))
    return None if left is None or right is None else f"{name}({left}, {right})"


def _value(node: Any, dtype: torch.dtype) -> Tensor:
    """The result of an operation of the graph; `dtype` is that of casts."""
    name = node.name()
    if name == "SiluBackward0":
        return F.silu(node._saved_self)
    if name == "GeluBackward0":
        return F.gelu(node._saved_self, approximate=node._saved_approximate)
    before = [function for function, _ in node.next_functions]
    if name == "ToCopyBackward0":
        return _value(before[0], dtype).to(dtype)
    left, right = (
        _value(function, dtype) if kept is None else kept
        for function, kept in zip(before, (node._saved_self, node._saved_other), strict=True)
    )
    return left * right


@contextmanager
def recomputed_activations() -> Iterator[None]:
    """Keeps less for the gradient: what follows cheaply from other kept activations is computed anew.

        with veneer.recomputed_activations():
            loss = model(**batch).loss
        loss.backward()

    SiLU, GELU, their products and normalised inputs are made again in the backward pass, to the same bits: 2/5 of what
    a Llama block keeps, for one to two percent of the time. Training by Veneer's `Trainer` does so by itself.
    """
    with Recompute()():
        yield


def suits(args: Any) -> bool:
    """Whether training with these arguments keeps what it keeps in the usual way, so that less can be kept."""
    others = ("offload_activations", "compile_blocks", "torch_compile", "fsdp", "deepspeed")
    return not any(getattr(args, name, None) for name in others)
