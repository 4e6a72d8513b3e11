"""What methods have in common whose prefixes are keys and values of every layer.

`KeyValues` holds them for all layers of one adapter, `KeyValuePrefix` shows them to the queries of one attention.
A method says in `KeyValues.columns` what they are made from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from veneer.adapter import Adapter, Base
from veneer.config import own
from veneer.errors import ConfigError, TargetError
from veneer.prompting.prompts import Prompt, PromptLearningConfig
from veneer.sites import Site
from veneer.structure import attentions
from veneer.targets import match

PLACES = ("self", "encoder", "cross")


class KeyValues(Prompt):
    """Keys and values of all layers side by side, (n, layers * 2 * d); in files `prompt_embeddings`, as in `peft`."""

    def __init__(self, sites: Mapping[str, Site], config: Any) -> None:
        super().__init__(sites, config)
        self.config = config
        self.places: list[str] = []
        self.relative: list[nn.Module] = []  # what knows the bias of relative positions, one for each half
        self.width: int = config.num_layers * 2 * config.token_dim

    def columns(self, columns: slice) -> Tensor:
        """Some columns of all, (n, columns)."""
        raise NotImplementedError

    def fill(self, whole: Tensor) -> None:
        """Takes over all of them, (n, layers * 2 * d)."""
        raise NotImplementedError

    def forward(self, inputs: Mapping[str, Any]) -> Tensor:
        return self.columns(slice(0, self.width))

    def of_layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (heads, n, width)."""
        config = self.config
        if config.num_transformer_submodules == 2:
            # `peft` hands an encoder-decoder its layers two at a time, so each finds every other pair, and the upper
            # half those of the lower half again. Its files mean that.
            index = 2 * index % config.num_layers
        both = self.columns(slice(2 * index * config.token_dim, 2 * (index + 1) * config.token_dim))
        keys, values = both.view(config.num_virtual_tokens, 2, config.num_attention_heads, -1).permute(1, 2, 0, 3)
        return keys, values

    def start(self, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Takes over what a model has computed for a context: the first n keys and values of each layer.

        Args:
            layers: Keys and values of each layer, (1, heads, at least n, width).

        Returns:
            All of them as one tensor, (n, layers * 2 * d).

        Raises:
            ConfigError: They are not of that shape, or layers have theirs in common.
        """
        config, n = self.config, self.config.num_virtual_tokens
        if config.num_transformer_submodules == 2:
            raise ConfigError(
                "num_transformer_submodules=2: as in peft, layers have their keys and values in common, so they cannot "
                "be those of a context. Name the places: places=['self']."
            )
        wanted = (1, config.num_attention_heads, config.token_dim // config.num_attention_heads)
        shapes = [tuple(x.shape) for pair in layers for x in pair]
        odd = next((s for s in shapes if len(s) != 4 or (s[0], s[1], s[3]) != wanted or s[2] < n), None)
        if odd is not None or len(layers) != config.num_layers:
            raise ConfigError(
                f"The context has keys and values of {len(layers)} layers, {odd or shapes[0]}; {config.num_layers} "
                f"layers of {(*wanted[:2], f'at least {n}', wanted[2])} (rows, heads, tokens, width) were expected. "
                "Take one text of at least num_virtual_tokens tokens, read by the base model."
            )
        pairs = [torch.stack([x[0, :, :n] for x in pair]) for pair in layers]  # (2, heads, n, width)
        whole = torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)
        self.fill(whole)
        return whole


class KeyValuePrefix(Adapter):
    """On an attention module: lets its queries attend to keys and values beside the real ones, under one softmax."""

    kinds = frozenset({"module"})
    splits_rows = False
    starts_as_base = False
    shared: KeyValues

    @classmethod
    def build(cls, module: nn.Module, site: Site | None, config: Any) -> Self:
        adapter = cls(site, config)
        adapter.attention = [module]  # in a list, so that it is no submodule
        return adapter

    attention: list[nn.Module]

    @property
    def device(self) -> torch.device | None:
        return next((parameter.device for parameter in self.attention[0].parameters()), None)

    def join(self, shared: Any, path: str) -> None:
        super().join(shared, path)
        self.index = len(self.shared.places)
        self.shared.places.append(path)

    @classmethod
    def shift(cls, config: Any) -> int:
        return config.num_virtual_tokens if "self" in (config.places or ["self"]) else 0

    @classmethod
    def needs_data(cls, config: Any) -> bool:
        return bool(config.init_text or config.init_examples)

    @classmethod
    def prepare(cls, adapters: dict[str, Self], config: Any, run: Any) -> None:
        from veneer.prompting.contexts import of_examples, of_text, read

        read(adapters, run, *(of_examples if config.init_examples else of_text)(config, run))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        from veneer.attention import hooks
        from veneer.prompting.prefixes import PREFIXES, Prefix

        keys, values = self.shared.of_layer(self.index)
        layer: Any = base.layer
        prefix = Prefix(keys, values, base.rows, bias=self._bias(layer, base.kwargs))
        base.kwargs = {**base.kwargs, PREFIXES: [*base.kwargs.get(PREFIXES, ()), prefix]}
        with hooks([layer.config]):
            return base(x)

    def _bias(self, layer: Any, kwargs: Mapping[str, Any]) -> Any:
        """The scores that relative positions add (T5); the prefix stands before all that was ever read."""
        if getattr(layer, "has_relative_attention_bias", False):
            self.shared.relative = [*(m for m in self.shared.relative if m.is_decoder != layer.is_decoder), layer]
        if "key_value_states" in kwargs and kwargs["key_value_states"] is not None:
            return None  # cross attention has none
        knowing: Any = next(
            (m for m in self.shared.relative if m.is_decoder == getattr(layer, "is_decoder", None)), None
        )
        if knowing is None:
            return None
        n, cache = self.shared.config.num_virtual_tokens, kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(layer.layer_idx))
        return lambda length: knowing.compute_bias(length, n, past_seen_tokens=n + past)[0]


@dataclass
class KeyValueConfig(PromptLearningConfig):
    """What the configurations of such prefixes have in common.

    Args:
        places: Which attention has prefixes: `self` (of a decoder, or of an encoder where there is no other half),
            `encoder` (the encoder's of an encoder-decoder), `cross`. `peft` knows the first only.
        init_text: A text that the prefix starts from: the keys and values that the model has for its first n tokens.
            Read by `veneer.prepare(model)`, and by `veneer train` itself. All of them without `num_virtual_tokens`.
        init_examples: Start from those of the first examples of the training data instead, one after the other.
        tokenizer_name_or_path: The tokenizer of `init_text`; that of the base model if none.

    Raises:
        ConfigError: There is no such place, two starts, or other modules are named.
        TargetError: The model's attention does not look its function up, so nothing can be joined to it.
    """

    places: list[str] | None = own(None)
    init_text: str | None = own(None)
    init_examples: bool = own(False)
    tokenizer_name_or_path: str | None = own(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if unknown := set(self.places or ()) - set(PLACES):
            raise ConfigError(f"{name}: places={self.places!r}; {sorted(unknown)[0]!r} is none of {', '.join(PLACES)}.")
        if self.init_text and self.init_examples:
            raise ConfigError(f"{name}: init_text and init_examples are two starts. Choose one.")

    def on(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> Self:
        if self.num_virtual_tokens is None and self.init_text:
            from veneer.prompting.contexts import text_ids

            return replace(self, num_virtual_tokens=len(text_ids(self))).on(root, modules)
        paths = self._paths(root, modules)
        known = super().on(root, modules)
        if self.target_modules not in (None, paths):
            raise ConfigError(
                f"{type(self).__name__}: target_modules={self.target_modules!r}; prefixes are in the attention of all "
                "layers. Leave it out, or choose by places, layers_to_transform or exclude_modules."
            )
        adapted = match(root, replace(self, target_modules=paths), modules=modules)
        heads, width = key_shape(modules[paths[0]], known.num_attention_heads, known.token_dim)
        filled = {
            "num_layers": len(adapted),
            "num_attention_heads": heads,
            "token_dim": heads * width,
            "num_transformer_submodules": 1 if self.places else None,
        }
        unknown: dict[str, Any] = {name: value for name, value in filled.items() if getattr(self, name) is None}
        config = replace(self, **unknown)
        return replace(super(KeyValueConfig, config).on(root, modules), target_modules=paths)

    def _paths(self, root: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
        found = hookable(root, modules)
        wanted = self.places or ["self"]
        paths = [path for path in modules if any(path in found[place] for place in wanted)]
        if not paths:
            raise TargetError(
                f"{type(root).__name__} has no attention at places={wanted}; it has "
                f"{', '.join(place for place in found if found[place])}."
            )
        return paths

    def resolved(self, modules: Mapping[str, nn.Module], paths: Sequence[str]) -> Self:
        return replace(self, target_modules=None)


def hookable(root: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """`structure.attentions`, where there are any.

    Raises:
        TargetError: There are none.
    """
    found = attentions(root, modules)
    if not any(found.values()):
        raise TargetError(
            f"{type(root).__name__}: none of its modules looks its attention function up where transformers "
            "registers them (ALL_ATTENTION_FUNCTIONS), so there is no layer that prefixes could be joined to. Use a "
            "method of another kind, such as prompt_tuning or lora."
        )
    return found


def key_shape(attention: Any, heads: int | None, hidden: int | None) -> tuple[int, int]:
    """Number of heads of keys, and width of a head, of an attention module.

    Args:
        attention: The module.
        heads: The number of heads of queries.
        hidden: The width of all of them.
    """
    settings = attention.config
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    width = getattr(attention, "head_dim", None) or getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    return getattr(text, "num_key_value_heads", None) or heads, width or hidden // heads  # type: ignore[operator,return-value]
