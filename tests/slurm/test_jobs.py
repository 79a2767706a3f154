"""Jobs under a real SLURM whose ranks are the stub of train.py: who is told what, who restarts, who is left alone.

All jobs of this file run at the same time; each test looks at one of them.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.ranks import PORTS, expand, host_names, port_of
from launcher.record import read_attempts, read_launch
from tests.launcher.conftest import Checkout, wait_for
from tests.slurm.conftest import config
from tests.slurm.instance import Slurm

pytestmark = pytest.mark.slow
HOLD = "1:0:6:hold,1:1:6:hold"
"""Both ranks wait at step 6 for a signal."""


class Cluster:
    """A checkout with the stub, and the private SLURM."""

    def __init__(self, slurm: Slurm, home: Path):
        self.slurm, self.checkout = slurm, Checkout(home)
        self.checkout.environment = self.checkout.environment | {"SLURM_CONF": str(slurm.conf)}

    def launch(self, name: str, do: str = "", flags: tuple[object, ...] = (), **changes: object) -> Path:
        """Submit a run of twelve steps; its directory."""
        cluster = config(self.checkout.home, **changes)
        stub = ["--recipe", "stub", "--stub.steps", 12, "--stub.do", do]
        self.checkout.call(cluster, "--name", name, *flags, "--", *stub)
        return self.checkout.home / "runs" / name

    def state(self, run_dir: Path) -> str:
        return self.facts(run_dir)["JobState"]

    def facts(self, run_dir: Path) -> dict[str, str]:
        """Of the newest job of the run, as scontrol shows it."""
        text = self.slurm.call("scontrol", "show", "job", "--oneliner", read_launch(run_dir).job)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def over(self, run_dir: Path) -> bool:
        return self.state(run_dir) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

    def wait(self, run_dir: Path) -> Path:
        wait_for(lambda: self.over(run_dir), 120)
        return run_dir


def outcomes(run_dir: Path) -> list[tuple[str, int]]:
    return [(attempt.action, attempt.status) for attempt in read_attempts(run_dir)]


def held(run_dir: Path, step: int = 6) -> Callable[[], bool]:
    def waits() -> bool:
        beats = [run_dir / f"heartbeat/rank-{rank}.json" for rank in (0, 1)]
        return all(path.exists() and json.loads(path.read_text())["step"] == step for path in beats)

    return waits


def finishes(cluster: Cluster) -> Path:
    return cluster.wait(cluster.launch("finishes", ranks_per_node=2))


def unfit_node(cluster: Cluster) -> Path:
    """Rank 1's node fails its pre-flight check."""
    return cluster.wait(cluster.launch("unfit", "1:1:0:77"))


def wrong_command(cluster: Cluster) -> Path:
    return cluster.wait(cluster.launch("wrong", "1:0:0:2,1:1:0:hold"))


def crash_loop(cluster: Cluster) -> Path:
    do = ",".join(f"{attempt}:0:7:1" for attempt in range(1, 6))
    return cluster.wait(cluster.launch("loop", do, ("--max-fruitless-restarts", 1)))


def cancelled(cluster: Cluster) -> Path:
    run_dir = cluster.launch("cancelled", HOLD)
    wait_for(held(run_dir), 60)
    again = [config(cluster.checkout.home), "--name", "cancelled", "--", "--recipe", "stub"]
    assert "is running as job" in cluster.checkout.call(*again, status=2)
    assert "told to save and stop" in cluster.checkout.call("cancel", run_dir)
    return cluster.wait(run_dir)


def scancelled(cluster: Cluster) -> Path:
    """By an operator who does not know of us."""
    run_dir = cluster.launch("scancelled", HOLD)
    wait_for(held(run_dir), 60)
    cluster.slurm.call("scancel", read_launch(run_dir).job)
    cluster.wait(run_dir)
    time.sleep(2)  # a job that came back to life would be pending now
    return run_dir


def preempted(cluster: Cluster) -> Path:
    """SLURM takes the nodes for a job of higher priority: SIGTERM, then the grace time of the partition."""
    run_dir = cluster.launch("preempted", HOLD, partition="cheap")
    wait_for(held(run_dir), 60)
    cluster.slurm.call("sbatch", "-p", "urgent", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    return cluster.wait(run_dir)


def requeued_by_us(cluster: Cluster) -> Path:
    run_dir = cluster.launch("requeued", HOLD)
    wait_for(held(run_dir), 60)
    assert "told to save and start again" in cluster.checkout.call("requeue", run_dir)
    return cluster.wait(run_dir)


def deaf_rank(cluster: Cluster) -> Path:
    """Rank 0 ends because nothing moves; rank 1 does not hear that it should leave."""
    return cluster.wait(cluster.launch("deaf", "1:0:6:76,1:1:2:hang"))


def lost_first_node(cluster: Cluster) -> Path:
    """The node with rank 0 and the batch script, so that nobody of us is left to decide anything."""
    run_dir = cluster.launch("lost-first", HOLD, partition="doomed")
    wait_for(held(run_dir), 60)
    cluster.slurm.kill_node("n9")
    return cluster.wait(run_dir)


def fewer_nodes(cluster: Cluster) -> Path:
    """Cancelled on two nodes, started again on one, with the code it had."""
    run_dir = cluster.launch("fewer", HOLD)
    wait_for(held(run_dir), 60)
    cluster.checkout.call("cancel", run_dir)
    cluster.wait(run_dir)
    cluster.checkout.call("requeue", run_dir, "--nodes", 1)
    return cluster.wait(run_dir)


def range_of_nodes(cluster: Cluster) -> Path:
    """More nodes asked for than there are, but fewer will do."""
    return cluster.wait(cluster.launch("range", flags=("--nodes", "1-9")))


def sweep(cluster: Cluster) -> Path:
    """An array of two; each crashes once."""
    path = config(cluster.checkout.home)
    words = ["--recipe", "stub", "--stub.steps", 12, "--stub.do", "1:1:4:kill"]
    cluster.checkout.call(path, "--name", "sweep", "--sweep", "stub.seed=3,4", "--", *words)
    for seed in (3, 4):
        cluster.wait(cluster.checkout.home / f"runs/sweep/seed={seed}")
    return cluster.checkout.home / "runs/sweep"


SCENARIOS = (
    lost_first_node, deaf_rank, finishes, unfit_node, wrong_command, crash_loop, cancelled, scancelled, preempted,
    requeued_by_us, fewer_nodes, range_of_nodes, sweep,
)  # fmt: skip
"""What waits longest first."""


@pytest.fixture(scope="module")
def cluster(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(slurm, tmp_path_factory.mktemp("jobs") / "home")


@pytest.fixture(scope="module")
def done(cluster: Cluster) -> Iterator[Callable[[Callable], Path]]:
    """The run directory of a scenario, when it is over; all of them are started at once."""
    with ThreadPoolExecutor(len(SCENARIOS)) as pool:
        running: dict[Callable, Future] = {scenario: pool.submit(scenario, cluster) for scenario in SCENARIOS}
        yield lambda scenario: running[scenario].result()


def test_ranks_over_two_nodes(cluster: Cluster, done) -> None:
    run_dir = done(finishes)
    environments = [json.loads((run_dir / f"environment-{rank}.json").read_text()) for rank in range(4)]
    job = read_launch(run_dir).job
    assert [e["RANK"] for e in environments] == list("0123") and {e["WORLD_SIZE"] for e in environments} == {"4"}
    assert [e["LOCAL_RANK"] for e in environments] == list("0101")
    assert {(e["LOCAL_WORLD_SIZE"], e["LOCAL_SIZE"]) for e in environments} == {("2", "2")}
    assert {e["MASTER_PORT"] for e in environments} == {str(port_of(job, 0))} and port_of(job, 0) in PORTS
    assert {e["MASTER_ADDR"] for e in environments} == {"127.0.0.1"}, "the nodes' names resolve nowhere; SLURM knows"
    assert outcomes(run_dir) == [("finished", 0)] and cluster.facts(run_dir)["ExitCode"] == "0:0"
    assert "rank 3 begins at step 0" in cluster.checkout.call("logs", run_dir, "--rank", 3)


def test_an_unfit_node_is_left_out_of_the_next_attempt(cluster: Cluster, done) -> None:
    run_dir = done(unfit_node)
    assert outcomes(run_dir) == [("restart", 77), ("finished", 0)]
    host = read_attempts(run_dir)[0].host
    facts = cluster.facts(run_dir)
    assert host in expand(facts["ExcNodeList"]) and host not in expand(facts["NodeList"]) and facts["Restarts"] == "1"
    assert json.loads((run_dir.parent / "bad_nodes.json").read_text())[host]["excluded"]
    port = json.loads((run_dir / "environment-0.json").read_text())["MASTER_PORT"]
    assert port == str(port_of(read_launch(run_dir).job, 1)), "another port after a restart"


def test_a_wrong_command_is_not_tried_again(cluster: Cluster, done) -> None:
    run_dir = done(wrong_command)
    assert outcomes(run_dir) == [("failed", 2)] and cluster.state(run_dir) == "FAILED"
    assert "command line or the configuration wrong" in cluster.checkout.call("logs", run_dir)


def test_a_crash_loop_is_broken(cluster: Cluster, done) -> None:
    run_dir = done(crash_loop)
    assert outcomes(run_dir) == [("restart", 1), ("restart", 1), ("failed", 1)]
    assert cluster.facts(run_dir)["Restarts"] == "2"


def test_cancel_saves_and_the_job_ends_well(cluster: Cluster, done) -> None:
    run_dir = done(cancelled)
    assert outcomes(run_dir) == [("stopped", 75)] and cluster.state(run_dir) == "COMPLETED"
    assert (run_dir / "checkpoints/step-00000006").is_dir()


def test_scancel_saves_and_nobody_brings_the_job_back(cluster: Cluster, done) -> None:
    run_dir = done(scancelled)
    assert outcomes(run_dir) == [("stopped", 75)] and cluster.state(run_dir) == "CANCELLED"
    assert (run_dir / "checkpoints/step-00000006").is_dir()


@pytest.mark.parametrize("scenario", [preempted, requeued_by_us])
def test_who_made_way_goes_on_from_the_step_where_it_was(cluster: Cluster, done, scenario: Callable) -> None:
    run_dir = done(scenario)
    assert [action for action, _ in outcomes(run_dir)] == ["restart", "finished"] and outcomes(run_dir)[0][1] == 75
    assert "rank 0 begins at step 6" in cluster.checkout.call("logs", run_dir)
    assert cluster.facts(run_dir)["Restarts"] == "1"


def test_a_rank_that_hears_nothing_is_killed_and_the_run_goes_on(cluster: Cluster, done) -> None:
    run_dir = done(deaf_rank)
    assert outcomes(run_dir) == [("restart", 76), ("finished", 0)]
    assert read_attempts(run_dir)[0].rank == "0" and "hung" in read_attempts(run_dir)[0].reason


def test_the_loss_of_the_first_node_is_slurm_s_to_mend(cluster: Cluster, done) -> None:
    run_dir = done(lost_first_node)
    assert outcomes(run_dir) == [("finished", 0)], "the first attempt could not be written down"
    facts = cluster.facts(run_dir)
    assert facts["Restarts"] == "1" and facts["NodeList"] == "n[10-11]"
    assert "rank 0 begins at step 5" in cluster.checkout.call("logs", run_dir), "from the last checkpoint"
    assert cluster.checkout.call("list", run_dir).splitlines()[1].split("\t")[9] == "1"


def test_a_run_goes_on_with_fewer_nodes(cluster: Cluster, done) -> None:
    run_dir = done(fewer_nodes)
    assert outcomes(run_dir) == [("stopped", 75), ("finished", 0)]
    assert json.loads((run_dir / "environment-0.json").read_text())["WORLD_SIZE"] == "1"
    assert len(list((run_dir / "code").iterdir())) == 1 and len(read_launch(run_dir).earlier_jobs) == 1


def test_a_range_of_nodes_takes_what_there_is(cluster: Cluster, done) -> None:
    run_dir = done(range_of_nodes)
    world = int(json.loads((run_dir / "environment-0.json").read_text())["WORLD_SIZE"])
    assert 1 <= world <= 4 and world == int(cluster.facts(run_dir)["NumNodes"])


def test_tasks_of_an_array_restart_by_themselves(cluster: Cluster, done) -> None:
    folder = done(sweep)
    for task, seed in enumerate((3, 4)):
        run_dir = folder / f"seed={seed}"
        assert outcomes(run_dir) == [("restart", 137), ("finished", 0)]
        assert read_launch(run_dir).job == read_attempts(run_dir)[0].job and read_launch(run_dir).job.endswith(
            f"_{task}"
        )
    rows = cluster.checkout.call("list", folder).splitlines()[1:]
    assert [row.split("\t")[1] for row in rows] == ["finished", "finished"]


def test_plain_srun_in_an_allocation_gives_the_same_ranks(cluster: Cluster, done, tmp_path: Path) -> None:
    stub = Path(__file__).parents[1] / "launcher/stub_train.py"
    train = [
        "python3",
        "-m",
        "launcher.ranks",
        "--",
        "python3",
        str(stub),
        "--run.dir",
        str(tmp_path),
        "--stub.steps",
        "2",
    ]
    subprocess.run(
        ["salloc", "-N2", "--ntasks-per-node=2", "srun", *train], env=cluster.checkout.environment, check=True,
        capture_output=True, timeout=120,
    )  # fmt: skip
    ours, theirs = (
        [json.loads((folder / f"environment-{rank}.json").read_text()) for rank in range(4)]
        for folder in (done(finishes), tmp_path)
    )
    assert [e | {"MASTER_PORT": ""} for e in ours] == [e | {"MASTER_PORT": ""} for e in theirs]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,5}-?", fullmatch=True), st.integers(0, 1200), st.integers(0, 40)),
                min_size=1, max_size=4))  # fmt: skip
def test_node_lists_are_read_as_scontrol_reads_them(slurm: Slurm, groups: list[tuple[str, int, int]]) -> None:
    text = ",".join(f"{prefix}[{first:04d}-{first + more:04d}]" for prefix, first, more in groups)
    assert expand(text) == slurm.call("scontrol", "show", "hostnames", text).split() == host_names(text)
