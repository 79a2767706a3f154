"""The runner of ranks: errors and hangs are shown, ranks know nothing of one another's past, nothing outlives us."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmpt import dist
from tests.forks import ROOT
from tests.ranks import run

SEEN: list[str] = []


def fails_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one has had enough")
    dist.barrier()


@pytest.mark.slow
def test_what_a_rank_raised_is_shown() -> None:
    with pytest.raises(AssertionError, match="rank one has had enough"):
        run(fails_on_one, 2, timeout_seconds=60)


def look_around(rank: int, world_size: int) -> tuple[list[str], str, str]:
    SEEN.append(os.environ.pop("MMPT_OF_A_TEST"))
    here = os.getcwd()
    os.chdir("/")
    return SEEN, here, dist.broadcast_object(f"from {rank}")


@pytest.mark.slow
def test_a_rank_is_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has our environment and folder of the moment, and what an earlier one did is not so in it."""
    monkeypatch.chdir(tmp_path)
    for value in ("a", "b"):
        monkeypatch.setenv("MMPT_OF_A_TEST", value)
        assert run(look_around, 2) == [([value], str(tmp_path), "from 0")] * 2
    assert SEEN == []


def hang(rank: int, world_size: int) -> None:
    time.sleep(1000)


def tell_and_stay(rank: int, world_size: int, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(1000)


PROGRAM = """
import sys
from tests.ranks import run
from tests.test_ranks import hang, tell_and_stay
try:
    run(hang, 2, timeout_seconds=3)
except AssertionError as error:
    print(error, flush=True)
run(tell_and_stay, 2, sys.argv[1])
"""


@pytest.mark.slow
def test_a_hang_ends_with_all_stacks_and_ranks_die_with_the_tests(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    tests = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    tests.send_signal(signal.SIGKILL)
    output, stacks = tests.communicate(timeout=60)  # returns when nobody holds the other end any more
    assert "ranks ended with [1, 1]" in output and stacks.count("in hang") == stacks.count("Timeout") == 2
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
