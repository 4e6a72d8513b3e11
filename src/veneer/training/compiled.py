"""`torch.compile` for a model's repeated blocks."""

from __future__ import annotations

from torch import nn

from veneer.errors import UnsupportedError
from veneer.structure import blocks


def compile_blocks(model: nn.Module, backend: str = "inductor") -> int:
    """Compiles each repeated block of a model, its adapters inside, in place; the rest stays as it is.

    Blocks are alike, so that the compiler works once for all of them, and names and files of the model do not change.

    Args:
        model: The model, adapted or not.
        backend: Of `torch.compile`.

    Returns:
        How many blocks there are.

    Raises:
        UnsupportedError: The model has no repeated blocks.
    """
    paths = blocks(dict(model.named_modules()))
    if not paths:
        raise UnsupportedError(
            f"training.compile_blocks: {type(model).__name__} has no list of like blocks. Use training.torch_compile, "
            "which compiles the model as a whole."
        )
    for path in paths:
        model.get_submodule(path).compile(backend=backend)
    return len(paths)
