"""Hidden states of examples, kept over the epochs of a run: in memory, or in a memory-mapped file.

A row is the hidden states of one example at its real positions, `(length, width)`, under a key of 16 bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from veneer import units
from veneer.errors import ConfigError, VeneerWarning

DATA, INDEX = "rows.bin", "rows.index"
_MAGIC = b"veneer rows 1\n"
# Key, first byte and length in bytes of a row, its CRC-32, and the CRC-32 of the entry up to here.
_ENTRY = struct.Struct("<16sQQII")


class Rows(ABC):
    """Kept rows.

    Args:
        limit: Bytes that they may take; further rows are not kept.
    """

    where: str
    """For messages."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0

    @abstractmethod
    def __contains__(self, key: bytes) -> bool: ...

    @abstractmethod
    def get(self, keys: Sequence[bytes]) -> Tensor:
        """The rows of these keys, one after the other: `(total, width)`, in new memory."""

    @abstractmethod
    def _put(self, rows: dict[bytes, Tensor]) -> None: ...

    def put(self, keys: Sequence[bytes], rows: Sequence[Tensor]) -> None:
        """Keeps those rows that are new and that there is room for."""
        fitting = {}
        room = self.limit - self.bytes
        for key, row in zip(keys, rows, strict=True):
            if key not in self and key not in fitting and row.nbytes <= room:
                fitting[key] = row
                room -= row.nbytes
        if fitting:
            self._put(fitting)

    @abstractmethod
    def clear(self) -> None:
        """Forgets all rows: they are not what would be computed now."""

    @abstractmethod
    def close(self, *, remove: bool = True) -> None:
        """Gives memory and files back; `remove` deletes what is on disk."""


class MemoryRows(Rows):
    """Rows in memory of the CPU, in the type that they were computed in."""

    where = "in memory"

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self._rows: dict[bytes, Tensor] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def get(self, keys: Sequence[bytes]) -> Tensor:
        return torch.cat([self._rows[key] for key in keys])

    def _put(self, rows: dict[bytes, Tensor]) -> None:
        # One piece of memory for the rows of a batch: a copy, for the model goes on with the original.
        together = torch.cat(list(rows.values())).cpu()
        self._rows |= zip(rows, together.split([len(row) for row in rows.values()]), strict=True)
        self.bytes += together.nbytes

    def clear(self) -> None:
        self._rows.clear()
        self.bytes = 0

    def close(self, *, remove: bool = True) -> None:
        self.clear()


class FileRows(Rows):
    """Rows in a file that is read through a mapping, so that the system may drop pages where memory is short.

    The file of data grows at its end. An entry of the index is appended after its row and carries checksums of both, so
    a row that a crash cut off, or that was damaged since, is not there: it is computed again.

    Args:
        folder: Where the two files lie; made if it is not there.
        limit: Bytes that the rows may take.
        identity: What rows depend on beside their key: model, weights, types. JSON.
        width: Of a row.
        dtype: Of a row.

    Raises:
        OSError: The folder cannot be written.
        ConfigError: It holds files of the same names that are not ours.
    """

    where = "on disk"

    def __init__(self, folder: Path, limit: int, identity: Mapping[str, Any], width: int, dtype: torch.dtype) -> None:
        super().__init__(limit)
        self.folder = folder
        self.width, self.dtype = width, dtype
        self.remark = ""
        """What was found in the folder."""
        # Row bytes: first, length, checksum; a checksum of none has been looked at.
        self._places: dict[bytes, tuple[int, int, int | None]] = {}
        self._mapped: Any = np.empty(0, dtype=np.uint8)
        self._writable = True
        folder.mkdir(parents=True, exist_ok=True)
        self._head = _MAGIC + json.dumps(dict(identity), sort_keys=True).encode() + b"\n"
        self._data, self._index = self._open()

    def _open(self) -> tuple[BinaryIO, BinaryIO]:
        data, index = self.folder / DATA, self.folder / INDEX
        known = index.read_bytes() if index.exists() else b""
        if known.startswith(self._head) and data.exists():
            size = data.stat().st_size
            entries, end = _entries(known, len(self._head))
            row = self.width * self.dtype.itemsize
            fitting = (e for e in entries if e[1] + e[2] <= size and e[2] % row == 0)
            self._places = {key: (first, length, check) for key, first, length, check in fitting}
            self.bytes = size
            self.remark = f"{units.count(len(self._places))} rows of an earlier run were there"
            files = data.open("r+b", buffering=0), index.open("r+b", buffering=0)
            files[1].truncate(end)  # what follows was cut off
            files[1].seek(end)
            return files
        if known.startswith(_MAGIC):
            self.remark = "the rows that were there belong to another model or version and were replaced"
        elif known or (data.exists() and data.stat().st_size):
            raise ConfigError(
                f"training.frozen_part_folder: {self.folder} holds a {DATA} that is none of Veneer's. Name another "
                "folder."
            )
        files = data.open("w+b", buffering=0), index.open("w+b", buffering=0)
        _write(files[1], self._head)
        return files

    def __contains__(self, key: bytes) -> bool:
        place = self._places.get(key)
        if place is None:
            return False
        first, length, check = place
        if check is not None:  # the first look at a row that was there already
            if zlib.crc32(self._bytes(first, length)) != check:
                del self._places[key]
                return False
            self._places[key] = first, length, None
        return True

    def get(self, keys: Sequence[bytes]) -> Tensor:
        pieces = [torch.from_numpy(self._bytes(*self._places[key][:2])) for key in keys]
        return torch.cat(pieces).view(self.dtype).view(-1, self.width)

    def _bytes(self, first: int, length: int) -> Any:
        if first + length > self._mapped.size:
            # "c": torch wants memory that can be written, and nothing that is written there reaches the file.
            self._mapped = np.memmap(self.folder / DATA, dtype=np.uint8, mode="c")
        return self._mapped[first : first + length]

    def _put(self, rows: dict[bytes, Tensor]) -> None:
        if not self._writable:
            return
        end = first = self._data.seek(0, os.SEEK_END)
        pieces, entries, places = [], [], {}
        for key, row in rows.items():
            if row.dtype != self.dtype or row.shape[1:] != (self.width,):
                continue
            piece = row.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            entry = _ENTRY.pack(key, end, len(piece), zlib.crc32(piece), 0)[:-4]
            entries.append(entry + struct.pack("<I", zlib.crc32(entry)))
            places[key] = end, len(piece), None
            end += len(piece)
            pieces.append(piece)
        # Written, not stored through the mapping: a full disk is an error here, and would end the process there.
        try:
            _write(self._data, b"".join(pieces))
            _write(self._index, b"".join(entries))
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"{self.folder}: no more hidden states can be kept ({error}). Those of further examples are computed "
                "in every epoch.",
                VeneerWarning,
                stacklevel=2,
            )
            return
        self._places |= places
        self.bytes += end - first

    def clear(self) -> None:
        self._places.clear()
        self._mapped = np.empty(0, dtype=np.uint8)
        self._index.truncate(len(self._head))
        self._index.seek(len(self._head))
        # The data stay, and count: Windows does not cut off a file that is mapped. New rows follow them.

    def close(self, *, remove: bool = True) -> None:
        self._places.clear()
        self._mapped = np.empty(0, dtype=np.uint8)
        self._data.close()
        self._index.close()
        if remove:
            for name in (DATA, INDEX):
                (self.folder / name).unlink(missing_ok=True)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    import psutil  # accelerate needs it too

    return int(psutil.virtual_memory().available)


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` lies or will lie."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _entries(text: bytes, start: int) -> tuple[list[tuple[bytes, int, int, int]], int]:
    """Entries of an index up to the first that is damaged, and where that begins."""
    found = []
    while start + _ENTRY.size <= len(text):
        entry = text[start : start + _ENTRY.size]
        key, first, length, check, own = _ENTRY.unpack(entry)
        if zlib.crc32(entry[:-4]) != own:
            break
        found.append((key, first, length, check))
        start += _ENTRY.size
    return found, start


def _write(file: BinaryIO, content: bytes) -> None:
    """All of it: an unbuffered file may take less at a time."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]
