"""Where tokens stand: position ids that follow the attention mask, and positions moved by prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import DataError, UnsupportedError
from veneer.structure import inputs_by_name, is_encoder_decoder


def takes_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


def positions_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The position ids of a text that comes without, (rows or 1, length): each token's number among those of its row.

    Args:
        model: The model that reads it.
        inputs: What the model is called with, by name.
    """
    ids, embeds, mask = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    text: Tensor = ids if ids is not None else embeds  # type: ignore[assignment]
    cache = inputs.get("past_key_values")
    past = 0 if cache is None else int(cache.get_seq_length())
    own = _own_rule(model)
    if own is not None and ids is not None:
        return own(ids, past)
    if mask is not None and mask.dim() == 2 and holes(mask):
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -text.shape[1] :]
    return torch.arange(past, past + text.shape[1], device=text.device)[None]


def _own_rule(model: nn.Module) -> Callable[[Tensor, int], Tensor] | None:
    """Ids and past length to positions, in models that number only what is no padding and begin later (RoBERTa)."""
    for module in model.modules():
        make = getattr(module, "create_position_ids_from_input_ids", None)
        if make is not None:
            return lambda ids, past: make(ids, module.padding_idx, past)
    return None


def positions_in(model: nn.Module) -> int | None:
    """How many tokens the model has positions for; none where its configuration does not say."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    tables: list[Any] = [m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids")]
    return most - max((table.padding_idx + 1 for table in tables), default=0)


@contextmanager
def explained(model: nn.Module, args: Any, kwargs: Mapping[str, Any], added: int, shift: int) -> Iterator[None]:
    """Tells what a text has no positions for, where the model only fails at an index.

    Args:
        model: The base model.
        args: What it is called with, before anything is put before the text.
        kwargs: The same by name.
        added: How many columns are.
        shift: By how many positions prefixes move the text, at most.

    Raises:
        DataError: The text, what is put before it and what is to be generated are longer than the model has positions.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        given = inputs_by_name(model, args, kwargs)
        most, cache = positions_in(model), given.get("past_key_values")
        texts = (given.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
        length = max((text.shape[1] for text in texts if text is not None), default=0)
        length += 0 if cache is None else int(cache.get_seq_length())
        new = max(0, (given.get("max_new_tokens") or 0) - 1)  # the last one is not read
        if most is None or length + added + shift + new <= most:
            raise
        behind = f" and {new + 1} new ones behind it" if new else ""
        raise DataError(
            f"{type(model).__name__} has {most} positions, and a text of {length} tokens with {added + shift} virtual "
            f"tokens before it{behind} needs {length + added + shift + new}. Cut the text to "
            f"{most - added - shift - new} tokens, or use adapters with fewer virtual tokens."
        ) from error


def holes(mask: Tensor) -> bool:
    """Whether padding stands before a token of its row."""
    return bool((mask.long().diff(dim=1) > 0).any())


@contextmanager
def moved(model: nn.Module, shift: Callable[[int, torch.device], Tensor], alike: int | None) -> Iterator[None]:
    """Lets positions of the text be later by `shift`, in every call of the model.

    `peft` hands prefixes to models as a cache of past keys, so that the text begins at their number; positions follow.
    An encoder-decoder counts them in its decoder alone.

    Args:
        model: The base model.
        shift: Number of rows and device to (rows, 1).
        alike: The shift, where it is that of all rows.

    Raises:
        UnsupportedError: Rows are to be moved differently in a model that numbers its rows all alike.
    """

    def at_root(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inputs_by_name(model, args, kwargs)
        text: Tensor = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
        positions = given.get("position_ids")
        positions = positions_of(model, given) if positions is None else positions
        given["position_ids"] = positions + shift(len(text), text.device)
        return (), given

    def at_table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        call.apply_defaults()
        # Some are given the positions too, and then do not look at what has gone before.
        name = "past_key_values_length" if call.arguments.get("position_ids") is None else "position_ids"
        call.arguments[name] = call.arguments[name] + alike
        return call.args, call.kwargs

    decoder = model.get_decoder() if is_encoder_decoder(model) else None  # type: ignore[operator]
    if decoder is None:
        places = [(model, at_root)] if takes_positions(model) else []
    else:
        tables = [m for m in decoder.modules() if "past_key_values_length" in inspect.signature(m.forward).parameters]
        places = [(module, at_table) for module in tables]
        if tables and alike is None:
            raise UnsupportedError(
                f"{type(model).__name__} numbers the tokens of all rows alike, so rows with prefixes of different "
                "length cannot run in one batch. Run them one after the other."
            )
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
