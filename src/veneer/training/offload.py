"""What a forward pass keeps for the backward pass, moved to the processor's memory until it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UnsupportedError

# Moving smaller tensors costs more time than their memory is worth.
_SMALLEST = 2**16


class Offload:
    """Within `with offload():` activations that are kept for the gradient wait in the processor's memory.

    Parameters and buffers stay where they are, and so does what is smaller than 64 KiB. Gradients are the same to the
    last bit. The copies go through pinned memory, each waiting for the one before.

    Args:
        model: The model, on an accelerator.
        smallest: Bytes from which on a tensor is moved.

    Raises:
        UnsupportedError: The model is on the processor already: there is nowhere cheaper to move to.
    """

    def __init__(self, model: nn.Module, smallest: int = _SMALLEST) -> None:
        self.model, self.smallest = model, smallest
        device = next(model.parameters()).device
        if device.type in ("cpu", "meta"):
            raise UnsupportedError(
                f"training.offload_activations moves activations from an accelerator to the processor, and the model "
                f"is on {device.type}. Use training.activation_checkpointing, which computes them again instead."
            )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        held = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}

        def pack(tensor: Tensor) -> Any:
            small = tensor.numel() * tensor.element_size() < self.smallest
            if small or tensor.device.type == "cpu" or tensor.untyped_storage().data_ptr() in held:
                return tensor
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            return tensor.device, copy.copy_(tensor)

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            device, copy = packed
            return copy.to(device, non_blocking=True)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
