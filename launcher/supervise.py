"""Runs on this machine: start the ranks, end them all when one ends badly, start them again as SLURM's jobs would.

    SIGTERM, SIGINT   the ranks save and the run stops (`mmpt-launch cancel`, Ctrl-C)
    SIGUSR2           the ranks save and begin again, as when a cluster wants its nodes back

Ranks are told by the kernel when this process dies in whatever way: they get SIGTERM, save, and leave.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.after import conclude
from launcher.ending import Ending, first_ending
from launcher.ranks import free_port
from launcher.record import STOP, write_json

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.1
KILL_WAIT_SECONDS = 30.0
"""Between SIGTERM and SIGKILL for the ranks that are left when one has ended; SLURM's default KillWait."""
PAUSE_SECONDS = 1.0
"""Before a restart: sockets close, the kernel gives memory back."""


@dataclass(frozen=True)
class LocalTask:
    """What submitit's local executor starts: the runs of one launch, one after the other."""

    train: str
    ranks: int
    environment: dict[str, str]
    runs: tuple[tuple[str, tuple[str, ...]], ...]
    """(directory, arguments) of each."""

    def __call__(self) -> int:
        """The first status that is not 0."""
        statuses = []
        for folder, arguments in self.runs:
            if not (Path(folder) / STOP).exists():
                command = [sys.executable, "-u", self.train, *arguments]
                statuses.append(Supervisor(Path(folder), command, self.ranks, self.environment).run())
        return next((status for status in statuses if status), 0)


class Supervisor:
    """One run of `ranks` ranks."""

    def __init__(self, run_dir: Path, command: list[str], ranks: int, environment: dict[str, str]):
        self.run_dir, self.command, self.ranks, self.environment = run_dir, command, ranks, environment
        self._processes: list[subprocess.Popen] = []
        self._stopping = False

    def run(self, pause: Callable[[float], None] = time.sleep) -> int:
        """Until the run is finished, stopped or given up; its exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._pass_on)
        job = job_here()
        write_json(self.run_dir / "supervisor.json", {"pid": os.getpid(), "host": socket.gethostname()})
        restarts = 0
        while True:
            ending = self._attempt(restarts)
            decision = conclude(self.run_dir, ending, job, restarts, outside="", stop_asked=self._stopping)
            if decision.action != "restart":
                return 0 if decision.action == "finished" else ending.status
            restarts += 1
            pause(PAUSE_SECONDS)

    def _attempt(self, restarts: int) -> Ending:
        """Start every rank, wait for every rank; how the first bad one ended."""
        port = free_port()
        self._processes = []
        for rank in range(self.ranks):
            self._processes.append(self._start(rank, port))
        if self._stopping:
            self._signal(signal.SIGTERM)
        ended: list[tuple[int, int]] = []
        deadline = float("inf")
        while len(ended) < self.ranks:
            for rank, process in enumerate(self._processes):
                status = process.poll()
                if status is not None and rank not in (r for r, _ in ended):
                    ended.append((rank, status))
                    if status and deadline == float("inf"):
                        deadline = time.monotonic() + KILL_WAIT_SECONDS
                        self._signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self._signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        for process in self._processes:  # data workers that a killed rank left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return first_ending(ended, socket.gethostname())

    def _start(self, rank: int, port: int) -> subprocess.Popen:
        own = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks,
            "LOCAL_SIZE": self.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        environment = os.environ | self.environment | {name: str(value) for name, value in own.items()}
        log = None  # rank 0 speaks where we do
        if rank:
            log = open(rank_log(self.run_dir, rank), "a")  # noqa: SIM115
        try:
            return subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        finally:
            if log is not None:
                log.close()

    def _pass_on(self, number: int, _frame: object) -> None:
        self._stopping |= number != signal.SIGUSR2
        self._signal(signal.SIGUSR2 if number == signal.SIGUSR2 else signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)


def rank_log(run_dir: Path, rank: int) -> Path:
    """As submitit names them; rank 0's it opens itself."""
    folder = run_dir / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{job_here()}_{rank}_log.out"


def job_here() -> str:
    """submitit's name for a local job: the process id of its controller."""
    return os.environ["SUBMITIT_LOCAL_JOB_ID"]


def _die_with_parent() -> None:
    """In the child, before it becomes the rank: SIGTERM when the supervisor is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
