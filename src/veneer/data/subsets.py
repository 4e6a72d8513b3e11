"""Which rows are held out and which are kept: seeded, and with the shares of the classes preserved."""

import random
from collections.abc import Hashable, Sequence
from math import floor

from veneer.errors import DataError


def hold_out(groups: Sequence[Hashable], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Splits row numbers into training and held-out ones.

    Args:
        groups: The class of each row; the same value for all where there are none.
        share: Share of the rows to hold out. Of a class, at least one row stays for training.
        seed: Chooses the rows. Their order stays that of the data.

    Raises:
        DataError: If no class has two rows.
    """
    if share == 0:
        return list(range(len(groups))), []
    rows = _rows_of(groups)
    spare = [len(members) - 1 for members in rows]
    if sum(spare) == 0:
        raise DataError(
            f"Nothing can be held out for evaluation: {len(groups)} rows, and no class has more than one. Add rows, "
            "name a file with data.validation, or set data.validation_share to 0."
        )
    wanted = min(max(1, round(len(groups) * share)), sum(spare))
    counts = allocate([len(members) for members in rows], wanted, spare)
    held = set(_draw(rows, counts, seed))
    return [row for row in range(len(groups)) if row not in held], sorted(held)


def subset(groups: Sequence[Hashable], limit: int | None, seed: int, each: int = 0) -> list[int]:
    """Row numbers of a random subset, in the order of the data.

    Args:
        groups: The class of each row.
        limit: How many; none or more than there are takes all.
        seed: Chooses the rows.
        each: How many every class keeps at least; `limit` must leave room for them.
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    rows = _rows_of(groups)
    sizes = [len(members) for members in rows]
    return sorted(_draw(rows, allocate(sizes, limit, sizes, each), seed))


def allocate(sizes: Sequence[int], total: int, most: Sequence[int], least: int = 0) -> list[int]:
    """Shares `total` out in proportion to `sizes` (largest remainders), each between `least` and its `most`.

    >>> allocate([70, 29, 1], 10, [70, 29, 1])
    [7, 3, 0]
    >>> allocate([70, 29, 1], 10, [70, 29, 1], least=1)
    [7, 2, 1]
    """
    quotas = [size * total / sum(sizes) for size in sizes]
    counts = [min(max(floor(quota), least), cap) for quota, cap in zip(quotas, most, strict=True)]
    while (missing := total - sum(counts)) != 0:
        # One step at a time to the class that is furthest from its quota; there are no more steps than classes
        # as long as few of them are held by their bounds.
        step = 1 if missing > 0 else -1
        open_ = [i for i, n in enumerate(counts) if (n < most[i] if step > 0 else n > least)]
        furthest = max(open_, key=lambda i: step * (quotas[i] - counts[i]))
        counts[furthest] += step
    return counts


def _rows_of(groups: Sequence[Hashable]) -> list[list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def _draw(rows: Sequence[Sequence[int]], counts: Sequence[int], seed: int) -> list[int]:
    generator = random.Random(seed)
    return [row for members, count in zip(rows, counts, strict=True) for row in generator.sample(members, count)]
