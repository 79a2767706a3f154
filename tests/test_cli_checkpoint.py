"""`mmpt checkpoint` on checkpoints of real runs: what it says, deletes, and takes out and in."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmpt import cli
from mmpt.engine.checkpoint import weights
from mmpt.engine.resume import find_checkpoint
from tests.forks import Forks
from tests.test_train import arguments


@pytest.fixture(scope="module")
def trained(forks: Forks, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, ZeRO-2, with checkpoints of steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("trained")
    run = forks.start(arguments(scenes, run_dir, run__stop_at_step=6, optim__lock="image"))
    assert run.wait() == [0, 0], run.output()
    return run_dir


def checkpoint(capsys: pytest.CaptureFixture, *words: object, status: int = 0) -> list[list[str]]:
    assert cli.main(["checkpoint", *map(str, words)]) == status
    printed = capsys.readouterr()
    return [line.split("\t") for line in (printed.out + printed.err).splitlines()]


@pytest.mark.slow
def test_list_verify_and_prune(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(trained, run_dir)
    newest = run_dir / "checkpoints/step-00000006/rank-00001.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    os.truncate(run_dir / "checkpoints/step-00000002/rank-00000.safetensors", 1000)

    header, *rows = checkpoint(capsys, "list", run_dir)
    assert header == ["step", "saved", "ranks", "zero", "precision", "MiB", "state"]
    assert [(row[0], *row[2:5]) for row in rows] == [(str(step), "2", "2", "fp32") for step in (2, 4, 6)]
    assert "1000 bytes instead of" in rows[0][-1] and [row[-1] for row in rows[1:]] == ["whole", "whole"]
    *states, [error] = checkpoint(capsys, "verify", run_dir, status=1)
    assert [state for _, state in states[1:]] == ["whole", "rank-00001.safetensors does not match its SHA-256"]
    assert error == "mmpt: error: 2 of 3 checkpoints cannot be used: step-00000002, step-00000006"
    assert checkpoint(capsys, "verify", run_dir / "checkpoints/step-00000004") == [["step-00000004", "whole"]]

    would = checkpoint(capsys, "prune", run_dir, "--keep-last", 1, "--dry-run")
    assert len(would) == 1 and "would delete" in would[0][0] and "step-00000002" in would[0][0]
    checkpoint(capsys, "prune", run_dir, "--keep-last", 1)
    kept = sorted(path.name for path in (run_dir / "checkpoints").glob("*step-*"))
    assert kept == ["step-00000004", "step-00000006"], "the newest that is whole stays"
    for words, said in (
        (["prune", run_dir, "--keep-last", 0], "--keep-last wants a number from 1"),
        (["prune", tmp_path / "nothing", "--keep-last", 1], "has no checkpoints"),
        (["list", tmp_path / "nothing"], "neither a checkpoint nor a run directory"),
        (["convert", run_dir, tmp_path / "out"], "one of SRC and OUT should be a .safetensors file"),
        (["convert", run_dir, run_dir], "exists; choose another name"),
        (["convert", newest.with_name("manifest.json").rename(tmp_path / "x.safetensors"), tmp_path / "out"],
         "is no safetensors file"),
    ):  # fmt: skip
        assert said in checkpoint(capsys, *words, status=1)[-1][0]


@pytest.mark.slow
def test_weights_go_out_as_one_file_and_come_back_for_fine_tuning(
    forks: Forks, trained: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Through a file that any other program may have written: names and shapes are all that is needed."""
    checkpoint(capsys, "convert", trained, tmp_path / "weights.safetensors")
    found, wanted = load_file(tmp_path / "weights.safetensors"), weights(*find_checkpoint(trained)[:2])
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    save_file(dict(reversed(found.items())), tmp_path / "rewritten.safetensors")
    checkpoint(capsys, "convert", tmp_path / "rewritten.safetensors", tmp_path / "back")
    assert checkpoint(capsys, "verify", tmp_path / "back") == [["step-00000000", "whole"]]

    run = forks.start(
        arguments(scenes, tmp_path / "tuned", run__init=tmp_path / "back", run__stop_at_step=1, run__keep_last=9)
    )
    assert run.wait() == [0, 0] and "weights from" in run.output(), run.output()
    begun = weights(*find_checkpoint(tmp_path / "tuned/checkpoints/step-00000000")[:2])
    assert begun.keys() == wanted.keys() and all(torch.equal(begun[name], wanted[name]) for name in wanted)
