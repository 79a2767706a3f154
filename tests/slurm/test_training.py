"""Real training on a real SLURM: whatever happens to a job, the finished run is the one that nothing happened to.

Two nodes with a rank each train the same small recipe on the built-in scenes, dropout included, in jobs that run at
the same time; each test looks at one of them. Equal means: every record and every byte of the last checkpoint.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from launcher.record import read_attempts, read_launch
from mmpt import cli_audit, dist
from tests.launcher.conftest import wait_for
from tests.slurm.conftest import config
from tests.slurm.instance import Slurm
from tests.test_train import SMALL, losses, weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, PER_EPOCH, STRIKE_AFTER = 40, 6, 9
AT_ONCE = 3
"""Runs whose ranks share the cores of this machine; more would only start slower."""


class Training:
    """The data, the private SLURM, and commands as a user types them."""

    def __init__(self, slurm: Slurm, folder: Path):
        self.slurm, self.folder = slurm, folder
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_CONF": str(slurm.conf),
        }  # fmt: skip
        self.call(sys.executable, "-m", "data_tools", "scenes", folder / "data", "--train", 96, "--held-out", 16)
        self.call(sys.executable, "-m", "data_tools", "tokenizer", folder / "data/train", folder / "tokenizer",
                  "--kind", "wordpiece", "--vocab-size", 256)  # fmt: skip

    def call(self, *words: object, timeout_seconds: float = 240) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.environment, cwd=self.folder, capture_output=True, text=True,
            timeout=timeout_seconds,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def launch(self, *words: object) -> str:
        return self.call(sys.executable, "-m", "launcher", *words)

    def recipe(self) -> list[object]:
        flags = SMALL | {
            "data.shards": self.folder / "data/train", "data.tokenizer": self.folder / "tokenizer", "data.workers": 0,
            "run.samples": 16 * STEPS,
        }  # fmt: skip
        return ["--recipe", "filip.demo", *(text for name, value in flags.items() for text in (f"--{name}", value))]

    def submit(self, name: str, *flags: object, **changes: object) -> Path:
        self.launch(config(self.folder, **changes), "--name", name, *flags, "--", *self.recipe())
        return self.folder / "runs" / name

    def job(self, run_dir: Path) -> str:
        return read_launch(run_dir).job

    def under_way(self, run_dir: Path) -> Path:
        """Wait until it is in the middle of its second epoch."""
        wait_for(lambda: records(run_dir) >= STRIKE_AFTER, 180)
        assert records(run_dir) < STEPS - PER_EPOCH
        return run_dir

    def finished(self, run_dir: Path) -> Path:
        def over() -> bool:
            attempts = read_attempts(run_dir)
            return bool(attempts) and attempts[-1].action not in ("restart", "leave")

        wait_for(over, 240)
        return run_dir

    def pid(self, run_dir: Path, rank: int) -> int:
        """Of train.py itself: srun's tasks become it, and whatever it starts has its environment."""
        wanted = {f"RANK={rank}".encode(), f"SLURM_JOB_ID={self.raw_job(run_dir)}".encode()}
        found = {pid for pid, variables in self.slurm.processes() if wanted <= set(variables)}
        (own,) = (pid for pid in found if parent(pid) not in found)
        return own

    def raw_job(self, run_dir: Path) -> str:
        """The number that a task of an array has besides its array's."""
        return self.facts(run_dir)["JobId"]

    def seconds(self, run_dir: Path) -> float:
        """Since the job began."""
        return time.time() - datetime.fromisoformat(self.facts(run_dir)["StartTime"]).timestamp()

    def facts(self, run_dir: Path) -> dict[str, str]:
        text = self.slurm.call("scontrol", "show", "job", "--oneliner", self.job(run_dir))
        return dict(part.split("=", 1) for part in text.split() if "=" in part)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])


def records(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def undisturbed(training: Training) -> Path:
    return training.finished(training.submit("undisturbed"))


def on_this_machine(training: Training) -> Path:
    path = config(training.folder, executor="local", nodes=1, ranks_per_node=2, time="null")
    training.launch(path, "--name", "local", "--", *training.recipe())
    return training.folder / "runs/local"


def deepspeed(training: Training) -> Path:
    """As one would by hand, in an interactive allocation."""
    run_dir = training.folder / "runs/deepspeed"
    train = ["deepspeed", "--num_accelerators", 2, "--master_port", dist.free_port(), ROOT / "mmpt/train.py"]
    training.call("salloc", "-N1", "-n2", *train, *training.recipe(), "--run.dir", run_dir)
    return run_dir


def array(training: Training) -> Path:
    """Two runs of a sweep that differ in nothing that is computed; each is struck in its own way."""
    path = config(training.folder)
    training.launch(path, "--name", "sweep", "--sweep", "run.keep_last=2,3", "--", *training.recipe())
    folder = training.folder / "runs/sweep"
    killed, requeued = folder / "keep_last=2", folder / "keep_last=3"
    os.kill(training.pid(training.under_way(killed), rank=1), signal.SIGKILL)
    training.slurm.call("scontrol", "requeue", training.job(training.under_way(requeued)))
    training.finished(killed)
    training.finished(requeued)
    return folder


def signalled(training: Training) -> Path:
    """As an operator would who wants the ranks to save."""
    run_dir = training.under_way(training.submit("signalled"))
    training.slurm.call("scancel", "--signal=USR2", training.job(run_dir))
    return training.finished(run_dir)


def time_limit(training: Training) -> Path:
    """The limit is lowered so that it comes within grace_seconds; the rest is SLURM's own doing.

    It looks at limits twice a minute. So that the run is not over by then, its ranks sleep until the signal is there.
    """
    run_dir = training.under_way(training.submit("time-limit"))
    ranks = [training.pid(run_dir, rank) for rank in (0, 1)]
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    minutes = 1 + int(training.seconds(run_dir) + 45) // 60
    training.slurm.call("scontrol", "update", f"JobId={training.job(run_dir)}", f"TimeLimit={minutes}")
    wait_for(lambda: any(told_or_awake(pid) for pid in ranks), 90)
    for pid in ranks:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: read_attempts(run_dir), 60)
    training.slurm.call("scontrol", "update", f"JobId={training.job(run_dir)}", "TimeLimit=10")
    return training.finished(run_dir)


def told_or_awake(pid: int) -> bool:
    """Whether SIGUSR2 waits for a process that sleeps, or the SIGCONT that SLURM sends with it has woken it already."""
    facts = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(facts["ShdPnd"], 16) >> (signal.SIGUSR2 - 1) & 1) or not facts["State"].startswith("T")


def lost_node(training: Training) -> Path:
    """slurmd, its step daemon and its tasks end at once, as when the power fails."""
    run_dir = training.under_way(training.submit("lost-node", partition="fragile"))
    training.slurm.kill_node("n5")
    return training.finished(run_dir)


SCENARIOS = (lost_node, undisturbed, array, time_limit, signalled, on_this_machine, deepspeed)
"""In the order in which they are started: what waits longest first."""


@pytest.fixture(scope="module")
def training(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(slurm, tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def done(training: Training) -> Iterator[Callable[[Callable], Path]]:
    """The run directory of a scenario, when it is over; they run a few at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running: dict[Callable, Future] = {scenario: pool.submit(scenario, training) for scenario in SCENARIOS}
        yield lambda scenario: running[scenario].result()


def assert_same_run(run_dir: Path, reference: Path, capsys: pytest.CaptureFixture) -> None:
    assert losses(run_dir) == losses(reference)
    assert weights(run_dir) == weights(reference)
    keys = []
    for path in (run_dir, reference):
        parser = argparse.ArgumentParser()
        cli_audit.add_arguments(parser)
        cli_audit.run(parser.parse_args([str(path)]))
        keys.append(capsys.readouterr().out)
    assert keys[0] == keys[1] and keys[0].count("\n") == 1 + 16 * STEPS


def test_two_nodes_of_slurm_and_two_ranks_of_this_machine_train_alike(done, capsys) -> None:
    run_dir = done(undisturbed)
    assert_same_run(run_dir, done(on_this_machine), capsys)
    assert len(losses(run_dir)) == STEPS
    assert len({dict(record)["loss"] for record in losses(run_dir)}) == STEPS, "every step moved something"
    assert [attempt.action for attempt in read_attempts(run_dir)] == ["finished"]


def test_deepspeed_in_an_interactive_allocation_trains_alike(done, capsys) -> None:
    assert_same_run(done(deepspeed), done(undisturbed), capsys)


def test_a_killed_rank_changes_nothing(done, capsys) -> None:
    run_dir = done(array) / "keep_last=2"
    first, last = read_attempts(run_dir)
    assert (first.action, first.status, first.rank) == ("restart", 137, "1") and last.action == "finished"
    assert STRIKE_AFTER <= first.step < STEPS
    assert_same_run(run_dir, done(undisturbed), capsys)


@pytest.mark.parametrize("scenario", [signalled, time_limit])
def test_a_job_that_is_told_to_make_way_saves_and_changes_nothing(done, capsys, scenario: Callable) -> None:
    run_dir = done(scenario)
    first, last = read_attempts(run_dir)
    assert (first.action, first.status, last.action) == ("restart", 75, "finished")
    assert first_step_of_attempt(run_dir, 2) == first.step, "nothing was done twice"
    assert_same_run(run_dir, done(undisturbed), capsys)


def first_step_of_attempt(run_dir: Path, attempt: int) -> int:
    events = [json.loads(text) for text in (run_dir / "events.jsonl").read_text().splitlines()]
    return next(e["step"] for e in events if e["event"] in ("start", "resume") and e["attempt"] == attempt)


def test_a_requeued_job_saves_and_changes_nothing(done, capsys) -> None:
    run_dir = done(array) / "keep_last=3"
    first, last = read_attempts(run_dir)
    assert (first.action, first.status, last.action) == ("leave", 75, "finished")
    assert first_step_of_attempt(run_dir, 2) == first.step
    assert_same_run(run_dir, done(undisturbed), capsys)


def test_a_lost_node_changes_nothing(training: Training, done, capsys) -> None:
    run_dir = done(lost_node)
    first, last = read_attempts(run_dir)
    assert (first.host, last.action) == ("n5", "finished") and first.action in ("restart", "leave")
    assert training.facts(run_dir)["NodeList"] == "n[4,6]", "the spare node took its place"
    assert_same_run(run_dir, done(undisturbed), capsys)
