"""`mmpt-launch` as one meets it: help, errors in one line, and the code that a run keeps."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launcher import snapshot
from launcher.__main__ import main
from launcher.snapshot import git_sha, package_files, take_snapshot

ROOT = Path(__file__).parents[2]
A_RUN = ["--", "--recipe", "filip.tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["locall", *A_RUN], "unknown cluster 'locall'; did you mean 'local'"),
        (["statuss"], "unknown cluster 'statuss'"),
        (["local", "--nodez", "3", *A_RUN], "unknown argument '--nodez'; did you mean '--nodes'?"),
        (["local", "--recipe", "filip.tiny"], "unknown argument '--recipe'; train.py's arguments come after --"),
        (["local"], "the arguments after -- lack --recipe NAME"),
        (["local", "--nodes", "2", *A_RUN], "uses this machine alone; got 2 nodes"),
        (["local", "--time", "1:00:00", *A_RUN], "a local run has no time limit"),
        (["local", "--executor", "debug", "--sweep", "optim.lr=1,2", *A_RUN], "takes one run, not a sweep"),
        (["local", "--runs", "$NOWHERE/runs", *A_RUN], "names a variable that is not set"),
        (["slurm-a100", "--runs", "/tmp", "--time", "soon", *A_RUN], "time should look like 24:00:00"),
        (["status", "no/such/folder"], "no/such/folder is not a folder"),
        (["logs", "no-run"], "neither a run that the launcher started nor a folder of such runs"),
        (["cancel"], "the following arguments are required: RUN"),
        (["logs", "a", "--rank", "x"], "invalid int value: 'x'"),
    ],
)
def test_errors_are_one_line_and_status_2(words: list[str], said: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("mmpt-launch: error: ") and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_without_slurm_a_cluster_of_slurm_s_is_refused(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert main(["slurm-a100", "--runs", str(tmp_path / "runs"), *A_RUN]) == 2
    assert "there is no sbatch here" in capsys.readouterr().err
    assert main(["list", str(tmp_path / "runs")]) == 0
    assert "failed\t" in (out := capsys.readouterr().out) and "it was not submitted" in out


def test_what_sbatch_says_is_passed_on(capsys, tmp_path: Path, monkeypatch) -> None:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: a100' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    assert main(["slurm-a100", "--runs", str(tmp_path / "runs"), *A_RUN]) == 2
    err = capsys.readouterr().err
    assert err == "mmpt-launch: error: sbatch refused: invalid partition specified: a100\n"


def test_help_lists_verbs_and_flags(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"mmpt-launch {verb}" in out for verb in ("status", "list", "logs", "cancel", "requeue"))
    assert main([]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["slurm-a100", "--help"])
    assert ended.value.code == 0 and "--grace-seconds" in capsys.readouterr().out


def test_a_snapshot_is_the_code_once_for_each_state_of_it(tmp_path: Path, monkeypatch) -> None:
    home = tmp_path / "home"
    for package in snapshot.PACKAGES:
        (home / package).mkdir(parents=True)
        (home / package / "a.py").write_text(package)
    (home / "mmpt/__pycache__").mkdir()
    (home / "mmpt/__pycache__/a.pyc").write_text("x")
    (home / "mmpt/.a.swp").write_text("x")
    monkeypatch.setattr(snapshot, "ROOT", home)
    first, same = take_snapshot(tmp_path / "code"), take_snapshot(tmp_path / "code")
    assert first == same and first.git_sha == ""
    found = sorted(str(path.relative_to(first.folder)) for path in first.folder.rglob("*") if path.is_file())
    assert found == ["data_tools/a.py", "launcher/a.py", "mmpt/a.py"]
    (home / "mmpt/a.py").write_text("changed")
    second = take_snapshot(tmp_path / "code")
    assert second.folder != first.folder and (first.folder / "mmpt/a.py").read_text() == "mmpt"
    assert len(list((tmp_path / "code").iterdir())) == 2, "no half copy is left"


def test_the_snapshot_holds_what_training_reads() -> None:
    names = {str(path.relative_to(ROOT)) for path in package_files()}
    assert {"mmpt/train.py", "mmpt/ops/late_interaction/late_interaction.cpp", "launcher/after.py"} <= names
    assert not any("__pycache__" in name for name in names)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_recorded_with_whether_files_differ(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "ROOT", tmp_path)
    assert git_sha() == ""
    (tmp_path / "a").write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "a"], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", clean := git_sha())
    (tmp_path / "a").write_text("2")
    assert git_sha() == f"{clean}+changes"
