"""What is on disk is a whole checkpoint or is not one."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from mmpt import dist
from mmpt.engine import checkpoint_files
from mmpt.engine.checkpoint_files import newest_valid, prune, publish
from tests.ranks import run


def fields(step: int) -> dict:
    return {
        "step": step, "world_size": dist.world_size(), "zero_stage": 1, "precision": "fp32", "optimizer_step": step,
        "moments": [], "shapes": {"w": (2, 3)}, "loss_scaler": {}, "state": {"data_state": 7},
    }  # fmt: skip


def put(folder: Path, step: int, data: bytes = b"x" * 100) -> Path:
    return publish(folder, step, data, [("master", "w", 0, 6)], fields(step))


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


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "99 bytes instead of 100"),
        (flip_a_bit, "does not match its SHA-256"),
        (lambda path: (path / "rank-00000.safetensors").unlink(), "is missing"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json"),
        (break_json, "is damaged"),
        (another_format, "not known"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path: Path, harm, reason: str) -> None:
    put(tmp_path, 1)
    harm(put(tmp_path, 2))
    checkpoint, _, passed_over = newest_valid(tmp_path)
    assert checkpoint.name == "step-00000001"
    assert len(passed_over) == 1 and passed_over[0].startswith("step-00000002") and reason in passed_over[0]


def test_only_damaged_ones_is_an_error_and_none_is_not(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nothing") is None
    truncate(put(tmp_path, 3))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is valid .*99 bytes"):
        newest_valid(tmp_path)


def test_an_unfinished_save_is_never_a_candidate(tmp_path: Path) -> None:
    put(tmp_path, 1)
    (tmp_path / ".tmp-step-00000002").mkdir()
    (tmp_path / ".tmp-step-00000002" / "manifest.json").write_text("{}")
    assert newest_valid(tmp_path)[0].name == "step-00000001"
    assert put(tmp_path, 2).name == "step-00000002" and not (tmp_path / ".tmp-step-00000002").exists()


def test_retention(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30, 40, 50):
        put(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every_steps=20, protect=tmp_path / "step-00000010")
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == [f"step-{step:08d}" for step in (0, 10, 20, 40, 50)]
    assert not list(tmp_path.glob(".trash*"))


def out_of_space(rank: int, world_size: int, folder: str) -> str:
    """Rank 1 may write no more than 1 kB to any file: the kernel refuses, as it does on a full disk."""
    place = Path(folder)
    put(place, 1)
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        put(place, 2, b"y" * 5000)
    except OSError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert newest_valid(place)[0].name == "step-00000001"
    dist.barrier()
    assert not list(place.glob(".tmp*"))
    return message


@pytest.mark.slow
def test_a_rank_that_cannot_write_fails_the_save_on_all_and_loses_nothing(tmp_path: Path) -> None:
    messages = run(out_of_space, 2, str(tmp_path))
    assert messages[0] == messages[1]
    assert "step 2 was not saved" in messages[0] and "rank 1: File too large" in messages[0]


def killed_inside(rank: int, world_size: int, folder: str, call: int) -> None:
    place, count = Path(folder), 0
    original = checkpoint_files.write_synced

    def write(path: Path, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == call:
            path.write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, data)

    checkpoint_files.write_synced = write
    put(place, 2)


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2, 3])
def test_kill_in_the_middle_of_any_write_leaves_the_previous_one(tmp_path: Path, call: int) -> None:
    """The three writes of a save: a rank's tensors, the manifest, the hint `latest` (after the rename)."""
    put(tmp_path, 1)
    with pytest.raises(AssertionError, match="-9"):
        run(killed_inside, 1, str(tmp_path), call)
    assert newest_valid(tmp_path)[0].name == ("step-00000002" if call == 3 else "step-00000001")
