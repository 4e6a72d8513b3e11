"""The last blocks of a model and its head, or the head alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import nn

from veneer import structure
from veneer.errors import ConfigError, TargetError
from veneer.methods.full import Full, FullConfig
from veneer.registry import register


class LastLayers(Full):
    r"""Trains the last k blocks and what comes after them, each layer in a copy of its own, as `Full` does.

    Trains: weights and biases of blocks n - k + 1 to n, of the final norm or pooler, and of the head.
    Cost: as many parameters as these have, and no backward pass through the blocks below.
    A head that has its weight from the embedding is trained alone, as embeddings are below the blocks.
    Start: equals the base model exactly. Merge: exact.
    Source: Lee, Tang and Lin 2019, arXiv:1911.03090; with k = 0 linear probing.
    """

    ties = False


@register("head", layers=0)
@register("last_layers")
@dataclass
class LastLayersConfig(FullConfig):
    """Configuration of `LastLayers`.

    `target_modules=None` means the last blocks and what the model registers after them; of an encoder-decoder these are
    the decoder's.

    Args:
        layers: How many blocks; 0 trains the head alone.
        head: Whether what comes after the blocks is trained too.

    Raises:
        ConfigError: A negative number of blocks, or nothing to train at all.
        TargetError: The model has no such blocks.
    """

    adapter = LastLayers
    peft_name = "LAST_LAYERS"
    learning_rates = {"classification": 3e-4, "causal-lm": 1e-4}  # noqa: RUF012  # read only

    layers: int = 1
    head: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 0 or not (self.layers or self.head):
            raise ConfigError(
                f"LastLayersConfig: layers={self.layers}, head={self.head}; a positive number of blocks, or the head, "
                "was expected."
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.target_modules is not None or self.target_parameters:
            return self
        blocks = structure.blocks(modules)
        if not 0 < max(1, self.layers) <= len(blocks):
            raise TargetError(
                f"layers={self.layers}: {type(root).__name__} has {len(blocks)} blocks that are known as such. Lower "
                "it, or name the modules in target_modules."
            )
        last = blocks[len(blocks) - self.layers :]
        order = list(modules)
        end = max(i for i, path in enumerate(order) if path == blocks[-1] or path.startswith(blocks[-1] + "."))
        chosen = [path for path in order if any(path.startswith(block + ".") for block in last)]
        return self.within(root, modules, chosen + (order[end + 1 :] if self.head else []))
