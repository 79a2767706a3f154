"""What is on disk is a whole checkpoint or is not one."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from mmpt.engine import checkpoint_files
from mmpt.engine.checkpoint_files import (
    newest_valid,
    prune,
    publish,
    read_manifest,
    remove_leftovers,
    temporary_of,
    write_part,
)
from tests.ranks import run


def fields(step: int) -> dict:
    return {
        "step": step, "world_size": 1, "zero_stage": 1, "precision": "fp32", "shapes": {"w": (2, 3)},
        "loss_scaler": {}, "state": {"data_state": 7},
    }  # fmt: skip


def put(folder: Path, step: int, data: bytes = b"x" * 100) -> Path:
    write_part(temporary_of(folder, step, "t"), 0, memoryview(data), [("master", "w", 0, 6)], ["exp_avg"], step)
    return publish(folder, step, "t", fields(step), ranks=1)[0]


def test_published_is_found_with_its_state(tmp_path: Path) -> None:
    put(tmp_path, 1)
    put(tmp_path, 20)
    checkpoint, manifest, passed_over = newest_valid(tmp_path)
    assert (checkpoint.name, manifest.state, passed_over) == ("step-00000020", {"data_state": 7}, [])
    assert manifest.shapes == {"w": (2, 3)} and manifest.files[0].contents == (("master", "w", 0, 6),)
    assert (tmp_path / "latest").read_text() == "step-00000020"


def truncate(path: Path) -> None:
    os.truncate(path / "rank-00000.safetensors", 99)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "rank-00000.safetensors").read_bytes())
    data[50] ^= 1
    (path / "rank-00000.safetensors").write_bytes(data)


def break_json(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-10])


def another_format(path: Path) -> None:
    data = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(data | {"format": 99}))


def change_the_data_state(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"data_state": 7', '"data_state": 3'))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "99 bytes instead of 100"),
        (flip_a_bit, "does not match its SHA-256"),
        (lambda path: (path / "rank-00000.safetensors").unlink(), "is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
        (break_json, "cannot be used"),
        (another_format, "reads format"),
        (change_the_data_state, "does not match its own SHA-256"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, harm, reason: str) -> None:
    put(tmp_path, 1)
    harm(put(tmp_path, 2))
    checkpoint, _, passed_over = newest_valid(tmp_path)
    assert checkpoint.name == "step-00000001"
    assert len(passed_over) == 1 and passed_over[0].startswith("step-00000002") and reason in passed_over[0]


def test_no_byte_of_a_manifest_can_change_unseen(tmp_path: Path) -> None:
    """Much of what changes in names and numbers leaves it valid JSON."""
    checkpoint = put(tmp_path, 1)
    path, still_json = checkpoint / "manifest.json", 0
    whole = path.read_bytes()
    for place in range(len(whole)):
        text = bytearray(whole)
        text[place] ^= 1 << place % 8
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"manifest\.json cannot be used"):
            read_manifest(checkpoint)
        with contextlib.suppress(ValueError):
            still_json += isinstance(json.loads(bytes(text)), dict)
    assert still_json > 100
    path.write_bytes(whole)
    assert read_manifest(checkpoint).state == {"data_state": 7}


def test_only_damaged_ones_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing") is None
    truncate(put(tmp_path, 3))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid .*99 bytes"):
        newest_valid(tmp_path)


def test_an_unfinished_save_is_never_a_candidate(tmp_path: Path) -> None:
    put(tmp_path, 1)
    leftover = temporary_of(tmp_path, 2, "dead")
    leftover.mkdir()
    (leftover / "manifest.json").write_text("{}")
    assert newest_valid(tmp_path)[0].name == "step-00000001"
    assert put(tmp_path, 2).name == "step-00000002" and newest_valid(tmp_path)[0].name == "step-00000002"
    remove_leftovers(tmp_path)
    assert not leftover.exists()


def test_a_damaged_one_is_replaced_by_its_redoing(tmp_path: Path) -> None:
    put(tmp_path, 1)
    truncate(put(tmp_path, 2))
    put(tmp_path, 2, b"z" * 100)
    assert newest_valid(tmp_path)[0].name == "step-00000002" and newest_valid(tmp_path)[2] == []


def test_retention(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30, 40, 50):
        put(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every_steps=20, protect=tmp_path / "step-00000010")
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (0, 10, 20, 40, 50)]
    assert not list(tmp_path.glob(".trash*"))


def killed_inside(rank: int, world_size: int, folder: str, call: int) -> None:
    place, count = Path(folder), 0

    def killing(original, write):
        def called(*arguments):
            nonlocal count
            count += 1
            if count == call:
                write(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return called

    files = checkpoint_files
    files._write_all = killing(files._write_all, lambda file, data: file.write(data[: len(data) // 2]))
    files.write_synced = killing(files.write_synced, lambda path, data: path.write_bytes(data[: len(data) // 2]))
    put(place, 2)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_kill_in_the_middle_of_any_write_leaves_the_previous_one(tmp_path: Path, call: int) -> None:
    """The writes of a save: a rank's tensors, its part of the manifest, the manifest, and, after the rename, the hint
    `latest`."""
    put(tmp_path, 1)
    with pytest.raises(AssertionError, match="-9"):
        run(killed_inside, 1, str(tmp_path), call)
    assert newest_valid(tmp_path)[0].name == ("step-00000002" if call == 4 else "step-00000001")
