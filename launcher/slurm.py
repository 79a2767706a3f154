"""The batch script of a run, through submitit: what sbatch gets is what --dry-run prints."""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from launcher.cluster import Cluster, minutes
from launcher.plan import value_of
from launcher.task import SlurmTask

WAIT_AFTER_FIRST_SECONDS = 300
"""Ranks that finish leave together; one that does not is ended after this."""
DEADLINE = "MMPT_DEADLINE"
"""Unix seconds at which the job is over; train.py saves and leaves in time."""
GRACE_FLAG = "--run.grace_seconds"
"""Of train.py: what fits between the signal to save and the end."""


class Executor(submitit.SlurmExecutor):
    """submitit's, which can also show its script where SLURM is not installed."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self, jobs: int) -> str:
        """What sbatch gets for one job, or for an array of several."""
        parameters: dict[str, Any] = self.parameters | ({"map_count": jobs} if jobs > 1 else {})
        return _make_sbatch_string(command=self._submitit_command_str, folder=self.folder, **parameters)


def executor(
    cluster: Cluster, folder: Path, name: str, code: Path, directory: Path, exclude: Sequence[str]
) -> Executor:
    """`folder` is the run's directory, or the sweep's; `code` goes first on PYTHONPATH."""
    python = shlex.quote(sys.executable)
    made = Executor(folder / "logs", python=cluster.python or python)
    memory = cluster.memory_gb_per_node
    resources = {
        "nodes": cluster.least_nodes, "ntasks_per_node": cluster.ranks_per_node, "cpus_per_task": cluster.cpus_per_rank,
        "time": minutes(cluster.time) if cluster.time else None, "mem": f"{memory}G" if memory else memory,
    }  # fmt: skip
    srun = ["--kill-on-bad-exit=1", f"--wait={WAIT_AFTER_FIRST_SECONDS}"]
    if cluster.cpus_per_rank:
        srun.append(f"--cpus-per-task={cluster.cpus_per_rank}")  # since 22.05 srun does not take it from sbatch
    optional = {
        "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos,
        "constraint": cluster.constraint, "exclude": ",".join(exclude) or None, "exclusive": cluster.exclusive or None,
    }  # fmt: skip
    made.update_parameters(
        job_name=name, **resources, **optional, signal_delay_s=cluster.grace_seconds, stderr_to_stdout=True, wckey=None,
        array_parallelism=cluster.parallel_sweep_jobs, srun_args=[*srun, *cluster.srun],
        additional_parameters=further_options(cluster, directory), setup=setup_lines(cluster, folder, code, python),
        teardown=teardown_lines(folder, python),
    )  # fmt: skip
    return made


def further_options(cluster: Cluster, directory: Path) -> dict[str, str | int | bool]:
    """What submitit has no name for. The cluster file's own options go last and win."""
    options: dict[str, str | int | bool] = {"chdir": str(directory), "requeue": True}
    if cluster.gpu_request:
        key, _, value = cluster.gpu_request.format(n=cluster.ranks_per_node).removeprefix("--").partition("=")
        options[key] = value
    if "-" in str(cluster.nodes):
        options["nodes"] = cluster.nodes
    return options | cluster.sbatch


def rank_arguments(cluster: Cluster, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """train.py's, told how long it has to save."""
    given = value_of(arguments, GRACE_FLAG) is not None
    return arguments if given else (*arguments, GRACE_FLAG, str(cluster.grace_seconds))


def setup_lines(cluster: Cluster, folder: Path, code: Path, python: str) -> list[str]:
    """Before srun, on the first node. The last line keeps what srun says of its tasks for `launcher.after`."""
    return [
        "trap : TERM  # the ranks save; this shell decides afterwards",
        *cluster.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(cluster.environment.items())),
        f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"export {DEADLINE}=$({python} -m launcher.deadline)",
        f'messages={shlex.quote(str(folder / "logs"))}/"$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}.srun"',
        'exec 2> "$messages"',
    ]


def teardown_lines(folder: Path, python: str) -> list[str]:
    return [
        "status=$?",
        "trap '' TERM  # requeueing sends it to ourselves",
        "exec 2>&1",
        'cat "$messages"',
        f'exec {python} -m launcher.after {shlex.quote(str(folder))} "$status" "$messages"',
    ]


def submit(made: Executor, tasks: Sequence[SlurmTask]) -> list[str]:
    """Job ids, of an array where there are several. ValueError with what sbatch said if it refused."""
    with _clean_environment(), redirect_stderr(StringIO()):  # submitit repeats there what its error holds
        try:
            jobs = made.submit_array(tasks) if len(tasks) > 1 else [made.submit(tasks[0])]
        except FileNotFoundError as error:
            raise ValueError("there is no sbatch here: submit from a login node, or use the cluster local") from error
        except (FailedJobError, FailedSubmissionError) as error:
            said = [text.removeprefix("sbatch: error: ") for line in str(error).splitlines() if (text := line.strip())]
            raise ValueError(f"sbatch refused: {'; '.join(said)}") from error
    return [job.job_id for job in jobs]


def inherited(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that would mislead a job submitted from within another, or from a wrapped shell."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    slurm = [name for name in environment if name.startswith(("SLURM_", "SUBMITIT_")) and name != "SLURM_CONF"]
    return sorted([*slurm, *(name for name in ranks if name in environment)])


@contextmanager
def _clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in inherited(before):
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)
