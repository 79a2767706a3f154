import json
import os
import shutil
from pathlib import Path

import pytest

from data_tools import verify, verify_epoch
from data_tools.__main__ import main
from data_tools.index import index
from mmpt.data.manifest import load_manifest
from tests.data.shards import picture, write_shards
from tests.data_tools.test_index import failure


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", [6, 5, 4])
    index(str(tmp_path / "shards"), chunk_samples=2)
    return tmp_path / "shards"


def damage_image(folder: Path, shard: str, number: int) -> None:
    path, image = folder / shard, picture(number)
    path.write_bytes(path.read_bytes().replace(image, image[:40] + bytes(len(image) - 40)))


def test_intact_shards(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    main(["verify", str(folder), str(tmp_path / "report.jsonl"), "--workers", "0"])
    assert "3 shards, 15 samples" in capsys.readouterr().out
    lines = verify.read_report(tmp_path / "report.jsonl")
    assert [line["shard"] for line in lines] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all(line["damage"] is None and line["bad_samples"] == [] and len(line["blake2b"]) == 64 for line in lines)


def test_bad_samples_are_named_listed_and_can_be_left_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    damage_image(folder, "00001.tar", 9)
    report, keys = tmp_path / "report.jsonl", tmp_path / "bad.txt"
    said = failure(["verify", str(folder), str(report), "--workers", "0", "--bad-keys", str(keys)])
    assert "0 damaged shards and 1 bad samples of 15" in said
    assert "sample '000009': cannot be decoded" in capsys.readouterr().out
    assert keys.read_text() == "000009\n"
    main(["index", str(folder), "--exclude", str(keys), "--workers", "0"])
    assert "14 samples (1 of 15 left out)" in capsys.readouterr().out
    assert load_manifest(str(folder)).samples == 14


@pytest.mark.parametrize("harm", ["payload", "header", "cut"])
def test_damage_names_shard_and_byte(folder: Path, tmp_path: Path, harm: str, capsys: pytest.CaptureFixture):
    """Of the same size, so that only reading can tell; a byte of a text is told by the digest of an earlier report."""
    path = folder / "00002.tar"
    data = bytearray(path.read_bytes())
    if harm == "header":
        data[100] ^= 1
    elif harm == "cut":
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    else:
        first = verify.verify_shard(load_manifest(str(folder)), "txt", 2)
        data[data.index(b"a yellow")] = ord("b")
        path.write_bytes(data)
        again = verify.verify_shard(load_manifest(str(folder)), "txt", 2)
        assert first["blake2b"] != again["blake2b"] and again["damage"] is None
        return
    path.write_bytes(data)
    assert "1 damaged shards" in failure(["verify", str(folder), str(tmp_path / "r"), "--workers", "0"])
    assert "00002.tar at byte" in capsys.readouterr().out


def test_a_stopped_verification_goes_on_where_it_was(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    report = tmp_path / "report.jsonl"
    main(["verify", str(folder), str(report), "--workers", "0"])
    lines = report.read_text().splitlines()
    report.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    capsys.readouterr()
    main(["verify", str(folder), str(report), "--workers", "0"])
    assert "2 of 3 shards were verified before" in capsys.readouterr().out
    (folder / "00000.tar").unlink()
    write_shards(tmp_path / "new", [7])
    shutil.copy(tmp_path / "new/00000.tar", folder / "00000.tar")
    index(str(folder), chunk_samples=2)
    main(["verify", str(folder), str(report), "--workers", "0"])
    assert "2 of 3 shards were verified before" in capsys.readouterr().out, "the changed shard is verified again"


@pytest.mark.slow
def test_processes_change_nothing(folder: Path, tmp_path: Path):
    damage_image(folder, "00000.tar", 3)
    for workers in ("0", "2"):
        failure(["verify", str(folder), str(tmp_path / workers), "--workers", workers])
    assert (tmp_path / "0").read_text() == (tmp_path / "2").read_text()
    assert json.loads((tmp_path / "0").read_text().splitlines()[0])["bad_samples"][0]["key"] == "000003"


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_an_epoch_is_covered_by_any_world_size(folder: Path, world_size: int, capsys: pytest.CaptureFixture):
    arguments = ["verify-epoch", str(folder), "--global-batch", "12", "--lanes", "5", "--read-keys"]
    main([*arguments, "--world-size", str(world_size), "--epochs", "3"])
    out = capsys.readouterr().out
    assert "4 steps of 12" in out and "epochs 3.200" in out
    main([*arguments, "--world-size", "1", "--epochs", "3"])
    assert capsys.readouterr().out.split()[-1] == out.split()[-1], "the same keys in the same order"


def test_weighted_sources_are_covered_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_shards(tmp_path / "b", [4])
    index(str(tmp_path / "b"))
    both = f"{folder}::{tmp_path / 'b'}"
    main(["verify-epoch", both, "--weights", "2,1", "--world-size", "2", "--global-batch", "6"])
    assert "epochs 1.067, 2.000" in capsys.readouterr().out


def test_an_order_that_misses_a_sample_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = verify_epoch.batch_positions

    def off_by_one(mixture, start, global_batch, rank, world_size):
        positions = whole(mixture, start, global_batch, rank, world_size)
        positions[0] = 0
        return positions

    monkeypatch.setattr(verify_epoch, "batch_positions", off_by_one)
    said = failure(["verify-epoch", str(folder), "--world-size", "1", "--global-batch", "5"])
    assert "samples were not delivered 1 or 2 times" in said


def test_an_unwritable_report_is_one_line(folder: Path):
    assert os.fspath(folder) in failure(["verify", str(folder), str(folder), "--workers", "0"])
