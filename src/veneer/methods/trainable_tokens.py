"""Trainable tokens: some rows of the embedding are trained, and the same rows of an output layer that is tied to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import targets
from veneer.adapter import Base, WeightAdapter
from veneer.config import ModuleConfig
from veneer.errors import ConfigError
from veneer.registry import register
from veneer.sites import EmbeddingSite, LinearSite, Site


class Rows(nn.Module):
    """The trained rows, which tied layers hold together."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(count, width))


class TrainableTokens(WeightAdapter):
    r"""Puts trained vectors in the place of those of some tokens.

        W'_t = v_t     for the chosen tokens t;   W' = W elsewhere.  Of a linear layer the tokens are its outputs.

    Trains: rows (n, width), the rows of W at the start. An output layer that is tied to the embedding trains the same.
    Cost: n width parameters; a look-up in them and a selection a call, no copy of the embedding.
    Start: equals the base layer exactly. Merge: exact up to rounding of the dtype.
    Raises: ConfigError without tokens, for tokens that the layer has not, and for one that is named twice.
    Source: the method of that name in `peft`; it replaces rows, so that new ones may start as anything in the base.
    """

    kinds = frozenset({"embedding", "linear"})
    ties = True

    tokens: Tensor
    slots: Tensor

    def __init__(self, site: Site, config: TrainableTokensConfig) -> None:
        super().__init__(site, config)
        width, vocabulary = site.shape if isinstance(site, EmbeddingSite) else site.shape[::-1]
        _check(config.token_indices, vocabulary)
        self.config = config
        self.follows = False
        self.starts_as_base = config.init_weights
        tokens = torch.tensor(config.token_indices, device="cpu")
        self.held = Rows(len(tokens), width)
        self.register_buffer("tokens", tokens, persistent=False)
        if isinstance(site, EmbeddingSite):
            slots = torch.full((vocabulary,), -1, dtype=torch.int32, device="cpu")  # place of a token among the rows
            slots[tokens] = torch.arange(len(tokens), dtype=torch.int32, device="cpu")
            self.register_buffer("slots", slots, persistent=False)

    def tie(self, first: Self) -> None:
        if first.config.token_indices == self.config.token_indices:
            self.held, self.follows = first.held, True
        elif self.config.ensure_weight_tying:
            raise ConfigError(
                f"ensure_weight_tying=True: layers that share their weight train the tokens "
                f"{first.config.token_indices} and {self.config.token_indices}. Name the same tokens for both."
            )

    def reset(self) -> None:
        rows = self.held.rows
        if not self.config.init_weights:
            nn.init.normal_(rows)
            return
        weight = self.site.read()
        with torch.no_grad():
            rows.copy_((weight.t() if isinstance(self.site, EmbeddingSite) else weight)[self.tokens])

    def adapt(self, weight: Tensor) -> Tensor:
        rows = self.held.rows
        wide = torch.promote_types(weight.dtype, rows.dtype)
        if isinstance(self.site, EmbeddingSite):
            return weight.to(wide).index_copy(1, self.tokens, rows.t().to(wide))
        return weight.to(wide).index_copy(0, self.tokens, rows.to(wide))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        rows, site = self.held.rows, self.site
        if isinstance(site, EmbeddingSite) and site.is_plain:
            slots = self.slots[x]  # (batch, length)
            own = site.given(x, F.embedding(slots.clamp_min(0), rows))
            y = base(x)
            return torch.where((slots >= 0).unsqueeze(-1), own.to(y.dtype), y)
        if base.below or not isinstance(site, LinearSite) or not site.is_plain:
            return super().forward(x, base)
        y, bias = base(x), site.bias()
        own = F.linear(x.to(rows.device), rows.to(x.dtype), None if bias is None else bias[self.tokens].to(x.dtype))
        # y is new, so that no copy of all outputs is needed; what a quantised layer returns may be a view.
        put = y.index_copy if site.store.quantised else y.index_copy_
        return put(-1, self.tokens, own.to(y.dtype))

    def to_file(self) -> dict[str, Tensor]:
        return {"trainable_tokens_delta": self.held.rows}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        self.put("held.rows", tensors["trainable_tokens_delta"])


class TokensBeside(TrainableTokens):
    """Trained tokens beside another method, in the layout that `peft` has for them: written once where tied."""

    def to_file(self) -> dict[str, Tensor]:
        return {} if self.follows else {"token_adapter.trainable_tokens_delta": self.held.rows}

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        for tensor in tensors.values():
            self.put("held.rows", tensor)


def _check(tokens: Collection[int], vocabulary: int) -> None:
    """Refuses tokens that cannot be trained.

    Raises:
        ConfigError: So.
    """
    if not tokens:
        raise ConfigError("token_indices is empty, so no token would be trained. List the tokens' indices.")
    if wrong := sorted(token for token in tokens if not 0 <= token < vocabulary):
        raise ConfigError(
            f"token_indices: {wrong} are not in a layer of {vocabulary} tokens. Resize the model's embeddings first, "
            "or correct the indices."
        )
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"token_indices={list(tokens)!r} names a token twice. Leave one of them out.")


@register("trainable_tokens")
@dataclass
class TrainableTokensConfig(ModuleConfig):
    """Configuration of `TrainableTokens`, field by field that of `peft`.

    `target_modules=None` means the embedding of the model's input tokens.

    Args:
        token_indices: The tokens to train.
        init_weights: Start as the base model's rows; False for random ones.
    """

    adapter = TrainableTokens
    peft_name = "TRAINABLE_TOKENS"
    own_fields = frozenset({"exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save"})
    default_targets = (["embed_tokens"],)
    ensure_weight_tying = False  # a setting of those beside other methods; here tied layers always are as one

    token_indices: list[int] = field(default_factory=list)
    init_weights: bool = True

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        found = None if self.target_modules is not None else targets.input_embedding(root, modules)
        return self if found is None else replace(self, target_modules=targets.exactly([found], modules))


@dataclass
class TokensBesideConfig(TrainableTokensConfig):
    """Configuration of `TokensBeside`, as other methods make it for their `trainable_token_indices`."""

    adapter = TokensBeside
    ensure_weight_tying: bool = False


def beside(tokens: list[int] | dict[str, list[int]] | None, config: ModuleConfig) -> list[ModuleConfig]:
    """What trains these tokens beside another method.

    Args:
        tokens: Tokens of the model's input embedding, or of the modules that are named.
        config: Configuration of the other method.
    """
    if tokens is None:
        return []
    places = tokens if isinstance(tokens, dict) else {None: tokens}
    return [
        TokensBesideConfig(
            target_modules=None if module is None else [module],
            token_indices=indices,
            modules_to_save=config.modules_to_save,
            ensure_weight_tying=getattr(config, "ensure_weight_tying", False),
        )
        for module, indices in places.items()
    ]
