"""Which checkpoints are kept, and when one goes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from deepseek.checkpoint import checkpoint as checkpoint_module
from deepseek.checkpoint import manifest as manifest_module
from deepseek.checkpoint.checkpoint import describe, newest_sound
from deepseek.checkpoint.manager import CheckpointManager
from deepseek.checkpoint.manifest import complete_steps, step_folders, step_name
from deepseek.config.errors import UserError
from support.stored import flip, flip_number, save, shard_of, value_of


@pytest.mark.parametrize(
    ("keep", "expected"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (-1, [1, 2, 3, 4, 5])]
)
def test_retention(tmp_path: Path, keep: int, expected: list[int]) -> None:
    manager = CheckpointManager(tmp_path, keep=keep)
    for step in range(1, 6):
        assert save(manager, step) == tmp_path / f"step_0000000{step}"
    assert manager.steps() == expected
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None and checkpoint.step == 5 and value_of(checkpoint) == 5
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".lock", *(f"step_0000000{step}" for step in expected)]


@pytest.mark.parametrize("keep", [0, -2])
def test_keep_that_makes_no_sense(tmp_path: Path, keep: int) -> None:
    with pytest.raises(UserError, match=f"^{keep} checkpoints cannot be kept: use 1 or more"):
        CheckpointManager(tmp_path, keep=keep)


def test_nothing_is_deleted_before_the_new_one_is_whole(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1)
    with pytest.raises(UserError):
        manager.save(2, {"a": torch.zeros(1)}, {"loss": float("nan")})
    assert manager.steps() == [1]


def test_damaged_ones_keep_no_place(manager: CheckpointManager) -> None:
    """Two that look whole and are not must not push the sound one out."""
    manager.keep = -1
    for step in (1, 2, 3):
        save(manager, step)
    manager.keep = 2
    for step in (2, 3):
        flip_number(manager.folder / f"step_0000000{step}")
    assert manager.steps() == [1, 2, 3]
    checkpoint = manager.newest_sound(lambda text: None)
    assert checkpoint is not None and checkpoint.step == 1
    save(manager, 2, 22.0)  # the run comes past step 2 again
    assert manager.steps() == [1, 2]
    assert value_of(manager.newest_sound(pytest.fail)) == 22


def test_known_damage_below_the_new_one_keeps_no_place(manager: CheckpointManager) -> None:
    save(manager, 1)
    flip_number(save(manager, 2))
    manager.newest_sound(lambda text: None)
    save(manager, 3)
    assert manager.steps() == [1, 3]


def test_later_damaged_one_is_found_by_the_writer_itself(manager: CheckpointManager) -> None:
    save(manager, 1)
    flip_number(save(manager, 3))
    save(manager, 2)
    assert manager.steps() == [1, 2]


def test_incomplete_directory_goes_with_the_next_save(manager: CheckpointManager) -> None:
    (manager.folder / "step_00000004").mkdir()
    save(manager, 1)
    assert sorted(path.name for path in manager.folder.iterdir()) == [".lock", "step_00000001"]


def test_keeping_all_deletes_nothing(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=-1)
    save(manager, 1)
    flip_number(save(manager, 2))
    (tmp_path / "step_00000009").mkdir()
    manager.newest_sound(lambda text: None)
    save(manager, 2, 5.0)
    save(manager, 3)
    assert manager.steps() == [1, 2, 3] and (tmp_path / "step_00000009").exists()


def test_later_sound_one_is_another_run(manager: CheckpointManager) -> None:
    save(manager, 5)
    with pytest.raises(UserError, match="a checkpoint of step 5, later than step 2") as caught:
        save(manager, 2)
    assert "use another run folder, or move step_00000005 away" in str(caught.value)
    assert manager.steps() == [5]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1, 10.0)
    save(manager, 1, 11.0)
    assert manager.steps() == [1] and value_of(manager.newest_sound(pytest.fail)) == 11
    flip(shard_of(tmp_path / "step_00000001"), 0)
    save(manager, 1, 12.0)
    assert manager.steps() == [1] and value_of(manager.newest_sound(pytest.fail)) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "step_00000001"]


def test_other_names_are_left_alone(manager: CheckpointManager) -> None:
    others = ["step_7", "step_000000001", "step_0000000x", "best", "step_00000003.bak"]
    for name in others:
        (manager.folder / name).mkdir()
    (manager.folder / "step_00000002").write_text("a file")
    for step in (1, 3, 4):
        save(manager, step)
    assert manager.steps() == [3, 4]
    assert all((manager.folder / name).exists() for name in [*others, "step_00000002"])


def test_steps_beyond_eight_digits(manager: CheckpointManager) -> None:
    for step in (99_999_999, 100_000_000):
        save(manager, step)
    assert manager.steps() == [99_999_999, 100_000_000]
    checkpoint = manager.newest_sound(pytest.fail)
    assert checkpoint is not None and checkpoint.step == 100_000_000


# -- readers beside a writer ----------------------------------------------------------------------


def test_what_is_being_read_is_not_retired(manager: CheckpointManager) -> None:
    manager.keep = 1
    save(manager, 1)
    checkpoint = newest_sound(manager.folder, pytest.fail)
    for step in (2, 3):
        save(manager, step)
    assert manager.steps() == [1, 3]
    assert value_of(checkpoint) == 1
    del checkpoint
    save(manager, 4)
    assert manager.steps() == [4]
    # Its own writer does not stand in its own way.
    own = manager.newest_sound(pytest.fail)
    save(manager, 5)
    assert own is not None and manager.steps() == [5]


def test_a_checkpoint_that_goes_before_it_is_held(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing was read, then the writer came: a reader takes what is there now."""
    manager.keep = 1
    save(manager, 1)

    def listing(folder: Path) -> list[Path]:
        monkeypatch.undo()
        paths = step_folders(folder)
        save(manager, 2)
        return paths

    for module, reads in (
        (checkpoint_module, lambda: value_of(newest_sound(manager.folder, pytest.fail))),
        (manifest_module, lambda: complete_steps(manager.folder)[0]),
    ):
        monkeypatch.setattr(module, "step_folders", listing)
        assert reads() == 2
    monkeypatch.setattr(checkpoint_module, "step_folders", lambda folder: [folder / step_name(1)])
    assert describe(manager.folder) == []
    monkeypatch.undo()
    (manager.folder / step_name(9)).symlink_to("nowhere")
    assert complete_steps(manager.folder) == [2]


def test_readers_beside_a_writer(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, keep=1)
    save(manager, 1)
    writer = threading.Thread(target=lambda: [save(manager, step) for step in range(2, 30)])
    writer.start()
    seen = set()
    while writer.is_alive():
        checkpoint = newest_sound(tmp_path, pytest.fail)
        assert checkpoint is not None and value_of(checkpoint) == checkpoint.step
        seen.add(checkpoint.step)
        del checkpoint
        assert all(row.problem is None for row in describe(tmp_path))
        assert complete_steps(tmp_path)
    writer.join()
    assert len(seen) > 3
    save(manager, 30)
    assert manager.steps() == [30]
