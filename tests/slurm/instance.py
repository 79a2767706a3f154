"""A private SLURM on this machine: one controller, several nodes, all daemons in the foreground as our children.

Nothing of it touches a SLURM that may be installed here: configuration, state, ports and munge's key and socket are its
own. Every process that it or its jobs start carries SLURM_CONF with our path, by which `stop` finds and ends them.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
CONFIGURATION = """
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
SlurmdTimeout=6
KillWait=10
OverTimeLimit=0
MinJobAge=3600
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs=64 RealMemory=4000 Gres=gpu:2
PartitionName=main Nodes=n[0-3] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=fragile Nodes=n[4-6] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=cheap Nodes=n[7-8] MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=doomed Nodes=n[9-11] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=n[7-8] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs of SLURM and munge that are not installed here (they may lie in sbin, outside PATH)."""
    return [name for name in PROGRAMS if _program(name) is None]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin:/usr/local/sbin")


class Slurm:
    """`start`, use `environment` for every client command, `stop`.

    Nodes n0 to n3 are for whoever comes, n4 to n6 (partition fragile) and n9 to n11 (doomed) for tests that kill one,
    n7 and n8 for one that is preempted: partition urgent takes them from partition cheap.
    """

    def __init__(self, folder: Path):
        self.folder, self.nodes = folder, [f"n{i}" for i in range(12)]
        self.conf = folder / "slurm.conf"
        self._processes: dict[str, subprocess.Popen] = {}
        self._stopping = threading.Event()
        self._hurrying = threading.Thread(target=self._hurry, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        """Start all daemons and wait until every node is idle. RuntimeError, with the logs' ends, when it is not."""
        (self.folder / "state").mkdir(parents=True)
        ports = _free_port_range(1 + len(self.nodes))
        last = len(self.nodes) - 1
        values = {
            "host": socket.gethostname().split(".")[0], "user": pwd.getpwuid(os.getuid()).pw_name,
            "folder": self.folder, "port": ports, "nodes": f"n[0-{last}]",
            "node_ports": f"[{ports + 1}-{ports + 1 + last}]",
        }  # fmt: skip
        self.conf.write_text(CONFIGURATION.format(**values))
        (self.folder / "gres.conf").write_text(f"NodeName=n[0-{last}] Name=gpu File=/dev/null,/dev/zero\n")
        self._start_munge()
        self._run("slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self._wait_until_idle()
        self._hurrying.start()

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self._run("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """As when its power fails: the daemon and all that runs on the node end at once."""
        self._processes[node].kill()
        self._processes[node].wait()
        mark = f"SLURMD_NODENAME={node}".encode()
        _kill([*self._step_daemons(node), *(pid for pid, variables in self.processes() if mark in variables)])

    def stop(self) -> None:
        """End every process. AssertionError if one is left."""
        self._stopping.set()
        if self._hurrying.is_alive():
            self._hurrying.join()
        for process in self._processes.values():
            process.kill()
            process.wait()
        deadline = time.monotonic() + 10
        while (left := [*self._step_daemons(), *(pid for pid, _ in self.processes())]) and time.monotonic() < deadline:
            _kill(left)
            time.sleep(0.05)
        assert not left, f"processes {left} could not be ended"

    def call(self, *command: object, check: bool = True) -> str:
        """Standard output of a client command."""
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=self.environment, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout if check else done.stdout + done.stderr

    def _hurry(self) -> None:
        """SLURM lets a requeued job wait for two minutes; here two seconds, the least that it survives, will do."""
        while not self._stopping.wait(0.3):
            with contextlib.suppress(subprocess.TimeoutExpired):
                waiting = self.call("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r %S", check=False)
                for job, start in re.findall(r"^(\S+) BeginTime (\d\S+)$", waiting, re.MULTILINE):
                    if datetime.fromisoformat(start).timestamp() > time.time() + 10:
                        self.call("scontrol", "update", f"JobId={job}", "StartTime=now+2", check=False)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._run(
            "munged", "--foreground", f"--key-file={key}", f"--socket={folder}/socket", f"--pid-file={folder}/pid",
            f"--log-file={folder}/log", f"--seed-file={folder}/seed", "--force",
        )  # fmt: skip

    def _run(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = _program(program)
        assert path is not None, program
        with open(self.folder / f"{name or program}.out", "a") as log:
            self._processes[name or program] = subprocess.Popen(
                [path, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def _wait_until_idle(self) -> None:
        deadline, states = time.monotonic() + 60, ""
        while time.monotonic() < deadline:
            states = self.call("sinfo", "-h", "-N", "-o", "%N=%t", check=False)
            if set(states.split()) == {f"{node}=idle" for node in self.nodes}:
                return
            time.sleep(0.1)
        logs = "".join(f"\n{p.name}:\n{p.read_text()[-1500:]}" for p in sorted(self.folder.glob("*.out")))
        raise RuntimeError(f"the nodes are not idle but {states!r}{logs}")

    def processes(self) -> list[tuple[int, list[bytes]]]:
        """(process id, environment) of every process that has our SLURM_CONF, besides this one."""
        mark, found = f"SLURM_CONF={self.conf}".encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if mark in variables and int(folder.name) != os.getpid():
                    found.append((int(folder.name), variables))
        return found

    def _step_daemons(self, node: str = "*") -> list[int]:
        """slurmstepd overwrites its environment; what it has open tells whose it is."""
        logs, found = {str(path) for path in self.folder.glob(f"slurmd-{node}.log")}, []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (folder / "comm").read_text().startswith("slurmstepd"):
                    found += [int(folder.name)] * any(os.readlink(link) in logs for link in (folder / "fd").iterdir())
        return found


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _free_port_range(count: int) -> int:
    """The first of `count` neighbouring TCP ports that nobody listens on, below those that outgoing connections use."""
    for first in range(21000 + os.getpid() % 5000, 32000, count):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError("no free ports")
