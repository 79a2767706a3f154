"""Run a function on W gloo ranks, in two lines:

    def check(rank, world_size): ...          # a top-level function; assert freely
    run(check, world_size=2)

Each rank is a process of its own with its own process group on a free loopback port. A rank that raises fails the test
with its traceback and the others are ended; a rank that hangs is ended after `timeout_seconds`, with the stacks of all.

Ranks are forked from one server, which has imported everything (rank_server.py) and dies with the tests. What forking
cannot show, such as ranks whose strings hash differently, the runs through `deepspeed` in test_train.py do.
"""

import atexit
import functools
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmpt import dist
from tests.rank_server import Job

NO_THREADS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""What keeps the server's libraries from starting any; jemalloc is pyarrow's allocator."""
PATIENCE_SECONDS = 1.0  # others may be about to report the same error


def run(function: Callable, world_size: int, *args: Any, timeout_seconds: float = 180.0) -> list[Any]:
    """Call function(rank, world_size, *args) on W ranks and return their results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        codes = Ranks(function, world_size, args, Path(folder), timeout_seconds).wait()
        assert codes == [0] * world_size, f"ranks ended with {codes}; a negative code or 1 without a report is a hang"
        return [torch.load(Path(folder) / f"result-{r}.pt", weights_only=False) for r in range(world_size)]


class Ranks:
    """Ranks that were started; others that are started before these have ended are the end of these.

    results: a folder for what they return. joined: whether they find themselves in a process group.
    """

    def __init__(
        self, function: Callable, world_size: int, args: tuple, results: Path, timeout_seconds: float,
        patience_seconds: float = PATIENCE_SECONDS, joined: bool = True,
    ):  # fmt: skip
        self._results, self._codes = results, None
        call = pickle.dumps((function, args))
        job = Job(
            tuple(sys.path), dict(os.environ), os.getcwd(), call, world_size, dist.free_port(), joined, str(results),
            timeout_seconds, patience_seconds,
        )  # fmt: skip
        self._server = _server()
        self.pids: list[int] = self._server.start(self, job)

    def running(self) -> bool:
        return self._codes is None and not self._server.has_answered()

    def wait(self) -> list[int]:
        """Their exit codes. AssertionError with the traceback of all that raised."""
        if self._codes is None:
            self._codes = self._server.answer()
        errors = sorted(self._results.glob("error-*.txt"))
        if errors:
            raise AssertionError("\n".join(f"--- {error.stem}\n{error.read_text()}" for error in errors))
        return self._codes


class _Server:
    """Its process, which ends when the line to it is cut: by us, or by our death."""

    def __init__(self) -> None:
        self._line, theirs = multiprocessing.Pipe()
        self._ranks: Ranks | None = None
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.rank_server", str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                cwd=Path(__file__).parents[1], env=os.environ | NO_THREADS,
                start_new_session=True,  # an interrupt from the keyboard is for us alone
            )  # fmt: skip

    def start(self, ranks: Ranks, job: Job) -> list[int]:
        left, self._ranks = self._ranks, ranks
        self._line.send(job)
        if left is not None and left._codes is None:
            left._codes = self.answer()
        return self.answer()

    def has_answered(self) -> bool:
        return self._line.poll()

    def answer(self) -> list[int]:
        try:
            return self._line.recv()
        except BaseException:  # it is dead, or will answer what nobody asks any more
            _server.cache_clear()
            self.end()
            raise

    def end(self) -> None:
        self._line.close()
        self._process.wait(30)


@functools.cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.end)
    return server
