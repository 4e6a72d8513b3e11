"""Prefix tuning: trained keys and values before those of the text, in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from veneer.config import PeftConfig
from veneer.errors import CheckpointError, ConfigError
from veneer.prompting.key_values import KeyValueConfig, KeyValuePrefix, KeyValues
from veneer.registry import register
from veneer.sites import Site


class Prefixes(KeyValues):
    """The keys and values themselves, or n embeddings and the network that they are projected by.

    In files `prompt_embeddings` are the keys and values, as in `peft`; embedding and network stand beside them, so that
    training can go on.
    """

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        self.transform: nn.Sequential | None = None
        if not config.prefix_projection:
            self.embedding = nn.Parameter(torch.empty(config.num_virtual_tokens, self.width))
            return
        hidden = config.encoder_hidden_size
        self.embedding = nn.Parameter(torch.empty(config.num_virtual_tokens, config.token_dim))
        self.transform = nn.Sequential(nn.Linear(config.token_dim, hidden), nn.Tanh(), nn.Linear(hidden, self.width))
        self.optional = frozenset(name for name in self.to_file() if name != "prompt_embeddings")

    def reset(self) -> None:
        nn.init.normal_(self.embedding)
        last = self.embedding
        if self.transform is not None:
            self.transform[0].reset_parameters()  # type: ignore[operator]
            self.transform[2].reset_parameters()  # type: ignore[operator]
            last = self.transform[2].weight  # type: ignore[assignment]
        if self.config.init_weights == "zero":
            nn.init.zeros_(last)
            if self.transform is not None:
                nn.init.zeros_(self.transform[2].bias)  # type: ignore[arg-type]

    def columns(self, columns: slice) -> Tensor:
        if self.transform is None:
            return self.embedding[:, columns]
        last: Any = self.transform[2]  # of which only what belongs here
        return nn.functional.linear(self.transform[:2](self.embedding), last.weight[columns], last.bias[columns])

    def fill(self, whole: Tensor) -> None:
        super().from_file({"embedding": whole})

    def start(self, layers: Any) -> Tensor:
        if self.transform is not None:
            raise ConfigError(
                "prefix_projection=True: the keys and values of a context cannot be traced back through the network. "
                "Leave prefix_projection out to start from a context."
            )
        return super().start(layers)

    def to_file(self) -> dict[str, Tensor]:
        if self.transform is None:
            return {"prompt_embeddings": self.embedding}
        more = {f"prefix_encoder.{name}": tensor for name, tensor in self.named_parameters()}
        return {"prompt_embeddings": self({}), **more}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        tensors = dict(tensors)
        whole = tensors.pop("prompt_embeddings")
        if self.transform is None:
            self.fill(whole)
        elif tensors.keys() >= self.optional:
            super().from_file({name.removeprefix("prefix_encoder."): tensor for name, tensor in tensors.items()})
        elif self.config.inference_mode:
            self.transform = None
            self.embedding = nn.Parameter(whole.clone(), requires_grad=False)
        else:
            raise CheckpointError(
                "The file holds keys and values, but not the network that they were projected by (prefix_projection), "
                "so their training cannot go on. Load it without is_trainable, or with prefix_projection=False."
            )


class PrefixTuning(KeyValuePrefix):
    r"""Lets all queries of a layer attend to n trained keys and values beside the real ones.

        attention(Q, [P_K; K], [P_V; V])

    P_K, P_V (heads, n, width) for each layer; with `prefix_projection` they are what a network of two layers makes of
    n embeddings. They stand in no cache and under no mask: within a sliding window, they stay in sight. The text begins
    at position n, as in `peft`, whose prefixes are a cache of the past.

    Trains: layers * 2 * n * d numbers, d the width of all heads of keys.
    Start: random normal, as in `peft`; zero; or, without projection, the keys and values of a text (`init_text`) or of
    training examples (`init_examples`). The model is not the base model at the start in any case.
    Merge: impossible, since no weight can add keys.
    Raises: UnsupportedError where a flash kernel would have to show prefixes to some rows only, or within a window.
    Source: Li and Liang 2021, arXiv:2101.00190, section 4.2 and 4.3 (network); without it and for encoders: Liu et al.
    2021 (P-Tuning v2), arXiv:2110.07602.
    """

    shares = Prefixes
    shared: Prefixes


@register("prefix_tuning", num_virtual_tokens=20)
@dataclass
class PrefixTuningConfig(KeyValueConfig):
    """Configuration of `PrefixTuning`.

    Args:
        init_weights: None for random starting values, `"zero"` for zeros.
        encoder_hidden_size: Width of the network of `prefix_projection`; that of the prefix if none.
        prefix_projection: Whether a network projects embeddings to keys and values while it is trained.

    Raises:
        ConfigError: A start from a context with `prefix_projection` or zeros.
    """

    adapter = PrefixTuning
    peft_name = "PREFIX_TUNING"

    init_weights: Literal["zero"] | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    @property
    def learning_rates(self) -> Mapping[str, float]:  # type: ignore[override]
        """Of keys and values; those of a context are worth keeping, and a network wants the rates that others do."""
        if self.prefix_projection:
            return PeftConfig.learning_rates
        begun = bool(self.init_text or self.init_examples)
        return {"classification": 1e-2 if begun else 3e-2, "causal-lm": 1e-2}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init_text or self.init_examples) and (self.prefix_projection or self.init_weights):
            raise ConfigError(
                "PrefixTuningConfig: a start from a context gives the keys and values themselves. Leave out "
                "prefix_projection and init_weights."
            )

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        config = super().on(root, modules)
        return replace(config, encoder_hidden_size=config.encoder_hidden_size or config.token_dim)
