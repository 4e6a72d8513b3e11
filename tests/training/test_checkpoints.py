import errno
import json
from pathlib import Path

import pytest

from veneer.errors import CheckpointError, VeneerWarning
from veneer.training import checkpoints


def fill(folder: Path, content: str = "weights", resumable: bool = True) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "tensors").write_text(content)
    (folder / "state").write_text("{}")
    checkpoints.seal(folder, resumable=resumable)


def save(folder: Path, step: int, resumable: bool = True) -> Path:
    final = folder / f"checkpoint-{step}"
    with checkpoints.saving(final) as partial:
        fill(partial, f"weights {step}", resumable)
    return final


def save_and_fail(final: Path, error: BaseException) -> None:
    with checkpoints.saving(final) as partial:
        (partial / "half").write_text("x")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_saved_checkpoint_is_whole_and_alone(tmp_path: Path) -> None:
    final = save(tmp_path, 7)
    assert names(tmp_path) == ["checkpoint-7"]
    assert checkpoints.defect(final) is None
    assert set(json.loads((final / checkpoints.MANIFEST).read_text())["files"]) == {"inner/tensors", "state"}


def test_nothing_is_seen_of_a_checkpoint_before_it_is_whole(tmp_path: Path) -> None:
    with checkpoints.saving(tmp_path / "checkpoint-7") as partial:
        fill(partial)
        assert checkpoints.steps(tmp_path) == []
    assert [step for step, _ in checkpoints.steps(tmp_path)] == [7]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"checkpoint-7 could not be saved: .*earlier checkpoints are intact"):
        save_and_fail(tmp_path / "checkpoint-7", error)
    assert names(tmp_path) == ["checkpoint-3"]
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-3"


def test_other_errors_are_passed_on_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_and_fail(tmp_path / "checkpoint-7", KeyboardInterrupt())
    assert names(tmp_path) == []


def test_saving_over_a_checkpoint_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 7)
    with checkpoints.saving(tmp_path / "checkpoint-7") as partial:
        fill(partial, "other")
    assert (tmp_path / "checkpoint-7" / "inner" / "tensors").read_text() == "other"
    assert names(tmp_path) == ["checkpoint-7"]


def damage_missing(folder: Path) -> None:
    (folder / "state").unlink()


def damage_truncated(folder: Path) -> None:
    (folder / "inner" / "tensors").write_text("weig")


def damage_changed(folder: Path) -> None:
    (folder / "inner" / "tensors").write_text("weights 8")


def damage_manifest(folder: Path) -> None:
    (folder / checkpoints.MANIFEST).write_text('{"files": ')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_missing, "state is missing"),
        (damage_truncated, "inner/tensors has 4 bytes, 9 were written"),
        (damage_changed, "the contents of inner/tensors have changed"),
        (damage_manifest, "its veneer_checkpoint.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: object, reason: str) -> None:
    save(tmp_path, 5)
    damage(save(tmp_path, 9))  # type: ignore[operator]
    with pytest.warns(VeneerWarning, match=f"checkpoint-9 is skipped: {reason}.*goes on from checkpoint-5"):
        assert checkpoints.last_complete(tmp_path).name == "checkpoint-5"


def test_without_a_complete_checkpoint_the_reasons_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint to resume from .there are no folders"):
        checkpoints.last_complete(tmp_path)
    damage_missing(save(tmp_path, 9))
    save(tmp_path, 12, resumable=False)
    with pytest.raises(CheckpointError, match=r"checkpoint-12: it was saved with save_only_model.*checkpoint-9: state"):
        checkpoints.last_complete(tmp_path)


def test_cleaning_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for name in (".checkpoint-7.partial", ".checkpoint-2.removed", ".checkpoint-5.replaced", ".final.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    (tmp_path / ".notes").mkdir()
    checkpoints.clean(tmp_path)
    assert names(tmp_path) == [".notes", "checkpoint-5"]


def test_cleaning_brings_back_a_checkpoint_that_was_to_be_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5).rename(tmp_path / ".checkpoint-5.replaced")
    checkpoints.clean(tmp_path)
    assert checkpoints.last_complete(tmp_path).name == "checkpoint-5"


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 10, 8):
        save(tmp_path, step)
    checkpoints.rotate(tmp_path, None)
    assert len(checkpoints.steps(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 3, best=tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-8"]
    checkpoints.rotate(tmp_path, 1, best=tmp_path / "checkpoint-2")
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2"]
    checkpoints.rotate(tmp_path, 1)
    assert names(tmp_path) == ["checkpoint-10"]
