"""A checkout whose train.py is the stub, launched as a user would: `mmpt-launch` in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.living import running

ROOT = Path(__file__).parents[2]
LOCAL = "executor: local\nranks_per_node: 2\ngpu_request: ''\nruns: runs\n"


class Checkout:
    """`home` holds the packages, mine.yaml and runs/; commands run there."""

    def __init__(self, home: Path):
        self.home = home
        shutil.copytree(ROOT / "launcher", home / "launcher", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "cluster_configs", home / "cluster_configs")
        (home / "mmpt").mkdir()
        shutil.copyfile(Path(__file__).with_name("stub_train.py"), home / "mmpt/train.py")
        (home / "mine.yaml").write_text(LOCAL)
        self.environment = os.environ | {"PYTHONPATH": str(home)}

    def popen(self, *words: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *map(str, words)], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def call(self, *words: object, status: int = 0) -> str:
        """Standard output, and standard error after it."""
        process = self.popen(*words)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, out + err
        return out + err

    def train(self, name: str, *flags: object, steps: int = 12, do: str = "") -> list[object]:
        """The words of a launch with mine.yaml."""
        stub = ["--recipe", "stub", "--stub.steps", steps, "--stub.do", do]
        return ["mine.yaml", "--name", name, *flags, "--", *stub]

    def stop(self) -> None:
        """Supervisors end their ranks when they are told to."""
        for path in self.home.glob("runs/**/supervisor.json"):
            pid = json.loads(path.read_text())["pid"]
            if running(pid):
                os.kill(pid, signal.SIGTERM)
                wait_for(lambda pid=pid: not running(pid))


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    made = Checkout(tmp_path / "home")
    yield made
    made.stop()


def wait_for(condition: Callable[[], object], timeout_seconds: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
