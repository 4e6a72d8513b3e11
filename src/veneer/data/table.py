"""Rows in memory, each of which knows the file and line it came from.

Errors about data are of use only with the place to look at, and a row number is not one: a csv file has
a header and quoted line breaks, a folder has many files.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from veneer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class Part:
    """The rows of one file.

    Args:
        name: The file as the user would write it.
        size: Number of rows.
        lines: Line on which each row begins, counted from 1; none where rows have no lines (parquet, json arrays).
    """

    name: str
    size: int
    lines: Sequence[int] | None = None

    def place(self, row: int) -> str:
        """Where a row of this part stands, without the file: `line 3`; empty where the file is the row."""
        if self.lines is not None:
            return f"line {self.lines[row]}"
        return "" if self.size == 1 else f"row {row + 1}"


@dataclass(frozen=True)
class Table:
    """All rows of a source, and their places.

    Args:
        source: What the user named.
        rows: The rows, in the order of the files.
        parts: The files they came from, in the same order.
    """

    source: str
    rows: Dataset
    parts: tuple[Part, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order of the file."""
        return list(self.rows.column_names)

    def values(self, column: str, indices: Sequence[int] | None = None) -> list[Any]:
        """One column as Python objects, of all rows or of some."""
        rows = self.rows.select_columns(column)
        return list((rows if indices is None else rows.select(indices))[column])

    def place(self, index: int) -> str:
        """Where one row stands: `reviews.csv, line 3`."""
        part, row = self._find(index)
        return ", ".join(filter(None, (part.name, part.place(row))))

    def places(self, indices: Iterable[int], show: int = 5) -> str:
        """Where some rows stand: `reviews.csv, line 3; line 9 (and 4 more)`. The file is named when it changes."""
        indices = list(indices)
        shown, previous = [], ""
        for index in indices[:show]:
            part, row = self._find(index)
            within = part.place(row)
            shown.append(within if part.name == previous and within else self.place(index))
            previous = part.name
        rest = len(indices) - show
        return "; ".join(shown) + (f" (and {rest:,} more)" if rest > 0 else "")

    def _find(self, index: int) -> tuple[Part, int]:
        ends = list(accumulate(part.size for part in self.parts))
        number = bisect_right(ends, index)
        return self.parts[number], index - (ends[number - 1] if number else 0)


def records_to_arrow(records: Sequence[dict[str, Any]], name: str, lines: Sequence[int] | None) -> pa.Table:
    """Columns from JSON objects. A key that an object lacks is null there.

    Raises:
        DataError: If a column holds values of two types; the first of either type is named.
    """
    import pyarrow as pa

    # Not pa.Table.from_pylist: it takes the keys of the first object only, and drops the others without a word.
    columns = dict.fromkeys(key for record in records for key in record)
    arrays = {}
    for column in columns:
        values = [record.get(column) for record in records]
        try:
            arrays[column] = pa.array(values)
        except (pa.ArrowException, OverflowError, UnicodeEncodeError) as error:
            raise DataError(_mixed(column, values, Part(name, len(records), lines), error)) from error
    return pa.table(arrays)


def _mixed(column: str, values: Sequence[Any], part: Part, error: Exception) -> str:
    """Says which two values of a column do not go together."""
    import pyarrow as pa

    first = next(index for index, value in enumerate(values) if value is not None)
    for index in range(first, len(values)):
        try:
            pa.array([values[first], values[index]])
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            if index == first:
                break
            return (
                f"{part.name}: column '{column}' mixes types: {part.place(first)} has {describe(values[first])}, "
                f"{part.place(index)} has {describe(values[index])}. Write the same type on every row."
            )
    return (
        f"{part.name}: column '{column}' cannot be read: {error}. "
        "Expected texts, numbers, true or false, or lists and objects of these."
    )


def describe(value: Any, width: int = 40) -> str:
    """A value and its type as JSON names it, short enough for a message.

    >>> describe("abc"), describe(3), describe([1, 2])
    ("the text 'abc'", 'the number 3', 'the list [1, 2]')
    """
    kinds: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (bool, "the value"),
        (str, "the text"),
        ((int, float), "the number"),
        (list, "the list"),
        (dict, "the object"),
    )
    if value is None:
        return "nothing"
    kind = next((name for types, name in kinds if isinstance(value, types)), f"the {type(value).__name__}")
    shown = repr(value)
    return f"{kind} {shown if len(shown) <= width else shown[:width] + '...'}"
