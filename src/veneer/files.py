"""Files that are either complete or absent, and where adapter files are looked for."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from veneer.errors import CheckpointError


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` write a temporary file beside `path`, syncs it, and renames it over `path`.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; `path` is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _failed(path, error) from error
    temporary = Path(name)
    try:
        fill(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file completely or not at all."""

    def fill(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write(path, fill)


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _failed(path: Path, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = "Free some space or name another folder." if full else "Check the folder and its permissions."
    return CheckpointError(f"{path} could not be written ({error.strerror or error}); nothing there was changed. {fix}")


def find(source: str | Path, name: str, *, required: bool = True, **hub: Any) -> Path:
    """The file `name` of an adapter that lies in a folder or on the hub.

    Args:
        source: A folder or a hub id.
        name: File name.
        required: Whether its absence is an error; otherwise a path that does not exist is returned.
        hub: `revision`, `subfolder`, `token`, `cache_dir` as in huggingface_hub.

    Raises:
        CheckpointError: It is in neither place.
    """
    folder = Path(source)
    subfolder = hub.pop("subfolder", None)
    if folder.is_dir():
        path = folder / (subfolder or "") / name
        if path.is_file() or not required:
            return path
        present = ", ".join(sorted(entry.name for entry in path.parent.iterdir())[:8]) if path.parent.is_dir() else ""
        raise CheckpointError(
            f"{path.parent} has no {name}; it holds: {present or 'nothing'}. Name an adapter's folder."
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, subfolder=subfolder, **hub))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if not required and isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return folder / name
        raise CheckpointError(
            f"{source!r} is no folder here, and {name} could not be fetched from the hub under that name "
            f"({type(error).__name__}). Check the spelling, the network and the access rights."
        ) from error
