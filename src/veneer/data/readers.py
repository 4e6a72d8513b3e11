"""One file to one table. A reader either returns every row of its file or raises with the line at fault.

Values of csv and tsv files stay the strings that stand in the file: `01` and `NA` are data, not 1 and missing.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.data.table import Part, describe, records_to_arrow
from veneer.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

# Bytes at the start of a file that name its encoding; UTF-8 is what files without them must be in.
BYTE_ORDER_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark.

    Raises:
        DataError: If the file cannot be read, is empty, or holds bytes that are not text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        # The utf-8-sig codec counts from behind the mark.
        offset = error.start + (3 if encoding == "utf-8-sig" else 0)
        line = data[:offset].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte {offset} (0x{data[offset]:02x}) is not {encoding.removesuffix('-sig')}: "
            f"{error.reason}. Save the file as UTF-8, for example with `iconv -f latin1 -t utf-8`."
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty. Expected at least one row.")
    return text


def read_csv(path: Path, delimiter: str = ",") -> tuple[pa.Table, Part]:
    """A table with a header line. A csv file whose header has no comma may be separated by semicolons or tabs.

    Quoting follows RFC 4180 and is checked: a stray quote would otherwise swallow the lines up to the next one.
    A tsv file that breaks those rules is read without quoting, as is also usual, if each line then has as many
    fields as the header.
    """
    text = read_text(path)
    header = text.split("\n", 1)[0]
    if delimiter == "," and "," not in header:
        delimiter = next((other for other in ";\t" if other in header), delimiter)
    try:
        rows, lines = _quoted_rows(text, delimiter, path)
    except DataError:
        plain = _plain_rows(text) if delimiter == "\t" else None
        if plain is None:
            raise
        rows, lines = plain
    # Tables written with their index (pandas) leave its name blank.
    names = [name.strip() or f"column_{number}" for number, name in enumerate(rows[0], 1)]
    return _columns(path, names, rows[1:], lines[1:])


def _columns(path: Path, names: list[str], rows: list[list[str]], lines: list[int]) -> tuple[pa.Table, Part]:
    import pyarrow as pa

    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}, line 1: the header names {twice} more than once. Give each column its own name.")
    if not rows:
        raise DataError(f"{path} has a header ({', '.join(names)}) and no rows below it. Expected at least one.")
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return pa.table(columns, names=names), Part(str(path), len(rows), lines)


def _quoted_rows(text: str, delimiter: str, path: Path) -> tuple[list[list[str]], list[int]]:
    """Rows (the header first) and the line on which each begins; blank lines are passed over."""
    rows: list[list[str]] = []
    lines: list[int] = []
    # newline="" keeps line breaks within quotes as they are.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    with _fields_of_any_length():
        try:
            for fields in reader:
                if len(fields) > 1 or (fields and fields[0].strip()):
                    rows.append(fields)
                    lines.append(start)
                    if len(fields) != len(rows[0]):
                        raise DataError(
                            f"{path}, line {start}: {len(fields)} fields ({_clip(delimiter.join(fields))}), but the "
                            f"header on line {lines[0]} names {len(rows[0])}: {', '.join(rows[0])}. Put a field that "
                            f"holds {delimiter!r} or a line break in double quotes."
                        )
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {start}: broken quoting ({error}). Put a field that holds a double quote in double "
                'quotes, and write the quote itself twice: "he said ""no""".'
            ) from error
    return rows, lines


def _plain_rows(text: str) -> tuple[list[list[str]], list[int]] | None:
    """Tab-separated lines without quoting; none if some line has another number of fields than the header."""
    numbered = [(number, line) for number, line in enumerate(_lines(text), 1) if line.strip()]
    rows = [line.split("\t") for _, line in numbered]
    if any(len(row) != len(rows[0]) for row in rows):
        return None
    return rows, [number for number, _ in numbered]


@contextlib.contextmanager
def _fields_of_any_length() -> Iterator[None]:
    """The csv module refuses fields over 128 KiB, and the setting is one for the whole process."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def read_jsonl(path: Path) -> tuple[pa.Table, Part]:
    """One JSON object a line; blank lines are passed over."""
    return _parse_jsonl(path, read_text(path))


def _parse_jsonl(path: Path, text: str) -> tuple[pa.Table, Part]:
    records: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}, column {error.colno}: not valid JSON ({error.msg}) at "
                f"{_clip(line, error.pos)}. Expected one complete JSON object a line; correct or remove this line."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: {describe(record)}. Expected one JSON object a line, such as "
                '{"text": "...", "label": "..."}. A file that is one array is named .json.'
            )
        records.append(record)
        lines.append(number)
    return records_to_arrow(records, str(path), lines), Part(str(path), len(records), lines)


def read_json(path: Path) -> tuple[pa.Table, Part]:
    """An array of objects. A file of one object a line is read as such, for many of those are named .json too."""
    text = read_text(path)
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        if _first_line_is_object(text):
            return _parse_jsonl(path, text)
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}) at "
            f"{_clip(text, error.pos)}. Expected an array of objects."
        ) from error
    if not isinstance(records, list):
        given = f"an object with the keys {list(records)}" if isinstance(records, dict) else describe(records)
        raise DataError(f"{path} is {given}. Expected an array of objects: save the array of rows alone.")
    if not records:
        raise DataError(f"{path} is an empty array. Expected at least one object.")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}, row {number}: {describe(record)}. Expected an object in every row.")
    return records_to_arrow(records, str(path), None), Part(str(path), len(records))


def _first_line_is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except json.JSONDecodeError:
        return False


def read_parquet(path: Path) -> tuple[pa.Table, Part]:
    """A parquet file, with the class names that `datasets` stores in its schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not pq.read_table: it would add columns for folders named like key=value.
        with pq.ParquetFile(path) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a complete parquet file ({str(error).splitlines()[0]}). It may be cut short: copy or "
            "download it again."
        ) from error
    if table.num_rows == 0:
        raise DataError(f"{path} is empty: columns {', '.join(table.column_names)} and no rows.")
    return table, Part(str(path), table.num_rows)


def read_lines(path: Path) -> tuple[pa.Table, Part]:
    """A plain text file: each line is an example in the column `text`; blank lines only separate."""
    numbered = [(number, line) for number, line in enumerate(_lines(read_text(path)), 1) if line.strip()]
    lines = [number for number, _ in numbered]
    return records_to_arrow([{"text": line} for _, line in numbered], str(path), lines), Part(
        str(path), len(lines), lines
    )


def _lines(text: str) -> list[str]:
    """Not str.splitlines: it also breaks at form feeds and Unicode separators, which JSON strings may hold."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _clip(text: str, around: int = 0, width: int = 60) -> str:
    """The part of a text around a position, quoted."""
    start = max(0, around - width // 2)
    piece = text[start : start + width]
    return f"{'...' if start else ''}{piece!r}{'...' if start + width < len(text) else ''}"


READERS: dict[str, Callable[[Path], tuple[pa.Table, Part]]] = {
    ".csv": read_csv,
    ".tsv": lambda path: read_csv(path, "\t"),
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".txt": read_lines,
}
