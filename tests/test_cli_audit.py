"""A run that met a bad image, and what `mmpt audit` says it has seen."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import parquet

from data_tools.index import index
from mmpt import cli
from tests.test_train import train

BATCH, STEPS, SAMPLES = 16, 12, 96


@pytest.fixture(scope="module")
def run(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs over 96 scenes of which the first has a damaged image and the last an empty caption."""
    folder = tmp_path_factory.mktemp("audit")
    shutil.copytree(scenes / "data/train", folder / "shards")
    shard = folder / "shards/00000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"\x89PNG") + 40
    data[at : at + 20] = bytes(20)
    begin = data.rindex(b".txt\0") // 512 * 512 + 512
    end = data.index(b"\0", begin)
    data[begin:end] = b" " * (end - begin)
    shard.write_bytes(data)
    index(str(folder / "shards"), chunk_samples=4)
    done = train(scenes, folder / "run", data__shards=folder / "shards")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def audit(capsys: pytest.CaptureFixture, *arguments: str | Path) -> list[list[str]]:
    assert cli.main(["audit", *map(str, arguments)]) == 0
    return [line.split("\t") for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_what_the_run_has_seen(run: Path, capsys: pytest.CaptureFixture):
    quarantined = {row["key"]: row for row in parquet.read_table(run / "quarantine.parquet").to_pylist()}
    reasons = sorted(row["reason"] for row in quarantined.values())
    assert len(reasons) == 2 and "cannot be decoded" in reasons[0] and "caption" in reasons[1], reasons
    assert all(row["times"] == 2 and row["offset"] % 512 == 0 for row in quarantined.values())
    header, *rows = audit(capsys, run)
    assert header == ["step", "position", "epoch", "shard", "key"] and len(rows) == BATCH * STEPS
    counts = Counter(row[4] for row in rows)
    assert not set(counts) & set(quarantined), "what could not be used was not seen"
    assert sum(counts.values()) == 2 * SAMPLES and sum(n == 2 for n in counts.values()) >= SAMPLES - 6
    stood_in = [json.loads(line)["stand_in"] for path in (run / "quarantine").iterdir()
                for line in path.read_text().splitlines() if line]  # fmt: skip
    assert all(counts[key] >= 3 for key in stood_in), "stand-ins came once more than their two turns"
    assert audit(capsys, run, "--steps", "3:4")[1:] == [row for row in rows if row[0] == "4"]


@pytest.mark.slow
def test_a_takedown_list(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    _, *rows = audit(capsys, run)
    seen = rows[5][4]
    (bad,) = [row["key"] for row in parquet.read_table(run / "quarantine.parquet").to_pylist()][:1]
    (tmp_path / "takedown.txt").write_text(f"{seen}\n{bad}\nnever-there\n")
    header, *answers = audit(capsys, run, "--takedown", tmp_path / "takedown.txt")
    assert header == ["key", "times_seen", "steps", "shard"]
    said = {answer[0]: answer for answer in answers}
    steps = [row[0] for row in rows if row[4] == seen]
    assert said[seen][1:3] == [str(len(steps)), ",".join(steps)]
    assert said[bad][1:3] == ["0", "never"]
    assert said["never-there"][1:3] == ["0", "not in the data"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["5", "3:99", "4:2", "a:b"])
def test_wrong_steps_are_one_line(run: Path, steps: str, capsys: pytest.CaptureFixture):
    assert cli.main(["audit", str(run), "--steps", steps]) == 1
    assert "--steps wants A:B with A <= B <= 12" in capsys.readouterr().err
