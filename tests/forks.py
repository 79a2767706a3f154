"""Real programs on W ranks in a second: they are forked from a process that has imported everything (ranks.py).

    run = forks.start(["--recipe", "filip.demo", ...], ranks=2)          # of train.py
    os.kill(run.pids[1], signal.SIGTERM)
    assert run.wait() == [75, 75], run.output()

    done = call("mmpt.cli", ["eval", ...])
    assert done.returncode == 0, done.stdout + done.stderr

Each rank is a process of its own session that calls the program's main and ends with its status, as `python
mmpt/train.py` does; importing torch, DeepSpeed and transformers, nine seconds each time, is all that is left out. What
the real launcher and a fresh interpreter add is for the tests in test_train.py that start those.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tests.ranks import PATIENCE_SECONDS, Ranks

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


class Request(NamedTuple):
    module: str
    arguments: list[str]
    folder: str
    """For its output."""
    environments: Sequence[Mapping[str, str]]
    """What each rank finds in its own."""
    largest_file: Mapping[int, int]
    """{rank: bytes}: it can write no more than that to a file, as on a full disk."""
    keys: str
    """A folder for what each rank trained on, a line [positions, keys] per step in rank-R.jsonl; or nothing."""


class Run:
    """A program that was started; another that is started before it has ended is its end. pids: of its ranks."""

    def __init__(
        self, module: str, arguments: Sequence[Any], ranks: int, patience_seconds: float = math.inf,
        environments: Sequence[Mapping[str, str]] = (), largest_file: Mapping[int, int] | None = None, keys: str = "",
    ):  # fmt: skip
        self._folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self._folder)
        for stream in ("stdout", "stderr"):
            (self._folder / stream).touch()
        words = [str(argument) for argument in arguments]
        request = Request(module, words, str(self._folder), environments, largest_file or {}, keys)
        self._ranks = Ranks(become, ranks, (request,), self._folder, 3600.0, patience_seconds, joined=False)
        self.pids = self._ranks.pids

    def wait(self, timeout_seconds: float = 120) -> list[int]:
        """The exit statuses of the ranks; minus the signal for one that was killed."""
        deadline = time.monotonic() + timeout_seconds
        while self.running():
            if time.monotonic() > deadline:
                for pid in self.pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout_seconds} s:\n{self.output()}")
            time.sleep(0.005)
        return self._ranks.wait()

    def running(self) -> bool:
        return self._ranks.running()

    def read(self, stream: str) -> str:
        return (self._folder / stream).read_text()

    def output(self) -> str:
        return self.read("stdout") + self.read("stderr")


class Forks:
    def start(
        self, arguments: Sequence[Any], ranks: int = 2, largest_file: dict[int, int] | None = None,
        rank_environment: Sequence[dict[str, str]] = (), keys: Path | None = None,
    ) -> Run:  # fmt: skip
        """Start train.py; see `Request`."""
        return Run(
            "mmpt.train", arguments, ranks, environments=rank_environment, largest_file=largest_file,
            keys=str(keys or ""),
        )  # fmt: skip


def call(module: str, arguments: Sequence[Any], ranks: int = 1) -> subprocess.CompletedProcess:
    """With the output of all ranks, and the status of one that failed, if any did; it ends the others soon, as the
    launcher has it."""
    run = Run(module, arguments, ranks, PATIENCE_SECONDS)
    codes = run.wait(300)
    return subprocess.CompletedProcess(
        list(arguments), max(codes) or min(codes), run.read("stdout"), run.read("stderr")
    )


def become(rank: int, world_size: int, request: Request) -> NoReturn:
    """Be a rank of the program, in a process that was forked for it."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request.folder) / name, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(ENVIRONMENT)
    os.environ.update(request.environments[rank] if request.environments else {})
    if (limit := request.largest_file.get(rank)) is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request.keys:
        note_keys(Path(request.keys), rank)
    status = 1
    try:
        status = importlib.import_module(request.module).main(request.arguments)
    except SystemExit as leaving:
        status = leaving.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def note_keys(folder: Path, rank: int) -> None:
    """From now on every step of this process is written down when it is done."""
    from mmpt import train

    original, path = train.train_step, folder / f"rank-{rank}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)

    def noting(engine: Any, micro_batches: list, *arguments: Any) -> Any:
        result = original(engine, micro_batches, *arguments)
        positions = [int(position) for batch in micro_batches for position in batch.positions]
        keys = [key for batch in micro_batches for key in batch.keys]
        with open(path, "a") as file:
            file.write("\n" + json.dumps([positions, keys]) + "\n")  # ends what a killed one left unfinished
        return result

    train.train_step = noting
