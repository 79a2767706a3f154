"""Real runs of train.py on W gloo ranks in two seconds: a process that has imported everything forks the ranks.

    with Forks() as forks:
        run = forks.start(["--recipe", "filip.demo", ...], ranks=2)
        os.kill(run.pids[1], signal.SIGTERM)
        assert run.wait() == [75, 75]

Each rank is a process of its own session that calls train.main and ends with its status, as `python mmpt/train.py`
does; importing torch, DeepSpeed and transformers, nine seconds each time, is all that is left out.
"""

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from mmpt import dist

ROOT = Path(__file__).parents[1]


class Run:
    """A run that was started. pids: of its ranks."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.pids: list[int] = json.loads(self._await("pids.json", 60))

    def _await(self, name: str, timeout_seconds: float) -> str:
        path, deadline = self._folder / name, time.monotonic() + timeout_seconds
        while not path.exists():
            if time.monotonic() > deadline:
                for pid in getattr(self, "pids", ()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"no end after {timeout_seconds} s:\n{self.output()}")
            time.sleep(0.005)
        return path.read_text()

    def wait(self, timeout_seconds: float = 120) -> list[int]:
        """The exit statuses of the ranks; minus the signal for one that was killed."""
        return json.loads(self._await("statuses.json", timeout_seconds))

    def running(self) -> bool:
        return not (self._folder / "statuses.json").exists()

    def output(self) -> str:
        path = self._folder / "output.txt"
        return path.read_text() if path.exists() else ""


class Forks:
    """The process that forks. environment: for it and all ranks."""

    def __init__(self, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._runs = 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"], stdin=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def start(
        self, arguments: Sequence[Any], ranks: int = 2, largest_file: dict[int, int] | None = None,
        environment: dict[str, str] | None = None, rank_environment: Sequence[dict[str, str]] = (),
        keys: Path | None = None,
    ) -> Run:  # fmt: skip
        """largest_file: {rank: bytes}: it can write no more than that to a file, as on a full disk. keys: a folder for
        what each rank trained on: a line [positions, keys] per step in rank-R.jsonl."""
        folder = Path(self._folder.name) / str(self._runs)
        folder.mkdir()
        self._runs += 1
        request = {
            "folder": str(folder), "arguments": [str(a) for a in arguments], "ranks": ranks, "port": dist.free_port(),
            "largest_file": largest_file or {}, "environment": environment or {},
            "rank_environment": list(rank_environment), "keys": str(keys or ""),
        }  # fmt: skip
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Run(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.kill()
        self._server.wait()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._folder.cleanup()


def rank_process(request: dict, rank: int) -> None:
    from mmpt import train

    output = os.open(Path(request["folder"]) / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setsid()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]), LOCAL_SIZE=str(request["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]), **request["environment"],
    )  # fmt: skip
    os.environ.update(dict(enumerate(request["rank_environment"])).get(rank, {}))
    limit = request["largest_file"].get(str(rank))
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if request["keys"]:
        note_keys(Path(request["keys"]), rank)
    status = 1
    try:
        status = train.main(request["arguments"])
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


def run_process(request: dict) -> None:
    """Fork the ranks, tell their pids, await them, tell their statuses."""
    folder, pids = Path(request["folder"]), []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            rank_process(request, rank)
        pids.append(pid)
    for name, values in (
        ("pids.json", lambda: pids),
        ("statuses.json", lambda: [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]),
    ):
        (folder / ".tmp").write_text(json.dumps(values()))
        os.replace(folder / ".tmp", folder / name)
    os._exit(0)


def serve() -> None:
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    from mmpt import recipe, train  # noqa: F401

    recipe.names()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody awaits the processes that await the ranks
    while True:
        select.select([sys.stdin], [], [])
        line = sys.stdin.readline()
        if not line:
            return
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run_process(json.loads(line))


if __name__ == "__main__":
    serve()
