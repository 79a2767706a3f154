"""The last line of the batch script: `python -m launcher.after FOLDER STATUS MESSAGES`, when all ranks have ended.

It runs on the job's first node, outside the step, so it outlives every rank; train.py never talks to SLURM. It writes
down how the attempt ended and starts the job again if that makes sense.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launcher import bad_nodes, queue_client
from launcher.ending import Ending, ending_of
from launcher.plan import SWEEP_FILE
from launcher.progress import last_words, reached_step
from launcher.queue_client import JobState, QueueError
from launcher.record import ATTEMPTS, STOP, Attempt, Launch, append_attempt, read_attempts, read_launch
from launcher.restart import Decision, Situation, decide

TRIES, PAUSE_SECONDS = 12, 10.0
"""The controller may be down for a moment; the job waits for it two minutes before it gives up."""


def main(arguments: Sequence[str], pause: Callable[[float], None] = time.sleep) -> int:
    """Exit status of the job: 0 when the run is finished or begins again, else that of the ranks."""
    folder, status, messages = Path(arguments[0]), int(arguments[1]), Path(arguments[2])
    run_dir = run_dir_of(folder, os.environ)
    job, restarts = queue_client.job_of(os.environ), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    text = messages.read_text() if messages.exists() else ""
    decision = conclude(run_dir, ending_of(text, status), job, restarts, outside(job, restarts))
    if decision.action not in ("restart", "leave"):
        return (status or 1) if decision.action == "failed" else 0
    problem = put_back(job, pause) if decision.action == "restart" else ""
    if problem:
        said = f"{decision.reason}; it could not be requeued ({problem}): mmpt-launch requeue {run_dir}"
        append(run_dir, job, restarts, Ending(status or 1), Decision("failed", said))
        return status or 1
    keep_away(job, exclusions(read_launch(run_dir)))
    return 0


def run_dir_of(folder: Path, environment: Mapping[str, str]) -> Path:
    """The run itself, or for a task of an array its run among those of the sweep."""
    task = environment.get("SLURM_ARRAY_TASK_ID")
    return Path(json.loads((folder / SWEEP_FILE).read_text())[int(task)]) if task else folder


def outside(job: str, restarts: int) -> str:
    """What SLURM has done to the job: "" while it is running and so ended by its own ranks."""
    try:
        state = queue_client.show(job)
    except QueueError as error:
        say(f"the state of job {job} is unknown ({error}); taken for running")
        return ""
    return outside_of(state, restarts, time.time())


def outside_of(state: JobState, restarts: int, now: float) -> str:
    if state.restarts > restarts:
        return "requeued"
    if state.state == "RUNNING":
        return ""
    return "time limit" if now >= state.ends_by_limit - 1 else "cancelled"


def conclude(
    run_dir: Path, ending: Ending, job: str, restarts: int, outside: str, stop_asked: bool = False
) -> Decision:
    """Decide, say so, and write it down; the same for a job and for a local run."""
    launch, earlier = read_launch(run_dir), read_attempts(run_dir)
    words, unfit = last_words(run_dir, max([launch.submitted, *(attempt.time for attempt in earlier)]))
    ending = replace(ending, words=words)
    decision = decide(
        Situation(
            ending, stop_asked or (run_dir / STOP).exists(), outside, restarts, reached_step(run_dir), earlier,
            launch.max_restarts, launch.max_fruitless_restarts,
        )
    )  # fmt: skip
    append(run_dir, job, restarts, ending, decision)
    if decision.blame and launch.executor == "slurm":
        held = unfit or {decision.blame: ending.told()}
        try:
            for node, reason in held.items():
                bad_nodes.blame(Path(launch.bad_nodes), node, reason, decision.exclude)
        except OSError as error:
            say(f"{launch.bad_nodes} could not be written: {error.strerror}")
    return decision


def append(run_dir: Path, job: str, restarts: int, ending: Ending, decision: Decision) -> None:
    step = reached_step(run_dir)
    told = (ending.status, ending.rank, ending.host, step, decision.action, decision.reason)
    try:
        append_attempt(run_dir, Attempt(time.time(), job, restarts, *told))
    except OSError as error:  # a full disk; the log, on the same one, may still take a line
        say(f"{run_dir / ATTEMPTS} could not be written: {error.strerror}")
    words = {"restart": "starting again", "failed": "giving up", "leave": "leaving it to SLURM"}
    why = f": {decision.reason}" if decision.reason else ""
    say(f"{words.get(decision.action, decision.action)} at step {step}{why}")


def exclusions(launch: Launch) -> list[str]:
    return [*launch.exclude, *bad_nodes.to_exclude(Path(launch.bad_nodes), launch.max_excluded_nodes)]


def put_back(job: str, pause: Callable[[float], None]) -> str:
    """Requeue the job; what went wrong, if it could not be done.

    This ends the very job that we are the last part of: the batch script ignores SIGTERM by now, and SLURM's KillWait
    leaves us seconds.
    """
    problem = ""
    for attempt in range(TRIES):
        if attempt:
            pause(PAUSE_SECONDS)
        try:
            queue_client.requeue(job)
            return ""
        except QueueError as error:
            problem = str(error)
    return problem


def keep_away(job: str, excluded: Sequence[str]) -> None:
    """From bad nodes, when the job starts again."""
    if not excluded:
        return
    try:
        queue_client.exclude(job, excluded)
        say(f"excluded: {','.join(excluded)}")
    except QueueError as error:
        say(f"{','.join(excluded)} could not be excluded: {error}")


def say(text: str) -> None:
    print(f"mmpt-launch: {time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
