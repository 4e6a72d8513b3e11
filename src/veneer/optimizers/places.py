"""The LoRA adapters of a model that an optimiser treats in a way of its own."""

from __future__ import annotations

from torch import nn

from veneer.errors import UnsupportedError
from veneer.methods.lora import Lora


def trained_lora(model: nn.Module, optimizer: str) -> list[Lora]:
    """All LoRA adapters that are trained.

    Args:
        model: The adapted model.
        optimizer: Name of the optimiser, for the message.

    Raises:
        UnsupportedError: There is none.
    """
    found = [module for module in model.modules() if isinstance(module, Lora) and module.up.requires_grad]
    if not found:
        raise UnsupportedError(
            f"{optimizer} is made for LoRA's two factors, and the model has no LoRA adapter that is trained. Choose "
            "LoRA or one of its variants as the method, or another optimiser."
        )
    return found


def check_plain(adapters: list[Lora], optimizer: str) -> None:
    """Refuses variants whose weight is not W + s up down with the factors that are trained.

    Raises:
        UnsupportedError: So.
    """
    for adapter in adapters:
        if type(adapter).factors is not Lora.factors:
            name = type(adapter).__name__
            raise UnsupportedError(
                f"{optimizer} takes up and down for the whole change of the weight, and those of {name} adapters are a "
                "part of it. Use LoRA+ or an optimiser of torch."
            )
