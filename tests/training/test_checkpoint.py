"""A checkpoint is whole or invisible, and every damage is seen."""

import os

import pytest

from lora_ft.errors import UserError
from lora_ft.training.checkpoint import (
    draft_checkpoint,
    find_damage,
    find_intact,
    list_checkpoints,
    rotate_checkpoints,
    seal_checkpoint,
)


def save(run, step):
    draft = draft_checkpoint(run, step)
    (draft / "adapter_model.safetensors").write_bytes(b"weights" * 100 + bytes([step]))
    (draft / "optimizer.pt").write_bytes(b"moments" * 100)
    (draft / "global_step").mkdir()
    (draft / "global_step" / "rank_1.pt").write_bytes(b"shard")
    return seal_checkpoint(draft, weights_only=False)


def test_draft_is_no_checkpoint(tmp_path):
    draft_checkpoint(tmp_path, 5)
    assert list_checkpoints(tmp_path) == [] and find_intact(tmp_path) is None
    folder = save(tmp_path, 5)
    assert folder == tmp_path / "checkpoint-5" and find_damage(folder) is None
    assert find_intact(tmp_path) == folder


def test_newest_is_newest_by_number(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]


def every_damage(folder):
    """Each file of a checkpoint, and what can happen to it."""
    for name in ("adapter_model.safetensors", "optimizer.pt", "global_step/rank_1.pt", "checkpoint.json"):
        yield name, "delete", None
        yield name, "truncate", 1
        for place in range((folder / name).stat().st_size):
            yield name, "flip", place


def test_every_damage_is_seen(tmp_path):
    """Failure mode 34: each file deleted, cut, and with one bit of each byte turned."""
    folder = save(tmp_path, 5)
    cases = list(every_damage(folder))
    for name, kind, place in cases:
        path = folder / name
        whole = path.read_bytes()
        if kind == "delete":
            path.unlink()
        elif kind == "truncate":
            path.write_bytes(whole[:-place])
        else:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        assert find_damage(folder) is not None, (name, kind, place)
        path.write_bytes(whole)
    assert len(cases) > 1500 and find_damage(folder) is None
    os.rename(folder, tmp_path / "checkpoint-6")
    assert find_damage(tmp_path / "checkpoint-6") is not None, "under another step's name"


def test_damaged_one_is_passed_over_aloud(tmp_path, capsys):
    for step in (5, 10, 15):
        save(tmp_path, step)
    (tmp_path / "checkpoint-15" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-10" / "checkpoint.json").write_text("[]")
    assert find_intact(tmp_path) == tmp_path / "checkpoint-5"
    said = capsys.readouterr().err
    assert "checkpoint-15 is passed over: optimizer.pt is missing; going back to checkpoint-5" in said
    assert "checkpoint-10 is passed over: checkpoint.json is not as it was written" in said
    (tmp_path / "checkpoint-5" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match="No checkpoint of this run is intact"):
        find_intact(tmp_path)


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, [5], [20, 15, 10, 5]),
        (2, [], [20, 15]),
        (2, [5], [20, 5]),
        (1, [5, 10], [20, 5]),
        (1, [20], [20]),
        (3, [5], [20, 15, 5]),
        (2, [5, 10, 15, 20], [20, 10, 5]),
        (2, [7, 15, 5, 10], [20, 15, 5]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(tmp_path, limit, best, left):
    """Failure mode 38; times of files, which a copy changes, do not matter."""
    for step in (20, 5, 15, 10):
        save(tmp_path, step)
    rotate_checkpoints(tmp_path, limit, list_checkpoints(tmp_path)[0], best)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert not list(tmp_path.glob(".checkpoint*"))
