"""Checkpoint folders that are either complete or not there.

A checkpoint is written to a hidden sibling (`.checkpoint-7.partial`), synced, and renamed to `checkpoint-7` as its last
step. A manifest inside lists every file with its size and hash, so that damage which happens later is noticed as well.
Old checkpoints are renamed to a hidden name before they are deleted: whatever is called `checkpoint-N` is whole.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from veneer.errors import CheckpointError, VeneerWarning
from veneer.files import sync_folder

MANIFEST = "veneer_checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFTOVER = re.compile(r"\.(checkpoint-\d+|final)\.(partial|replaced|removed)")


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, complete or not, with their steps; lowest step first."""
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(entry.name), entry) for entry in folder.iterdir() if entry.is_dir())
    return sorted((int(match[1]), entry) for match, entry in found if match)


@contextmanager
def aside(final: Path, *, owner: bool = True) -> Iterator[Path]:
    """Gives a hidden sibling of `final` to fill in, which vanishes if anything goes wrong.

    Args:
        final: The folder whose contents are made.
        owner: False on processes that only help to fill it in.

    Raises:
        CheckpointError: The disk is full or not writable; what stands at `final` and beside it is untouched.
    """
    partial = final.with_name(f".{final.name}.partial")
    try:
        if owner:
            _remove(partial)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
    except BaseException as error:
        if owner:
            shutil.rmtree(partial, ignore_errors=True)
        if _is_write_failure(error):
            raise _write_failed(final, error) from error
        raise


@contextmanager
def saving(final: Path, *, owner: bool = True) -> Iterator[Path]:
    """Gives a folder to fill in, which in the end becomes `final`. Arguments and errors as for `aside`."""
    with aside(final, owner=owner) as partial:
        yield partial
        if owner:
            sync(partial)
            _publish(partial, final)


def seal(folder: Path, *, resumable: bool) -> None:
    """Writes the manifest, the last file of a checkpoint.

    Args:
        folder: A checkpoint with all its files.
        resumable: Whether the states of the optimiser and the generators are in it.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"format": 1, "resumable": resumable, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def defect(folder: Path) -> str | None:
    """What keeps training from going on from this checkpoint; none if nothing does."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, {entry['bytes']} were written"
        if _digest(path) != entry["sha256"]:
            return f"the contents of {name} have changed since it was written"
    if not manifest.get("resumable"):
        return "it was saved with save_only_model, without the state of the optimiser"
    return None


def last_complete(folder: Path) -> Path:
    """The newest checkpoint that training can go on from; warns about each newer one that is damaged.

    Raises:
        CheckpointError: There is none.
    """
    defects: list[tuple[str, str]] = []
    for _, checkpoint in reversed(steps(folder)):
        problem = defect(checkpoint)
        if problem is None:
            for name, reason in defects:
                warnings.warn(
                    f"{folder / name} is skipped: {reason}. Training goes on from {checkpoint.name} instead.",
                    VeneerWarning,
                    stacklevel=3,
                )
            return checkpoint
        defects.append((checkpoint.name, problem))
    found = "; ".join(f"{name}: {reason}" for name, reason in defects) or "there are no folders checkpoint-N"
    raise CheckpointError(
        f"{folder} has no complete checkpoint to resume from ({found}). Start the run anew without resume "
        "(output.overwrite allows the same folder); a lower save_steps loses less the next time."
    )


def clean(folder: Path) -> None:
    """Clears away what a killed process left behind in a folder of checkpoints."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = _LEFTOVER.fullmatch(entry.name)
        if match is None:
            continue
        standing = entry.with_name(match[1])
        # Killed between the two renames of a replacement: the old one still is the newest complete one.
        if match[2] == "replaced" and not standing.exists():
            os.rename(entry, standing)
        else:
            shutil.rmtree(entry)


def rotate(folder: Path, keep: int | None, best: Path | None = None) -> None:
    """Deletes the oldest checkpoints beyond `keep`; the newest and the best always stay."""
    if keep is None or keep <= 0:
        return
    present = [path for _, path in steps(folder)]
    protected = {path.name for path in (*present[-1:], *([best] if best else []))}
    surplus = len(present) - max(keep, len(protected))
    for path in [path for path in present if path.name not in protected][: max(surplus, 0)]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Deletes a checkpoint so that no moment shows half of it."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
    _remove(hidden)
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def sync(folder: Path) -> None:
    """Has everything in a folder reach the disk."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _publish(partial: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():  # damaged since, or done again after a resume from an earlier one
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    sync_folder(final.parent)
    _remove(replaced)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_write_failure(error: BaseException) -> bool:
    """Whether writing failed; torch and safetensors hide the `OSError` behind classes of their own."""
    if isinstance(error, OSError) or (isinstance(error, CheckpointError) and isinstance(error.__cause__, OSError)):
        return True
    text = str(error)
    return isinstance(error, Exception) and any(
        sign in text for sign in ("PytorchStreamWriter", "inline_container", "No space left", "I/O error", "IoError")
    )


def _write_failed(final: Path, error: BaseException) -> CheckpointError:
    if isinstance(error, CheckpointError) and error.__cause__ is not None:
        error = error.__cause__  # it names the hidden folder
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    cause = "the disk is full" if full else f"writing failed ({error})"
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    return CheckpointError(
        f"{final} could not be saved: {cause}, {free / 1e6:.0f} MB are free. Nothing half-written was left, and "
        "earlier checkpoints are intact. Free some space (or lower save_total_limit), then go on with resume."
    )
