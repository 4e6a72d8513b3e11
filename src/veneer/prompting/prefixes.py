"""Attention to prefixes: keys and values that every query may attend to beside the real ones.

Part of the attention hook (`attention.py`): what is joined here is no part of any cache, so prefixes work with caches
of every kind, with gradient checkpointing and in encoders alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.errors import UnsupportedError

FLASH = "flash_attention"
"""What the names of the flash implementations begin with."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values that the queries of one attention module attend to beside the real ones.

    Args:
        keys: (heads of keys, n, width), the same for all rows.
        values: The same.
        rows: Which rows of the batch have it, (rows,) bool; none for all.
        gate: None joins it to the real keys, under one softmax. Otherwise it is attended to by itself, and what that
            gives, times the gate, is added.
        bias: What is added to the scores of queries and prefix, (heads, queries, n), where it has a bias for each
            pair of positions; asked with the number of queries.
        apart: With a gate: a list that is given what the prefix adds, (rows, length, heads, width), in place of adding.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None
    gate: Tensor | None = None
    bias: Callable[[int], Tensor] | None = None
    apart: list[Tensor] | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]


PREFIXES = "veneer_prefixes"
"""Name of the argument of attention modules, and of the functions they call, that holds a list of prefixes."""


def with_prefixes(
    present: str,
    attend: Callable[..., Any],
    prefixes: Sequence[Prefix],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, Any]:
    """Attention to the real keys and to prefixes.

    Args:
        present: Name of the implementation that does the work.
        attend: The implementation.
        prefixes: What is attended to beside.
        module: The attention module.
        query: (rows, heads, length, width).
        key: The same, of maybe fewer heads, with those of a cache.
        value: The same.
        mask: As the implementation takes it.
        how: Its other arguments.

    Returns:
        (rows, length, heads, width), and the weights where the implementation gives them.

    Raises:
        UnsupportedError: A flash implementation would have to show prefixes to some rows only, or within a window.
    """
    joined = [prefix for prefix in prefixes if prefix.gate is None]
    if joined:
        key, value, mask, wider = _wider(present, joined, module, query, key, value, mask, how)
        y, weights = attend(module, query, key, value, mask, **wider)
    else:
        y, weights = attend(module, query, key, value, mask, **how)
    for prefix in prefixes:
        if prefix.gate is not None:
            alone = {**how, "is_causal": False, "position_bias": None, "sliding_window": None, "dropout": 0.0}
            keys, values = _for_rows(prefix.keys, query), _for_rows(prefix.values, query)
            more = prefix.gate.to(y) * attend(module, query, keys, values, None, **alone)[0]
            more = more if prefix.rows is None else more * prefix.rows[:, None, None, None].to(more)
            if prefix.apart is None:
                y = y + more
            else:
                prefix.apart.append(more)
    return y, weights


def _for_rows(x: Tensor, query: Tensor) -> Tensor:
    """(heads, n, width) -> (rows, heads, n, width), in the type of the queries."""
    return x.to(query.device, query.dtype).expand(len(query), *x.shape)


def _wider(
    present: str,
    prefixes: Sequence[Prefix],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    how: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """Keys, values, mask and other arguments, with prefixes in front."""
    rows, _, length, _ = query.shape
    size, bias = sum(prefix.length for prefix in prefixes), how.get("position_bias")
    seen = None  # which of the prefixes' keys each row has, (rows, size)
    if any(prefix.rows is not None for prefix in prefixes):
        whole = torch.ones(rows, dtype=torch.bool, device=query.device)
        owned = [(whole if p.rows is None else p.rows.to(query.device), p.length) for p in prefixes]
        seen = torch.cat([own[:, None].expand(rows, width) for own, width in owned], 1)
    causal = how.get("is_causal")
    if present == "sdpa" and mask is None and length > 1 and (_is_causal(module) if causal is None else causal):
        # By a flag, from the first key on: what a cache has room for beyond that is not looked at.
        key, value, bias = key[:, :, :length], value[:, :, :length], None if bias is None else bias[..., :length]
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if bias is not None:
        front = [bias.new_zeros(*bias.shape[1:3], p.length) if p.bias is None else p.bias(length) for p in prefixes]
        how = {
            **how,
            "position_bias": torch.cat([*(part.to(bias).expand(len(bias), -1, -1, -1) for part in front), bias], -1),
        }
    if present.startswith(FLASH):
        # Its causal mask is aligned at the end, so keys in front are seen by all. A window would cut them off.
        if seen is not None or how.get("sliding_window") is not None:
            raise UnsupportedError(
                f"{present}: prefixes of some rows only, or beside a sliding window, need another attention. Load the "
                "model with attn_implementation='sdpa'."
            )
        mask = None if mask is None else torch.cat([mask.new_ones(rows, size), mask], 1)
    else:
        mask = _mask_with_front(present, mask, seen, query, key.shape[2], size)
    keys, values = (
        torch.cat([*(_for_rows(x, query) for x in front), real], 2)
        for front, real in (([p.keys for p in prefixes], key), ([p.values for p in prefixes], value))
    )
    return keys, values, mask, how


def _is_causal(module: nn.Module) -> bool:
    """Whether attention is causal where no mask says so; the default is that of transformers' own functions."""
    return bool(getattr(module, "is_causal", True))


def _mask_with_front(
    present: str, mask: Tensor | None, seen: Tensor | None, query: Tensor, real: int, size: int
) -> Tensor | None:
    """The mask (rows or 1, heads or 1, length, real) with `size` keys in front; no mask where all is seen by all."""
    rows, _, length, _ = query.shape
    if mask is None:
        if seen is None:
            return None
        mask = torch.ones(1, 1, length, real, dtype=torch.bool, device=query.device)
        mask = mask if present == "sdpa" else torch.zeros_like(mask, dtype=query.dtype)
    logical = mask.dtype == torch.bool
    shown, hidden = (True, False) if logical else (0.0, torch.finfo(mask.dtype).min)
    front = mask.new_full((rows, mask.shape[1], length, size), shown)
    if seen is not None:
        front = front.masked_fill(~seen[:, None, None], hidden)
    return torch.cat([front, mask[..., :real].expand(rows, -1, length, -1)], -1)
