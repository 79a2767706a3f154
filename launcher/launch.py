"""From a cluster's name and train.py's arguments to running ranks."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import submitit

from launcher import bad_nodes, slurm
from launcher.cluster import Cluster, changed, filled_in, load_cluster
from launcher.living import alive
from launcher.plan import SWEEP_FILE, Run, plan_runs
from launcher.record import LAUNCH, STOP, Launch, read_launch, write_json, write_launch
from launcher.snapshot import Snapshot, take_snapshot
from launcher.supervise import LocalTask
from launcher.task import DebugTask, SlurmTask

FOREVER_MINUTES = 10 * 365 * 24 * 60


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    cluster: str
    changes: dict[str, str]
    """Flags that change the cluster file's values."""
    arguments: tuple[str, ...]
    """Of train.py."""
    sweeps: tuple[str, ...] = ()
    name: str | None = None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What would be done, before anything is."""

    request: Request
    cluster: Cluster
    runs: tuple[Run, ...]
    folder: Path
    """Of the run, or of the sweep."""
    exclude: tuple[str, ...]
    """The user's and the bad ones."""

    @property
    def bad_nodes(self) -> Path:
        return filled_in(self.cluster.runs) / "bad_nodes.json"

    @property
    def max_excluded_nodes(self) -> int:
        return max(1, int(self.cluster.max_excluded_share * self.cluster.least_nodes))


def plan(request: Request) -> Plan:
    """ValueError for a wrong cluster, flag, sweep or run directory."""
    cluster = changed(load_cluster(request.cluster), request.changes)
    runs = plan_runs(request.arguments, request.sweeps, filled_in(cluster.runs), request.name)
    folder = runs[0].dir.parent if len(runs) > 1 else runs[0].dir
    if cluster.executor != "slurm" and str(cluster.nodes) != "1":
        raise ValueError(f"the executor {cluster.executor} uses this machine alone; got {cluster.nodes} nodes")
    if cluster.executor == "local" and cluster.time is not None:
        raise ValueError("a local run has no time limit; leave --time out")
    if cluster.executor == "debug" and len(runs) > 1:
        raise ValueError("the debug executor takes one run, not a sweep")
    made = Plan(request, cluster, tuple(runs), folder, ())
    bad = bad_nodes.to_exclude(made.bad_nodes, made.max_excluded_nodes) if cluster.executor == "slurm" else []
    return Plan(request, cluster, tuple(runs), folder, tuple(dict.fromkeys([*request.exclude, *bad])))


def start(made: Plan, code: Snapshot | None = None) -> list[Launch]:
    """Start it, and write launch.json into every run's directory. ValueError if one is alive already or SLURM refuses.

    `code`: what it was launched with before [a copy of what is here now]. With the debug executor this process becomes
    train.py.
    """
    for run in made.runs:
        if (run.dir / LAUNCH).exists() and (where := alive(read_launch(run.dir))):
            raise ValueError(f"{run.dir} is {where}; mmpt-launch cancel it first, or give another --name")
    code = code or take_snapshot(made.folder / "code")
    made.folder.joinpath("logs").mkdir(parents=True, exist_ok=True)
    if len(made.runs) > 1:
        write_json(made.folder / SWEEP_FILE, [str(run.dir) for run in made.runs])
    launches = [_launch(made, run, code) for run in made.runs]
    for launch in launches:
        write_launch(launch)
        (Path(launch.run_dir) / STOP).unlink(missing_ok=True)
    jobs = _START[made.cluster.executor](made, code)
    started = [replace(launch, job=job) for launch, job in zip(launches, jobs, strict=True)]
    for launch in started:
        write_launch(launch)
    return started


def _launch(made: Plan, run: Run, code: Snapshot) -> Launch:
    run.dir.mkdir(parents=True, exist_ok=True)
    earlier: tuple[str, ...] = ()
    if (run.dir / LAUNCH).exists():
        before = read_launch(run.dir)
        earlier = (*before.earlier_jobs, before.job)
    cluster, request = made.cluster, made.request
    return Launch(
        str(run.dir), request.cluster, cluster.executor, run.arguments, request.changes, os.getcwd(), str(code.folder),
        code.git_sha, str(made.folder / "logs"), "", socket.gethostname(), time.time(), cluster.max_restarts,
        cluster.max_fruitless_restarts, made.max_excluded_nodes, str(made.bad_nodes), request.exclude, earlier,
    )  # fmt: skip


def sbatch_executor(made: Plan, code: Path) -> slurm.Executor:
    return slurm.executor(made.cluster, made.folder, made.folder.name, code, Path.cwd(), made.exclude)


def _start_slurm(made: Plan, code: Snapshot) -> list[str]:
    tasks = [SlurmTask(str(code.train), slurm.rank_arguments(made.cluster, run.arguments)) for run in made.runs]
    return slurm.submit(sbatch_executor(made, code.folder), tasks)


def _start_local(made: Plan, code: Snapshot) -> list[str]:
    """submitit's local executor with one task, the supervisor of the ranks; it outlives this process and terminal."""
    runs = tuple((str(run.dir), run.arguments) for run in made.runs)
    environment = made.cluster.environment | {"PYTHONPATH": _search_path(code)}
    executor = submitit.LocalExecutor(made.folder / "logs")
    executor.update_parameters(
        timeout_min=FOREVER_MINUTES, stderr_to_stdout=True,
        gpus_per_node=made.cluster.ranks_per_node if made.cluster.gpu_request else 0,
    )  # fmt: skip
    with _as_a_service(environment["PYTHONPATH"], made.folder / "logs" / "local.log"):
        job = executor.submit(LocalTask(str(code.train), made.cluster.ranks_per_node, environment, runs))
    return [job.job_id] * len(runs)


def _start_debug(made: Plan, code: Snapshot) -> list[str]:
    environment = made.cluster.environment | {"PYTHONPATH": _search_path(code)}
    executor = submitit.DebugExecutor(made.folder / "logs")
    executor.submit(DebugTask(str(code.train), made.runs[0].arguments, environment)).results()
    raise AssertionError("train.py should have taken this process over")


def _search_path(code: Snapshot) -> str:
    """The run's own code first, then what the shell has."""
    return os.pathsep.join([str(code.folder), *filter(None, [os.environ.get("PYTHONPATH")])])


_START = {"slurm": _start_slurm, "local": _start_local, "debug": _start_debug}


@contextmanager
def _as_a_service(search_path: str, log: Path) -> Iterator[None]:
    """What is started here hears neither Ctrl-C nor the end of the terminal, holds no pipe of ours open, and imports
    the run's own code."""
    sys.stdout.flush()
    sys.stderr.flush()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    streams = [os.dup(number) for number in range(3)]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = search_path
    with open(os.devnull) as nothing, open(log, "a") as file:
        for number, stream in enumerate((nothing, file, file)):
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
