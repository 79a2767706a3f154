"""Runs on two ranks that are stopped, starved and struck, and the exit statuses and files that a launcher reads."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mmpt import exit_codes
from tests.forks import Forks, Run
from tests.test_train import arguments, losses, weights

LONG = {"run__samples": 16 * 5000, "run__checkpoint_every_steps": 100000}


def events(run_dir: Path, *kinds: str) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in kinds or not kinds]


def steps_recorded(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def await_that(condition: Callable[[], bool], run: Run, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert run.running() and time.monotonic() < deadline, run.output()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(forks: Forks, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of twelve steps that nothing happened to; its checkpoints are written at once."""
    run_dir = tmp_path_factory.mktemp("whole")
    run = forks.start(arguments(scenes, run_dir, run__async_checkpoints=False, run__keep_last=100))
    assert run.wait() == [0, 0], run.output()
    return run_dir


@pytest.mark.slow
def test_one_rank_is_signalled_and_all_save_and_leave(forks: Forks, whole: Path, scenes: Path, tmp_path: Path) -> None:
    """Each signal, to one rank or to all; before the first step too. Then the end is that of the run left alone, and
    every checkpoint written behind its back has the bytes of one written at once."""
    told: list[tuple[int, tuple[int, ...]]] = [
        (signal.SIGTERM, (0,)), (signal.SIGUSR2, (1,)), (signal.SIGUSR1, (0, 1)),
    ]  # fmt: skip
    for attempt, (number, ranks) in enumerate(told):
        run = forks.start(arguments(scenes, tmp_path, run__keep_last=100))
        reached = steps_recorded(tmp_path)
        if attempt:
            await_that(lambda reached=reached: steps_recorded(tmp_path) > reached, run)
        else:
            await_that((tmp_path / "heartbeat/rank-0.json").exists, run)
        for rank in ranks:
            os.kill(run.pids[rank], number)
        assert run.wait() == [exit_codes.REQUEUE] * 2, run.output()
        stop = events(tmp_path, "stop")[-1]
        assert stop["attempt"] == attempt + 1 and stop["saved"]
        assert signal.Signals(number).name in events(tmp_path, "signal")[-1]["reasons"][0]
        if attempt:
            assert (tmp_path / f"checkpoints/step-{stop['step']:08d}").is_dir() and stop["step"] > reached
    assert len({event["step"] for event in events(tmp_path, "stop")}) == len(told), "there was progress between them"
    run = forks.start(arguments(scenes, tmp_path, run__keep_last=100))
    assert run.wait() == [0, 0], run.output()
    assert losses(tmp_path) == losses(whole) and weights(tmp_path) == weights(whole)
    for checkpoint in (whole / "checkpoints").glob("step-*"):
        for file in checkpoint.iterdir():
            assert (tmp_path / "checkpoints" / checkpoint.name / file.name).read_bytes() == file.read_bytes(), file
    assert len({event["code"] for event in events(tmp_path, "start", "resume")} - {""}) == 1, "which code it is of"
    assert [event["event"] for event in events(tmp_path, "start", "resume", "finish")] == [
        "start", "resume", "resume", "resume", "finish",
    ]  # fmt: skip
    beat = json.loads((tmp_path / "heartbeat/rank-1.json").read_text())
    assert beat["step"] > 0 and abs(beat["time"] - time.time()) < 60 and beat["pid"] == run.pids[1]


@pytest.mark.slow
def test_the_job_ends_soon_and_a_grace_time_too_short(forks: Forks, scenes: Path, tmp_path: Path) -> None:
    deadline = time.time() + 14
    run = forks.start(
        arguments(scenes, tmp_path, run__stop_before_seconds=4, **LONG),
        rank_environment=[{}, {"MMPT_DEADLINE": str(deadline)}],
    )
    assert run.wait() == [exit_codes.REQUEUE] * 2 and time.time() < deadline, run.output()
    stop = events(tmp_path, "stop")[-1]
    assert stop["saved"] and stop["step"] > 0 and (tmp_path / f"checkpoints/step-{stop['step']:08d}").is_dir()
    assert "rank 1" in run.output() and "the end of the job is near" in run.output()

    run = forks.start(arguments(scenes, tmp_path, run__grace_seconds=0, **LONG))
    await_that(lambda: steps_recorded(tmp_path) > stop["step"], run)
    os.kill(run.pids[1], signal.SIGUSR2)
    assert run.wait() == [exit_codes.REQUEUE] * 2, run.output()
    late = events(tmp_path, "stop")[-1]
    assert not late["saved"] and late["step"] > stop["step"] and "no time to save" in run.output()
    assert not (tmp_path / f"checkpoints/step-{late['step']:08d}").exists()


@pytest.mark.slow
def test_a_hung_collective_and_a_hung_loader_end_with_everybodys_stacks(
    forks: Forks, scenes: Path, tmp_path: Path
) -> None:
    """A rank that stands still, and a data worker that does; the same command then finishes."""
    limits = {"run__hang_dump_seconds": 2, "run__hang_exit_seconds": 6}
    run = forks.start(arguments(scenes, tmp_path, **LONG, **limits))
    await_that(lambda: steps_recorded(tmp_path) > 2, run)
    os.kill(run.pids[1], signal.SIGSTOP)
    await_that(lambda: len(events(tmp_path, "hang")) == 1, run)
    time.sleep(0.5)
    os.kill(run.pids[1], signal.SIGCONT)
    assert run.wait() == [exit_codes.HUNG] * 2, run.output()
    assert "in phase step" in run.output()
    waiting, stopped = ((tmp_path / f"stacks/rank-{rank}.txt").read_text() for rank in range(2))
    assert "in phase step" in waiting and "in train_step" in waiting and "in loop" in stopped

    run = forks.start(arguments(scenes, tmp_path, data__workers=1, **LONG, **limits))
    reached = steps_recorded(tmp_path)
    await_that(lambda: steps_recorded(tmp_path) > reached, run)
    worker = data_worker(run.pids[1])
    os.kill(worker, signal.SIGSTOP)
    assert run.wait() == [exit_codes.HUNG] * 2, run.output()
    os.kill(worker, signal.SIGCONT)  # and it sees that its rank is gone
    assert "rank 1 on" in run.output() and "in phase data" in run.output()
    assert "in phase data" in (tmp_path / "stacks/rank-1.txt").read_text()
    assert "in phase step" in (tmp_path / "stacks/rank-0.txt").read_text().split("rank 0:")[-1], "it waited for rank 1"


@pytest.mark.slow
def test_a_rank_that_nobody_answers_at_the_start_ends(forks: Forks, scenes: Path, tmp_path: Path) -> None:
    """As one whose rank 0 stands still when it has taken the call; torch alone would wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(silent.getsockname()[1])}
        limits = {"run__hang_dump_seconds": 1, "run__hang_exit_seconds": 2, "engine__timeout_seconds": 3}
        run = forks.start(arguments(scenes, tmp_path, **limits), ranks=1, rank_environment=[place])
        assert run.wait(60) == [exit_codes.HUNG], run.output()
    said = [line for line in run.output().splitlines() if line.startswith("train.py: error")]
    assert len(said) == 1 and said[0].startswith("train.py: error: rank 1 on ") and "in 3 s" in said[0]
    assert "in init_process_group" in run.output() and not (tmp_path / "heartbeat").exists()


def data_worker(rank_pid: int) -> int:
    """The process that makes the batches of a rank: a child of the fork server, which is a child of the rank."""
    for server in children(rank_pid):
        for worker in children(server):
            return worker
    raise AssertionError(f"rank {rank_pid} has no data worker")


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_signals_to_every_process_of_the_job_leave_the_workers_alone(
    forks: Forks, scenes: Path, tmp_path: Path
) -> None:
    """As a scheduler sends them: to the ranks, the fork servers and the data workers."""
    run = forks.start(arguments(scenes, tmp_path, data__workers=1, **LONG))
    await_that(lambda: steps_recorded(tmp_path) > 0, run)
    processes = [p for rank in run.pids for server in children(rank) for p in (*children(server), server)] + run.pids
    assert len(processes) >= 6
    for number in (signal.SIGUSR1, signal.SIGTERM):
        for pid in processes:
            os.kill(pid, number)
    assert run.wait() == [exit_codes.REQUEUE] * 2, run.output()
    assert events(tmp_path, "stop")[-1]["saved"]


@pytest.mark.slow
def test_a_rank_that_is_ended_because_another_failed_says_nothing(forks: Forks, scenes: Path, tmp_path: Path) -> None:
    """`deepspeed` sends SIGTERM to the others when a rank fails; here rank 0 is killed right after it was sent."""
    run = forks.start(arguments(scenes, tmp_path, **LONG))
    await_that(lambda: steps_recorded(tmp_path) > 0, run)
    os.kill(run.pids[0], signal.SIGSTOP)
    os.kill(run.pids[1], signal.SIGTERM)
    os.kill(run.pids[0], signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL, exit_codes.FAILED], run.output()
    assert "train.py: error" not in run.output()

    run = forks.start(arguments(scenes, tmp_path, **LONG))
    reached = steps_recorded(tmp_path)
    await_that(lambda: steps_recorded(tmp_path) > reached, run)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait() == [exit_codes.FAILED, -signal.SIGKILL], run.output()
    said = [line for line in run.output().splitlines() if line.startswith("train.py: error")]
    assert len(said) == 1 and "another rank ended without a word" in said[0]
    assert events(tmp_path, "crash")[-1]["attempt"] == 2


@pytest.mark.slow
def test_a_node_that_cannot_write_is_named_and_a_disk_that_nobody_can_write_is_no_nodes_fault(
    forks: Forks, scenes: Path, tmp_path: Path
) -> None:
    nodes = [{"SLURMD_NODENAME": "n0", "LOCAL_RANK": "0"}, {"SLURMD_NODENAME": "n1", "LOCAL_RANK": "0"}]
    for limited, status, said in (
        ([1], exit_codes.UNFIT_NODE, "train.py: error: 1 of 2 nodes cannot train: node n1: "),
        ([0, 1], exit_codes.FAILED, "train.py: error: "),
    ):
        run = forks.start(
            arguments(scenes, tmp_path), largest_file=dict.fromkeys(limited, 5000), rank_environment=nodes
        )
        assert run.wait() == [status] * 2, run.output()
        errors = [line for line in run.output().splitlines() if line.startswith("train.py: error")]
        (line,) = errors
        assert line.startswith(f"{said}{tmp_path} cannot be written: File too large ("), run.output()
        found = events(tmp_path, "preflight")[-1]
        assert not found["ok"] and found["nodes"] == 2 and len(found["unfit"]) == len(limited)
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.slow
def test_a_full_disk_ends_the_run_after_a_second_try_and_loses_nothing(
    forks: Forks, whole: Path, scenes: Path, tmp_path: Path
) -> None:
    run = forks.start(arguments(scenes, tmp_path, run__stop_at_step=2))
    assert run.wait() == [0, 0], run.output()
    run = forks.start(arguments(scenes, tmp_path), largest_file={1: 100_000})
    assert run.wait() == [exit_codes.FAILED] * 2, run.output()
    said = [line for line in run.output().splitlines() if "was not saved" in line]
    assert len(said) == 2 and "step 4 was not saved: rank 1: File too large" in said[0], run.output()
    assert said[0].endswith("training goes on, the next one is due as always")
    assert said[1].startswith("train.py: error: checkpoint of step 6 was not saved")
    assert events(tmp_path, "crash")[-1]["error"] in said[1]
    run = forks.start(arguments(scenes, tmp_path))
    assert run.wait() == [0, 0] and "continuing from" in run.output()
    assert losses(tmp_path) == losses(whole) and weights(tmp_path) == weights(whole)
