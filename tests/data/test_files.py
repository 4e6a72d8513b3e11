"""What a source may be: folders of several shapes, samples, hub ids, splits, and names that are none of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from veneer import samples
from veneer.data import read_rows, read_table
from veneer.data.files import HELD_OUT
from veneer.errors import DataError, VeneerWarning

Write = Callable[[str, str | bytes], str]
ROW = "text,label\n{0},x\n"


def test_folder_of_one_kind_is_joined_in_order(write: Write, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(f"d/{name}.csv", ROW.format(name))
    write("d/README.md", "about")
    write("d/.hidden.csv", "broken")
    assert read_rows(tmp_path / "d")["text"][:] == ["a", "b", "c"]


def test_folder_with_other_files_says_so(write: Write, tmp_path: Path) -> None:
    write("d/a.csv", ROW.format("a"))
    write("d/notes.doc", "x")
    with pytest.warns(VeneerWarning, match=r"only its \.csv files are read, not notes\.doc"):
        assert len(read_rows(tmp_path / "d")) == 1


def test_folder_of_several_kinds(write: Write, tmp_path: Path) -> None:
    write("d/a.csv", ROW.format("a"))
    write("d/b.jsonl", '{"text": "b"}')
    with pytest.raises(DataError, match=r"several kinds \(\.csv, \.jsonl\)"):
        read_rows(tmp_path / "d")


def test_folder_without_data(write: Write, tmp_path: Path) -> None:
    write("d/inner/picture.png", "x")
    with pytest.raises(DataError, match=r"holds no data: inner. Expected files of one kind"):
        read_rows(tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data: nothing"):
        read_rows(tmp_path / "empty")


def test_folder_whose_files_differ(write: Write, tmp_path: Path) -> None:
    write("d/a.csv", ROW.format("a"))
    write("d/b.csv", "text,class\na,x\n")
    with pytest.raises(DataError, match=r"a\.csv has the columns text, label, but .*b\.csv has text, class"):
        read_rows(tmp_path / "d")
    write("e/a.jsonl", '{"text": 1}')
    write("e/b.jsonl", '{"text": "b"}')
    with pytest.raises(DataError, match="columns of different types"):
        read_rows(tmp_path / "e")


def test_folder_divided_into_splits(write: Write, tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test"):
        write(f"d/{name}.csv", ROW.format(name))
    folder = str(tmp_path / "d")
    assert read_rows(folder)["text"][:] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert read_rows(folder, "test")["text"][:] == ["test"]
    assert read_rows(f"{folder}:test")["text"][:] == ["test"]
    assert read_table(folder, prefer=HELD_OUT).values("text") == ["test"]
    with pytest.raises(DataError, match=r"has no split 'validation'. It holds: test\.csv"):
        read_rows(folder, "validation")
    with pytest.raises(DataError, match=r"names the split 'test', data\.split names 'train'"):
        read_rows(f"{folder}:test", "train")


def test_folder_divided_into_splits_without_the_wanted_one(write: Write, tmp_path: Path) -> None:
    write("d/dev.csv", ROW.format("a"))
    write("d/test.csv", ROW.format("b"))
    write("d/extra.csv", ROW.format("c"))
    with (
        pytest.warns(VeneerWarning, match=r"only its splits are read, not extra\.csv"),
        pytest.raises(DataError, match=r"divided into splits \(validation, test\), but has none of train"),
    ):
        read_rows(tmp_path / "d")


def test_label_folders(write: Write, tmp_path: Path) -> None:
    write("d/very_good/1.txt", "Great.\nReally.\n")
    write("d/very_good/2.txt", "Fine.")
    write("d/bad/1.txt", "Dull.")
    table = read_table(tmp_path / "d")
    assert table.rows.to_list() == [
        {"text": "Dull.", "label": "bad"},
        {"text": "Great.\nReally.", "label": "very_good"},
        {"text": "Fine.", "label": "very_good"},
    ]
    assert table.places([0, 2]) == f"{tmp_path / 'd/bad/1.txt'}; {tmp_path / 'd/very_good/2.txt'}"


def test_label_folders_in_splits_with_an_empty_and_a_foreign_file(write: Write, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(f"d/{split}/pos/1.txt", f"{split} good")
        write(f"d/{split}/neg/1.txt", "")
    write("d/train/pos/2.html", "x")
    with pytest.warns(VeneerWarning, match=r"only its \.txt files are read, not 2\.html"):
        assert read_rows(tmp_path / "d")["text"][:] == ["", "train good"]
    assert read_rows(tmp_path / "d", "test")["text"][:] == ["", "test good"]


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"]})
    part.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"odd": part}).save_to_disk(tmp_path / "three")
    for source in ("one", "two", "two:test", "three"):
        assert read_rows(str(tmp_path / source)).to_list() == [{"text": "a"}]
    with pytest.raises(DataError, match="has the splits train, test"):
        read_rows(tmp_path / "two", "dev")
    with pytest.raises(DataError, match="without splits"):
        read_rows(tmp_path / "one", "train")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(DataError, match="cannot be loaded"):
        read_rows(tmp_path / "one")


def test_split_of_a_single_file(write: Write) -> None:
    with pytest.raises(DataError, match="is one file, so it has no split 'test'"):
        read_rows(write("a.csv", ROW.format("a")), "test")


def test_home_folder(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.csv", ROW.format("a"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read_rows("~/a.csv")) == 1


def test_missing_file_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write("reviews.csv", ROW.format("a"))
    with pytest.raises(DataError, match=r"There is no file or folder .*Did you mean 'reviews\.csv'\?"):
        read_rows(tmp_path / "review.csv")
    with pytest.raises(DataError, match="There is no file or folder"):
        read_rows("./nowhere/at/all/here")


def test_sample(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("fetched.csv", ROW.format("a"))
    monkeypatch.setattr(samples, "resolve_data", lambda name: path if name == "sms-spam" else name)
    table = read_table("sms-spam")
    assert (table.source, len(table)) == ("sms-spam", 1)


class FakeHub:
    """Stands in for `datasets.load_dataset`."""

    def __init__(self, *splits: str, error: Exception | None = None) -> None:
        self.splits, self.error = splits, error
        self.calls: list[tuple[str, str | None, str | None]] = []

    def __call__(self, name: str, configuration: str | None, split: str | None) -> Any:
        self.calls.append((name, configuration, split))
        if self.error:
            raise self.error
        parts = {part: datasets.Dataset.from_dict({"text": [part]}) for part in self.splits}
        return parts[split] if split else datasets.DatasetDict(parts)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def install(*splits: str, error: Exception | None = None) -> FakeHub:
        fake = FakeHub(*splits, error=error)
        monkeypatch.setattr(datasets, "load_dataset", fake)
        return fake

    return install


def test_hub_ids_and_their_splits(hub: Callable[..., FakeHub]) -> None:
    fake = hub("train", "test")
    table = read_table("owner/films")
    assert (table.values("text"), table.place(0)) == (["train"], "owner/films (train)")
    assert read_table("owner/films", prefer=HELD_OUT).values("text") == ["test"]
    assert read_rows("owner/films/small:test")["text"][:] == ["test"]
    assert read_rows("films", "train")["text"][:] == ["train"]
    assert fake.calls == [
        ("owner/films", None, None),
        ("owner/films", None, None),
        ("owner/films", "small", "test"),
        ("films", None, "train"),
    ]
    hub("odd")
    assert read_rows("owner/films")["text"][:] == ["odd"]


def test_hub_without_the_wanted_split(hub: Callable[..., FakeHub]) -> None:
    hub("training", "extra")
    with pytest.raises(DataError, match=r"has the splits training, extra, but none of train\. Did you mean 'training'"):
        read_rows("owner/films")


def test_hub_out_of_reach(hub: Callable[..., FakeHub]) -> None:
    hub(error=ConnectionError("Couldn't reach the Hub\nlong trace"))
    with pytest.raises(DataError) as caught:
        read_rows("sms-spm")
    message = str(caught.value)
    assert (
        "no file, folder or sample here, and loading it from the hub failed with ConnectionError: Couldn't" in message
    )
    assert "Did you mean 'sms-spam'?" in message
    assert "network" in message
    assert "long trace" not in message
