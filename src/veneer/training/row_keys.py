"""Examples told apart by their content: a key for each row of a model's inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.data.batches import IGNORED

# Arguments that say what comes after the last block, and not what goes into the first.
_OF_LOSS = frozenset({"labels", "shift_labels", "num_items_in_batch", "return_dict", "return_loss", "logits_to_keep"})
LOOKING_IN = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Arguments and settings that ask for something out of the blocks themselves."""
_ASKED = (*LOOKING_IN, "use_cache", "past_key_values")
# Arguments with an element for each position; of all others a row is taken whole.
_BY_POSITION = ("attention_mask", "input_ids", "inputs_embeds", "position_ids", "token_type_ids")


def row_keys(inputs: Mapping[str, Any], from_edge: bool) -> tuple[list[bytes], Tensor | None] | None:
    """A key of 16 bytes for each row, over all that hidden states may depend on.

    Masked positions are left out, for nothing real depends on them.

    Args:
        inputs: What the model is called with, by name.
        from_edge: Whether it matters at which column a row's first real position stands.

    Returns:
        The keys, and which positions are real, (rows, longest), or none where all are; none instead of both where the
        call asks for more than hidden states, or is given something that is not understood.
    """
    if any(inputs.get(name) is not None and inputs[name] is not False for name in _ASKED):
        return None
    inputs = {k: v for k, v in inputs.items() if k not in _OF_LOSS and k not in _ASKED and v is not None}
    first = next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim()), None)
    if first is None or any(isinstance(v, Tensor) and v.requires_grad for v in inputs.values()):
        return None
    rows = first.shape[0]
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and tokens is not None and mask.shape == tokens.shape[:2]):
        return None
    real = mask.bool().cpu() if mask is not None else None
    device = first.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    common = hashlib.blake2b(repr(cast).encode())
    by_position: list[Any] = []
    by_row: list[Any] = []
    for name, value in sorted(inputs.items()):
        if isinstance(value, bool | int | float | str):
            common.update(f"{name}={value!r};".encode())
            continue
        if not isinstance(value, Tensor) or not value.dim():
            return None
        if name in _BY_POSITION:
            value = value.expand(rows, *value.shape[1:])
        if value.shape[0] != rows:
            return None
        common.update(f"{name} {value.dtype} {tuple(value.shape[2:])};".encode())
        in_columns = real is not None and name in _BY_POSITION and value.shape[1:2] == real.shape[1:]
        (by_position if in_columns else by_row).append(_octets(value))
    keys = []
    for row in range(rows):
        digest = hashlib.blake2b(common.digest(), digest_size=16)
        if real is not None:
            columns = real[row].nonzero()[:, 0].numpy()
            digest.update((columns if from_edge or not len(columns) else columns - columns[0]).tobytes())
            for octets in by_position:
                digest.update(octets[row][columns].tobytes())
        for octets in by_row:
            digest.update(octets[row].tobytes())
        keys.append(digest.digest())
    return keys, real


def loss_at_padding(inputs: Mapping[str, Any]) -> bool:
    """Whether a label stands at padding or right after it, so that a loss looks at what the model says there.

    So it is where a language model's rows are padded on the left and their first token has a label: a loss shifts
    labels by one place.
    """
    mask, labels = inputs.get("attention_mask"), inputs.get("labels")
    if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.dim() != 2 or mask.shape != labels.shape:
        return False
    told, padding = labels != IGNORED, mask == 0
    return bool((told & padding).any() or (told[:, 1:] & padding[:, :-1]).any())


def _octets(value: Tensor) -> Any:
    """The bytes of each element, in a further axis."""
    return value.detach().cpu()[..., None].contiguous().view(torch.uint8).numpy()
