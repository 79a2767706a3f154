"""What the batch script does when its ranks have ended, against stand-ins for SLURM's programs that write down calls.

tests/slurm shows the same against SLURM itself, where it is installed; these run everywhere.
"""

import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import after, bad_nodes
from launcher.after import outside_of
from launcher.queue_client import JobState, QueueError, job_of, show, states
from launcher.record import STOP, Launch, read_attempts, write_json, write_launch

RUNNING = "JobId=7 JobState=RUNNING Restarts=0 StartTime=2026-11-25T17:39:34 TimeLimit=1-00:01:00 ExcNodeList=(null)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], Path]:
    """Make a program that prints a text and ends with a status; the file of all calls."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(name: str, text: str, status: int = 0) -> Path:
        path = programs / name
        stream = "" if status == 0 else ">&2"
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {calls}\necho "{text}" {stream}\nexit {status}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return make


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run at step 40 whose job 7 has just ended for the first time."""
    folder = tmp_path / "runs/a"
    (folder / "checkpoints/step-00000040").mkdir(parents=True)
    bad = str(tmp_path / "runs/bad_nodes.json")
    write_launch(Launch(str(folder), "c", "slurm", (), {}, "", "", "", "", "7", "", 0.0, 3, 1, 2, bad, ("gpu001",)))
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return folder


def end(run_dir: Path, status: int, messages: str = "") -> int:
    (run_dir / "messages").write_text(messages)
    return after.main([str(run_dir), str(status), str(run_dir / "messages")], pause=lambda _: None)


def test_a_saved_run_is_put_back_without_the_nodes_that_are_excluded(slurm, run_dir: Path) -> None:
    calls = slurm("scontrol", RUNNING)
    assert end(run_dir, 75, "srun: error: n0: task 0: Exited with exit code 75\n") == 0
    assert calls.read_text().splitlines() == [
        "scontrol show job --oneliner 7", "scontrol requeue 7", "scontrol update JobId=7 ExcNodeList=gpu001",
    ]  # fmt: skip
    assert [(a.action, a.status, a.step) for a in read_attempts(run_dir)] == [("restart", 75, 40)]


def test_an_unfit_node_is_excluded_and_remembered(slurm, run_dir: Path) -> None:
    calls = slurm("scontrol", RUNNING)
    unfit = "srun: error: gpu017: task 130: Exited with exit code 77\nsrun: error: gpu018: task 137: Killed\n"
    assert end(run_dir, 137, unfit) == 0
    assert calls.read_text().splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=gpu001,gpu017"
    held = json.loads((run_dir.parent / "bad_nodes.json").read_text())
    assert held["gpu017"]["count"] == 1 and held["gpu017"]["excluded"] and "unfit" in held["gpu017"]["reason"]
    assert held.keys() == {"gpu017"}


def test_all_nodes_that_train_py_found_unfit_are_excluded_with_its_reason(slurm, run_dir: Path) -> None:
    calls = slurm("scontrol", RUNNING)
    unfit = {"gpu017": "cuda:3: 1 of 4096 rows of a matrix product are wrong", "gpu018": "/dev/shm has 3 MiB free"}
    event = {"time": time.time(), "event": "preflight", "step": 0, "attempt": 1, "ok": False, "unfit": unfit}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert end(run_dir, 77, "srun: error: gpu018: tasks 136-143: Exited with exit code 77\n") == 0
    held = bad_nodes.read(run_dir.parent / "bad_nodes.json")
    assert {name: node.reason for name, node in held.items()} == unfit
    assert calls.read_text().splitlines()[-1] == "scontrol update JobId=7 ExcNodeList=gpu001,gpu017,gpu018"
    assert "gpu017: cuda:3: 1 of 4096 rows" in read_attempts(run_dir)[0].reason


def test_the_error_of_a_crash_is_passed_on_but_not_that_of_an_earlier_one(slurm, run_dir: Path) -> None:
    slurm("scontrol", RUNNING)
    event = {"time": time.time(), "event": "crash", "step": 40, "attempt": 1, "error": "shard 7\nis damaged"}
    (run_dir / "events.jsonl").write_text(json.dumps(event) + "\n")
    failed = "srun: error: n0: task 0: Exited with exit code 1\n"
    assert end(run_dir, 1, failed) == 0
    assert read_attempts(run_dir)[0].reason == "rank 0 on n0 failed: shard 7 is damaged"
    assert end(run_dir, 1, failed) == 0
    assert read_attempts(run_dir)[1].reason == "rank 0 on n0 failed"


def test_a_task_of_an_array_is_named_as_scontrol_wants_it(slurm, run_dir: Path, monkeypatch) -> None:
    calls = slurm("scontrol", RUNNING)
    sweep = run_dir.parent
    write_json(sweep / "sweep.json", ["elsewhere", str(run_dir)])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1200")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    (run_dir / "messages").write_text("")
    assert after.main([str(sweep), "75", str(run_dir / "messages")]) == 0
    assert "scontrol requeue 1200_1" in calls.read_text()
    assert read_attempts(run_dir)[0].job == "1200_1" == job_of(os.environ)


@pytest.mark.parametrize(("status", "exit_status"), [(0, 0), (2, 2), (78, 78)])
def test_what_is_over_is_left_alone(slurm, run_dir: Path, status: int, exit_status: int) -> None:
    calls = slurm("scontrol", RUNNING)
    assert end(run_dir, status) == exit_status
    assert "requeue" not in calls.read_text()


def test_a_cancelled_run_stays_cancelled(slurm, run_dir: Path) -> None:
    """Requeueing a job that scancel is ending would bring it back to life."""
    calls = slurm("scontrol", RUNNING.replace("RUNNING", "COMPLETING"))
    assert end(run_dir, 75) == 0 and "requeue" not in calls.read_text()
    slurm("scontrol", RUNNING)
    (run_dir / STOP).touch()
    assert end(run_dir, 75) == 0 and "requeue" not in calls.read_text()
    assert [a.action for a in read_attempts(run_dir)] == ["stopped", "stopped"]


def test_while_the_controller_is_away_the_job_waits(slurm, run_dir: Path) -> None:
    calls, pauses = slurm("scontrol", "Unable to contact slurm controller (connect failure)", 1), []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            slurm("scontrol", "")  # it is back

    (run_dir / "messages").write_text("")
    assert after.main([str(run_dir), "75", str(run_dir / "messages")], pause) == 0
    assert calls.read_text().count("scontrol requeue 7") == 4 and len(pauses) == 3


def test_where_requeueing_is_forbidden_the_cure_is_named(slurm, run_dir: Path) -> None:
    slurm("scontrol", "Requeue of job denied", 1)
    assert end(run_dir, 75) == 75
    last = read_attempts(run_dir)[-1]
    assert last.action == "failed" and "denied" in last.reason and f"mmpt-launch requeue {run_dir}" in last.reason


def test_on_a_full_disk_the_decision_stands(slurm, run_dir: Path, monkeypatch, capsys) -> None:
    calls = slurm("scontrol", RUNNING)

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(after, "append_attempt", full)
    monkeypatch.setattr(bad_nodes, "write_json", full)
    assert end(run_dir, 77, "srun: error: gpu017: task 130: Exited with exit code 77\n") == 0
    said = capsys.readouterr().out
    assert said.count("could not be written: No space left on device") == 2 and "requeue 7" in calls.read_text()


def test_what_slurm_did_to_a_job() -> None:
    state = JobState("RUNNING", 1, "", 1000.0)
    assert outside_of(state, 1, 500.0) == "" and outside_of(state, 0, 500.0) == "requeued"
    ending = JobState("COMPLETING", 0, "", 1000.0)
    assert outside_of(ending, 0, 500.0) == "cancelled" and outside_of(ending, 0, 1000.5) == "time limit"


def test_asking_the_queue(slurm) -> None:
    slurm("scontrol", RUNNING.replace("(null)", "gpu[001-003]"))
    state = show("7")
    assert state.excluded == "gpu[001-003]" and state.state == "RUNNING"
    start = time.mktime((2026, 11, 25, 17, 39, 34, 0, 0, -1))
    assert state.ends_by_limit == start + 86460
    slurm("scontrol", "JobId=7 JobState=PENDING TimeLimit=UNLIMITED StartTime=Unknown")
    assert show("7").ends_by_limit == float("inf")
    slurm("scontrol", "gibberish")
    with pytest.raises(QueueError, match="said nothing of job 7"):
        show("7")
    calls = slurm("squeue", "7|RUNNING|None\n1200_3|PENDING|JobArrayTaskLimit")
    assert states(["7", "1200_3", "9"]) == {"7": ("RUNNING", "None"), "1200_3": ("PENDING", "JobArrayTaskLimit")}
    assert "--jobs 1200,7,9" in calls.read_text()
    slurm("squeue", "slurm_load_jobs error: Invalid job id specified", 1)
    assert states(["9"]) == {}
    slurm("squeue", "Unable to contact slurm controller", 1)
    with pytest.raises(QueueError, match="Unable to contact"):
        states(["9"])


def test_without_slurm_the_error_names_the_program(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(QueueError, match="scontrol"):
        show("7")


def test_bad_nodes_are_excluded_by_count_capped_and_forgotten(tmp_path: Path) -> None:
    path, now = tmp_path / "bad_nodes.json", 1000.0
    assert bad_nodes.to_exclude(path, 5, now) == []
    bad_nodes.blame(path, "n1", "killed", False, now)
    assert bad_nodes.to_exclude(path, 5, now) == [], "once may be the program's fault"
    bad_nodes.blame(path, "n1", "killed", False, now + 1)
    for i in range(2, 6):
        bad_nodes.blame(path, f"n{i}", "unfit", True, now + i)
    assert bad_nodes.to_exclude(path, 9, now) == ["n1", "n2", "n3", "n4", "n5"]
    assert bad_nodes.to_exclude(path, 2, now) == ["n1", "n5"], "the most blamed, then the latest"
    later = now + 3 + bad_nodes.REMEMBERED_SECONDS
    assert bad_nodes.to_exclude(path, 9, later) == ["n4", "n5"]
    path.write_text("{")
    assert bad_nodes.read(path, now) == {}
