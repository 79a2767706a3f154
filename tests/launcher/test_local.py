"""Runs on this machine, started, killed, stopped and restarted as a user would, in real processes.

The ranks are a stub of train.py that keeps its contract and needs no torch; tests/slurm has the real one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import supervise
from launcher.living import running
from launcher.record import Launch, read_attempts, write_launch
from launcher.supervise import Supervisor
from tests.launcher.conftest import Checkout, wait_for

pytestmark = pytest.mark.slow


def outcomes(run_dir: Path) -> list[tuple[str, int]]:
    return [(attempt.action, attempt.status) for attempt in read_attempts(run_dir)]


def supervisor_of(run_dir: Path) -> int:
    return json.loads((run_dir / "supervisor.json").read_text())["pid"]


def ranks_of(run_dir: Path) -> list[int]:
    """Process ids of the ranks, in their order."""
    pid = supervisor_of(run_dir)
    return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def step_of(run_dir: Path) -> int:
    path = run_dir / "heartbeat/rank-0.json"
    return json.loads(path.read_text())["step"] if path.exists() else -1


def detached(checkout: Checkout, name: str, do: str = "1:0:6:hold,1:1:6:hold") -> Path:
    """A run that is left to itself and waits at its sixth step."""
    checkout.call(*checkout.train(name, "--detach", do=do))
    run_dir = checkout.home / "runs" / name
    wait_for(lambda: step_of(run_dir) == 6)
    return run_dir


def over(run_dir: Path) -> bool:
    return not running(supervisor_of(run_dir))


def test_two_ranks_finish_and_the_terminal_shows_rank_zero(checkout: Checkout) -> None:
    out = checkout.call(*checkout.train("one"))
    run_dir = checkout.home / "runs/one"
    assert "rank 0 begins at step 0" in out and "finished at step 12" in out and "rank 1 begins" not in out
    assert outcomes(run_dir) == [("finished", 0)]
    zero, one = (json.loads((run_dir / f"environment-{rank}.json").read_text()) for rank in (0, 1))
    assert zero["WORLD_SIZE"] == zero["LOCAL_WORLD_SIZE"] == zero["LOCAL_SIZE"] == "2"
    assert one == zero | {"RANK": "1", "LOCAL_RANK": "1"} and zero["RANK"] == zero["LOCAL_RANK"] == "0"
    assert "rank 1 begins at step 0" in checkout.call("logs", "one", "--rank", 1)
    assert "12/12" in checkout.call("status")
    assert "is finished" in checkout.call("requeue", "one")


def test_crashes_are_restarted(checkout: Checkout) -> None:
    out = checkout.call(*checkout.train("crash", do="1:1:4:kill,2:0:8:1,3:0:9:76"))
    run_dir = checkout.home / "runs/crash"
    assert outcomes(run_dir) == [("restart", 137), ("restart", 1), ("restart", 76), ("finished", 0)]
    assert "rank 1 on" in out and "was killed by signal 9 (Killed)" in out and "hung" in out
    row = checkout.call("list").splitlines()[1].split("\t")
    assert row[1] == "finished" and row[3] == "12" and row[9] == "3"


def test_a_crash_loop_is_broken(checkout: Checkout) -> None:
    loop = ",".join(f"{attempt}:0:7:1" for attempt in range(1, 9))
    out = checkout.call(*checkout.train("loop", "--max-fruitless-restarts", 1, do=loop), status=1)
    assert outcomes(checkout.home / "runs/loop") == [("restart", 1), ("restart", 1), ("failed", 1)]
    assert "2 attempts in a row have not got past step 7" in out
    assert "failed" in checkout.call("status")


@pytest.mark.parametrize(("status", "said"), [(2, "command line or the configuration wrong"), (78, "not finite")])
def test_what_cannot_get_better_is_not_tried_again(checkout: Checkout, status: int, said: str) -> None:
    out = checkout.call(*checkout.train("wrong", do=f"1:0:3:{status}"), status=status)
    assert said in out and outcomes(checkout.home / "runs/wrong") == [("failed", status)]


def test_a_run_keeps_its_code_through_crash_cancel_and_requeue(checkout: Checkout) -> None:
    run_dir = detached(checkout, "a", do="1:0:6:hold,1:1:6:hold,2:0:8:hold,2:1:8:hold")
    refused = checkout.call(*checkout.train("a"), status=2)
    assert "is running as process" in refused and "cancel it first" in refused
    (checkout.home / "mmpt/train.py").write_text("print('new code'); raise SystemExit(2)")  # the checkout moves on
    os.kill(ranks_of(run_dir)[1], signal.SIGKILL)
    wait_for(lambda: step_of(run_dir) == 8)
    assert "told to save and stop" in checkout.call("cancel", "a")
    wait_for(lambda: over(run_dir))
    assert outcomes(run_dir) == [("restart", 137), ("stopped", 75)] and "stopped as asked" in checkout.call("status")
    assert "is over already" in checkout.call("cancel", "runs/a")

    checkout.call("requeue", "a")
    wait_for(lambda: outcomes(run_dir)[-1] == ("finished", 0))
    assert "rank 0 begins at step 8" in checkout.call("logs", "a")
    assert len(list((run_dir / "code").iterdir())) == 1


def test_new_code_where_it_is_asked_for(checkout: Checkout) -> None:
    run_dir = detached(checkout, "a")
    checkout.call("cancel", "a")
    wait_for(lambda: over(run_dir))
    (checkout.home / "mmpt/train.py").write_text("print('new code'); raise SystemExit(2)")
    checkout.call("requeue", "a", "--new-code")
    wait_for(lambda: outcomes(run_dir)[-1] == ("failed", 2))
    assert "new code" in checkout.call("logs", "a") and len(list((run_dir / "code").iterdir())) == 2


def test_requeue_of_a_living_run_saves_and_starts_again(checkout: Checkout) -> None:
    run_dir = detached(checkout, "a")
    assert "told to save and start again" in checkout.call("requeue", "a")
    wait_for(lambda: over(run_dir))
    assert outcomes(run_dir) == [("restart", 75), ("finished", 0)]


def test_control_c_saves_and_stops(checkout: Checkout) -> None:
    process = checkout.popen(*checkout.train("a", do="1:0:6:hold,1:1:6:hold"))
    run_dir = checkout.home / "runs/a"
    wait_for(lambda: step_of(run_dir) == 6)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "saving and stopping" in out and "stopped at step 6" in out
    assert outcomes(run_dir) == [("stopped", 75)] and over(run_dir)


def test_the_launcher_may_die(checkout: Checkout) -> None:
    process = checkout.popen(*checkout.train("a", do="1:0:6:hold,1:1:6:hold"))
    run_dir = checkout.home / "runs/a"
    wait_for(lambda: step_of(run_dir) == 6)
    process.kill()
    process.communicate()
    for pid in ranks_of(run_dir):
        os.kill(pid, signal.SIGUSR2)
    wait_for(lambda: over(run_dir))
    assert outcomes(run_dir) == [("restart", 75), ("finished", 0)]


def test_ranks_do_not_outlive_their_supervisor(checkout: Checkout) -> None:
    run_dir = detached(checkout, "a")
    ranks = ranks_of(run_dir)
    assert len(ranks) == 2
    os.kill(supervisor_of(run_dir), signal.SIGKILL)
    wait_for(lambda: not any(map(running, ranks)))
    assert step_of(run_dir) == 6 and outcomes(run_dir) == []
    heartbeat = run_dir / "heartbeat/rank-0.json"
    heartbeat.write_text(json.dumps(json.loads(heartbeat.read_text()) | {"time": time.time() - 600}))
    assert "dead" in (out := checkout.call("status")) and "last heartbeat 10m 0s ago" in out
    checkout.call("requeue", "a")
    wait_for(lambda: outcomes(run_dir) == [("finished", 0)])


def test_a_sweep_runs_one_point_after_the_other(checkout: Checkout) -> None:
    words = checkout.train("s", "--sweep", "stub.steps=6,9", "--sweep", "stub.do=1:0:2:kill,1:1:2:kill")
    checkout.call(*[word for word in words if word not in ("--stub.steps", 12, "--stub.do", "")])
    rows = [line.split("\t") for line in checkout.call("list", "runs/s").splitlines()[1:]]
    assert [row[0] for row in rows] == [f"runs/s/steps={n}_do=1-{r}-2-kill" for n in (6, 9) for r in (0, 1)]
    assert [(row[1], row[3], row[9]) for row in rows] == [("finished", n, "1") for n in ("6", "6", "9", "9")]


def test_a_sweep_of_one_point_is_a_run_in_its_place_and_several_runs_start_again_at_once(checkout: Checkout) -> None:
    words = checkout.train("s", "--sweep", "run.seed=4", do="1:0:3:2")
    checkout.call(*words, status=2)
    checkout.call(*checkout.train("t", do="1:0:3:2"), status=2)
    checkout.call("requeue", "runs/s/seed=4", "runs/t")
    run_dirs = [checkout.home / "runs/s/seed=4", checkout.home / "runs/t"]
    for run_dir in run_dirs:
        wait_for(lambda run_dir=run_dir: outcomes(run_dir) == [("failed", 2), ("finished", 0)])


def test_debug_is_one_rank_in_this_terminal(checkout: Checkout) -> None:
    assert "rank 0 begins" in checkout.call(*checkout.train("a", "--executor", "debug"))
    environment = json.loads((checkout.home / "runs/a/environment-0.json").read_text())
    assert environment["WORLD_SIZE"] == "1"
    checkout.call(*checkout.train("b", "--executor", "debug", do="1:0:2:78"), status=78)


def test_a_rank_that_hears_nothing_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 says that it hangs; rank 1 does not end at SIGTERM."""
    monkeypatch.setattr(supervise, "KILL_WAIT_SECONDS", 0.5)
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "7")
    write_launch(
        Launch(
            str(tmp_path), "mine", "local", (), {}, "", "", "", "", "7", "", 0.0, 0, 3, 1, str(tmp_path / "bad.json")
        )
    )
    stub = Path(__file__).with_name("stub_train.py")
    command = [
        sys.executable,
        str(stub),
        "--run.dir",
        str(tmp_path),
        "--stub.steps",
        "9",
        "--stub.do",
        "1:0:3:76,1:1:2:hang",
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        assert Supervisor(tmp_path, command, 2, {}).run(lambda _: None) == 76
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert outcomes(tmp_path) == [("failed", 76)], "max_restarts is 0"
    children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args"], capture_output=True, text=True).stdout
    assert "stub_train" not in children
