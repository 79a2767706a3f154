"""Before anything is built: is every node fit to train, and does the run directory take what a run writes?

A node that is not would otherwise cost a crash hours later, or be right in all but a few numbers. Checked are free
memory and shared memory, a matrix product and an all-reduce against their known results, and that the run directory
has room and gives back what was written.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from mmpt import dist
from mmpt.failure import UnfitNode

MEMORY_BYTES_PER_RANK = 512 << 20
SHARED_MEMORY_BYTES_PER_RANK = 16 << 20
DEVICE_MEMORY_SHARE = 0.5
"""Of a GPU's memory, this much must be free: less, and a process that should be gone still holds it."""
WRITTEN_BYTES = 1 << 20
SPARE_BYTES = 64 << 20
REDUCED_ELEMENTS = 1 << 20


class Problem(NamedTuple):
    """What is wrong on one rank's node. storage: with the run directory, as that node sees it."""

    node: str
    reason: str
    storage: bool = False


def preflight(run_dir: Path, device: torch.device) -> list[Problem]:
    """Every problem of every node, the same list on all ranks; makes the run directory. Collective."""
    node, local = dist.node_name(), int(os.environ.get("LOCAL_RANK", "0"))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    reasons = [matmul_fault(device), all_reduce_fault(device)]
    if device.type == "cuda":
        reasons.append(device_memory_fault(*torch.cuda.mem_get_info(device)))
    if local == 0:
        reasons.append(memory_fault(available_memory_bytes(), local_ranks))
        reasons.append(shared_memory_fault(Path("/dev/shm"), local_ranks))
    found = [Problem(node, reason) for reason in reasons if reason]
    if local == 0 and (reason := storage_fault(run_dir, dist.rank())):
        found.append(Problem(node, reason, storage=True))
    return [problem for problems in dist.gather_objects(found) for problem in problems]


def raise_for(problems: list[Problem], nodes: set[str]) -> None:
    """OSError where all nodes have trouble with the run directory, which is then no node's fault; UnfitNode for any
    other problem, naming the nodes. nodes: all of them."""
    if nodes == {problem.node for problem in problems if problem.storage}:
        raise OSError(next(problem.reason for problem in problems if problem.storage))
    unfit = {problem.node: problem.reason for problem in reversed(problems)}
    if unfit:
        told = "; ".join(f"node {node}: {reason}" for node, reason in sorted(unfit.items())[:8])
        raise UnfitNode(f"{len(unfit)} of {len(nodes)} nodes cannot train: {told}", here=dist.node_name() in unfit)


def matmul_fault(device: torch.device, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> str:
    """A product of small integers, exact in fp32 and TF32, against A (B v) in fp64: one wrong bit shows (Freivalds)."""
    size, repeats = (4096, 4) if device.type == "cuda" else (256, 1)
    i = torch.arange(size, device=device)
    a = ((7 * i[:, None] + 3 * i[None, :]) % 13 - 6).float()
    b = ((5 * i[:, None] + 11 * i[None, :]) % 15 - 7).float()
    v = ((i % 9) + 1).double()
    wanted = a.double() @ (b.double() @ v)
    for _ in range(repeats):
        wrong = int((multiply(a, b).double() @ v != wanted).sum())
        if wrong:
            return f"{device}: {wrong} of {size} rows of a matrix product are wrong"
    return ""


def all_reduce_fault(device: torch.device) -> str:
    """The sum over ranks of integers that stay exact in fp32 for thousands of ranks."""
    pattern = (torch.arange(REDUCED_ELEMENTS, device=device) % 251).float()
    found = dist.sum_over_ranks(pattern * (dist.rank() % 8 + 1))
    wrong = int((found != pattern * sum(rank % 8 + 1 for rank in range(dist.world_size()))).sum())
    return f"{device}: {wrong} of {REDUCED_ELEMENTS} numbers of an all-reduce are wrong" if wrong else ""


def device_memory_fault(free_bytes: int, total_bytes: int) -> str:
    if free_bytes < DEVICE_MEMORY_SHARE * total_bytes:
        return (
            f"GPU {torch.cuda.current_device()} has {free_bytes >> 20} of {total_bytes >> 20} MiB free: another "
            "process holds the rest"
        )
    return ""


def memory_fault(available_bytes: int, local_ranks: int) -> str:
    needed = MEMORY_BYTES_PER_RANK * local_ranks
    if available_bytes < needed:
        return f"{available_bytes >> 20} MiB of memory are free, {local_ranks} ranks need at least {needed >> 20}"
    return ""


def available_memory_bytes() -> int:
    """Of the machine, or of our control group where that is less."""
    available = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    own = [line.split("::", 1)[1].strip("/\n") for line in _lines(Path("/proc/self/cgroup")) if "::" in line]
    for folder in [group / name for name in own] + [group]:
        limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
        if limit and used and limit[0].strip().isdecimal():
            cached = [line.split()[1] for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
            available = min(available, int(limit[0]) - int(used[0]) + int(cached[0] if cached else 0))
    return max(available, 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def shared_memory_fault(folder: Path, local_ranks: int) -> str:
    """Data workers hand their batches over in it; containers come with 64 MB of it, or less."""
    if not folder.is_dir():
        return ""
    free, needed = shutil.disk_usage(folder).free, SHARED_MEMORY_BYTES_PER_RANK * local_ranks
    return f"{folder} has {free >> 20} MiB free, the data workers need {needed >> 20}" if free < needed else ""


def storage_fault(run_dir: Path, rank: int) -> str:
    """Write, sync, read back; and room for one more checkpoint as large as the newest."""
    path, data = run_dir / f".preflight-{rank}", os.urandom(WRITTEN_BYTES)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if path.read_bytes() != data:
                return f"{run_dir} does not give back what was written"
        finally:
            path.unlink(missing_ok=True)
        newest = max((run_dir / "checkpoints").glob("step-*"), default=None)
        needed = SPARE_BYTES + sum(file.stat().st_size for file in newest.iterdir()) if newest else SPARE_BYTES
        free = shutil.disk_usage(run_dir).free
    except OSError as error:
        return f"{run_dir} cannot be written: {error.strerror} ({error.filename or path})"
    return f"{run_dir} has {free >> 20} MiB free, a checkpoint needs {needed >> 20}" if free < needed else ""
