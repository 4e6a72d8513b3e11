"""Cartridges: the keys and values of a real context, trained on from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.prompting.key_values import KeyValueConfig, KeyValuePrefix, KeyValues
from veneer.registry import register
from veneer.sites import Site


class Parts(KeyValues):
    """Keys and values of all layers side by side: the first few frozen, (f, layers * 2 * d), the others trained."""

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        count = config.num_frozen_tokens
        self.register_buffer("frozen", torch.empty(count, self.width))
        self.embedding = nn.Parameter(torch.empty(config.num_virtual_tokens - count, self.width))

    frozen: Tensor

    def reset(self) -> None:
        nn.init.normal_(self.frozen)
        nn.init.normal_(self.embedding)

    def columns(self, columns: slice) -> Tensor:
        return torch.cat([self.frozen[:, columns], self.embedding[:, columns]])

    def fill(self, whole: Tensor) -> None:
        count = len(self.frozen)
        super().from_file({"frozen": whole[:count], "embedding": whole[count:]})

    def to_file(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self({})}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.fill(tensors["prompt_embeddings"])


class Cartridge(KeyValuePrefix):
    r"""Trains the keys and values that a context leaves behind, to stand for much more text than their number.

        attention(Q, [P_K; K], [P_V; V]),   P = [F; Z],   F (f, d) frozen, Z (n - f, d) trained

    The first tokens of a text draw attention wherever it goes (they are its sink), so the first f stay as they are.
    What the prefix does to attention is what `PrefixTuning` says.

    Trains: layers * 2 * (n - f) * d numbers, d the width of all heads of keys.
    Start: the keys and values of a text (`init_text`, `initialize_kv_prefix_from_text`), of training examples
    (`init_examples`), or of a cache (`initialize_kv_prefix_from_past_key_values`): then the model with it does what the
    base model does with the context before the text. Otherwise random normal, as in `peft`.
    Merge: impossible, since no weight can add keys.
    Source: Eyuboglu et al. 2025, arXiv:2506.06266, section 4.1.
    """

    shares = Parts
    shared: Parts


@register("cartridge", num_virtual_tokens=20)
@dataclass
class CartridgeConfig(KeyValueConfig):
    """Configuration of `Cartridge`.

    Args:
        num_frozen_tokens: How many tokens at its beginning are not trained.

    Raises:
        ConfigError: That is negative, or more than there are.
    """

    adapter = Cartridge
    peft_name = "CARTRIDGE"

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.num_virtual_tokens
        if self.num_frozen_tokens < 0 or (most is not None and self.num_frozen_tokens > most):
            raise ConfigError(
                f"CartridgeConfig: num_frozen_tokens={self.num_frozen_tokens}; 0 to num_virtual_tokens ({most}) was "
                "expected."
            )
