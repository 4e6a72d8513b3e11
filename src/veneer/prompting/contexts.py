"""Prefixes that start from a real context: the keys and values that the frozen model has for a text.

Functions under the names of `peft`, and what `prepare` calls for `init_text` and `init_examples`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer import checkpoint
from veneer.adapter import Adapter, Base
from veneer.attention import SEES, hooks
from veneer.config import PeftConfig
from veneer.data.batches import IGNORED
from veneer.errors import BaseMismatchError, ConfigError, StateError
from veneer.methods.cartridge import CartridgeConfig
from veneer.model import PeftModel
from veneer.preparation import Run, places_of, settle
from veneer.prompting.key_values import KeyValueConfig, KeyValuePrefix, KeyValues
from veneer.structure import is_encoder_decoder


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Lets a prefix be the keys and values that the base model has for the first tokens of a text.

    Of an encoder-decoder, both halves read the text. Works for models without caches, and within sliding windows.

    Args:
        model: The adapted model.
        tokenizer: Its tokenizer.
        text: The text.
        adapter_name: The adapter, of `cartridge` or `prefix_tuning` without projection; the active one if none.
        num_virtual_tokens: Kept for `peft`; the adapter's own number.
        use_chat_template: Give it as the system's message, where the tokenizer has a template.
        max_length: Cut the text to so many tokens.

    Returns:
        The keys and values of all layers, (n, layers * 2 * d).

    Raises:
        ConfigError: The adapter is of another method, or the text is too short for it.
    """
    name = _named(model, adapter_name, num_virtual_tokens)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        message = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(message, tokenize=True, return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    places = places_of(model, name)
    adapters: dict[str, Any] = {path: wrapper.adapters[name] for path, wrapper in places.items()}
    run = Run(model, places, ())
    whole = read(adapters, run, ids[0, :max_length], ids[0, :max_length])
    settle(model, name, adapters, None)
    return whole


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Any,
    num_virtual_tokens: int | None = None,
) -> Tensor:
    """Lets a prefix be the first keys and values of a cache.

    Args:
        model: The adapted model.
        adapter_name: As in `initialize_kv_prefix_from_text`.
        past_key_values: A cache of transformers after one text, or a pair (keys, values) for each layer.
        num_virtual_tokens: As above.

    Returns:
        As above.

    Raises:
        ConfigError: As above, or the cache has not kept the first tokens.
    """
    name = _named(model, adapter_name, num_virtual_tokens)
    places = places_of(model, name)
    adapters: dict[str, Any] = {path: wrapper.adapters[name] for path, wrapper in places.items()}
    whole = _shared(adapters).start(_layers(past_key_values))
    settle(model, name, adapters, None)
    return whole


def compose_cartridge_adapters(
    adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True
) -> None:
    """Writes a cartridge that is several, one after the other; the frozen tokens are those of the first.

    Args:
        adapter_paths: Folders or hub ids of cartridges of one base model.
        output_path: The folder to write.
        safe_serialization: Kept for `peft`.

    Raises:
        ConfigError: They are fewer than two, other adapters, or of unequal shape.
        BaseMismatchError: They were trained on different base models.
        CheckpointError: A file cannot be read or written.
    """
    if not safe_serialization:
        raise ConfigError("Veneer writes safetensors only. Leave out safe_serialization=False.")
    if len(adapter_paths) < 2:
        raise ConfigError(f"{len(adapter_paths)} cartridges were given; two or more can be composed.")
    configs: list[Any] = [PeftConfig.from_pretrained(path) for path in adapter_paths]
    files = [checkpoint.read(path) for path in adapter_paths]
    bases = [header["base"] for _, header in files if header.get("base")]
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise ConfigError(f"{path} is of {type(config).__name__}; cartridges were expected.")
        for field in _ALIKE:
            if getattr(config, field) != getattr(configs[0], field):
                raise ConfigError(
                    f"{path}: {field}={getattr(config, field)!r}, but {adapter_paths[0]} has "
                    f"{getattr(configs[0], field)!r}. Compose cartridges of one base model."
                )
    if any(base != bases[0] for base in bases):
        raise BaseMismatchError(f"{', '.join(map(str, adapter_paths))} were trained on different base models.")
    whole = torch.cat([tensors["prompt_embeddings"] for tensors, _ in files])
    composed = replace(configs[0], num_virtual_tokens=len(whole), init_text=None, init_examples=False)
    checkpoint.write({"prompt_embeddings": whole}, composed, Path(output_path), bases[0] if bases else {})


_ALIKE = ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "places")


def of_text(config: KeyValueConfig, run: Run) -> tuple[Tensor, Tensor]:
    """The tokens of `init_text`, twice: both halves of an encoder-decoder read them."""
    ids = text_ids(config)
    return ids, ids


def text_ids(config: KeyValueConfig) -> Tensor:
    """The tokens of `init_text`, (length,).

    Raises:
        ConfigError: It is not known which tokenizer reads it.
    """
    from transformers import AutoTokenizer

    source = config.tokenizer_name_or_path or config.base_model_name_or_path
    if not source:
        raise ConfigError(
            f"{type(config).__name__}: init_text needs tokenizer_name_or_path, since the base model has no name."
        )
    ids: Tensor = AutoTokenizer.from_pretrained(source)(config.init_text, return_tensors="pt")["input_ids"][0]
    return ids


def of_examples(config: KeyValueConfig, run: Run) -> tuple[Tensor, Tensor]:
    """The tokens of the first examples of the data, one after the other; and those of their answers.

    Raises:
        StateError: The batches hold no texts.
    """
    texts: list[Tensor] = []
    answers: list[Tensor] = []
    n = config.num_virtual_tokens or 0
    for batch in run.batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if ids is None:
            raise StateError("init_examples: the batches have no input_ids. Pass mappings of the model's arguments.")
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        texts.append(ids.flatten() if mask is None else ids[mask.bool()])
        answers += [] if labels is None or labels.dim() < 2 else [labels[labels != IGNORED]]
        if sum(map(len, texts)) >= n and (sum(map(len, answers)) >= n or not is_encoder_decoder(_root(run))):
            break
    if not texts:
        raise StateError("init_examples: there was no batch to start from. Pass at least one.")
    return torch.cat(texts), torch.cat(answers or texts)


def read(adapters: Mapping[str, KeyValuePrefix], run: Run, text: Tensor, answer: Tensor) -> Tensor:
    """Runs the base model on one text, and lets the prefixes be the keys and values that it has.

    Args:
        adapters: All places of one adapter, by path.
        run: Passes the text through the model.
        text: Its tokens, (length,).
        answer: Those that the decoder of an encoder-decoder reads.

    Returns:
        The keys and values of all layers, (n, layers * 2 * d).

    Raises:
        ConfigError: The text is too short, or the prefix cannot be that of a context.
    """
    root, shared = _root(run), _shared(adapters)
    n, device = shared.config.num_virtual_tokens, next(root.parameters()).device
    if len(text) < n or (is_encoder_decoder(root) and len(answer) < n):
        raise ConfigError(
            f"num_virtual_tokens={n}, but the context has {min(len(text), len(answer))} tokens. Give a longer one, or "
            "ask for fewer."
        )
    inputs: dict[str, Any] = {"input_ids": text[None, :n].to(device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if is_encoder_decoder(root):
        inputs["decoder_input_ids"] = answer[None, :n].to(device)
    if "use_cache" in inspect.signature(root.forward).parameters:
        inputs["use_cache"] = False
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with run.showing({path: _Recorder(path, seen.__setitem__) for path in adapters}), torch.no_grad():
        run.model(**inputs)
    return shared.start([seen[path] for path in sorted(adapters, key=lambda path: adapters[path].index)])


def _root(run: Run) -> Any:
    return run.model.get_base_model()


def _shared(adapters: Mapping[str, KeyValuePrefix]) -> KeyValues:
    return next(iter(adapters.values())).shared


def _named(model: PeftModel, name: str | None, tokens: int | None) -> str:
    """The adapter, which has to have a prefix that can be filled."""
    name = model.active_adapter if name is None else name
    model._known([name])
    config = model.peft_config[name]
    if not isinstance(config, KeyValueConfig):
        raise ConfigError(
            f"Adapter {name!r} is of {type(config).__name__}; one of cartridge or prefix_tuning was expected, whose "
            "prefix is keys and values."
        )
    if tokens not in (None, config.num_virtual_tokens):
        raise ConfigError(
            f"num_virtual_tokens={tokens}, but adapter {name!r} has {config.num_virtual_tokens}. Leave it out."
        )
    return name


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer of a cache, (rows, heads, tokens, width).

    Raises:
        ConfigError: It is none, or has dropped tokens.
    """
    if isinstance(cache, tuple | list):
        return [(pair[0], pair[1]) for pair in cache]
    cache = getattr(cache, "self_attention_cache", cache)
    if not getattr(cache, "layers", None):
        raise ConfigError(
            f"past_key_values is a {type(cache).__name__} without layers; a filled cache of transformers, or a list of "
            "(keys, values) was expected."
        )
    layers = []
    for layer in cache.layers:
        used = int(layer.get_seq_length())
        if used > layer.keys.shape[2]:
            raise ConfigError(
                f"The cache has kept {layer.keys.shape[2]} of {used} tokens (its window slides), so the first ones are "
                "gone. Use initialize_kv_prefix_from_text, which needs no cache."
            )
        layers.append((layer.keys[:, :, :used], layer.values[:, :, :used]))
    return layers


class _Recorder(Adapter):
    """Shows the keys and values that an attention module computes, and changes nothing."""

    def __init__(self, path: str, see: Callable[[str, tuple[Tensor, Tensor]], None]) -> None:
        super().__init__(None, None)
        self.path = path
        self.see = see

    def forward(self, x: Tensor, base: Base) -> Tensor:
        layer: Any = base.layer
        base.kwargs = {**base.kwargs, SEES: lambda keys, values: self.see(self.path, (keys, values))}
        with hooks([layer.config]):
            return base(x)
