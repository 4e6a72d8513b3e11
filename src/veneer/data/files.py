"""From what the user named to a table: a sample data set, a file, a folder, or a hub id.

A source is looked for in that order; a local file with a sample's name is written `./name`. `source:split` names
one split of a folder or hub data set. Local files are parsed by `readers`, not by `datasets.load_dataset`: its
cache may answer with an older state of the file, and its errors do not name lines.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from veneer.data.hub import load_hub
from veneer.data.readers import READERS, read_text
from veneer.data.table import Part, Table, records_to_arrow
from veneer.errors import DataError, VeneerWarning, nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# Words in the names of files and folders that say which split they hold.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
TRAIN = ("train",)
HELD_OUT = ("validation", "test")
KINDS = ", ".join(READERS)


def read_rows(source: str | Path, split: str | None = None) -> Dataset:
    """All rows of a source, as a `datasets.Dataset` in memory (a hub data set stays on disk).

    Args:
        source: A csv, tsv, jsonl, ndjson, json (array of objects), parquet or txt file (a line is an example, in the
            column `text`); a folder of files of one of these kinds, of `label_name/*.txt` (a file is an example, in
            the columns `text` and `label`), or saved by `datasets`; a sample's name; or a hub id, `owner/name` or
            `owner/name/configuration`.
        split: Split of a folder or hub data set; without it `train` or the only one.

    Raises:
        DataError: If it cannot be found or read.
    """
    return read_table(source, split).rows


def read_table(source: str | Path, split: str | None = None, prefer: Sequence[str] = TRAIN) -> Table:
    """As `read_rows`, with the place of every row.

    Args:
        source: As there.
        split: As there.
        prefer: Splits to take, the first that exists, when neither `split` nor the source names one.
    """
    from veneer import samples

    name, split = _split_name(str(source), split)
    path = Path(samples.resolve_data(name)).expanduser()
    if not path.exists():
        return _read_hub(name, split, prefer)
    if path.is_dir():
        return _read_folder(path, split, prefer)
    if split is not None:
        raise DataError(f"{name} is one file, so it has no split {split!r}. Leave data.split out or name a folder.")
    table, part = _reader(path)(path)
    return _table(name, [table], [part])


def _split_name(source: str, split: str | None) -> tuple[str, str | None]:
    """Takes `source:split` apart, unless a file of that very name exists or the colon belongs to a path."""
    match = re.fullmatch(r"([^:]+):([^:/\\][^/\\]*)", source)
    if match is None or Path(source).exists():
        return source, split
    if split is not None and split != match[2]:
        raise DataError(f"The source {source} names the split {match[2]!r}, data.split names {split!r}. Keep one.")
    return match[1], match[2]


def _read_hub(name: str, split: str | None, prefer: Sequence[str]) -> Table:
    from veneer.sample_packages import SAMPLES

    path = Path(name)
    # A hub id is `name`, `owner/name` or `owner/name/configuration` and has no file's ending.
    if path.suffix.lower() in READERS or not re.fullmatch(r"[\w.-]+(/[\w.-]+){0,2}", name) or name.startswith("."):
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise DataError(f"There is no file or folder {name}.{nearest(path.name, names)}")
    local = [entry.name for entry in Path().iterdir()]
    dataset, label = load_hub(name, split, prefer, nearest(name, [*SAMPLES, *local]))
    if len(dataset) == 0:
        raise DataError(f"{label} has no rows.")
    return Table(name, dataset, (Part(label, len(dataset)),))


def _reader(path: Path) -> Callable[[Path], tuple[pa.Table, Part]]:
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: files that end in '{path.suffix}' cannot be read. Expected one of {KINDS}.")
    return READERS[path.suffix.lower()]


def _read_folder(folder: Path, split: str | None, prefer: Sequence[str]) -> Table:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return _read_saved(folder, split, prefer)
    entries = sorted(entry for entry in folder.iterdir() if not _is_notice(entry))
    chosen = _of_split([entry for entry in entries if entry.is_dir() or entry.suffix.lower() in READERS], split, prefer)
    if chosen is not None and len(chosen) == 1 and chosen[0].is_dir():
        return _read_folder(chosen[0], None, prefer)
    if split is not None and chosen is None:
        raise DataError(
            f"{folder} has no split {split!r}. It holds: {_some(entries)}. A split is a folder or file named after it."
        )
    if chosen is not None:
        entries = chosen
    classes = [entry for entry in entries if entry.is_dir() and any(entry.glob("*.txt"))]
    if classes:
        _warn_unread(folder, [entry for entry in entries if entry not in classes], "folders of .txt files")
        return _read_label_tree(folder, classes)
    return _read_flat(folder, entries)


def _read_flat(folder: Path, entries: list[Path]) -> Table:
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in READERS]
    kinds = sorted({file.suffix.lower() for file in files})
    if not files:
        raise DataError(
            f"{folder} holds no data: {_some(entries)}. Expected files of one kind ({KINDS}), or one folder of .txt "
            "files for each label."
        )
    if len(kinds) > 1:
        raise DataError(f"{folder} holds files of several kinds ({', '.join(kinds)}). Name one file, or keep one kind.")
    _warn_unread(folder, [entry for entry in entries if entry not in files], f"{kinds[0]} files")
    pairs = [_reader(file)(file) for file in files]
    return _table(str(folder), [table for table, _ in pairs], [part for _, part in pairs])


def _read_label_tree(folder: Path, classes: list[Path]) -> Table:
    records, parts = [], []
    for label in classes:
        files = sorted(label.glob("*.txt"))
        _warn_unread(label, [entry for entry in sorted(label.iterdir()) if entry not in files], ".txt files")
        for file in files:
            # An empty file becomes an empty row, so that all of them are reported together.
            text = read_text(file).strip() if file.read_bytes().strip() else ""
            records.append({"text": text, "label": label.name})
            parts.append(Part(str(file), 1))
    return _table(str(folder), [records_to_arrow(records, str(folder), None)], parts)


def _read_saved(folder: Path, split: str | None, prefer: Sequence[str]) -> Table:
    """A folder written by `datasets.save_to_disk`."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow, json or the file system raise on a damaged folder
        raise DataError(f"{folder} was saved by datasets but cannot be loaded: {error}. Save it again.") from error
    if isinstance(saved, datasets.DatasetDict):
        only = [next(iter(saved))] if len(saved) == 1 else []
        name = split or next((name for name in (*prefer, *only) if name in saved), None)
        if name not in saved:
            raise DataError(f"{folder} has the splits {', '.join(saved)}. Name one of them with data.split.")
        saved, split = saved[name], None
    if split is not None:
        raise DataError(f"{folder} holds one data set without splits. Leave data.split out (given: {split!r}).")
    if len(saved) == 0:
        raise DataError(f"{folder} has no rows.")
    return Table(str(folder), saved, (Part(str(folder), len(saved)),))


def _of_split(entries: list[Path], split: str | None, prefer: Sequence[str]) -> list[Path] | None:
    """The entries of one split; none where the folder is not divided into splits.

    Without this, a folder with train.csv and test.csv would train on its own test.
    """
    groups: dict[str, list[Path]] = {}
    for entry in entries:
        words = re.split(r"[^a-z]+", entry.name.lower())
        kind = next((kind for kind, names in SPLIT_WORDS.items() if any(word in names for word in words)), None)
        if kind is not None:
            groups.setdefault(kind, []).append(entry)
    if split is not None:
        kind = next((kind for kind, names in SPLIT_WORDS.items() if split.lower() in names), split)
        named = [entry for entry in entries if split in (entry.name, entry.stem)]
        return named or groups.get(kind)
    if len(groups) < 2:
        return None
    folder = entries[0].parent
    _warn_unread(folder, [entry for entry in entries if not any(entry in group for group in groups.values())], "splits")
    for kind in prefer:
        if kind in groups:
            return groups[kind]
    raise DataError(
        f"{folder} is divided into splits ({', '.join(groups)}), but has none of {', '.join(prefer)}. Name the file, "
        f"or the split as in `{folder}:{next(iter(groups))}`."
    )


def _table(source: str, tables: list[pa.Table], parts: list[Part]) -> Table:
    """One table of all files, which must have the same columns."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import InMemoryTable

    for table, part in zip(tables, parts, strict=False):
        twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if twice:
            raise DataError(f"{part.name} has more than one column named {twice}. Give each column its own name.")
        missing = set(tables[0].column_names) ^ set(table.column_names)
        if missing:
            raise DataError(
                f"{parts[0].name} has the columns {', '.join(tables[0].column_names)}, but {part.name} has "
                f"{', '.join(table.column_names)}. Give the files of a folder the same columns."
            )
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"The files of {source} have columns of different types: {error}. Use one type.") from error
    return Table(source, Dataset(InMemoryTable(joined)), tuple(parts))


def _warn_unread(folder: Path, entries: list[Path], wanted: str) -> None:
    if entries:
        warnings.warn(f"{folder}: only its {wanted} are read, not {_some(entries)}.", VeneerWarning, stacklevel=2)


def _is_notice(entry: Path) -> bool:
    """Files that describe the data are no data."""
    return entry.name.startswith(".") or entry.stem.lower() in ("readme", "license", "licence", "dataset_info")


def _some(entries: list[Path], show: int = 6) -> str:
    names = [entry.name for entry in entries]
    rest = f" and {len(names) - show:,} more" if len(names) > show else ""
    return (", ".join(names[:show]) + rest) or "nothing"
