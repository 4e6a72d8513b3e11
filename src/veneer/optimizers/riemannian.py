"""Riemannian preconditioned LoRA: gradients measured by what they do to the product of the factors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from veneer.errors import ConfigError, UnsupportedError
from veneer.methods.lora import Lora
from veneer.optimizers.places import check_plain, trained_lora


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    r"""An optimiser that preconditions the gradients of LoRA's factors before each step.

        grad_down <- (up^T up + reg)^-1 grad_down,     grad_up <- grad_up (down down^T + reg)^-1

    so that a step does not depend on how the product is split between its factors. All else that is trained is moved as
    `optimizer_cls` does.

    Args:
        model: The adapted model.
        optimizer_cls: Class of the optimiser, such as `torch.optim.AdamW`.
        lr: Learning rate.
        reg: What is added to the diagonals.
        kwargs: Further arguments of `optimizer_cls`.

    Raises:
        ConfigError: `reg` is not positive.
        UnsupportedError: No LoRA adapter is trained, it is a variant that the method does not hold for, or the
            optimiser computes gradients itself.

    Source: Zhang and Pilanci 2024, arXiv:2402.02347, section 3.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return with_preconditioner(optimizer_cls(trained, lr=lr, **kwargs), model, reg)  # type: ignore[call-arg]


def with_preconditioner(optimizer: Optimizer, model: nn.Module, reg: float) -> Optimizer:
    """Lets the optimiser precondition gradients at the beginning of each step; the rest as above."""
    if reg <= 0:
        raise ConfigError(f"reg={reg!r}; a positive number was expected: up starts at zero.")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedError(f"{type(optimizer).__name__} computes gradients within a step. Use Adam or SGD.")
    lora = trained_lora(model, "The Riemannian optimiser")
    check_plain(lora, "The Riemannian optimiser")

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            raise UnsupportedError("step(closure): gradients would be computed anew after they were preconditioned.")
        precondition(lora, reg)

    optimizer.register_step_pre_hook(before)
    return optimizer


@torch.no_grad()
def precondition(lora: list[Lora], reg: float) -> None:
    """Changes the gradients of the adapters' factors in place."""
    factors: list[tuple[Tensor, Tensor, bool]] = []  # gradient, Gram matrix (r, r), whether it acts from the left
    for adapter in lora:
        wide = torch.promote_types(adapter.down.dtype, torch.float32)
        down, up = adapter.down.to(wide), adapter.up.to(wide)
        if adapter.down.grad is not None:
            factors.append((adapter.down.grad, up.mT @ up, True))
        if adapter.up.grad is not None:
            factors.append((adapter.up.grad, down @ down.mT, False))
    for (grad, _, left), inverse in zip(factors, _inverses([gram for _, gram, _ in factors], reg), strict=True):
        wide_grad = grad.to(inverse.dtype)
        grad.copy_(inverse @ wide_grad if left else wide_grad @ inverse)


def _inverses(grams: list[Tensor], reg: float) -> list[Tensor]:
    """(gram + reg)^-1 of each; those of one shape at once, since they are small and many."""
    alike: dict[Any, list[int]] = {}
    for i, gram in enumerate(grams):
        alike.setdefault((gram.shape, gram.dtype, gram.device), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        stack = torch.stack([grams[i] for i in members])
        identity = torch.eye(stack.shape[-1], dtype=stack.dtype, device=stack.device)
        found |= dict(zip(members, torch.linalg.inv(stack + reg * identity), strict=True))
    return [found[i] for i in range(len(grams))]
