"""P-tuning: virtual tokens before the text, which a small network makes of trained embeddings."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.config import check_positive, check_shares
from veneer.errors import VeneerWarning
from veneer.field_types import member
from veneer.prompting.prompts import EncodedPrompt, VirtualTokens, VirtualTokensConfig
from veneer.registry import register
from veneer.sites import Site


class PromptEncoderReparameterizationType(StrEnum):
    """The networks that make virtual tokens of embeddings."""

    MLP = "MLP"
    LSTM = "LSTM"


class Recurrent(nn.Module):
    """A bidirectional LSTM over the virtual tokens, and two layers on top of it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        settings: dict[str, Any] = {"num_layers": config.encoder_num_layers, "dropout": config.encoder_dropout}
        self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True, **settings)
        self.top = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # asked for the shape alone, which the kernel does not tell
            return torch.empty_like(x)
        return self.top(self.lstm(x)[0])


class PromptEncoder(EncodedPrompt):
    """Embeddings, (n, d), and the network on them; with two submodules (2 n, d), of which the first n are used."""

    def __init__(self, sites: Mapping[str, Site], config: PromptEncoderConfig) -> None:
        super().__init__(sites, config)
        width: Any = config.token_dim
        hidden: Any = config.encoder_hidden_size
        total = config.num_virtual_tokens * config.num_transformer_submodules  # type: ignore[operator]
        self.embedding = nn.Parameter(torch.empty(total, width))
        if config.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM:
            self.network = Recurrent(config)
        else:
            widths = [width, hidden, hidden, width]
            layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
            self.network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def reset(self) -> None:
        nn.init.normal_(self.embedding)
        for module in self.network.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.Linear | nn.LSTM):
                module.reset_parameters()

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.encode()[: self.config.num_virtual_tokens]


class PTuning(VirtualTokens):
    r"""Puts n virtual tokens before the text, which a network makes of n trained embeddings.

        E' = [f(P); E],     f = MLP: d -> h -> h -> d with ReLU, or a bidirectional LSTM and two layers on top of it

    Trains: P (n, d) and f; for use, f(P) alone is needed.
    Cost: n d parameters, and 2 d h + h^2 of the MLP, or some 8 d h + 12 h^2 for each layer of the LSTM.
    Start: random. The model is not the base model at the start. Merge: impossible, since the text itself is longer.
    Source: Liu et al. 2021, arXiv:2103.10385, section 3.2, whose template has virtual tokens between the words too:
    here, as in `peft`, they all stand before the text.
    """

    shares = PromptEncoder


@register("p_tuning", num_virtual_tokens=20)
@dataclass
class PromptEncoderConfig(VirtualTokensConfig):
    """Configuration of `PTuning`.

    Args:
        encoder_reparameterization_type: The network: `MLP` or `LSTM`.
        encoder_hidden_size: Its width h; that of the embeddings if none.
        encoder_num_layers: Layers of the LSTM; the MLP has three in any case.
        encoder_dropout: Share that is dropped between layers of the LSTM; the MLP drops nothing.

    Raises:
        ConfigError: Another network, or a size or share that is out of range.
    """

    adapter = PTuning
    peft_name = "P_TUNING"
    learning_rates = {"classification": 2e-3, "causal-lm": 2e-3}  # noqa: RUF012  # read only; of a network

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "encoder_hidden_size", "encoder_num_layers")
        check_shares(self, "encoder_dropout")
        kind = member(self, "encoder_reparameterization_type", PromptEncoderReparameterizationType)
        self.encoder_reparameterization_type = kind
        if kind == PromptEncoderReparameterizationType.MLP and (self.encoder_num_layers != 2 or self.encoder_dropout):
            warnings.warn(
                f"PromptEncoderConfig: encoder_num_layers={self.encoder_num_layers} and encoder_dropout="
                f"{self.encoder_dropout} are those of the LSTM; the MLP has three layers and drops nothing.",
                VeneerWarning,
                stacklevel=4,
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        config = super().on(root, modules)
        return replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)
