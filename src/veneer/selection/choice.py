"""The best entries by a score: of every row, of every layer, or of all layers together; and ranks by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.errors import ConfigError


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


def above(score: Tensor, threshold: float) -> Tensor:
    """Positions in the flattened score of the entries that have at least this score, rising."""
    return (score.reshape(-1) >= threshold).nonzero().flatten()


def whole_rows(rows: Tensor, length: int) -> Tensor:
    """Positions of all entries of these rows of a weight whose rows are so long."""
    return (rows[:, None] * length + torch.arange(length, device=rows.device)).flatten()


def ranks(
    importance: Mapping[str, float], costs: Mapping[str, int], budget: int, low: int, high: Callable[[str], int]
) -> dict[str, int]:
    """Ranks of layers in proportion to their importance, within a budget of parameters.

        r_i = clamp(c s_i, low, high_i),     c the largest with sum r_i cost_i <= budget

    rounded down; what is left goes one rank at a time to those that were cut most.

    Args:
        importance: s_i, by layer; zero or more.
        costs: Parameters of one rank, by layer.
        budget: How many parameters there may be.
        low: The lowest rank; with 0, layers can be left out.
        high: The highest rank of a layer.

    Raises:
        ConfigError: The importances are not numbers from zero on or all zero, or the budget is below the lowest ranks
            or above the highest.
    """
    if not all(0 <= value < float("inf") for value in importance.values()):
        wrong = next(path for path, value in importance.items() if not 0 <= value < float("inf"))
        raise ConfigError(
            f"Ranks cannot be given by these scores: that of {wrong} is {importance[wrong]}, and numbers from 0 on "
            "were expected. Take a criterion that has no signs, such as snip or fisher."
        )
    if not any(importance.values()):
        raise ConfigError("Ranks cannot be given by these scores: all of them are zero.")
    highest = {path: high(path) for path in importance}
    least, most = (sum(costs[p] * r(p) for p in importance) for r in (lambda p: low, lambda p: highest[p]))
    if not least <= budget <= most:
        raise ConfigError(
            f"Ranks from {low} to the highest take {least:,} to {most:,} parameters in these layers, and the budget is "
            f"{budget:,}. Change the rank r of the method, which sets the budget, or the lowest or highest rank."
        )

    def wanted(scale: float) -> dict[str, float]:
        return {path: min(max(scale * s, low), highest[path]) for path, s in importance.items()}

    def cost(given: Mapping[str, float]) -> float:
        return sum(costs[path] * rank for path, rank in given.items())

    under, over = 0.0, 2 * max(highest.values()) / min(s for s in importance.values() if s > 0)
    for _ in range(200):
        middle = (under + over) / 2
        under, over = (middle, over) if cost(wanted(middle)) <= budget else (under, middle)
    ideal = wanted(under)
    given = {path: int(rank + 1e-9) for path, rank in ideal.items()}
    left = budget - int(cost(given))
    while True:
        fitting = [path for path in given if costs[path] <= left and given[path] < highest[path]]
        if not fitting:
            return given
        best = max(fitting, key=lambda path: ideal[path] - given[path])
        given[best] += 1
        left -= costs[best]
