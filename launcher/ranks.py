"""Who a task of SLURM's is among the ranks of a run, from SLURM's variables; nothing but the standard library.

    srun --ntasks-per-node=8 python -m launcher.ranks -- python mmpt/train.py --recipe filip.vit_l14

becomes the command (exec), so that signals reach it directly, with RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
LOCAL_SIZE (as DeepSpeed calls it), MASTER_ADDR and MASTER_PORT. `deepspeed --launcher slurm` sets none of them.
"""

import os
import re
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence

PORTS = range(20_000, 32_000)
"""Below the ports that outgoing connections take (/proc/sys/net/ipv4/ip_local_port_range)."""
CLIENT_TIMEOUT_SECONDS = 30.0


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables of this task. ValueError where SLURM's are missing or the first node has no address."""
    world_size = _needed(slurm, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    tasks = tasks_per_node(_needed(slurm, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    local_size = str(tasks[int(_needed(slurm, "SLURM_NODEID"))])
    hosts = host_names(_needed(slurm, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    return {
        "RANK": _needed(slurm, "SLURM_PROCID"),
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": _needed(slurm, "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": local_size,
        "LOCAL_SIZE": local_size,
        "MASTER_ADDR": address_of(hosts[0]),
        "MASTER_PORT": str(port_of(_needed(slurm, "SLURM_JOB_ID"), int(slurm.get("SLURM_RESTART_COUNT") or 0))),
    }


def port_of(job: str, restarts: int) -> int:
    """The same on every rank without a word between them; another after a restart, when the old one may linger."""
    return PORTS[zlib.crc32(f"{job}.{restarts}".encode()) % len(PORTS)]


def free_port() -> int:
    """One of this machine that nobody listens on at this moment, for ranks that all run here."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def tasks_per_node(text: str) -> list[int]:
    """`8(x63),4` -> sixty-three times 8, then 4."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM's tasks per node, {text!r}, cannot be read")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def host_names(text: str) -> list[str]:
    """The hosts of a SLURM list such as `gpu[001-003,7],login1`: scontrol's answer, or our own where it has none."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", text], capture_output=True, text=True, timeout=CLIENT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return expand(text)
    names = done.stdout.split()  # a list that it cannot read it repeats, with status 0
    return names if names and all(re.fullmatch(r"[\w.-]+", name) for name in names) else expand(text)


def expand(text: str) -> list[str]:
    """`pre[1-3,07]suf,x` -> pre1suf pre2suf pre3suf pre07suf x. Several brackets multiply; zeros in front are kept."""
    names: list[str] = []
    part, position = [""], 0
    for match in re.finditer(r"([^,\[\]\s]+)|\[([\d,-]+)\]|,", text):
        if match.start() != position:
            break
        position = match.end()
        if match[0] == ",":
            names, part = names + part, [""]
        else:
            endings = [match[1]] if match[1] else [n for item in match[2].split(",") for n in _numbers(item, text)]
            part = [start + ending for start in part for ending in endings]
    names += part
    if position != len(text) or not all(names):
        raise ValueError(f"SLURM's node list {text!r} cannot be read")
    return names


def _numbers(item: str, text: str) -> list[str]:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
    first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
    if int(last) < int(first):
        raise ValueError(f"SLURM's node list {text!r} cannot be read")
    return [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]


def address_of(host: str) -> str:
    """The host's name if it resolves here, else the address that SLURM knows it by. ValueError if neither is known."""
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", host],
            capture_output=True, text=True, timeout=CLIENT_TIMEOUT_SECONDS,
        )  # fmt: skip
        match = re.search(r"\bNodeAddr=(\S+)", done.stdout)
        if match:
            socket.getaddrinfo(match[1], None)
            return match[1]
    except (OSError, subprocess.TimeoutExpired):
        pass
    raise ValueError(f"the address of node {host!r}, where rank 0 runs, is unknown here: neither DNS nor SLURM has one")


def _needed(slurm: Mapping[str, str], *names: str) -> str:
    for name in names:
        if slurm.get(name):
            return slurm[name]
    raise ValueError(
        f"{names[-1]} is not set: this is not a task of srun; use `srun ... python -m launcher.ranks -- ...`"
    )


def main(arguments: Sequence[str]) -> int:
    """Become the command; 2 where that is impossible."""
    command = list(arguments)[1:] if list(arguments)[:1] == ["--"] else list(arguments)
    try:
        if not command:
            raise ValueError("a command is needed after --")
        environment = rank_environment(os.environ)
        os.execvpe(command[0], command, os.environ | environment)
    except (ValueError, OSError) as error:
        print(f"launcher.ranks: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
