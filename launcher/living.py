"""Whether a run is alive, asked of whoever runs it: SLURM's queue, or the process table of this machine."""

import os
import socket
import time
from pathlib import Path

from launcher import queue_client
from launcher.progress import heartbeat
from launcher.record import Launch, read_json

LIVE_STATES = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")
STALE_SECONDS = 60.0
"""A heartbeat comes every few seconds; one older than this is news."""


def alive(launch: Launch) -> str:
    """`running as job 12`, or "" for a run that is over. QueueError where SLURM cannot be asked."""
    if launch.executor == "slurm":
        if not launch.job:
            return ""
        state, reason = queue_client.states([launch.job]).get(launch.job, ("", ""))
        waiting = f" ({reason})" if reason not in ("", "None") else ""
        return f"{state.lower()}{waiting} as job {launch.job}" if state in LIVE_STATES else ""
    if launch.host != socket.gethostname():
        beat = heartbeat(Path(launch.run_dir)).get("time", 0.0)
        return f"running on {launch.host}" if time.time() - beat < STALE_SECONDS else ""
    pid = supervisor(launch)
    return f"running as process {pid}" if pid else ""


def supervisor(launch: Launch) -> int:
    """The process id of the local supervisor; 0 if it is over or runs on another machine."""
    facts = read_json(Path(launch.run_dir) / "supervisor.json")
    if facts.get("host") != socket.gethostname() or not isinstance(facts.get("pid"), int):
        return 0
    try:
        command = Path(f"/proc/{facts['pid']}/cmdline").read_bytes()
    except OSError:
        return 0
    return facts["pid"] if b"submitit" in command and os.fsencode(launch.logs) in command else 0


def running(pid: int) -> bool:
    """Whether a process exists and is more than a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] != "Z"
    except OSError:
        return False
