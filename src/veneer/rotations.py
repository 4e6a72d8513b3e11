"""Orthogonal matrices from trained numbers, and block-diagonal ones applied without being formed."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.errors import ConfigError


def above_diagonal(size: int) -> Tensor:
    """Places of the entries above the diagonal in a flattened `(size, size)` matrix, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device="cpu")
    return rows * size + columns


def skew(entries: Tensor, places: Tensor, size: int) -> Tensor:
    """The skew-symmetric matrices, `(..., size, size)`, with these `(..., size (size - 1) / 2)` above the diagonal."""
    flat = entries.new_zeros(*entries.shape[:-1], size * size).index_copy(-1, places, entries)
    upper = flat.unflatten(-1, (size, size))
    return upper - upper.mT


def cayley(q: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1, orthogonal for skew-symmetric Q; a batch of them."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q)  # the factors commute


def cayley_neumann(q: Tensor, terms: int) -> Tensor:
    """(I + Q)(I + Q + ... + Q^(terms - 2)): the Cayley transform of -Q with its inverse cut off.

    As in `peft`, one term gives I, two give I + 2 Q, and three the same as four.
    """
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms == 1:
        return eye.expand_as(q)
    if terms == 2:
        return eye + 2 * q
    square = q @ q
    if terms == 5:  # one product less: I + Q + Q^2 + Q^3 = (I + Q)(I + Q^2)
        return (eye + 2 * q + square) @ (eye + square)
    series = eye + q
    for _ in range(max(terms, 4) - 3):
        series = eye + q @ series
    return series + q @ series


def turn(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows, `(*batch, n, width)`, times the block-diagonal matrix of `(*batch, count, size, size)`.

    One block stands for all of them.
    """
    count, size = blocks.shape[-3:-1]
    if count == 1:
        return (rows.unflatten(-1, (-1, size)).flatten(-3, -2) @ blocks.squeeze(-3)).view(rows.shape)
    parts = rows.unflatten(-1, (count, size)).transpose(-3, -2)  # (*batch, count, n, size)
    return (parts @ blocks).transpose(-3, -2).reshape(rows.shape)


def nearest_divisor(width: int, wanted: int, setting: str) -> int:
    """The divisor of `width` nearest to `wanted`, the smaller one of two; `width` itself where that is less.

    Raises:
        ConfigError: That is 1, and one was not wanted.
    """
    if wanted >= width:
        return width
    lower = next(n for n in range(wanted, 0, -1) if width % n == 0)
    higher = next(n for n in range(wanted, width + 1) if width % n == 0)
    found = lower if wanted - lower <= higher - wanted else higher
    if found == 1 < wanted:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise ConfigError(f"{setting}={wanted} does not divide the width of this layer, {width}; these do: {divisors}.")
    return found
