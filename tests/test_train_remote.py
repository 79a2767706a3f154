"""The same training from a folder, from a web server and from an S3 endpoint that fail 5 % of requests: equal bits."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.__main__ import main as mmpt_data
from tests.data.remote.fault_server import TRANSIENT, Plan, folder_answers, serving, upstream_answers
from tests.data.remote.s3_server import bucket_of, set_credentials
from tests.test_train import losses, one_line, train, weights

QUICK = {"data__remote__timeout_seconds": 1, "data__remote__deadline_seconds": 60}
FAULTS = tuple(fault for fault in TRANSIENT if "drip" not in fault)


@pytest.fixture(scope="module")
def s3_port(scenes: Path) -> Iterator[int]:
    with bucket_of(scenes / "data/train") as port:
        yield port


def train_from(shards: str, scenes: Path, folder: Path, workers: int) -> subprocess.CompletedProcess:
    """Index remote shards as the documentation says, and train on them."""
    mmpt_data(["index", shards, "--out", str(folder / "manifest")])
    return train(
        scenes, folder / "run", data__shards=folder / "manifest", data__cache__folder=folder / "cache",
        data__workers=workers, **QUICK,
    )  # fmt: skip


@pytest.mark.slow
def test_where_the_shards_lie_changes_no_bit(
    scenes: Path, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    set_credentials(monkeypatch)
    local = train(scenes, tmp_path / "local")
    assert local.returncode == 0, local.stdout + local.stderr

    web_plan, s3_plan = Plan(FAULTS, 0.05, seed=1), Plan(FAULTS, 0.05, seed=2)
    with serving(folder_answers(scenes / "data/train"), web_plan) as server:
        done = train_from(f"{server.url}/{{00000..00000}}.tar", scenes, tmp_path / "web", workers=0)
        assert done.returncode == 0, done.stdout + done.stderr
    with serving(upstream_answers(s3_port), s3_plan) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        done = train_from("s3://bucket/train", scenes, tmp_path / "s3", workers=1)
        assert done.returncode == 0, done.stdout + done.stderr

    for name, plan in (("web", web_plan), ("s3", s3_plan)):
        assert plan.given > 0, f"no request to the {name} server failed"
        assert losses(tmp_path / name / "run") == losses(tmp_path / "local")
        assert weights(tmp_path / name / "run") == weights(tmp_path / "local")


@pytest.mark.slow
def test_a_server_that_stays_broken_is_one_line(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving(folder_answers(scenes / "data/train"), Plan()) as server:
        pattern = f"{server.url}/{{00000..00000}}.tar"
        mmpt_data(["index", pattern, "--out", str(tmp_path / "manifest")])
        server.plan = Plan(("503",), 1.0)
        done = train(scenes, tmp_path / "run", data__shards=tmp_path / "manifest",
                     data__cache__folder=tmp_path / "cache", data__remote__timeout_seconds=1,
                     data__remote__deadline_seconds=2)  # fmt: skip
    assert "00000.tar at byte" in (said := one_line(done, 1)) and "503" in said
