"""The process that ranks are forked from: `python -m tests.rank_server FILE_DESCRIPTOR`; see ranks.py.

It imports what ranks need, once, and never computes: a process with threads (of OpenMP, of gloo) must not be forked.
"""

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmpt import dist

# Not only what is imported at once: these import most of what a step of training does.
PRELOAD = (
    "mmpt.train", "mmpt.cli", "pytest", "setuptools", "distutils.sysconfig", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer", "transformers.models.auto.tokenization_auto",
)  # fmt: skip
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class Job(NamedTuple):
    path: tuple[str, ...]
    environment: dict[str, str]
    working_folder: str
    call: bytes
    """The pickled function and its arguments, whose modules can be imported only with the right path."""
    world_size: int
    port: int
    joined: bool
    """Whether the ranks are a process group when the function is called."""
    results: str
    """Folder for what ranks return or raise."""
    timeout_seconds: float
    patience_seconds: float
    """How long ranks may go on when one has failed."""


def main(line: Connection) -> None:
    """Answer each job with the process ids of its ranks and then their exit codes, until nobody is at the other end."""
    for module in PRELOAD:
        importlib.import_module(module)
    while True:
        try:
            job: Job = line.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            ranks = start(job)
        except Exception:
            (Path(job.results) / "error-server.txt").write_text(traceback.format_exc())
            ranks = []
        line.send([rank.pid for rank in ranks])
        line.send(await_all(ranks, job, line))


def start(job: Job) -> list:
    sys.path[:] = job.path
    function, args = pickle.loads(job.call)  # noqa: S301
    assert threads() == 1, "an import has started threads, with which a process must not be forked"
    gc.freeze()  # or every collection of every rank would look through, and copy, all that is imported here
    context = get_context("fork")
    ranks = [context.Process(target=be, args=(rank, function, args, job)) for rank in range(job.world_size)]
    for rank in ranks:
        rank.start()
    return ranks


def await_all(ranks: list, job: Job, line: Connection) -> list[int]:
    """Their exit codes. They are ended when they take too long, when one fails, and when somebody else is waited for,
    or nobody."""
    deadline, failed = time.monotonic() + job.timeout_seconds, False
    try:
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
            if line.poll(0.01):
                break
            if not failed and any(rank.exitcode for rank in ranks):
                failed, deadline = True, min(deadline, time.monotonic() + job.patience_seconds)
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
    return [rank.exitcode for rank in ranks]


def threads() -> int:
    """Of this process, where the system tells; of Python elsewhere."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def be(rank: int, function: Callable, args: tuple, job: Job) -> None:
    """Be a rank, and leave."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    os.chdir(job.working_folder)
    os.environ.clear()
    os.environ.update(job.environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world_size), LOCAL_SIZE=str(job.world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job.port), DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    faulthandler.dump_traceback_later(job.timeout_seconds * 0.9, exit=True)
    torch.set_num_threads(1)
    np.random.seed()  # noqa: NPY002  # or all ranks would draw alike, which they do not elsewhere
    try:
        if job.joined:
            dist.init(job.timeout_seconds)
        result = function(rank, job.world_size, *args)
        torch.save(result, Path(job.results) / f"result-{rank}.pt")
        dist.shutdown()
    except BaseException:
        (Path(job.results) / f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stdout.flush()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # library threads still running at interpreter exit abort a rank now and then


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
    os._exit(0)  # without the goodbyes of what was imported
