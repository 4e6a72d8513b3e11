"""The best entries by a score: of every row, of every layer, or of all layers together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def best_of_rows(score: Tensor, count: int) -> Tensor:
    """Positions in the flattened score of the `count` best entries of every row, rising."""
    rows = score.reshape(-1, score.shape[-1])
    columns = rows.topk(min(count, rows.shape[1]), dim=1).indices
    starts = torch.arange(rows.shape[0], device=score.device)[:, None] * rows.shape[1]
    return (starts + columns).flatten().sort().values


def best_of_layer(score: Tensor, count: int) -> Tensor:
    """Positions in the flattened score of its `count` best entries, rising."""
    flat = score.reshape(-1)
    return flat.topk(min(count, flat.numel())).indices.sort().values


def best_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """For each layer, the positions of those of its entries that are among the `count` best of all layers, rising."""
    # No layer has more than `count` of them, so no more take part in the comparison.
    candidates = {path: best_of_layer(score, count) for path, score in scores.items()}
    values = torch.cat([scores[path].reshape(-1)[positions] for path, positions in candidates.items()])
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(min(count, values.numel())).indices] = True
    masks = chosen.split([positions.numel() for positions in candidates.values()])
    return {path: positions[mask] for (path, positions), mask in zip(candidates.items(), masks, strict=True)}
