"""SLURM's own commands: what a job is doing, and making it do something else. Each answers or fails within seconds."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_SECONDS = 30.0
SOON_SECONDS = 10


class QueueError(Exception):
    """SLURM could not be asked, or refused. Its message in one line."""


@dataclass(frozen=True)
class JobState:
    """Of `scontrol show job`."""

    state: str
    """RUNNING, PENDING, COMPLETING, CANCELLED, ..."""
    restarts: int
    excluded: str
    """A node list, "" for none."""
    ends_by_limit: float
    """Unix seconds at which the time limit is reached; infinity without one."""


def job_of(environment: Mapping[str, str]) -> str:
    """The name of the job we run in, as scontrol wants it: 1234, or 1200_34 for a task of an array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"]


def show(job: str) -> JobState:
    """QueueError for a job that SLURM does not know (any more)."""
    text = call("scontrol", "show", "job", "--oneliner", job)
    found = dict(re.findall(r"(\w+)=(\S+)", text))
    if "JobState" not in found:
        raise QueueError(f"scontrol said nothing of job {job}'s state: {text.strip()[:200]!r}")
    excluded = found.get("ExcNodeList", "")
    return JobState(
        found["JobState"], int(found.get("Restarts", "0")), "" if excluded == "(null)" else excluded,
        _start(found) + _limit_seconds(found.get("TimeLimit", "")),
    )  # fmt: skip


def _start(found: Mapping[str, str]) -> float:
    try:
        return datetime.fromisoformat(found.get("StartTime", "")).timestamp()
    except ValueError:
        return float("inf")


def _limit_seconds(text: str) -> float:
    """D-HH:MM:SS as scontrol prints it; infinity for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def states(jobs: Sequence[str], timeout_seconds: float = TIMEOUT_SECONDS) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of those jobs that are in the queue, in one question. QueueError."""
    if not jobs:
        return {}
    wanted = {job.partition("_")[0] for job in jobs}
    # Jobs that are over may be unknown by now; squeue then fails for the whole list but still prints the others.
    done = _run(
        "squeue", "--noheader", "--array", "--jobs", ",".join(sorted(wanted)), "--format", "%i|%T|%r",
        timeout_seconds=timeout_seconds,
    )  # fmt: skip
    found = {}
    for line in done.stdout.splitlines():
        job, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        found[job] = (state, reason)
    if not found and done.returncode and "Invalid job id" not in done.stderr:
        raise QueueError(_one_line(done.stderr))
    return {job: found[job] for job in jobs if job in found}


def requeue(job: str) -> None:
    call("scontrol", "requeue", job)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """For a job that waits to start again."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def start_soon(job: str) -> None:
    """For a job that waits: SLURM holds a requeued one for about two minutes.

    Not at once: a job that starts in the very second of its requeue is killed ("Job credential revoked"), because its
    nodes take the new start for the one that was just ended; their clocks may differ by seconds.
    """
    call("scontrol", "update", f"JobId={job}", f"StartTime=now+{SOON_SECONDS}")


def signal_ranks(job: str, signal: str) -> None:
    """To every task, not to the batch script."""
    call("scancel", f"--signal={signal}", job)


def cancel(job: str) -> None:
    call("scancel", job)


def call(*command: str) -> str:
    """Standard output. QueueError with the first line of what went wrong."""
    done = _run(*command)
    if done.returncode:
        raise QueueError(f"{command[0]}: {_one_line(done.stderr or done.stdout)}")
    return done.stdout


def _run(*command: str, timeout_seconds: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except OSError as error:
        raise QueueError(f"{command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise QueueError(f"{command[0]} has not answered for {timeout_seconds:g} seconds") from error


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "failed without a word"
