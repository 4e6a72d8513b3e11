"""Files are either complete or as they were before: full disks, missing rights, killed processes."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from veneer import files
from veneer.errors import CheckpointError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two files, `a` and `b`, that say "old"."""
    for name in ("a", "b"):
        (tmp_path / name).write_text("old")
    return tmp_path


def contents(folder: Path) -> tuple[str, str]:
    return (folder / "a").read_text(), (folder / "b").read_text()


def write_both(folder: Path, text: str = "new") -> None:
    files.write_together({folder / name: lambda path: files.fill_text(path, text) for name in ("a", "b")})


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a.txt"
    files.write_text(path, "naïve ✓\n")
    assert path.read_text(encoding="utf-8") == "naïve ✓\n"
    files.write_text(path, "b")
    assert path.read_text() == "b"
    assert listing(path.parent) == ["a.txt"]


def test_several_files_are_written_whole(folder: Path) -> None:
    write_both(folder)
    assert contents(folder) == ("new", "new")
    assert listing(folder) == ["a", "b"]


def test_written_files_have_the_rights_that_the_user_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
        write_both(tmp_path)
    finally:
        os.umask(before)
    for name in ("a", "b"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, r"No space left on device.*Free some space or name another folder"),
        (errno.EDQUOT, r"quota exceeded.*Free some space"),
        (errno.EROFS, r"Read-only file system.*Check the folder and its permissions"),
        (errno.EIO, r"Input/output error.*Check the folder"),
    ],
)
def test_what_cannot_be_filled_changes_nothing(folder: Path, number: int, fix: str) -> None:
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError(number, os.strerror(number))

    with pytest.raises(CheckpointError, match=r"a could not be written \(.*nothing there was changed\. .*") as caught:
        files.write(folder / "a", fails)
    assert caught.match(f"(?i){fix}")
    with pytest.raises(CheckpointError, match="b could not be written"):
        files.write_together({folder / "a": lambda path: files.fill_text(path, "new"), folder / "b": fails})
    assert contents(folder) == ("old", "old")
    assert listing(folder) == ["a", "b"]


def test_other_failures_change_nothing_either(folder: Path) -> None:
    def stopped(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write(folder / "a", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_together({folder / "a": lambda path: files.fill_text(path, "new"), folder / "b": stopped})
    assert contents(folder) == ("old", "old")
    assert listing(folder) == ["a", "b"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_failures_of_the_system_change_nothing(folder: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fails)
    for write in (write_both, lambda folder: files.write_text(folder / "a", "new")):
        with pytest.raises(CheckpointError, match=r"No space left on device.*Free some space"):
            write(folder)
    monkeypatch.undo()
    assert contents(folder) == ("old", "old")
    assert listing(folder) == ["a", "b"]


def test_a_folder_in_the_place_of_a_file(folder: Path) -> None:
    (folder / "b").unlink()
    (folder / "b").mkdir()
    with pytest.raises(CheckpointError, match=r"b could not be written \(Is a directory\)"):
        write_both(folder)
    assert (folder / "a").read_text() == "old"
    assert listing(folder) == ["a", "b"]


def test_a_file_in_the_place_of_the_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a/x could not be written \(.*\); nothing there was changed"):
        files.write_text(folder / "a" / "x", "new")
    assert contents(folder) == ("old", "old")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written(folder: Path) -> None:
    folder.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied.*Check the folder and its permissions"):
            write_both(folder)
    finally:
        folder.chmod(0o700)
    assert contents(folder) == ("old", "old")


# A save of two files, cut off while they are renamed


class Killed(BaseException):
    """Stands for the end of the process: nothing may run after it that a kill would not let run."""


def cut_off(folder: Path, renames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes both files, but is stopped before the rename with this number; the first is that of the note."""
    rename, count = os.replace, 0

    def replace(*args: Any) -> None:
        nonlocal count
        if count == renames:
            raise Killed
        count += 1
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)  # as no clean-up runs in a killed process
        with pytest.raises(Killed):
            write_both(folder)


def test_a_save_that_was_cut_off_before_its_note_is_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_off(folder, 0, monkeypatch)
    assert files.find(folder, "a").read_text() == "old"
    assert contents(folder) == ("old", "old")
    write_both(folder, "newer")
    assert contents(folder) == ("newer", "newer")


@pytest.mark.parametrize("renames", [1, 2])
def test_a_save_that_was_cut_off_later_is_completed_by_readers(
    folder: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(folder, renames, monkeypatch)
    assert "old" in contents(folder)
    assert files.find(folder.parent, "b", subfolder=folder.name).read_text() == "new"
    assert contents(folder) == ("new", "new")
    assert listing(folder) == ["a", "b"]


@pytest.mark.parametrize("renames", [1, 2])
def test_a_save_that_was_cut_off_later_does_not_undo_the_next_one(
    folder: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off(folder, renames, monkeypatch)
    files.write_text(folder / "a", "newer")
    assert contents(folder) == ("newer", "new")
    files.settle(folder)
    assert contents(folder) == ("newer", "new")
    assert listing(folder) == ["a", "b"]


def test_a_note_that_leads_elsewhere_is_refused(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    for names in ({"../a": "x"}, {"x": "../a"}, {"x": str(folder / "a")}, ["x"], {"x": 3}, "x"):
        (inner / files.NOTE).write_text(json.dumps(names))
        with pytest.raises(CheckpointError, match=rf"a save was cut off there .*delete {files.NOTE} and save again"):
            files.find(inner, "x")
    (inner / files.NOTE).write_text("{")
    with pytest.raises(CheckpointError, match="a save was cut off there"):
        files.write_text(inner / "x", "new")
    assert contents(folder) == ("old", "old")
    assert listing(inner) == [files.NOTE]


# Looking for files


def test_files_of_a_folder(folder: Path) -> None:
    assert files.find(folder, "a") == folder / "a"
    assert files.find(str(folder), "a") == folder / "a"
    assert files.find(folder, "missing", required=False) == folder / "missing"
    with pytest.raises(CheckpointError, match=r"has no missing; it holds: a, b\. Name an adapter's folder"):
        files.find(folder, "missing")
    empty = folder / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty has no a; it holds: nothing\."):
        files.find(folder, "a", subfolder="empty")
    with pytest.raises(CheckpointError, match=r"not-there has no a; it holds: nothing\."):
        files.find(folder, "a", subfolder="not-there")


@pytest.mark.parametrize(
    "source", ["no-such-user/no-such-adapter", "/no/such/folder", "not there", Path("also not there")]
)
def test_what_is_neither_a_folder_nor_on_the_hub(source: str | Path) -> None:
    for required in (True, False):
        with pytest.raises(
            CheckpointError,
            match=rf"'{source}' is no folder here, and a\.txt could not be fetched .*Check the spelling, the network",
        ):
            files.find(source, "a.txt", required=required)


@pytest.mark.parametrize("required", [True, False])
def test_a_file_that_the_hub_does_not_have(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked: list[tuple[Any, ...]] = []

    def download(source: str, name: str, **more: Any) -> str:
        asked.append((source, name, more))
        raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    if required:
        with pytest.raises(CheckpointError, match="EntryNotFoundError"):
            files.find("user/adapter", "a", revision="main")
    else:
        assert not files.find("user/adapter", "a", required=False, revision="main", subfolder="s").exists()
    assert asked[0][:2] == ("user/adapter", "a")
    assert asked[0][2]["revision"] == "main"
