"""Files that are either complete or absent, and where adapter files are looked for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from veneer.errors import CheckpointError

NOTE = ".veneer-save.json"
"""In a folder: a save of several files was cut off while they were put in their places; see `settle`."""


def write(path: Path, fill: Callable[[Path], None]) -> None:
    """Has `fill` write a temporary file beside `path`, syncs it, and renames it over `path`.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written; `path` is as it was before.
    """
    write_together({path: fill})


def write_together(fills: Mapping[Path, Callable[[Path], None]]) -> None:
    """The same for several files of one folder, of which a reader is to find all the old or all the new ones.

    When all temporary files are complete, a note of their names is put into the folder; from then on the save counts
    as done. A process that is killed before leaves the old files; one that is killed after it leaves the note, by which
    the next `find` or `write` in that folder puts the remaining files in their places.

    Raises:
        CheckpointError: As in `write`.
    """
    path, folder = next(iter(fills)), next(iter(fills)).parent
    temporaries: dict[str, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder)
        for path, fill in fills.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            temporaries[path.name] = _temporary(path)
            fill(temporaries[path.name])
            _sync(temporaries[path.name])
        if len(fills) == 1:
            os.replace(temporaries[path.name], path)
        else:
            names = {name: temporary.name for name, temporary in temporaries.items()}
            temporaries[NOTE] = _temporary(folder / NOTE)
            temporaries[NOTE].write_text(json.dumps(names), encoding="utf-8")
            _sync(temporaries[NOTE])
            os.replace(temporaries[NOTE], folder / NOTE)
            temporaries.clear()
            sync_folder(folder)
            settle(folder)
        sync_folder(folder)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Completes a save in this folder that was cut off; does nothing where there was none.

    Raises:
        CheckpointError: The folder cannot be written, or its note is not one of ours.
    """
    note = folder / NOTE
    try:
        names = json.loads(note.read_text(encoding="utf-8"))
        for name, temporary in names.items():
            if Path(name).name != name or Path(temporary).name != temporary:
                raise ValueError("a name leads out of the folder")
            with contextlib.suppress(FileNotFoundError):  # it is in its place already
                os.replace(folder / temporary, folder / name)
        sync_folder(folder)
        note.unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: a save was cut off there and cannot be completed ({error}). Make the folder writable, or "
            f"delete {NOTE} and save again."
        ) from error


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    return Path(name)


def _sync(path: Path) -> None:
    os.chmod(path, 0o666 & ~_umask())  # mkstemp makes files private
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file completely or not at all."""
    write(path, lambda temporary: fill_text(temporary, text))


def fill_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


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
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "Free some space or name another folder." if full else "Check the folder and its permissions."
    return CheckpointError(f"{path} could not be written ({error.strerror or error}); nothing there was changed. {fix}")


HUB_ARGUMENTS = frozenset({"revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download"})
"""What `find` passes on to huggingface_hub."""


def find(source: str | Path, name: str, *, required: bool = True, **hub: Any) -> Path:
    """The file `name` of an adapter that lies in a folder or on the hub.

    Args:
        source: A folder or a hub id.
        name: File name.
        required: Whether its absence is an error; otherwise a path that does not exist is returned.
        hub: Any of `HUB_ARGUMENTS`, as in huggingface_hub.

    Raises:
        CheckpointError: It is in neither place.
    """
    folder = Path(source)
    subfolder = hub.pop("subfolder", None)
    if folder.is_dir():
        path = folder / (subfolder or "") / name
        settle(path.parent)
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
            f"{str(source)!r} is no folder here, and {name} could not be fetched from the hub under that name "
            f"({type(error).__name__}). Check the spelling, the network and the access rights."
        ) from error
